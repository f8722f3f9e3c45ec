"""One decoding step on the CPU, compiled: the weights stay in bfloat16 or int8 and are widened in registers.

PyTorch decodes at the speed of its calls, and on a CPU without bf16 units it multiplies bf16 matrices ~100 times
slower than fp32 ones. Decoding one stream does nothing but read every weight once, so fewer bytes are less time:
`cpu_step.cpp` does a whole step in one call (figures in docs/lab-notes.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from pathlib import Path

import torch
from torch import Tensor, nn

from miaobi import native
from miaobi.model.quantized import eight_bits
from miaobi.model.transformer import KVCache, Transformer, head_dim, intermediate_size

SOURCE = Path(__file__).with_name("cpu_step.cpp")
KINDS = ("float32", "bfloat16", "int8")  # in the order of cpu_step.cpp
LANES = 8  # floats in one vector of cpu_step.cpp
MOST_ROWS = 64  # of a panel, in any cpu_step.cpp


class Matrix(ctypes.Structure):
    """As in cpu_step.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "scale", "bias")]


class Layer(ctypes.Structure):
    """As in cpu_step.cpp."""

    _fields_ = [(name, Matrix) for name in ("qkv", "proj", "gate", "up", "down")] + [
        (name, ctypes.c_void_p)
        for name in ("attn_norm", "attn_norm_bias", "mlp_norm", "mlp_norm_bias", "q_norm", "k_norm")
    ]


class Model(ctypes.Structure):
    """As in cpu_step.cpp."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("layers", "heads", "kv_heads", "head_dim", "width", "inner", "vocab", "is_rms", "is_gated",
                     "is_tanh")
    ] + [("eps", ctypes.c_float), ("qk_eps", ctypes.c_float), ("head", Matrix)] + [
        (name, ctypes.c_void_p) for name in ("norm", "norm_bias", "rope")
    ] + [("block_size", ctypes.c_int64)]  # fmt: skip


def can_step(model: Transformer) -> bool:
    """Whether cpu_step.cpp can have this model: it takes whole vectors."""
    cfg = model.cfg
    return not any(width % LANES for width in (cfg.n_embd, head_dim(cfg), intermediate_size(cfg)))


def large_pages(size: int) -> Tensor:
    """`size` zero bytes in pages of 2 MB where Linux has them: a step walks through all of them, and with pages of 4 kB
    looking up their addresses took a quarter of its time.
    """
    memory = mmap.mmap(-1, max(1, size))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size]


class CpuStep:
    """A `Step` (see step.py): a model's weights as cpu_step.cpp reads them, and the call.

    The model's own matrices are rounded alike, so that its `forward` (prefill, scores, and steps until the library is
    there) computes with the same numbers.
    """

    can_verify = True
    can_draw = False
    is_exact = True

    @torch.no_grad()
    def __init__(self, model: Transformer, kind: str) -> None:
        """model: in fp32 on the CPU. kind: one of KINDS."""
        cfg, attn, mlp = model.cfg, model.blocks[0].attn, model.blocks[0].mlp
        self.model, self.kind = model, kind
        self.cache_dtype = torch.float32 if kind == "float32" else torch.bfloat16
        self.kept: list[Tensor] = []  # memory that the structures point to
        self.matrices: list[Tensor] = []  # (rows, K), in the type of `kind`
        self.is_arranged = False
        matrices = [p for p in model.parameters() if p.ndim == 2]
        self.free = large_pages(
            getattr(torch, kind).itemsize * sum((len(p) + 2 * MOST_ROWS) * p.shape[1] for p in matrices)
        )
        self.layers = (Layer * cfg.n_layer)(*(self.layer(block) for block in model.blocks))
        inner = intermediate_size(cfg)
        self.about = Model(
            cfg.n_layer, attn.n_head, attn.n_kv_head, attn.head_dim, cfg.n_embd, inner, cfg.vocab_size,
            isinstance(model.norm, nn.RMSNorm), mlp.gated, mlp.approximate == "tanh", model.norm.eps,
            attn.q_norm.eps if attn.q_norm is not None else 0.0, self.matrix(model.head_weight),
            *self.norm(model.norm), self.keep(model.rope), cfg.block_size,
        )  # fmt: skip
        heads = 2 * (attn.n_head + attn.n_kv_head)  # of q, k, v and of what they give
        self.per_stream, self.per_thread = heads * attn.head_dim + inner, cfg.block_size
        library()  # begin to build it now: the prompt is read in the meantime

    @property
    def ready(self) -> bool:
        """Whether the library is there."""
        return library() is not None

    def rows(self, n: int, size: int) -> int:
        """How many of `size` rows a step of n writes to: just those."""
        return n

    def keep(self, tensor: Tensor | None) -> int | None:
        """Address of a tensor, which then stays."""
        if tensor is None:
            return None
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()

    def matrix(self, weight: Tensor, bias: Tensor | None = None) -> Matrix:
        """A copy of a weight in large pages, with rows of zeros up to a whole panel; `weight` is rounded to it."""
        packed, scale = eight_bits(weight) if self.kind == "int8" else (weight, None)
        dtype, (rows, width) = getattr(torch, self.kind), weight.shape
        size = -(-rows // MOST_ROWS) * MOST_ROWS * width * dtype.itemsize
        memory, self.free = self.free[:size], self.free[size:]
        self.matrices.append(memory.view(dtype).view(-1, width))
        placed = self.matrices[-1][:rows].copy_(packed)
        if self.kind == "int8":
            torch.mul(placed, scale, out=weight)
        elif self.kind == "bfloat16":
            weight.copy_(placed)
        return Matrix(placed.data_ptr(), self.keep(scale), self.keep(bias))

    @torch.no_grad()
    def arrange(self, rows: int) -> None:
        """Bring the matrices into panels of so many rows, as the library reads them."""
        for matrix in self.matrices if rows > 1 else []:
            matrix.copy_(matrix.view(-1, rows, matrix.shape[1]).mT.reshape(matrix.shape))
        self.is_arranged = True

    def linear(self, linear: nn.Linear, parts: int = 1) -> list[Matrix]:
        """Pack a linear layer, cut into as many parts of equal height."""
        biases = [None] * parts if linear.bias is None else linear.bias.chunk(parts)
        return [self.matrix(w, b) for w, b in zip(linear.weight.chunk(parts), biases, strict=True)]

    def norm(self, norm: nn.Module | None) -> tuple[int | None, int | None]:
        """Addresses of a norm's weight and bias."""
        return self.keep(getattr(norm, "weight", None)), self.keep(getattr(norm, "bias", None))

    def layer(self, block: nn.Module) -> Layer:
        """Pack a block."""
        attn, mlp = block.attn, block.mlp
        gate_up = self.linear(mlp.up, 2) if mlp.gated else [Matrix(), *self.linear(mlp.up)]
        return Layer(*self.linear(attn.qkv), *self.linear(attn.proj), *gate_up, *self.linear(mlp.down),
                     *self.norm(block.attn_norm), *self.norm(block.mlp_norm),
                     self.norm(attn.q_norm)[0], self.norm(attn.k_norm)[0])  # fmt: skip

    def __call__(self, tokens: Tensor, caches: list[KVCache], positions: list[int]) -> Tensor:
        """One token further in the first B rows of the caches: tokens (B, 1) go to `positions`, behind what is there.
        Returns logits (B, V) float32.

        Needs `library()`, and caches as `make_caches` gives them: all layers one behind the other.
        """
        return self.call(tokens, caches, positions)

    def verify(self, tokens: Tensor, caches: list[KVCache], start: int, row: int = 0, unscored: int = 0) -> Tensor:
        """Several tokens (T, 1) of one row at once, from position `start` on; logits (T - unscored, V), none for the
        first `unscored`, equal those of T calls, bit for bit.
        """
        return self.call(tokens, caches, [*range(start, start + len(tokens))], row, unscored)

    def call(
        self, tokens: Tensor, caches: list[KVCache], positions: list[int], row: int | None = None, unscored: int = 0
    ) -> Tensor:
        """`miaobi_step` of cpu_step.cpp; row: all tokens are of this one, one behind the other."""
        if not self.is_arranged:
            self.arrange(library().miaobi_panel(KINDS.index(self.kind)))
        model, cache, B, first = self.model, caches[0], len(tokens), row or 0
        rows, _, S, _ = cache.k.shape
        position_ids = torch.tensor(positions)
        x = model.wte(tokens[:, 0]) if model.wpe is None else model.wte(tokens[:, 0]) + model.wpe(position_ids)
        x, logits = x.float().contiguous(), torch.empty(B - unscored, model.cfg.vocab_size)
        threads = torch.get_num_threads()
        scratch = torch.empty(B * self.per_stream + threads * (B * model.cfg.n_embd + self.per_thread))
        bf16_cache = cache.k.dtype == torch.bfloat16
        memory = (position_ids, cache.k[first:], cache.v[first:], x, logits, scratch)  # rows before that are untouched
        addresses = (ctypes.c_void_p(t.data_ptr()) for t in memory)
        library().miaobi_step(ctypes.byref(self.about), self.layers, KINDS.index(self.kind), bf16_cache,
                              row is not None, unscored, B, rows, S, *addresses, threads)  # fmt: skip
        return logits


def library() -> ctypes.CDLL | None:
    """The compiled step; None while or where there is none."""
    return native.library(SOURCE)
