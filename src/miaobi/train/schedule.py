"""A run that ends in time: its steps are laid over the speed that is measured, again and again until the end.

The schedule of the learning rate then runs over shares of the run instead of steps: where the steps are laid anew, the
rest of the schedule is laid over the rest of the steps, without a jump. Every decision stands in `Progress.laid`, so
that a resumed run goes on from what was decided.
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
from miaobi.train.measured import ExecutionMode, Work
from miaobi.train.optimizer import rate
from miaobi.train.recipe import total_steps
from miaobi.train.run_directory import Progress
from miaobi.train.world import World

if TYPE_CHECKING:
    from miaobi.train.setup import Plan

PARTS = 10
"""The steps are laid anew when a tenth of the rest is done, or a tenth of the time that was left is over."""
COARSE = 0.2
"""Share of the schedule in one step from which on it is no schedule any more, and that is said."""
WRITING = 1.0
"""Seconds that a checkpoint is taken to need, before one was written."""
ENDING = 2.0
"""Seconds kept for what comes after the last evaluation: its checkpoint on the disk, the report."""


def clock() -> float:
    """Seconds, as good as the system has them."""
    return time.perf_counter()


def lay_first(
    cfg: RunConfig,
    progress: Progress,
    world: World,
    model: Transformer,
    batch: Batch,
    dtype: torch.dtype,
    most: int,
) -> int:
    """Steps that a run of max_minutes begins with: by two passes of a micro-batch, of which the second is timed.

    A run that has begun keeps what it began with. most: steps that it may have at all.
    """
    if not progress.laid:
        device, mode = model.wte.weight.device, ExecutionMode(str(dtype).removeprefix("torch."))
        rows = math.ceil(cfg.train.global_batch / world.size)
        work = Work(
            Objective(model), lambda n, _: to_device(batch, slice(n), device), device, 0, rows, len(batch.inputs)
        )
        work.once(mode)
        steps = int(60 * cfg.train.max_minutes / (work.once(mode) * rows))
        progress.laid = [[0, world.gather(max(1, min(most, steps)))[0], 0.0]]
        log(
            f"max_minutes={cfg.train.max_minutes:g}: about {number_of(progress.laid[0][1], 'step')} by the "
            f"first measurement"
        )
    return int(progress.laid[0][1])


class Deadline:
    """Lays the steps of a run over the time that it has left.

    `progress.laid` holds rows of step, steps of the whole run as they were laid then, and the share of the schedule
    that lay behind.
    """

    def __init__(self, cfg: TrainConfig, progress: Progress, world: World, most: int, begun: float) -> None:
        """most: steps that the run may have at all. begun: by `clock`, when the run began, its cuts taken out."""
        self.cfg, self.progress, self.world, self.most = cfg, progress, world, most
        self.begun = begun
        self.per_step: float | None = None
        self.evaluation: float | None = None  # with its checkpoint, in seconds
        self.has_warned, self.look = False, math.inf
        step, total, _ = progress.laid[-1]
        self.next = max(progress.step, int(step)) + max(1, min(3, int(total - step) // PARTS))

    @classmethod
    def of(cls, plan: Plan, begun: float) -> Deadline | None:
        """That of a run; None where it may take as long as it takes."""
        if plan.cfg.train.max_minutes is None or not plan.progress.laid:
            return None
        most = total_steps(plan.cfg, len(plan.blocks))
        return cls(plan.cfg.train, plan.progress, plan.world, most, begun)

    def elapsed(self) -> float:
        """Seconds of the commands of this run up to their last checkpoints, and of this one."""
        return clock() - self.begun

    def note_steps(self, seconds: float) -> None:
        """Take down how long a step takes now."""
        self.per_step = seconds if self.per_step is None else (self.per_step + seconds) / 2

    def note_evaluation(self, seconds: float) -> None:
        """Take down how long an evaluation and its checkpoint took."""
        self.evaluation = seconds

    def is_due(self, step: int) -> bool:
        """Whether the steps are to be laid anew before `step`. Several ranks have several clocks: they go by steps."""
        return step >= self.next or (self.world.size == 1 and clock() >= self.look)

    def lay(self, step: int) -> int:
        """Lay the steps anew before `step`, one at least; how many the whole run has now. Every rank must ask."""
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
                f"max_minutes leaves time for {total - step} more step(s), with {1 - done:.0%} of the learning rate's "
                "schedule before them, which is cut short: steps are slow now. More minutes, or a smaller model, help"
            )
            self.has_warned = True
        if laid[-1][0] == step:
            laid.pop()
        laid.append([step, total, done])
        self.next, self.look = step + max(1, (total - step) // PARTS), clock() + left / PARTS
        return total


def share_done(step: int, laid: list[list[float]]) -> float:
    """The share of the schedule that lies behind `step`, 0 to 1."""
    begun, total, done = next(row for row in reversed(laid) if row[0] <= step)
    return done + (1.0 - done) * (step - begun) / max(1.0, total - begun)


def share_of_rate(step: int, optim: OptimConfig, progress: Progress) -> float:
    """Learning rate of `step` as a share of the peak. Where the steps were laid over time, the schedule is at the same
    share of the steps that it was laid over first.
    """
    at = share_done(step, progress.laid) * progress.laid[0][1] if progress.laid else None
    return rate(step, optim, at) * progress.slowed
