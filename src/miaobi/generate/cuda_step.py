"""One decoding step on a GPU, recorded as a CUDA graph and replayed: launching its hundreds of small kernels one by one
takes longer than they do (pytorch.org/blog/accelerating-pytorch-with-cuda-graphs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from miaobi.console import warn
from miaobi.generate.eager_step import EagerStep
from miaobi.model.transformer import KVCache, RowCache, Transformer


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
        part = [RowCache(cache.k[:rows], cache.v[:rows], last, position_ids) for cache in caches]

        def step() -> Tensor:
            mask = torch.arange(last + 1, device=device) <= position_ids[:, None]
            return self.model(ids, position_ids[:, None], mask[:, None, None], part, last_only=True)[:, -1]

        return Recorded(ids, position_ids, *self.capture(step))

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
