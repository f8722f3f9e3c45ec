"""How the steps of one run are computed, from its first to its last; see `measured` for how that is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from miaobi.config import TrainConfig
from miaobi.console import log, warn
from miaobi.device import can_compile, candidate_dtypes
from miaobi.errors import UserError
from miaobi.train.evaluate import place
from miaobi.train.layout import is_sharded
from miaobi.train.measured import Computed, Work, apply, checked, choose_eager
from miaobi.train.micro import find
from miaobi.train.run_directory import Progress
from miaobi.train.setup import Plan
from miaobi.train.watch import duration
from miaobi.train.world import World

COMPILE_SECONDS = 20.0
"""What compiling the blocks takes before the first step, once in a run."""
SAVED = {"cpu": 0.1, "cuda": 0.25}
"""Of an eager step in bf16, at least; fp32 on a CPU saves SAVED_IN_FP32 (docs/lab-notes.md), which is left alone."""
SAVED_IN_FP32 = 0.04


def choose(plan: Plan, objective: nn.Module) -> tuple[Plan, bool]:
    """Decide, or go on with, micro-batch, precision, attention and compilation. Returns the plan with them, and whether
    masks are those of FlexAttention.
    """
    cfg, left, model = plan.cfg.train, plan.total_steps - plan.progress.step, plan.model
    # FlexAttention knows no dropout, and needs the compiler to be fast.
    can_flex = plan.device.type == "cuda" and model.cfg.dropout == 0.0
    model.train()

    def example(micro: int, flex: bool = False) -> tuple:
        return place(plan.blocks.fixed(micro), slice(None), plan.device, flex)

    def work(micro: int) -> Work:
        pieces = math.ceil(cfg.global_batch / plan.world.size / micro)
        return Work(objective, example(micro), plan.device, left, pieces)

    plan = find(plan, work, str(plan.dtype).removeprefix("torch."))
    way = choose_computing(cfg, work(plan.micro), plan.dtype, plan.progress, plan.world,
                           partial(example, plan.micro, can_flex))  # fmt: skip
    return replace(plan, dtype=getattr(torch, way.dtype)), can_flex and bool(way.compiled)


def choose_computing(
    cfg: TrainConfig,
    work: Work,
    dtype: torch.dtype,
    progress: Progress,
    world: World,
    compiled_example: Callable[[], tuple] | None = None,
) -> Computed:
    """How the steps of this run are computed, from here on: decided before the first one and kept in
    `Progress.computed`, so that a resumed run computes as it began. Rank 0 decides for all.

    compiled_example: the arguments for one micro-batch where compiled blocks take others than eager ones.
    """
    usual = Computed(str(dtype).removeprefix("torch."))
    # Sharded models answer only together, and adapters are left alone.
    can_measure = work.device.type == "cpu" and not is_sharded(work.objective.model) and cfg.trainable == "full"
    dtypes = candidate_dtypes(cfg.dtype, work.device, dtype)
    if progress.computed:
        way = continued(progress.computed, dtypes)
    else:
        way = usual
        why = f"--compile says so; it saves some {saved(work, usual):.0%} of a step" if cfg.compile is True else ""
        if cfg.compile == "auto":
            why = why_compile(work, usual, world)
        if why:
            way = Computed(usual.dtype, compiled="blocks", why=why)
        elif can_measure and progress.step == 0:
            way = choose_eager(work, dtypes)
        progress.computed = world.gather(asdict(way))[0]
        way = Computed(**progress.computed)
    if way != usual:
        log(f"computing in {way}")
    if way.compiled:
        log(f"compiling now, which takes some {COMPILE_SECONDS:.0f} s: {way.why}")
        work = replace(work, example=compiled_example()) if compiled_example else work
    return way if apply(work, way) else usual


def saved(work: Work, usual: Computed) -> float:
    """The share of an eager step that compiling its blocks saves."""
    is_fp32_cpu = work.device.type == "cpu" and usual.dtype == "float32"
    return SAVED_IN_FP32 if is_fp32_cpu else SAVED.get(work.device.type, 0.0)


def why_compile(work: Work, usual: Computed, world: World) -> str:
    """What compiling the blocks will win of the time that the run would take without; "" where it does not win its own
    time back, or cannot be done.

    Two eager passes tell: the first one warms up. All ranks make them, those of a sharded model together.
    """
    share = saved(work, usual)
    if not all(world.gather(can_compile(work.device) and share > SAVED_IN_FP32)):
        return ""
    work.once(usual)
    seconds = work.steps * work.pieces * work.once(usual)
    if seconds * share < COMPILE_SECONDS:
        return ""
    return f"the run would take {duration(seconds)} without, and it saves about {duration(seconds * share)} of that"


def continued(fields: dict[str, Any], dtypes: list[str]) -> Computed:
    """What a run was begun with, on a machine where `dtypes` make sense: another one may lack a precision.

    Raises UserError for fields that no run has written.
    """
    try:
        way = checked(fields)
    except (TypeError, ValueError) as e:
        raise UserError(f"progress.json of the last checkpoint is damaged ({e}); "
                        "continue from another checkpoint with --resume_from") from e  # fmt: skip
    if way.dtype in dtypes:
        return way
    warn(f"this run was computed in {way.dtype}; on this machine it goes on in {dtypes[0]}, with other roundings")
    return replace(way, dtype=dtypes[0])
