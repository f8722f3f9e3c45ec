"""How many sequences go through the model at once: found before a run, and fewer where memory runs out in it.

The global batch stays what it is: a step adds up the gradients of its micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from miaobi.console import log, warn
from miaobi.device import is_out_of_memory, peak_memory, reset_peak_memory
from miaobi.errors import number_of
from miaobi.train.measured import ExecutionMode, Work
from miaobi.train.setup import Plan

PROBES = 1, 3
"""Sequences at once that are tried."""
FILLED = 0.92
"""Of the memory that is free: the allocator needs room for its pieces."""


def fitting(peaks: dict[int, int], free: int, asked: int) -> int:
    """The most sequences at once, up to `asked`, that fit into `free` bytes; at least 1.

    peaks: sequences -> bytes that a pass took, of two tries. The second one is dearer per sequence than a later one,
    if anything: the loss works in chunks, which are full at some size.
    """
    (few, low), (more, high) = sorted(peaks.items())
    each = max(1.0, (high - low) / (more - few))
    return max(1, min(asked, int(few + (free - low) / each)))


def find(plan: Plan, works: Callable[[int], Work], dtype: str) -> Plan:
    """The plan with a micro-batch that the GPU's memory holds. Kept as it is in a resumed run, or if it was set.

    works: sequences -> what a pass of so many is.
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
        works(micro).once(ExecutionMode(dtype))
        peaks[micro] = peak_memory(plan.device)
    free, _ = torch.cuda.mem_get_info(plan.device)
    room = int(FILLED * (free + torch.cuda.memory_allocated(plan.device))) - state_bytes(plan)
    micro = min(plan.world.gather(fitting(peaks, room, asked)))
    if micro == asked:
        return plan
    p.micro = even(asked, micro)
    log(f"micro-batches of {number_of(p.micro, 'sequence')}, {asked} would not fit: {room / 2**30:.1f} GiB are free, "
        f"{max(PROBES)} took {peaks[max(PROBES)] / 2**30:.1f}")  # fmt: skip
    return replace(plan, micro=p.micro)


def state_bytes(plan: Plan) -> int:
    """What the gradients and the optimizers' moments will take, where they are not there yet."""
    moving = sum(p.numel() for p in plan.model.parameters() if p.requires_grad)
    have = sum(len(optimizer.state) for optimizer in plan.optimizers)
    return 4 * moving * (1 if have else 3)


def even(rows: int, most: int) -> int:
    """Sequences at once, at most `most`, so that the pieces of `rows` are about equal."""
    return math.ceil(rows / math.ceil(rows / most))


def lowered(plan: Plan, error: RuntimeError) -> Plan:
    """The plan with half as many sequences at once, after `error` in the middle of a step, whose gradients are dropped.

    Raises the error where it is another one, where there is one sequence at once already, and with several ranks,
    which would no longer be at the same place.
    """
    if not is_out_of_memory(error) or plan.world.size > 1 or plan.micro == 1:
        raise error
    plan.model.zero_grad(set_to_none=True)
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    micro = -(-plan.micro // 2)
    warn(
        f"out of memory with {plan.micro} sequences at once: the step is done again, and the run goes on, with {micro}"
    )
    plan.progress.micro = micro
    return replace(plan, micro=micro)
