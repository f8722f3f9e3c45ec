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
from miaobi.train.layout import is_sharded
from miaobi.train.measured import Computed, Work, checked, choose, is_long
from miaobi.train.run_directory import Progress
from miaobi.train.world import World

COMPILE_PAYS_AFTER = 200
"""Steps from which on a run compiles before the first of them, in about twenty seconds; on a CPU in fp32, where less is
to be won, only as long runs do whose ways are measured."""
NOTED = "# How its steps are computed: decided before the first of them, and kept when the run goes on."


def choose_computing(cfg: TrainConfig, work: Work, dtype: torch.dtype, progress: Progress, world: World) -> Computed:
    """How the steps of this run are computed, from here on: decided before the first one and kept in
    `Progress.computed`, so that a resumed run computes as it began. Rank 0 decides for all.
    """
    usual = Computed(str(dtype).removeprefix("torch."))
    # Sharded models answer only together, and adapters are left alone.
    can_measure = work.device.type != "mps" and not is_sharded(work.objective.model) and cfg.trainable == "full"
    fp32_cpu = work.device.type == "cpu" and dtype == torch.float32  # all but products is 3% of a step there
    compiles = cfg.compile is not False and (cfg.compile is True or can_compile(work.device))
    anyway = compiles and (cfg.compile is True or (work.steps >= COMPILE_PAYS_AFTER and not fp32_cpu))
    dtypes = candidate_dtypes(cfg.dtype, work.device, dtype)
    if progress.computed:
        way = continued(progress.computed, dtypes)
    elif can_measure and progress.step == 0 and is_long(work):
        way = choose(work, dtypes, compiles, anyway)
    elif anyway:
        way = replace(usual, compiled="blocks", why="--compile" if cfg.compile is True else "a long run")
    else:
        way = usual
    if not progress.computed:
        progress.computed = world.gather(asdict(way))[0]
        way = Computed(**progress.computed)
    if replace(way, seconds=0.0, why=usual.why) != usual:
        log(f"computing in {way}")
    return way if work.set(way) else usual


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


def note(config: Path, way: Computed) -> None:
    """Write below a run's config.yaml, as comments, how it is computed and why."""
    told = textwrap.wrap(f"{way} ({way.why})", 112, break_on_hyphens=False)
    before = config.read_text(encoding="utf-8").partition(NOTED)[0]
    write_text(config, "\n".join([before.rstrip("\n"), NOTED, *(f"#   {line}" for line in told), ""]))
