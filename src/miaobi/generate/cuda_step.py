"""One decoding step on a GPU, recorded as a CUDA graph and replayed: launching its hundreds of small kernels one by one
takes longer than they do (pytorch.org/blog/accelerating-pytorch-with-cuda-graphs).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miaobi.console import warn
from miaobi.generate.eager_step import EagerStep
from miaobi.generate.memory import Memory, drawn_on
from miaobi.generate.sampling import Drawing, Kind
from miaobi.model.transformer import Block, KVCache, Transformer, as_rows, keys_and_values

ALIGNED = 16
"""Attention copies a mask whose rows do not begin at multiples of this, in every layer."""


SHORTEST = 64
"""Positions that attention looks at, at least; from there on by powers of two: reading all of 256 caches takes twenty
times as long as reading the weights of a small model."""
RESERVED = 256
"""Positions of caches, at least, where the block has as many."""


@dataclass
class Recorded:
    """A step of a fixed number of rows, whose tensors stay where they are: it computes logits (rows, V)."""

    logits: Tensor
    replay: Callable[[], None]
    draws: dict[Kind, Callable[[], None]] = field(default_factory=dict)
    """What draws from the logits, and has the next step go on from there; recorded when it is first needed."""


class CudaStep:
    """A `Step` (see step.py), recorded when it is first needed: one for each power of two of rows and of positions, so
    that few serve all. What is recorded points into memory, which is lent to one set of slots after the other.

    Attributes:
        ready: false once a step could not be recorded; nothing is tried again then.
    """

    can_verify = False
    is_exact = False
    can_draw = True
    cache_dtype = None

    def __init__(self, model: Transformer) -> None:
        self.model, self.ready, self.eager = model, True, EagerStep(model)
        self.recorded: dict[tuple[int, int], Recorded] = {}  # by rows, and positions that are looked at
        self.memory: Memory | None = None
        self.owner: weakref.ref | None = None

    def rows(self, n: int, size: int) -> int:
        """How many of `size` rows a step of n writes to. Those beyond n get something at the caches' last position."""
        return min(size, 1 << (n - 1).bit_length())

    def lend(self, owner: object, size: int, length: int) -> Memory:
        """Memory for `size` rows of `length` positions at least, its caches empty: that which was recorded for, where
        it has room and its last owner, who does not give it back, is gone.
        """
        had, block = self.memory, self.model.cfg.block_size
        is_free = self.owner is None or self.owner() is None
        if had is None or not is_free or had.seen.shape[0] < size or had.caches[0].k.shape[2] < length:
            length = min(block, max(RESERVED, 1 << (length - 1).bit_length()))
            self.use(Memory.make(self.model, self.model.make_caches(size, length)))
        else:
            keys_and_values(had.caches).zero_()
        self.owner = weakref.ref(owner)
        return self.memory

    def use(self, memory: Memory) -> None:
        """Work in `memory` from now on; what was recorded for another is let go."""
        self.recorded.clear()
        self.memory = memory

    def __call__(self, tokens: Tensor, caches: list[KVCache], positions: list[int]) -> Tensor:
        """One token further: tokens (n, 1) go to `positions` of the first n rows. Returns logits (n, V), which the next
        call overwrites.
        """
        memory, n = self.memory, len(positions)
        if memory is None or memory.caches is not caches:
            memory = Memory.make(self.model, caches)
        step = self.prepared(memory, positions)
        if step is None:
            return self.eager(tokens, caches, positions)
        rows = len(step.logits)
        memory.expected = None
        memory.ids[:n].copy_(tokens[:, 0])
        memory.positions[:rows].copy_(torch.tensor(memory.padded(positions, rows)))
        step.replay()
        return step.logits[:n]

    def draw(self, memory: Memory, tokens: list[int], positions: list[int], how: list[Drawing]) -> list[int]:
        """One token further, and what is drawn then for each row: -1 where logits are not finite. `seen` and `barred`
        of the memory count, and `seen` is brought up to date.

        Where a call goes on from the last one, the card has all it needs, and the host only asks what was drawn.
        """
        n, kind = len(positions), Kind.of(how, self.model.cfg.vocab_size)
        step = self.prepared(memory, positions, kind)
        if step is None:
            memory.put(tokens, positions, how, n)
            return self.read(drawn_on(memory, self.eager(memory.ids[:n, None], memory.caches, positions), kind))
        rows = len(step.logits)
        if memory.expected != (rows, tokens, positions, how):
            memory.put(tokens, positions, how, rows)
        step.replay()
        step.draws[kind]()
        ids = self.read(memory.drawn[:n])
        memory.expected = (rows, ids, [at + 1 for at in positions], [one._replace(count=one.count + 1) for one in how])
        return ids

    def read(self, ids: Tensor) -> list[int]:
        """The numbers on the card: the only wait for it."""
        return ids.tolist()

    def prepared(self, memory: Memory, positions: list[int], kind: Kind | None = None) -> Recorded | None:
        """The step for so many rows that look so far back, and what draws then; recorded now if need be. None where
        that cannot be done.
        """
        if memory is not self.memory:
            self.use(memory)
        size, _, length, _ = memory.caches[0].k.shape
        key = self.rows(len(positions), size), min(length, max(SHORTEST, 1 << max(positions).bit_length()))
        try:
            if self.ready and key not in self.recorded:
                self.recorded[key] = self.record(memory, *key)
            if self.ready and kind is not None and kind not in self.recorded[key].draws:
                self.record_draw(memory, self.recorded[key], kind)
        except RuntimeError as e:
            self.ready = False
            warn(f"no CUDA graph here ({str(e).splitlines()[0]}); decoding without, which is slower")
        return self.recorded[key] if self.ready else None

    def record(self, memory: Memory, rows: int, span: int) -> Recorded:
        """A step that looks at the first `span` positions of the caches behind a mask: no size in it depends on where a
        row is.
        """
        ids, positions, memory.expected = memory.ids[:rows], memory.positions[:rows], None
        positions.fill_(memory.caches[0].k.shape[2] - 1)  # recording writes there, before any use
        part = [KVCache(cache.k[:rows], cache.v[:rows]) for cache in memory.caches]
        return Recorded(*self.capture(lambda: decode(self.model, ids, positions, part, span)))

    def record_draw(self, memory: Memory, step: Recorded, kind: Kind) -> None:
        """Have a step draw too. What is drawn while recording has not been seen."""
        seen, memory.expected = memory.seen.clone(), None
        _, step.draws[kind] = self.capture(lambda: drawn_on(memory, step.logits, kind))
        memory.seen.copy_(seen)

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


def decode(
    model: Transformer, ids: Tensor, position_ids: Tensor, caches: list[KVCache], span: int | None = None
) -> Tensor:
    """What `model` gives for one token of each row, in few launches: ids (B,) go to position_ids (B,) of the caches,
    which are as `make_caches` gives them; a mask hides the positions behind. Returns logits (B, V).

    span: none of the rows is further than this; default, the caches' length.
    """
    B, S = len(ids), span or caches[0].k.shape[2]
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
    S = mask.shape[-1]
    y = F.scaled_dot_product_attention(q, cache.k[:, :, :S], cache.v[:, :, :S], mask)
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
