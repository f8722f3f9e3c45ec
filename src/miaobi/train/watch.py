"""What a run writes down, and what it warns of."""

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

    Failing to write them never ends a run.
    """

    def __init__(
        self,
        out: Path,
        start: int,
        evaluated: bool = True,
        events: str | Path | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """start: steps that are done. evaluated: whether `start` was before it was saved, where it was to be. events:
        a directory that gets the TensorBoard events as well."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only needed here

        self.warned, self.file, self.samples, self.boards, self.trackers = False, None, None, [], trackers
        with self.going_on():
            self.file = self.continued(out / "metrics.jsonl", start, evaluated)
            self.samples = self.continued(out / "samples.jsonl", start, evaluated)
        for directory in {Path(place).resolve() for place in (out, events) if place is not None}:
            with self.going_on():
                self.boards.append(SummaryWriter(str(directory), purge_step=start + 1))

    @classmethod
    def of(cls, plan: Plan) -> Metrics:
        """Those of a run, going on from where it stands."""
        cfg, p = plan.cfg.train, plan.progress
        asked = dict.fromkeys((*cfg.trackers, *(["wandb"] if cfg.wandb_log else [])))
        about = About(cfg.wandb_project, cfg.wandb_run_name, p.run, flatten(plan.cfg))
        trackers = [start(kind, plan.out, about) for kind in asked]
        return cls(plan.out, p.step, p.evaluated == p.step, cfg.tensorboard_path, trackers)

    @staticmethod
    def continued(path: Path, start: int, evaluated: bool) -> TextIO:
        """A file of lines to append to, without those of steps that are now run, or evaluated, again after a kill."""
        kept = []
        if start and path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                step, is_evaluation = _read(line)
                if step < start or (step == start and (evaluated or not is_evaluation)):
                    kept.append(line)
        write_text(path, "".join(f"{line}\n" for line in kept))  # in place of a link, not through it
        return path.open("a", encoding="utf-8")

    def log(self, step: int, **values: float | None) -> None:
        """One line of metrics.jsonl, one point of every curve."""
        known = {key: value for key, value in values.items() if value is not None}
        with self.going_on():
            if self.file is not None:
                self.file.write(json.dumps({"step": step, **known}) + "\n")
                self.file.flush()
        with self.going_on():
            for key, value in known.items():
                for board in self.boards:
                    board.add_scalar(key, value, step)
        for tracker in self.trackers:
            with self.going_on():
                tracker.log(known, step=step)

    def sample(self, step: int, text: str) -> None:
        """One line of samples.jsonl: what the model wrote at an evaluation."""
        with self.going_on():
            if self.samples is not None:
                self.samples.write(json_of({"step": step, "text": text}) + "\n")
                self.samples.flush()

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """A full disk costs curves, not the run; said once."""
        try:
            yield
        except OSError as e:
            if not self.warned:
                warn(f"metrics could not be written ({e}); training goes on without them: free some space")
            self.warned = True

    def close(self) -> None:
        """Flush everything."""
        for sink in (self.file, self.samples, *self.boards):
            with self.going_on():
                if sink is not None:
                    sink.close()
        for tracker in self.trackers:
            with self.going_on():
                tracker.finish()


def _read(line: str) -> tuple[float, bool]:
    """Step of a line, and whether it tells of an evaluation."""
    try:
        row = json.loads(line)
        return (row["step"] if type(row["step"]) is int else float("inf")), "val_loss" in row or "text" in row
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf"), False  # cut by the kill


def since_best(history: list[list[float]]) -> int:
    """Evaluations since the one with the lowest validation loss."""
    losses = [val for _, _, val in history]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


ENDLESS = 10_000
"""Passes over the text beyond which nobody means the end: small-gpt's files have max_epoch 1919810."""


def known_end(plan: Plan) -> int | None:
    """The last step; None where max_epochs is endless, and patience or Ctrl-C will end the run."""
    passes = plan.total_steps * plan.cfg.train.global_batch / len(plan.blocks)
    return None if passes > ENDLESS else plan.total_steps


def time_left(plan: Plan, per_step: float) -> str:
    """How long the run will still take, in words; empty without a known end, or beyond 30 days.

    per_step: seconds.
    """
    end = known_end(plan)
    seconds = 0 if end is None else (end - plan.progress.step) * per_step
    return "" if end is None or seconds > 30 * 86400 else f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def overfitting(history: list[list[float]], dropout: float, learning_rate: float) -> str | None:
    """A plain-words warning when validation has risen twice running while training fell, else None.

    dropout, learning_rate: what the run has; the advice is what it has not tried.
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
        f"step {step:.0f}: the model is learning the text by heart: training loss fell {t0:.2f} -> {t2:.2f} while "
        f"validation rose {v0:.2f} -> {v2:.2f}. The best checkpoint so far is step {best[0]:.0f} (val {best[2]:.2f}) "
        f"and is kept. More text helps most; then {', '.join(advice[:-1])}, or {advice[-1]}"
    )


@contextmanager
def on_signals(interrupt: Callable[[str], None]) -> Iterator[None]:
    """Call `interrupt` with "interrupted" on Ctrl-C, "terminated" on SIGTERM and what else announces the end: SIGUSR1
    (SLURM's --signal), SIGXCPU, SIGHUP where nohup does not ignore it. The old handlers return.

    `interrupt` must only take a note: it may come in the middle of anything, of a line being printed too.
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
