"""One decoding step on a GPU, recorded as a CUDA graph and replayed: launching its hundreds of small kernels one by one
takes longer than they do (pytorch.org/blog/accelerating-pytorch-with-cuda-graphs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miaobi.console import warn
from miaobi.generate.eager_step import EagerStep
from miaobi.model.transformer import Block, KVCache, Transformer, as_rows, keys_and_values

ALIGNED = 16
"""Attention copies a mask whose rows do not begin at multiples of this, in every layer."""


@dataclass
class Recorded:
    """A step of a fixed number of rows, whose tensors stay where they are."""

    ids: Tensor
    position_ids: Tensor
    logits: Tensor
    replay: Callable[[], None]


class CudaStep:
    """A `Step` (see step.py), recorded when it is first needed: one for each power of two of rows, so that few serve
    all.

    Attributes:
        ready: false once a step could not be recorded; nothing is tried again then.
    """

    can_verify = False
    is_exact = False
    cache_dtype = None

    def __init__(self, model: Transformer) -> None:
        self.model, self.ready, self.eager = model, True, EagerStep(model)
        self.recorded: dict[int, Recorded] = {}
        self.keys: Tensor | None = None  # of the caches into whose memory the recorded steps point, which must stay

    def rows(self, n: int, size: int) -> int:
        """How many of `size` rows a step of n writes to. Those beyond n get something at the caches' last position."""
        return min(size, 1 << (n - 1).bit_length())

    def __call__(self, tokens: Tensor, caches: list[KVCache], positions: list[int]) -> Tensor:
        """One token further: tokens (n, 1) go to `positions` of the first n rows. Returns logits (n, V), which the next
        call overwrites.
        """
        if not self.ready:
            return self.eager(tokens, caches, positions)
        n, (size, _, length, _) = len(tokens), caches[0].k.shape
        if self.keys is not caches[0].k:
            self.recorded.clear()
            self.keys = caches[0].k
        rows = self.rows(n, size)
        if rows not in self.recorded:
            try:
                self.recorded[rows] = self.record(rows, caches)
            except RuntimeError as e:
                self.ready = False
                warn(f"no CUDA graph here ({str(e).splitlines()[0]}); decoding without, which is slower")
                return self.eager(tokens, caches, positions)
        step = self.recorded[rows]
        step.ids[:n].copy_(tokens)
        step.position_ids.copy_(torch.tensor([*positions, *[length - 1] * (rows - n)]))
        step.replay()
        return step.logits[:n]

    def record(self, rows: int, caches: list[KVCache]) -> Recorded:
        """A step that looks at all positions of the caches behind a mask: no size in it depends on where a row is."""
        device, last = self.model.wte.weight.device, caches[0].k.shape[2] - 1
        ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        position_ids = torch.full((rows,), last, device=device)  # recording writes there, before any use
        part = [KVCache(cache.k[:rows], cache.v[:rows]) for cache in caches]
        return Recorded(ids, position_ids, *self.capture(lambda: decode(self.model, ids[:, 0], position_ids, part)))

    def capture(self, step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """What `step` returns, and what computes it anew into the same memory."""
        with torch.cuda.device(self.model.wte.weight.device):  # not the current one, which may be another
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                for _ in range(2):  # libraries allocate what they need the first time
                    step()
            torch.cuda.current_stream().wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            # its own choice is a stream of the first device ever used
            with torch.cuda.graph(graph, stream=side_stream):
                logits = step()
        return logits, graph.replay


def decode(model: Transformer, ids: Tensor, position_ids: Tensor, caches: list[KVCache]) -> Tensor:
    """What `model` gives for one token of each row, in few launches: ids (B,) go to position_ids (B,) of the caches,
    which are as `make_caches` gives them; a mask hides the positions behind. Returns logits (B, V).
    """
    B, S = len(ids), caches[0].k.shape[2]
    x, rope = model.embed(ids[:, None], position_ids[:, None])
    x = x[:, 0]
    hidden = torch.arange(-(-S // ALIGNED) * ALIGNED, device=ids.device) > position_ids[:, None]
    mask = torch.zeros_like(hidden, dtype=x.dtype).masked_fill_(hidden, -torch.inf)[:, None, None, :S]  # (B, 1, 1, S)
    angles = [None] * len(caches) if rope is None else zip(*turning(model, rope[:, :, 0, 0]), strict=True)
    at = torch.arange(B, device=ids.device), position_ids
    for block, cache, turn in zip(model.blocks, caches, angles, strict=True):
        x = decode_block(block, x, turn, mask, cache, at)
    return F.linear(model.norm(x), model.head_weight)


def turning(model: Transformer, rope: Tensor) -> tuple[Tensor, Tensor]:
    """What the heads of q and k, and the same with their halves exchanged, are multiplied by: (L, B, H + H_kv, D) each.

    rope: (2, B, D). The weights of QK-norm are in it, for all layers at once.
    """
    cos, sin = rope[:, None, :, None]  # (1, B, 1, D)
    half = rope.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
    attn = model.blocks[0].attn
    if attn.q_norm is None:
        shape = (len(model.blocks), *cos.shape[1:])
        return cos.expand(shape), sin.expand(shape)
    norms = torch.stack([norm.weight for block in model.blocks for norm in (block.attn.q_norm, block.attn.k_norm)])
    q, k = norms.view(-1, 1, 2, 1, norms.shape[-1]).unbind(2)  # (L, 1, 1, D)
    weight = torch.cat((q.expand(-1, -1, attn.n_head, -1), k.expand(-1, -1, attn.n_kv_head, -1)), dim=2)
    return weight * cos, weight.roll(half, -1) * sin


def decode_block(
    block: Block, x: Tensor, turn: tuple[Tensor, Tensor] | None, mask: Tensor, cache: KVCache, at: tuple[Tensor, Tensor]
) -> Tensor:
    """`block` of x (B, C). turn: this layer's `turning`. at: rows and positions (B,) of the cache to write to."""
    attn, mlp, B = block.attn, block.mlp, len(x)
    heads = attn.qkv(block.attn_norm(x)).view(B, -1, attn.head_dim)
    if turn is not None:
        # v's heads as well, in vain: a part of them would be copied first
        normed = heads if attn.q_norm is None else F.rms_norm(heads, heads.shape[-1:], None, attn.q_norm.eps)
        exchanged, both = normed.roll(attn.head_dim // 2, -1), slice(attn.n_head + attn.n_kv_head)
        torch.addcmul(normed[:, both] * turn[0], exchanged[:, both], turn[1], out=heads[:, both])
    keys_and_values([cache])[:, 0, at[0], :, at[1]] = heads[:, attn.n_head :].view(B, 2, attn.n_kv_head, attn.head_dim)
    q = as_rows(heads[:, : attn.n_head, None], attn.n_kv_head)
    y = F.scaled_dot_product_attention(q, cache.k, cache.v, mask)
    x = plus_linear(x, y.reshape(B, -1), attn.proj)
    y = mlp.up(block.mlp_norm(x))
    if mlp.gated:
        gate, up = y.chunk(2, dim=-1)
        return plus_linear(x, F.silu(gate) * up, mlp.down)
    return plus_linear(x, F.gelu(y, approximate=mlp.approximate), mlp.down)


def plus_linear(x: Tensor, y: Tensor, linear: nn.Linear) -> Tensor:
    """x + linear(y), in one launch where there is no bias. Adapters (`model/lora.py`) are other layers."""
    if type(linear) is nn.Linear and linear.bias is None:
        return torch.addmm(x, y, linear.weight.T)
    return x + linear(y)
