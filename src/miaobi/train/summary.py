"""summary.json of a run: sizes, resolved settings, machine, reason for its end, memory and time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaobi.console import warn
from miaobi.device import peak_memory, reset_peak_memory
from miaobi.environment import Environment, environment
from miaobi.errors import UserError
from miaobi.files import read_record, write_json

if TYPE_CHECKING:
    from miaobi.train.setup import Plan

SUMMARY = "summary.json"


@dataclass
class Summary(Environment):
    """How a run was computed and how it ended."""

    total_steps: int = 0
    """Planned steps."""
    parameters: int = 0
    trained_parameters: int = 0
    train_tokens: int = 0
    """Tokens of the training text."""
    batch_tokens: int = 0
    """Tokens of a step."""
    micro_batch: int = 0
    device: str = ""
    dtype: str = ""
    ranks: int = 1
    resolved: dict[str, Any] = field(default_factory=dict)
    """Settings that the configuration leaves open, as they were resolved."""
    data: str = ""
    """Fingerprint of the prepared data."""
    stopped: str | None = None
    """max_iters, max_minutes, patience, interrupted, terminated, failed; None while it runs, and after a kill."""
    error: str = ""
    """The error, if it failed."""
    started: float = 0.0
    """Seconds since 1970 of the latest start."""
    ended: float = 0.0
    wall_seconds: float = 0.0
    """From start to end, over all commands of the run."""
    peak_memory_bytes: int = 0
    """Peak of this process, or of the GPU's allocator."""


def read_summary(run: Path, unknown: list[str] | None = None) -> Summary | None:
    """The summary of a run; None if there is none. Raises UserError for a damaged file.

    unknown: collects the names of unknown fields, which a newer miaobi wrote; without it they are an error.
    """
    return read_record(run / SUMMARY, Summary, unknown=unknown) if (run / SUMMARY).is_file() else None


@contextmanager
def summarized(plan: Plan) -> Iterator[None]:
    """Write the run's summary before and after the body, on rank 0. A file that cannot be written costs a warning."""
    if not plan.world.is_first:
        yield
        return
    try:
        before = read_summary(plan.out)
    except UserError:
        before = None  # a damaged one is replaced
    reset_peak_memory(plan.device)
    summary = describe(plan)
    write_summary(plan, summary)
    try:
        yield
        summary.stopped = plan.progress.stopped or plan.end
    except KeyboardInterrupt:
        summary.stopped = "interrupted"
        raise
    except BaseException as e:
        summary.stopped, summary.error = "failed", str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
        raise
    finally:
        summary.ended, summary.total_steps = time.time(), plan.progress.planned  # max_minutes replans them
        summary.wall_seconds = summary.ended - summary.started + (before.wall_seconds if before else 0.0)
        summary.peak_memory_bytes = max(peak_memory(plan.device), before.peak_memory_bytes if before else 0)
        write_summary(plan, summary)


def describe(plan: Plan) -> Summary:
    """The summary before the first step."""
    return Summary(
        total_steps=plan.total_steps,
        parameters=plan.parameters,
        trained_parameters=plan.trained_parameters,
        train_tokens=len(plan.data.train),
        batch_tokens=plan.cfg.train.global_batch * plan.model.cfg.block_size,
        micro_batch=plan.micro,
        device=str(plan.device),
        dtype=str(plan.dtype).removeprefix("torch."),
        ranks=plan.world.size,
        resolved=dataclasses.asdict(plan.model.cfg) | dataclasses.asdict(plan.optim),
        data=plan.data.fingerprint,
        **asdict(environment()),
        started=time.time(),
    )


def write_summary(plan: Plan, summary: Summary) -> None:
    """Write the summary."""
    try:
        write_json(plan.out / SUMMARY, asdict(summary))
    except OSError as e:
        warn(f"{plan.out / SUMMARY} could not be written ({e.strerror}); the report will lack it")
