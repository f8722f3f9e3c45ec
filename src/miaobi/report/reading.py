"""Reads and checks a run directory; nothing in it is executed or changed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miaobi.errors import UserError, number_of
from miaobi.files import pointed, read_json
from miaobi.report.statistics import TextStatistics, text_statistics
from miaobi.settings import flatten, load_config, read_yaml, sections
from miaobi.train.run_directory import Progress, load_progress
from miaobi.train.summary import Summary, read_summary
from miaobi.yaml_file import remarks

CURVES = ("train_loss", "val_loss", "val_bits_per_char", "train_eval_loss", "learning_rate", "grad_norm",
          "tokens_per_second", "epoch")  # fmt: skip
LARGEST = 64 << 20
"""Largest metrics or samples file that is read, in bytes."""


@dataclass(frozen=True)
class Setting:
    """A key of the configuration."""

    section: str
    key: str
    value: Any
    origin: str

    @property
    def is_given(self) -> bool:
        """Whether the user set it."""
        return self.origin != "default"


@dataclass(frozen=True)
class Sample:
    """A text that the model generated after `step` steps."""

    step: int
    text: str


@dataclass(frozen=True)
class Evaluation:
    """An evaluation: nats per token, bits per character, and training loss."""

    step: int
    val_loss: float
    val_bits: float
    train_loss: float | None
    """On training text with the weights of this step if that was measured, else the mean over the steps before."""


@dataclass
class RunRecord:
    """A run, as read from its directory."""

    path: Path
    name: str
    settings: list[Setting]
    curves: dict[str, list[tuple[int, float]]]
    """Metric -> (step, finite value), by step."""
    not_finite: int | None
    """First step with a value that is not finite."""
    evaluations: list[Evaluation]
    samples: list[Sample]
    progress: Progress | None
    """None if no checkpoint was written."""
    summary: Summary | None
    text: TextStatistics | None
    planned: tuple[float | None, int | None]
    """(seconds, bytes) predicted by plan.json, if the output of `miaobi plan ... --json` was saved there."""
    missing: list[str] = field(default_factory=list)
    """What could not be read, and why, in English."""

    def value(self, key: str) -> Any:
        """A setting; if it was left open, its resolved value."""
        found = next((setting.value for setting in self.settings if setting.key == key), None)
        return self.summary.resolved.get(key) if found is None and self.summary else found

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the lowest validation loss."""
        return min(self.evaluations, key=lambda e: e.val_loss, default=None)

    @property
    def bits_per_nat(self) -> float | None:
        """Bits per character for one nat per token, on the validation text."""
        scored = next((e for e in self.evaluations if e.val_loss > 0), None)
        return scored.val_bits / scored.val_loss if scored else None


def read_run(name: str) -> RunRecord:
    """Read a run of `miaobi train`. Raises UserError if it is none, or if a required file is damaged."""
    path = Path(name)
    if not path.is_dir():
        why = "that is a file" if path.exists() else "no such directory"
        raise UserError(f"no run at {path}: {why}. Give the --out_dir of `miaobi train`")
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is no run of `miaobi train`: it has no config.yaml")
    missing: list[str] = []
    rows = read_lines(path / "metrics.jsonl", missing)
    curves, not_finite = read_curves(rows)
    last = pointed(path / "checkpoints" / "last") if (path / "checkpoints").is_dir() else None
    progress = read_progress(last, missing)
    settings = read_settings(path / "config.yaml", missing)
    unknown: list[str] = []
    summary = read_summary(path, unknown)
    if unknown:
        missing.append(f"{unknown_keys(unknown)} of summary.json: another version of miaobi wrote them")
    return RunRecord(
        path=path, name=path.resolve().name, settings=settings, curves=curves, not_finite=not_finite,
        evaluations=evaluations_of(rows), samples=read_samples(path / "samples.jsonl", missing), progress=progress,
        summary=summary, text=read_text(path, settings, missing), planned=read_plan(path), missing=missing,
    )  # fmt: skip


def unknown_keys(names: list[str]) -> str:
    """Unknown names, as text."""
    return f"{len(names)} unknown key(s) ({', '.join(name[:40] for name in names[:5])}{', …' * (len(names) > 5)})"


def read_progress(checkpoint: Path | None, missing: list[str]) -> Progress | None:
    """Progress of a checkpoint, if there is one that this version can read."""
    if checkpoint is None:
        missing.append("no checkpoint was written")
        return None
    try:
        return load_progress(checkpoint)
    except UserError as e:
        missing.append(f"the counters of the last checkpoint could not be read: {e}")
        return None


def read_settings(config: Path, missing: list[str]) -> list[Setting]:
    """The configuration of a run, and the origin of each value; keys of another version are left out and reported.

    Raises UserError if it is not a configuration of train.
    """
    values, _ = read_yaml(config)
    where, origin = sections(), remarks(config)
    unknown = [key for key in values if key not in where]
    if unknown and "out_dir" in values:  # which every run has written
        missing.append(f"{unknown_keys(unknown)} of config.yaml: another version of miaobi wrote them")
        values = {key: value for key, value in values.items() if key in where}
    try:
        cfg, _ = load_config(None, list(values.items()))
    except UserError as e:
        raise UserError(f"{config} is not the configuration of a run of `miaobi train`: {e}") from e
    return [Setting(where[key], key, value, origin.get(key, "default")) for key, value in flatten(cfg).items()]


def read_lines(file: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The JSON objects with a step in a file of lines, by step; invalid lines are counted and reported."""
    if not file.is_file():
        missing.append(f"{file.name} is missing")
        return []
    if file.stat().st_size > LARGEST:
        raise UserError(f"{file} has {file.stat().st_size:,} bytes; a report reads at most {LARGEST:,}")
    rows, damaged = [], 0
    with file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for line in filter(str.strip, lines):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 1 << 53:
                rows.append(row)
            else:
                damaged += 1
    if damaged:
        missing.append(f"{damaged} of {number_of(len(rows) + damaged, 'line')} of {file.name} could not be read")
    return sorted(rows, key=lambda row: row["step"])


def read_curves(rows: list[dict[str, Any]]) -> tuple[dict[str, list[tuple[int, float]]], int | None]:
    """The curves of metrics.jsonl, and the first step with a value that is not finite."""
    curves: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVES}
    not_finite = None
    for row in rows:
        for name in CURVES:
            value = row.get(name)
            if is_finite(value):
                curves[name].append((row["step"], float(value)))
            elif not_finite is None and type(value) is float:
                not_finite = row["step"]
    return curves, not_finite


def evaluations_of(rows: list[dict[str, Any]]) -> list[Evaluation]:
    """The evaluations; of several at one step, the last."""
    found: dict[int, Evaluation] = {}
    train: tuple[float, int] = (0.0, 0)
    for row in rows:
        value = row.get("train_loss")
        if is_finite(value):
            train = (train[0] + value, train[1] + 1)
        if is_finite(row.get("val_loss")) and is_finite(row.get("val_bits_per_char")):
            now = row.get("train_eval_loss")
            mean = train[0] / train[1] if train[1] else None
            train_loss = float(now) if is_finite(now) else mean
            found[row["step"]] = Evaluation(
                row["step"], float(row["val_loss"]), float(row["val_bits_per_char"]), train_loss
            )
            train = (0.0, 0)
    return list(found.values())


def is_finite(value: Any) -> bool:
    """Whether a JSON value is a number that can be drawn."""
    return type(value) in (int, float) and abs(value) < 1e300


def read_samples(file: Path, missing: list[str]) -> list[Sample]:
    """The texts that the model generated at its evaluations."""
    if not file.is_file():
        return []  # of a run without samples, or of an older version
    rows = read_lines(file, missing)
    return [Sample(row["step"], row["text"]) for row in rows if isinstance(row.get("text"), str)]


def read_plan(run: Path) -> tuple[float | None, int | None]:
    """The predictions of plan.json. Raises UserError if it is damaged."""
    plan = read_json(run / "plan.json")
    time, memory = (plan.get(key) if isinstance(plan.get(key), dict) else {} for key in ("time", "memory"))
    seconds, size = time.get("seconds"), memory.get("run")
    return float(seconds) if is_finite(seconds) else None, size if type(size) is int and size >= 0 else None


def read_text(run: Path, settings: list[Setting], missing: list[str]) -> TextStatistics | None:
    """Statistics of the training text, if its prepared data still exists."""
    given = next(setting.value for setting in settings if setting.key == "data")
    places = (Path(given), run / "data")  # raw text was prepared into the run
    try:
        return text_statistics(next(place for place in places if (place / "manifest.json").is_file()))
    except StopIteration:
        missing.append(f"the prepared text, {given}, is not there any more, or it is nanoGPT's")
    except UserError as e:
        missing.append(f"the prepared text could not be read: {e}")
    return None
