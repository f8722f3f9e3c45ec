"""The execution mode of a run, the same from its first step to its last; `measured` chooses it."""

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
from miaobi.train.measured import ExecutionMode, Workload, checked, choose, compiling_seconds, is_long
from miaobi.train.micro import find_micro_batch
from miaobi.train.run_directory import Progress
from miaobi.train.setup import Plan
from miaobi.train.watch import duration
from miaobi.train.world import World

COMPILING_SAVES = {"cpu": 0.1, "cuda": 0.25}
"""Least share of an eager half-precision step that compiling its blocks saves (docs/lab-notes.md). In fp32 on a CPU it
is COMPILING_SAVES_IN_FP32, for which nothing is compiled unless the run is so long that its modes are timed."""
COMPILING_SAVES_IN_FP32 = 0.04
COMMENT = "# How its steps are computed: decided before the first step, and kept when the run is continued."


def decide_mode(plan: Plan, objective: Objective) -> tuple[Plan, bool]:
    """Choose micro-batch, precision, attention and compilation, or keep those of a resumed run. Returns the plan with
    them, and whether masks are those of FlexAttention.
    """
    cfg, model = plan.cfg.train, plan.model
    can_flex = plan.device.type == "cuda" and model.cfg.dropout == 0.0  # it is only fast when compiled
    can_flex = can_flex and plan.blocks.fixed(1).documents is not None
    model.train()

    def work(micro: int) -> Workload:
        return Workload(objective, example, plan.device, plan.total_steps - plan.progress.step,
                        cfg.global_batch // plan.world.size, micro, cfg.micro_batch_size is not None,
                        can_flex)  # fmt: skip

    def example(rows: int, flex: bool) -> tuple:
        return to_device(plan.blocks.fixed(rows), slice(None), plan.device, flex, plan.dtype)

    plan = find_micro_batch(plan, work, str(plan.dtype).removeprefix("torch."))
    mode = choose_mode(cfg, work(plan.micro), plan.dtype, plan.progress, plan.world)
    is_fixed = cfg.micro_batch_size is not None or plan.progress.micro  # by the user, or by the memory
    plan = replace(plan, dtype=getattr(torch, mode.dtype), micro=plan.micro if is_fixed else mode.micro or plan.micro)
    if plan.world.is_first:
        write_comment(plan.out / "config.yaml", mode)
    return plan, can_flex and bool(mode.compiled) and not mode.plain_mask


def choose_mode(
    cfg: TrainConfig, work: Workload, dtype: torch.dtype, progress: Progress, world: World
) -> ExecutionMode:
    """Choose the execution mode and apply it. It is chosen before the first step and saved in `Progress.computed`, so
    that a resumed run computes as it began. Rank 0 chooses for all ranks.
    """
    usual = ExecutionMode(str(dtype).removeprefix("torch."))
    # Passes of a sharded model need all ranks together; LoRA is too small to be worth it.
    can_measure = work.device.type != "mps" and not is_sharded(work.objective.model) and cfg.trainable == "full"
    dtypes = candidate_dtypes(cfg.dtype, work.device, dtype)
    if progress.computed:
        mode = resumed_mode(progress.computed, dtypes)
    else:
        why = (
            f"--compile asks for it; it saves about {share_saved(work, usual):.0%} of a step"
            if cfg.compile is True
            else ""
        )
        if cfg.compile == "auto":
            why = reason_to_compile(work, usual, world)
        mode = replace(usual, compiled="blocks", why=why) if why else usual
        if can_measure and progress.step == 0 and is_long(work):
            compiles = cfg.compile is True or (cfg.compile == "auto" and can_compile(work.device))
            mode = choose(work, dtypes, compiles, why)
        progress.computed = world.gather(asdict(mode))[0]
        mode = ExecutionMode(**progress.computed)
    if replace(mode, seconds=0.0, why=usual.why) != usual:
        log(f"computing in {mode}")
    applied = work.apply(mode)
    if applied is not None and applied != mode and applied.plain_mask:
        progress.computed = asdict(applied)  # so that a run that is continued need not find out again
    return applied or usual


def share_saved(work: Workload, usual: ExecutionMode) -> float:
    """The share of an eager step that compiling its blocks saves."""
    is_fp32_cpu = work.device.type == "cpu" and usual.dtype == "float32"
    return COMPILING_SAVES_IN_FP32 if is_fp32_cpu else COMPILING_SAVES.get(work.device.type, 0.0)


def reason_to_compile(work: Workload, usual: ExecutionMode, world: World) -> str:
    """Why to compile the blocks: the time that it saves in this run; "" if that is less than compiling takes, or if it
    is not possible.

    Estimated from two eager passes, the first of which is a warm-up. All ranks make them, because those of a sharded
    model need each other.
    """
    share = share_saved(work, usual)
    if not all(world.gather(can_compile(work.device) and share > COMPILING_SAVES_IN_FP32)):
        return ""
    work.time_mode(usual)
    seconds = work.steps * work.rows * work.time_mode(usual)
    if seconds * share < compiling_seconds(work, replace(usual, compiled="blocks")):
        return ""
    return f"the run would take {duration(seconds)} without it, and compiling saves about {duration(seconds * share)}"


def resumed_mode(fields: dict[str, Any], dtypes: list[str]) -> ExecutionMode:
    """The mode that a run began with, in a precision that this machine supports: one of `dtypes`.

    Raises UserError for fields that are not valid.
    """
    try:
        mode = checked(fields)
    except (TypeError, ValueError) as e:
        raise UserError(f"progress.json of the last checkpoint is damaged ({e}); "
                        "continue from another checkpoint with --resume_from") from e  # fmt: skip
    if mode.dtype in dtypes:
        return mode
    warn(
        f"this run was computed in {mode.dtype}; on this machine it continues in {dtypes[0]}, which rounds differently"
    )
    return replace(mode, dtype=dtypes[0])


def write_comment(config: Path, mode: ExecutionMode) -> None:
    """Append to a run's config.yaml, as comments, how it is computed and why."""
    lines = textwrap.wrap(f"{mode} ({mode.why})", 112, break_on_hyphens=False)
    before = config.read_text(encoding="utf-8").partition(COMMENT)[0]
    write_text(config, "\n".join([before.rstrip("\n"), COMMENT, *(f"#   {line}" for line in lines), ""]))
