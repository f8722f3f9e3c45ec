"""Memory of a training step, by part, measured by running the step on tensors that have shapes and no values.

torch's FakeTensorMode runs the model, the loss and the optimizers as training does, while the bytes of living tensors
are counted operation by operation. So families, dropout, recomputation and kinds of attention need no formulas of their
own. Not included: rounding by the allocator, and savings by the compiler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from miaobi.config import OptimConfig
from miaobi.model import loss
from miaobi.model.config import LoraConfig, ModelConfig
from miaobi.model.lora import add_lora
from miaobi.model.transformer import Transformer, head_dim
from miaobi.train import orthogonal
from miaobi.train.layout import Objective
from miaobi.train.optimizer import make_optimizers

PROCESS = 307 << 20
"""Bytes of a run on a CPU besides its tensors: Python, torch and other libraries, the text while it is prepared."""
FRAGMENTS = 3.3, 0.1
"""Fragmentation of glibc's heap, as shares of `working` and of `activations`: freed memory between living tensors is
not reused. These and PROCESS were fitted to six runs of benchmarks/plan_memory.py, 4M to 9M parameters, torch 2.13; two
others were off by 6%. Larger runs were not measured."""
MAX_PROBES = 5
"""Steps that are run at most to find the largest micro-batch."""


@dataclass(frozen=True)
class StepSpec:
    """What a step computes."""

    shape: ModelConfig
    optim: OptimConfig
    lora: LoraConfig | None
    """If only adapters are trained."""
    device: str
    """cpu, cuda or mps."""
    dtype: torch.dtype
    """Of the matrix products."""
    micro: int
    """Sequences of a micro-batch."""
    pieces: int
    """Micro-batches of a step: from the second on, gradients are allocated already."""
    recompute: bool = False
    """activation_checkpointing."""
    documents: bool = False
    """Whether blocks hold several documents, separated by a mask (packed dialogues)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a step by part and at its peak; the bytes of a checkpoint and of generation come in addition."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments, Muon's momentum."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    working: int
    """Everything else that is alive at the peak: logits of a chunk of the loss, gradients of activations, Muon's
    products."""
    checkpoint: int
    """The copy that is written in the background: in the same memory on a CPU, else in the memory of the host."""
    kv_cache: int
    """Keys and values of one sequence of block_size tokens, for generation."""
    fragments: int
    """On a CPU, in addition: fragmentation of the heap."""
    peak: int
    """Most bytes of the step's tensors at any moment. The first five may add up to more: if a step is one micro-batch,
    gradients are allocated while activations are freed."""


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of living tensors, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.track, out)
        return out

    def track(self, tensor: Tensor) -> None:
        """Count the memory of a tensor until the last tensor that uses it is deleted."""
        storage = tensor.untyped_storage()
        if (key := id(storage)) not in self.known:
            self.known.add(key)
            self.now += (size := storage.nbytes())
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.freed, key, size)

    def freed(self, key: int, size: int) -> None:
        """Subtract memory that was freed."""
        self.known.discard(key)
        self.now -= size


class CudaDropout(TorchFunctionMode):
    """Dropout that saves a mask of one byte per value, as CUDA's kernel does; a CPU's saves four bytes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.dropout:
            return self.drop(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def drop(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """As `F.dropout`."""
        return torch.native_dropout(x, p, training)[0] if training and p else x


@functools.cache
def step_memory(work: StepSpec) -> Memory:
    """Memory of one step. Takes seconds, whatever the size."""
    on_cuda = CudaDropout() if work.device == "cuda" else contextlib.nullcontext()
    with FakeTensorMode(), MemoryTracker() as alive, chunks_of(work.device), on_cuda:
        objective = Objective(make_model(work))
        model = objective.model
        weights = alive.now
        optimizers = make_optimizers(model, work.optim, work.optim.optimizer)
        for p in model.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        gradients = alive.now - weights
        alive.peak = 0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            if work.pieces == 1:
                optimizer.zero_grad(set_to_none=True)
        optimizer = sum(
            value.untyped_storage().nbytes()
            for optimizer in optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        before, peak = alive.now, alive.peak
        alive.peak = 0
        kept = forward_backward(objective, work, alive) - before
        peak = max(peak, alive.peak)
    there = weights + optimizer + kept + (gradients if work.pieces > 1 else 0)
    working = max(0, peak - there)
    fragments = int(FRAGMENTS[0] * working + FRAGMENTS[1] * kept) if work.device == "cpu" else 0
    return Memory(
        weights, gradients, optimizer, kept, working, weights + optimizer, kv_cache(work.shape, work.dtype), fragments,
        peak,
    )  # fmt: skip


def make_model(work: StepSpec) -> Transformer:
    """The model of a run, without values."""
    shape = work.shape
    model = Transformer(shape)
    if work.lora is not None:
        add_lora(model, work.lora)
    model.recompute = work.recompute
    for block in model.blocks:
        if work.device == "cuda":  # its kernel drops probabilities without keeping them; the CPU has none that does
            block.attn.dropout = 0.0
    return model.train()


def forward_backward(objective: Objective, work: StepSpec, alive: MemoryTracker | None = None) -> int:
    """Run one micro-batch; returns the bytes alive between the two passes."""
    rows = (work.micro, work.shape.block_size)
    ids, targets = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    positions, mask = None, None
    if work.documents:
        positions = torch.zeros(rows, dtype=torch.long)
        mask = torch.zeros(work.micro, 1, rows[1], rows[1], dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.dtype != torch.float32):
        nats = objective(ids, targets, positions, mask)
    between = alive.now if alive is not None else 0
    nats.backward()
    return between


@contextlib.contextmanager
def chunks_of(device: str) -> Iterator[None]:
    """Compute the loss in the chunks of the target device, although its tensors are fake CPU tensors, and Muon's
    products whole: block by block they need as much memory, and tracing them takes a minute.
    """
    chunk, block = loss.CPU_CHUNK, orthogonal.BLOCK
    loss.CPU_CHUNK = chunk if device == "cpu" else loss.GPU_CHUNK
    orthogonal.BLOCK = sys.maxsize
    try:
        yield
    finally:
        loss.CPU_CHUNK, orthogonal.BLOCK = chunk, block


def kv_cache(shape: ModelConfig, dtype: torch.dtype, streams: int = 1) -> int:
    """Bytes of the keys and values of `streams` texts of block_size tokens."""
    heads = shape.n_kv_head or shape.n_head
    return 2 * shape.n_layer * streams * heads * shape.block_size * head_dim(shape) * dtype.itemsize


def largest_micro(work: StepSpec, rows: int, free: int) -> int:
    """The largest micro-batch, up to `rows` sequences, whose step fits into `free` bytes; 0 if not even one sequence
    fits.

    A step's memory grows by the same amount with every sequence, except for the loss, whose chunks have a limited size.
    """

    def peak(micro: int) -> int:
        parts = step_memory(dataclasses.replace(work, micro=micro, pieces=-(-rows // micro)))
        return parts.peak + parts.fragments

    known = {1: peak(1)}
    if known[1] > free:
        return 0
    guess = min(rows, work.micro if work.micro > 1 else 16)  # the plan has traced work.micro already
    for _ in range(MAX_PROBES):
        if guess in known:
            break
        known[guess] = peak(guess)
        below = max(micro for micro, bytes_ in known.items() if bytes_ <= free)
        above = min((micro for micro, bytes_ in known.items() if bytes_ > free), default=None)
        other = above or max([micro for micro in known if micro < below], default=below)
        if other == below:
            break
        each = max(1.0, (known[other] - known[below]) / (other - below))
        guess = min(rows if above is None else above - 1, below + int((free - known[below]) / each))
    return max(micro for micro, bytes_ in known.items() if bytes_ <= free)
