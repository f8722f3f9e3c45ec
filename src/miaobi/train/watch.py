"""Logging of a run: metrics files, TensorBoard and trackers; time left, overfitting, signals."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from miaobi.console import warn
from miaobi.files import json_of, write_text
from miaobi.settings import flatten
from miaobi.train.trackers import About, Tracker, start

if TYPE_CHECKING:
    from miaobi.train.setup import Plan


class Metrics:
    """metrics.jsonl, samples.jsonl, TensorBoard events, and the trackers that were asked for.

    An error while writing them never ends a run.
    """

    def __init__(
        self,
        out: Path,
        start: int,
        evaluated: bool = True,
        events: str | Path | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """start: steps already done. evaluated: whether step `start` was evaluated before it was saved. events: a
        further directory for the TensorBoard events.
        """
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

        self.warned, self.file, self.samples, self.writers, self.trackers = False, None, None, [], trackers
        with self.tolerating_errors():
            self.file = self.open_for_appending(out / "metrics.jsonl", start, evaluated)
            self.samples = self.open_for_appending(out / "samples.jsonl", start, evaluated)
        for directory in {Path(place).resolve() for place in (out, events) if place is not None}:
            with self.tolerating_errors():
                self.writers.append(SummaryWriter(str(directory), purge_step=start + 1))

    @classmethod
    def of(cls, plan: Plan) -> Metrics:
        """The metrics of a run, continued from its current step."""
        cfg, p = plan.cfg.train, plan.progress
        asked = dict.fromkeys((*cfg.trackers, *(["wandb"] if cfg.wandb_log else [])))
        about = About(cfg.wandb_project, cfg.wandb_run_name, p.run, flatten(plan.cfg))
        trackers = [start(kind, plan.out, about) for kind in asked]
        return cls(plan.out, p.step, p.evaluated == p.step, cfg.tensorboard_path, trackers)

    @staticmethod
    def open_for_appending(path: Path, start: int, evaluated: bool) -> TextIO:
        """Open a file of JSON lines for appending; lines of steps that are repeated after a kill are removed first."""
        kept = []
        if start and path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                step, is_evaluation = step_and_kind(line)
                if step < start or (step == start and (evaluated or not is_evaluation)):
                    kept.append(line)
        write_text(path, "".join(f"{line}\n" for line in kept))  # in place of a link, not through it
        return path.open("a", encoding="utf-8")

    def log(self, step: int, **values: float | None) -> None:
        """Write one line of metrics.jsonl and one point of every curve."""
        known = {key: value for key, value in values.items() if value is not None}
        with self.tolerating_errors():
            if self.file is not None:
                self.file.write(json.dumps({"step": step, **known}) + "\n")
                self.file.flush()
        with self.tolerating_errors():
            for key, value in known.items():
                for board in self.writers:
                    board.add_scalar(key, value, step)
        for tracker in self.trackers:
            with self.tolerating_errors():
                tracker.log(known, step=step)

    def sample(self, step: int, text: str) -> None:
        """Write one line of samples.jsonl: the text that the model generated at an evaluation."""
        with self.tolerating_errors():
            if self.samples is not None:
                self.samples.write(json_of({"step": step, "text": text}) + "\n")
                self.samples.flush()

    @contextmanager
    def tolerating_errors(self) -> Iterator[None]:
        """Turn an error of the disk into one warning: a full disk costs the curves, not the run."""
        try:
            yield
        except OSError as e:
            if not self.warned:
                warn(f"metrics could not be written ({e}); training goes on without them: free some space")
            self.warned = True

    def close(self) -> None:
        """Flush everything."""
        for sink in (self.file, self.samples, *self.writers):
            with self.tolerating_errors():
                if sink is not None:
                    sink.close()
        for tracker in self.trackers:
            with self.tolerating_errors():
                tracker.finish()


def step_and_kind(line: str) -> tuple[float, bool]:
    """Step of a line, and whether it is of an evaluation."""
    try:
        row = json.loads(line)
        return (row["step"] if type(row["step"]) is int else float("inf")), "val_loss" in row or "text" in row
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf"), False  # cut by the kill


def evaluations_since_best(history: list[list[float]]) -> int:
    """Evaluations since the one with the lowest validation loss."""
    losses = [val for _, _, val in history]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


ENDLESS = 10_000
"""Passes over the text that stand for "without end": small-gpt's files have max_epoch 1919810."""


def last_step(plan: Plan) -> int | None:
    """The last step; None where max_epochs is endless, and patience or Ctrl-C will end the run."""
    passes = plan.total_steps * plan.cfg.train.global_batch / len(plan.blocks)
    return None if passes > ENDLESS else plan.total_steps


def time_left(plan: Plan, per_step: float) -> str:
    """How long the run will still take, in words; empty without a known end, or beyond 30 days.

    per_step: seconds.
    """
    end = last_step(plan)
    seconds = 0 if end is None else (end - plan.progress.step) * per_step
    return "" if end is None or seconds > 30 * 86400 else f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def overfitting_warning(history: list[list[float]], dropout: float, learning_rate: float) -> str | None:
    """The warning if validation loss has risen twice in a row while training loss fell, else None.

    dropout, learning_rate: of the run; the advice is what it has not tried yet.
    """
    if len(history) < 3:
        return None
    (_, t0, v0), (_, t1, v1), (step, t2, v2) = history[-3:]
    if None in (t0, t1, t2) or not (v0 < v1 < v2 and t0 > t1 > t2):
        return None
    best = min(history, key=lambda row: row[2])
    more = "--dropout=0.2 and up" if dropout == 0 else f"more --dropout than {dropout:g}" if dropout < 0.5 else None
    advice = ["a smaller model", *([more] if more else []), f"a lower --learning_rate than {learning_rate:g}"]
    return (
        f"step {step:.0f}: the model is overfitting (it memorizes the text): training loss fell {t0:.2f} -> {t2:.2f} "
        f"while validation rose {v0:.2f} -> {v2:.2f}. The best checkpoint so far is step {best[0]:.0f} (val "
        f"{best[2]:.2f}) and is kept. More text helps most; then {', '.join(advice[:-1])}, or {advice[-1]}"
    )


@contextmanager
def on_signals(interrupt: Callable[[str], None]) -> Iterator[None]:
    """Call `interrupt` with "interrupted" on Ctrl-C, with "terminated" on SIGTERM and other signals that announce the
    end: SIGUSR1 (SLURM's --signal), SIGXCPU, SIGHUP unless nohup ignores it. The old handlers are restored.

    `interrupt` may only set a flag: a signal can arrive at any moment, also while a line is being printed.
    """
    reasons = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
    for name in ("SIGHUP", "SIGUSR1", "SIGXCPU"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            reasons[number] = "terminated"
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, lambda n, _: interrupt(reasons[n])) for number in reasons}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
