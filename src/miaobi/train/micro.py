"""The size of micro-batches: the largest that fits, found before a run, and halved if memory runs out during it.

The global batch does not change: a step accumulates the gradients of its micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from miaobi.console import log, warn
from miaobi.device import is_out_of_memory, peak_memory, reset_peak_memory
from miaobi.errors import number_of
from miaobi.train.measured import ExecutionMode, Workload
from miaobi.train.setup import Plan

PROBES = 1, 3
"""Micro-batch sizes that are tried."""
USABLE = 0.92
"""Share of the free memory that can be filled: the rest is lost to fragmentation."""


def largest_that_fits(peaks: dict[int, int], free: int, asked: int) -> int:
    """The largest micro-batch, up to `asked` sequences, that fits into `free` bytes; at least 1.

    peaks: micro-batch size -> peak bytes, of two tries. Memory per sequence is extrapolated from them; larger
    micro-batches need no more per sequence, because the loss is computed in chunks of limited size.
    """
    (few, low), (more, high) = sorted(peaks.items())
    each = max(1.0, (high - low) / (more - few))
    return max(1, min(asked, int(few + (free - low) / each)))


def find_micro_batch(plan: Plan, works: Callable[[int], Workload], dtype: str) -> Plan:
    """The plan with a micro-batch that fits into the GPU's memory. A resumed run, or a user's setting, keeps its own.

    works: micro-batch size -> its `Workload`.
    """
    p, asked = plan.progress, plan.micro
    if p.micro:
        return replace(plan, micro=min(asked, p.micro))
    is_given = plan.cfg.train.micro_batch_size is not None
    if plan.device.type != "cuda" or is_given or asked <= max(PROBES):
        return plan
    peaks = {}
    for micro in PROBES:
        reset_peak_memory(plan.device)
        works(micro).time_pass(ExecutionMode(dtype))
        peaks[micro] = peak_memory(plan.device)
    free, _ = torch.cuda.mem_get_info(plan.device)
    room = int(USABLE * (free + torch.cuda.memory_allocated(plan.device))) - state_bytes(plan)
    micro = min(plan.world.gather(largest_that_fits(peaks, room, asked)))
    if micro == asked:
        return plan
    p.micro = equal_pieces(asked, micro)
    log(f"micro-batches of {number_of(p.micro, 'sequence')}, {asked} would not fit: {room / 2**30:.1f} GiB are free, "
        f"{max(PROBES)} took {peaks[max(PROBES)] / 2**30:.1f}")  # fmt: skip
    return replace(plan, micro=p.micro)


def state_bytes(plan: Plan) -> int:
    """Bytes that gradients and optimizer state will need, as far as they are not allocated yet."""
    moving = sum(p.numel() for p in plan.model.parameters() if p.requires_grad)
    have = sum(len(optimizer.state) for optimizer in plan.optimizers)
    return 4 * moving * (1 if have else 3)


def equal_pieces(rows: int, most: int) -> int:
    """Size of the pieces, at most `most`, into which `rows` divide about equally."""
    return math.ceil(rows / math.ceil(rows / most))


def halved_micro_batch(plan: Plan, error: RuntimeError) -> Plan:
    """The plan with half the micro-batch, after `error` in the middle of a step, whose gradients are discarded.

    Raises the error again if it is not out of memory, if a micro-batch has one sequence already, or with several ranks,
    because the others have gone on.
    """
    if not is_out_of_memory(error) or plan.world.size > 1 or plan.micro == 1:
        raise error
    plan.model.zero_grad(set_to_none=True)
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    micro = -(-plan.micro // 2)
    warn(
        f"out of memory with micro-batches of {plan.micro} sequences: the step is repeated, and the run continues, "
        f"with micro-batches of {micro}"
    )
    plan.progress.micro = micro
    return replace(plan, micro=micro)
