"""Runs that end in time: the number of steps is planned from the measured speed, and planned again until the end.

The schedule of the learning rate then follows shares of the run instead of step numbers: whenever the steps are
replanned, the rest of the schedule is spread over the remaining steps, without a jump. Every plan is saved in
`Progress.laid`, so that a resumed run continues from it.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

from miaobi.config import OptimConfig, RunConfig, TrainConfig
from miaobi.console import log, warn
from miaobi.corpus.dataset import Batch
from miaobi.errors import number_of
from miaobi.model.transformer import Transformer
from miaobi.train.evaluate import to_device
from miaobi.train.layout import Objective
from miaobi.train.measured import ExecutionMode, Workload
from miaobi.train.optimizer import rate
from miaobi.train.recipe import total_steps
from miaobi.train.run_directory import Progress
from miaobi.train.world import World

if TYPE_CHECKING:
    from miaobi.train.setup import Plan

PARTS = 10
"""The steps are replanned whenever a tenth of the remaining steps is done or a tenth of the remaining time has passed.
"""
COARSE = 0.2
"""Share of the schedule in a single step from which on a warning says that the schedule is cut short."""
WRITING = 1.0
"""Seconds assumed for writing a checkpoint, until one was written."""
ENDING = 2.0
"""Seconds reserved for what follows the last evaluation: its checkpoint, the report."""


def clock() -> float:
    """Seconds, by the most precise clock of the system."""
    return time.perf_counter()


def first_estimate(
    cfg: RunConfig,
    progress: Progress,
    world: World,
    model: Transformer,
    batch: Batch,
    dtype: torch.dtype,
    most: int,
) -> int:
    """Steps that a run with max_minutes plans at first, estimated from two passes of a micro-batch; the second is
    timed.

    A resumed run keeps its own. most: upper bound of the steps.
    """
    if not progress.laid:
        device, mode = model.wte.weight.device, ExecutionMode(str(dtype).removeprefix("torch."))
        rows = math.ceil(cfg.train.global_batch / world.size)
        work = Workload(
            Objective(model), lambda n, _: to_device(batch, slice(n), device), device, 0, rows, len(batch.inputs)
        )
        work.time_pass(mode)
        steps = int(60 * cfg.train.max_minutes / (work.time_pass(mode) * rows))
        progress.laid = [[0, world.gather(max(1, min(most, steps)))[0], 0.0]]
        log(
            f"max_minutes={cfg.train.max_minutes:g}: about {number_of(progress.laid[0][1], 'step')} by the "
            f"first measurement"
        )
    return int(progress.laid[0][1])


class Deadline:
    """Plans the steps of a run so that it ends in time.

    `progress.laid` has a row for every plan: step at which it was made, total steps, share of the schedule that was
    done.
    """

    def __init__(self, cfg: TrainConfig, progress: Progress, world: World, most: int, begun: float) -> None:
        """most: upper bound of the steps. begun: by `clock`, when the run would have begun without interruptions."""
        self.cfg, self.progress, self.world, self.most = cfg, progress, world, most
        self.begun = begun
        self.per_step: float | None = None
        self.evaluation: float | None = None  # with its checkpoint, in seconds
        self.has_warned, self.next_check = False, math.inf
        step, total, _ = progress.laid[-1]
        self.next = max(progress.step, int(step)) + max(1, min(3, int(total - step) // PARTS))

    @classmethod
    def of(cls, plan: Plan, begun: float) -> Deadline | None:
        """The deadline of a run; None without max_minutes."""
        if plan.cfg.train.max_minutes is None or not plan.progress.laid:
            return None
        most = total_steps(plan.cfg, len(plan.blocks))
        return cls(plan.cfg.train, plan.progress, plan.world, most, begun)

    def elapsed(self) -> float:
        """Seconds that the run has taken: this command, and earlier ones up to their last checkpoint."""
        return clock() - self.begun

    def note_steps(self, seconds: float) -> None:
        """Update the time of a step."""
        self.per_step = seconds if self.per_step is None else (self.per_step + seconds) / 2

    def note_evaluation(self, seconds: float) -> None:
        """Update the time of an evaluation with its checkpoint."""
        self.evaluation = seconds

    def is_due(self, step: int) -> bool:
        """Whether to replan before `step`. With several ranks it depends on the step alone, because their clocks
        differ.
        """
        return step >= self.next or (self.world.size == 1 and clock() >= self.next_check)

    def replan(self, step: int) -> int:
        """Plan the steps from `step` on, at least one more; returns the total. Collective: every rank must call it."""
        laid, per_step = self.progress.laid, self.per_step or 0.0
        evaluation = self.evaluation
        if evaluation is None:  # forward alone, a third of the work
            evaluation = WRITING + per_step / 3 * 1.25 * self.progress.windows / self.cfg.global_batch
        left = 60 * self.cfg.max_minutes - self.elapsed() - evaluation - ENDING
        steps = int(max(1.0, left / max(1e-9, per_step + evaluation / self.cfg.eval_interval)))
        total = self.world.gather(min(self.most, step + steps))[0]
        done = share_done(step, laid)
        if (1.0 - done) / (total - step) > COARSE and total < self.most and not self.has_warned:
            warn(
                f"max_minutes leaves time for {total - step} more step(s), but {1 - done:.0%} of the learning rate's "
                "schedule remains, which is cut short: steps are slow now. More minutes, or a smaller model, help"
            )
            self.has_warned = True
        if laid[-1][0] == step:
            laid.pop()
        laid.append([step, total, done])
        self.next, self.next_check = step + max(1, (total - step) // PARTS), clock() + left / PARTS
        return total


def share_done(step: int, laid: list[list[float]]) -> float:
    """Share of the schedule that is done before `step`, 0 to 1."""
    begun, total, done = next(row for row in reversed(laid) if row[0] <= step)
    return done + (1.0 - done) * (step - begun) / max(1.0, total - begun)


def share_of_rate(step: int, optim: OptimConfig, progress: Progress) -> float:
    """Learning rate of `step` as a share of the peak. If the steps were replanned, the schedule is read at the same
    share of the steps that were planned first.
    """
    at = share_done(step, progress.laid) * progress.laid[0][1] if progress.laid else None
    return rate(step, optim, at) * progress.slowed
