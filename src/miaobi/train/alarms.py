"""Warnings while a run trains, each with its cause: steps that are not finite, loss spikes, overfitting, a disk that
fills up, a slowdown.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from miaobi.console import log, shown, warn
from miaobi.errors import number_of
from miaobi.train.recovery import NotFiniteError
from miaobi.train.threads import BUSY, cpu_seconds, own_seconds
from miaobi.train.watch import evaluations_since_best, overfitting_warning

if TYPE_CHECKING:
    from miaobi.train.setup import Plan

MAX_SKIPPED = 3
"""Steps in a row that are not finite: from so many on the weights are to blame, not a batch."""
RECENT, MIN_RECENT = 50, 20
"""How many recent losses a new one is compared with; how many of them there must be at least."""
SPIKE = 6.0, 0.5
"""A loss spikes if it is above the recent mean by this many standard deviations, and by this many nats."""
SLOW = 0.5
"""Share of its usual speed below which a run counts as slowed down, twice in a row."""
EXCERPT = 24
"""Characters of a document that are printed, so that it can be found."""


class Alarms:
    """The checks of a run, called whenever it logs its steps."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.speeds: deque[float] = deque(maxlen=RECENT)
        self.skipped = 0  # steps in a row that were not finite
        self.slow, self.warned_slow, self.warned_full = 0, False, False
        self.seen = Usage.now()

    def finite_losses(self, first: int, losses: Tensor, norms: Tensor) -> Tensor:
        """The losses (steps,) that are finite, of steps from `first` on (0-based). A step whose loss or gradient is not
        finite was skipped, which is a warning. Raises NotFiniteError at MAX_SKIPPED in a row.
        """
        good = losses.isfinite() & norms.isfinite()
        for i, is_good in enumerate(good.tolist()):
            self.skipped = 0 if is_good else self.skipped + 1
            if is_good:
                continue
            what, step = "gradient" if losses[i].isfinite() else "loss", first + i
            if self.skipped >= MAX_SKIPPED:
                raise NotFiniteError(what, step + 1)
            warn(f"the {what} is not finite at step {step + 1}: the step is skipped. {self.batch(step)}")
        self.warn_of_spike(first, losses, good)
        return losses[good]

    def warn_of_spike(self, first: int, losses: Tensor, good: Tensor) -> None:
        """Warn of a loss spike, the highest of these steps."""
        worst = None
        for i, loss in enumerate(losses.tolist()):
            if not good[i]:
                continue
            if len(self.losses) >= MIN_RECENT:
                mean, spread = statistics.fmean(self.losses), statistics.pstdev(self.losses)
                if loss - mean > max(SPIKE[0] * spread, SPIKE[1]) and (worst is None or loss > worst[1]):
                    worst = i, loss, mean
            self.losses.append(loss)
        if worst is not None:
            i, loss, mean = worst
            warn(f"step {first + i + 1}: the loss spikes to {loss:.2f} from {mean:.2f}. {self.batch(first + i)}")

    def batch(self, step: int) -> str:
        """The documents of a step's batch, in words."""
        cfg, data = self.plan.cfg.train, self.plan.data
        numbers = self.plan.blocks.documents(cfg.global_batch, cfg.seed, step)
        first, end = (int(at) for at in np.append(data.train.starts, len(data.train))[numbers[0] :][:2])
        ids = data.train.read(first, min(end - 1, first + EXCERPT)).tolist()  # the last token only ends it
        opening = " ".join(self.plan.tokenizer.decode(ids).split())[:EXCERPT]
        more = f" and {len(numbers) - 8:,} more" if len(numbers) > 8 else ""
        listed = ", ".join(str(number + 1) for number in numbers[:8])
        kind = ("dialogue" if data.is_dialogue else "document") + "s" * (len(numbers) > 1)
        return (f"Its batch holds {kind} {listed}{more} of the training part, "
                f"the first begins {shown(opening)!r}")  # fmt: skip

    def check_speed(self, tokens_per_second: float, fetching: float) -> None:
        """Say when a run becomes much slower than it was, and why. fetching: share of the time spent on batches."""
        before, self.seen = self.seen, Usage.now()
        usual = statistics.median(self.speeds) if len(self.speeds) >= 5 else 0.0
        self.slow = self.slow + 1 if tokens_per_second < SLOW * usual else 0
        if self.slow >= 2 and not self.warned_slow:
            warn(f"{tokens_per_second:,.0f} tokens/s, {usual:,.0f} before: {cause(before, self.seen, fetching)}")
            self.warned_slow = True
        elif self.warned_slow and tokens_per_second > 0.8 * usual:
            log(f"{tokens_per_second:,.0f} tokens/s: as fast as before")
            self.warned_slow = False
        if not self.slow:
            self.speeds.append(tokens_per_second)

    def check_evaluation(self) -> None:
        """Warn once of overfitting; stop a run that has not improved for `patience` evaluations."""
        p, plan = self.plan.progress, self.plan
        hint = overfitting_warning(p.history, plan.model.cfg.dropout, plan.optim.learning_rate)
        if hint is not None and not p.warned:
            warn(hint)
            p.warned = True
        patience = plan.cfg.train.patience
        if patience and evaluations_since_best(p.history) >= patience and p.step < p.planned:
            p.stopped = "patience"
            log(f"stopped: no better validation loss for {number_of(patience, 'evaluation')}. "
                f"The best model is step {p.best_step} (val {p.best_val_loss:.4f})")  # fmt: skip

    def check_disk(self) -> None:
        """Warn once that the disk has no room for two more checkpoints: a new one is written before the old one is
        deleted.
        """
        if self.warned_full or not self.plan.world.is_first:
            return
        needed = 2 * checkpoint_size(self.plan)
        try:
            free = shutil.disk_usage(self.plan.out).free
        except OSError:
            return
        if free < needed:
            warn(f"the disk of {self.plan.out} has {free / 2**20:,.0f} MiB left, and a checkpoint takes about "
                 f"{needed / 2**21:,.0f} MiB, besides the one before it: free some space")  # fmt: skip
            self.warned_full = True


def checkpoint_size(plan: Plan) -> int:
    """Bytes of weights and optimizer state."""
    states = sum(value.numel() * value.element_size() for optimizer in plan.optimizers
                 for state in optimizer.state.values() for value in state.values())  # fmt: skip
    return 4 * plan.parameters + states


class Usage:
    """Counters of the machine at a moment: time, CPU seconds, throttling, page faults."""

    def __init__(self, at: float, all_: float | None, own: float, throttled: int, faults: int) -> None:
        self.at, self.all, self.own, self.throttled, self.faults = at, all_, own, throttled, faults

    @classmethod
    def now(cls) -> Usage:
        """The counters now."""
        return cls(time.monotonic(), cpu_seconds(), own_seconds(), throttles(), major_faults())


def cause(before: Usage, after: Usage, fetching: float) -> str:
    """Why a run was slow between two moments, as far as the system says."""
    spent = max(1e-9, after.at - before.at)
    others = math.nan if after.all is None or before.all is None else after.all - before.all - after.own + before.own
    if fetching > SLOW:
        return (f"{fetching:.0%} of the time is spent reading batches: the disk of the data is slow or busy; "
                "copy the prepared data to a local disk")  # fmt: skip
    if others / spent > BUSY:
        return f"other programs take {others / spent:.1f} cores"
    if after.throttled > before.throttled:
        return "the processor is too hot and throttles: check its cooling"
    if after.faults - before.faults > 100 * spent:
        return "the machine is out of memory and swaps: a smaller --micro_batch_size needs less"
    return ("the cause is not known (`nvidia-smi -q -d PERFORMANCE,UTILIZATION` shows whether another program uses the "
            "GPU, or whether it is too hot)")  # fmt: skip


def throttles() -> int:
    """How often the processors were throttled for their heat; 0 where the system does not count it."""
    total = 0
    for file in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
        try:
            total += int(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0
    return total


def major_faults() -> int:
    """Page faults of this process that had to be read from a disk."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
