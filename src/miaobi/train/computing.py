"""How the steps of one run are computed, from its first to its last; see `measured` for how that is chosen."""

from __future__ import annotations

import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from miaobi.config import TrainConfig
from miaobi.console import log, warn
from miaobi.device import can_compile, candidate_dtypes
from miaobi.errors import UserError
from miaobi.files import write_text
from miaobi.train.evaluate import to_device
from miaobi.train.layout import Objective, is_sharded
from miaobi.train.measured import ExecutionMode, Work, checked, choose, compiling_seconds, is_long
from miaobi.train.micro import find
from miaobi.train.run_directory import Progress
from miaobi.train.setup import Plan
from miaobi.train.watch import duration
from miaobi.train.world import World

SAVED = {"cpu": 0.1, "cuda": 0.25}
"""Share of an eager step in half precision that compiling its blocks saves, at least (docs/lab-notes.md). In fp32 on a
CPU it is SAVED_IN_FP32: that is left alone, unless the run is so long that its modes are timed."""
SAVED_IN_FP32 = 0.04
NOTED = "# How its steps are computed: decided before the first of them, and kept when the run goes on."


def decide(plan: Plan, objective: Objective) -> tuple[Plan, bool]:
    """Decide, or go on with, micro-batch, precision, attention and compilation. Returns the plan with them, and whether
    masks are those of FlexAttention.
    """
    cfg, model = plan.cfg.train, plan.model
    can_flex = plan.device.type == "cuda" and model.cfg.dropout == 0.0  # it is only fast compiled
    can_flex = can_flex and plan.blocks.fixed(1).documents is not None
    model.train()

    def work(micro: int) -> Work:
        return Work(objective, example, plan.device, plan.total_steps - plan.progress.step,
                    cfg.global_batch // plan.world.size, micro, cfg.micro_batch_size is not None,
                    can_flex)  # fmt: skip

    def example(rows: int, flex: bool) -> tuple:
        return to_device(plan.blocks.fixed(rows), slice(None), plan.device, flex, plan.dtype)

    plan = find(plan, work, str(plan.dtype).removeprefix("torch."))
    mode = choose_computing(cfg, work(plan.micro), plan.dtype, plan.progress, plan.world)
    is_fixed = cfg.micro_batch_size is not None or plan.progress.micro  # by the user, or by the memory
    plan = replace(plan, dtype=getattr(torch, mode.dtype), micro=plan.micro if is_fixed else mode.micro or plan.micro)
    if plan.world.is_first:
        note(plan.out / "config.yaml", mode)
    return plan, can_flex and bool(mode.compiled) and not mode.plain_mask


def choose_computing(
    cfg: TrainConfig, work: Work, dtype: torch.dtype, progress: Progress, world: World
) -> ExecutionMode:
    """How the steps of this run are computed, from here on: decided before the first one and kept in
    `Progress.computed`, so that a resumed run computes as it began. Rank 0 decides for all.
    """
    usual = ExecutionMode(str(dtype).removeprefix("torch."))
    # Sharded models answer only together, and adapters are left alone.
    can_measure = work.device.type != "mps" and not is_sharded(work.objective.model) and cfg.trainable == "full"
    dtypes = candidate_dtypes(cfg.dtype, work.device, dtype)
    if progress.computed:
        mode = continued(progress.computed, dtypes)
    else:
        why = f"--compile says so; it saves some {saved(work, usual):.0%} of a step" if cfg.compile is True else ""
        if cfg.compile == "auto":
            why = why_compile(work, usual, world)
        mode = replace(usual, compiled="blocks", why=why) if why else usual
        if can_measure and progress.step == 0 and is_long(work):
            compiles = cfg.compile is True or (cfg.compile == "auto" and can_compile(work.device))
            mode = choose(work, dtypes, compiles, why)
        progress.computed = world.gather(asdict(mode))[0]
        mode = ExecutionMode(**progress.computed)
    if replace(mode, seconds=0.0, why=usual.why) != usual:
        log(f"computing in {mode}")
    now = work.set(mode)
    if now is not None and now != mode and now.plain_mask:
        progress.computed = asdict(now)  # so that a run that goes on need not find out again
    return now or usual


def saved(work: Work, usual: ExecutionMode) -> float:
    """The share of an eager step that compiling its blocks saves."""
    is_fp32_cpu = work.device.type == "cpu" and usual.dtype == "float32"
    return SAVED_IN_FP32 if is_fp32_cpu else SAVED.get(work.device.type, 0.0)


def why_compile(work: Work, usual: ExecutionMode, world: World) -> str:
    """What compiling the blocks will win of the time that the run would take without; "" where it does not win its own
    time back, or cannot be done.

    Two eager passes tell: the first one warms up. All ranks make them, those of a sharded model together.
    """
    share = saved(work, usual)
    if not all(world.gather(can_compile(work.device) and share > SAVED_IN_FP32)):
        return ""
    work.timed(usual)
    seconds = work.steps * work.rows * work.timed(usual)
    if seconds * share < compiling_seconds(work, replace(usual, compiled="blocks")):
        return ""
    return f"the run would take {duration(seconds)} without, and it saves about {duration(seconds * share)} of that"


def continued(fields: dict[str, Any], dtypes: list[str]) -> ExecutionMode:
    """What a run was begun with, on a machine where `dtypes` make sense: another one may lack a precision.

    Raises UserError for fields that no run has written.
    """
    try:
        mode = checked(fields)
    except (TypeError, ValueError) as e:
        raise UserError(f"progress.json of the last checkpoint is damaged ({e}); "
                        "continue from another checkpoint with --resume_from") from e  # fmt: skip
    if mode.dtype in dtypes:
        return mode
    warn(f"this run was computed in {mode.dtype}; on this machine it goes on in {dtypes[0]}, with other roundings")
    return replace(mode, dtype=dtypes[0])


def note(config: Path, mode: ExecutionMode) -> None:
    """Write below a run's config.yaml, as comments, how it is computed and why."""
    lines = textwrap.wrap(f"{mode} ({mode.why})", 112, break_on_hyphens=False)
    before = config.read_text(encoding="utf-8").partition(NOTED)[0]
    write_text(config, "\n".join([before.rstrip("\n"), NOTED, *(f"#   {line}" for line in lines), ""]))
