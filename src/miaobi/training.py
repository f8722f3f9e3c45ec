"""`miaobi train`: a run, with what rooms above `train` add to it."""

from __future__ import annotations

from typing import Any

from miaobi.config import RunConfig
from miaobi.settings import Origin


def train(cfg: RunConfig, origin: Origin, started: float | None = None) -> dict[str, Any]:
    """Train from a checkpoint of small-gpt if resume_from names one, with samples at evaluations and a report.

    started: by time.perf_counter, when the command began, from when on max_minutes count.

    Returns what `train.loop.train` does. Raises UserError.
    """
    from miaobi.train.run_directory import hash_early

    hash_early(cfg, origin)
    from miaobi.convert.small_gpt import start_from_checkpoint
    from miaobi.generate.chat import preview
    from miaobi.report.page import writing_report
    from miaobi.train.loop import train as train_run

    cfg, origin = start_from_checkpoint(cfg, origin)
    with writing_report(cfg.train.out_dir):
        return train_run(cfg, origin, preview, started)
