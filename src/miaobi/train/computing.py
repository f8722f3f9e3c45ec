"""How the steps of one run are computed, from its first to its last; see `measured` for how that is chosen."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
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
from miaobi.train.world import World

COMPILE_PAYS_AFTER = 200
"""Steps from which on a run compiles before the first of them, in about twenty seconds; fp32 on a CPU gains nothing."""


def choose(plan: Plan, objective: nn.Module) -> tuple[Plan, bool]:
    """Decide, or go on with, micro-batch, precision, attention and compilation. Returns the plan with them, and whether
    masks are those of FlexAttention.
    """
    cfg, steps, model = plan.cfg.train, plan.total_steps, plan.model
    compiles = cfg.compile is True or (cfg.compile == "auto" and steps >= COMPILE_PAYS_AFTER)
    # FlexAttention knows no dropout, and needs the compiler to be fast.
    flex = plan.device.type == "cuda" and model.cfg.dropout == 0.0 and compiles
    model.train()

    def work(micro: int) -> Work:
        example = place(plan.blocks.fixed(micro), slice(None), plan.device, flex)
        pieces = math.ceil(cfg.global_batch / plan.world.size / micro)
        return Work(objective, example, plan.device, steps - plan.progress.step, pieces)

    usual = str(plan.dtype).removeprefix("torch.")
    plan = find(plan, work, usual)
    way = choose_computing(cfg, work(plan.micro), plan.dtype, plan.progress, plan.world)
    return replace(plan, dtype=getattr(torch, way.dtype)), flex and bool(way.compiled)


def choose_computing(cfg: TrainConfig, work: Work, dtype: torch.dtype, progress: Progress, world: World) -> Computed:
    """How the steps of this run are computed, from here on: decided before the first one and kept in
    `Progress.computed`, so that a resumed run computes as it began. Rank 0 decides for all.
    """
    usual = Computed(str(dtype).removeprefix("torch."))
    # Sharded models answer only together, and adapters are left alone.
    can_measure = work.device.type == "cpu" and not is_sharded(work.objective.model) and cfg.trainable == "full"
    fp32_cpu = work.device.type == "cpu" and dtype == torch.float32  # all but products is 3% of a step there
    pays = work.steps >= COMPILE_PAYS_AFTER and can_compile(work.device) and not fp32_cpu
    dtypes = candidate_dtypes(cfg.dtype, work.device, dtype)
    if progress.computed:
        way = continued(progress.computed, dtypes)
    else:
        way = usual
        if cfg.compile is True or (cfg.compile == "auto" and pays):
            way = Computed(usual.dtype, compiled="blocks", why="--compile" if cfg.compile is True else "a long run")
        elif can_measure and progress.step == 0:
            way = choose_eager(work, dtypes)
        progress.computed = world.gather(asdict(way))[0]
        way = Computed(**progress.computed)
    if way != usual:
        log(f"computing in {way}")
    return way if apply(work, way) else usual


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
