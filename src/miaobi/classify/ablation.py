"""Runs of cells: a split each, or the whole grid; finished ones are kept, so the same command again goes on."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from miaobi.checksums import Checksums
from miaobi.classify import head
from miaobi.classify.base import open_base, prepare_base
from miaobi.classify.card import card_of
from miaobi.classify.config import ClassifyConfig
from miaobi.classify.data import Labelled, differences, make_split, read_labelled
from miaobi.classify.evaluation import baselines, paired_interval
from miaobi.classify.finetune import Cell, Experiment, Interrupted, finetune
from miaobi.classify.run_directory import RESULT, cell_of, changed, identity, read_result, refuse_others, run_directory
from miaobi.console import log
from miaobi.device import keep_allocations, pick_device, pick_dtype
from miaobi.errors import UserError, number_of
from miaobi.files import aside_of, no_links, point, write_json, write_text, written_whole
from miaobi.fonts import plot_fonts
from miaobi.lock import locked
from miaobi.model.card import write_card
from miaobi.settings import Origin, with_origins, write_yaml
from miaobi.train.watch import on_signals

POOLINGS = ("mask", "no_mask")
TRAINABLE = ("full", "last_block", "lora", "head")
FIGURES = ("accuracy", "macro_f1", "calibration_error", "seconds", "trained_parameters", "peak_memory_mb")
SPLIT = ("data_sha256", "protocol", "train_fraction", "block_size", "long_texts")
"""Settings that decide what is tested: figures stand in one table where these agree."""

Row = dict[str, Any]


def train(cfg: ClassifyConfig, origin: Origin | None = None) -> dict[str, Any]:
    """Tune `cfg.base_model` once per seed; the classifiers lie in out_dir/checkpoints, `best` names the best.

    Returns run, rows (one per seed), earlier (rows of other poolings and parts that lie in out_dir), accuracy,
    macro_f1 (means), accuracy_deviation, baselines, versus_svm (difference, low, high), data, stopped.
    Raises UserError.
    """
    cells = [Cell(cfg.pooling, cfg.trainable, cfg.seed + i) for i in range(cfg.seeds)]
    run = Run(cfg, origin or {}, keep_models=True)
    result = run.go(cells)
    result["earlier"] = run.earlier(cells)
    if run.rows:
        result["accuracy"], result["accuracy_deviation"] = spread(run.rows, "accuracy")
        result["macro_f1"], _ = spread(run.rows, "macro_f1")
        if cfg.baselines and not result["stopped"]:
            result["versus_svm"] = versus_svm(run.rows, result["baselines"])
    return result


def ablate(cfg: ClassifyConfig, origin: Origin | None = None) -> dict[str, Any]:
    """The grid of POOLINGS and TRAINABLE, once per seed: ablation.csv and ablation.png in out_dir.

    Of a side that the command line names, as with --pooling=mean, there is that value alone. (A file's is that of
    `train`: one file serves both.)

    Returns run, rows, baselines, data, stopped. Raises UserError.
    """
    origin = origin or {}
    poolings = (cfg.pooling,) if origin.get("pooling") == "command line" else POOLINGS
    trainable = (cfg.trainable,) if origin.get("trainable") == "command line" else TRAINABLE
    cells = [Cell(p, t, cfg.seed + i) for i in range(cfg.seeds) for p in poolings for t in trainable]
    run = Run(cfg, origin, keep_models=False)
    result = run.go(cells)
    write_csv(run.out / "ablation.csv", result["rows"], result["baselines"])
    if result["rows"]:
        plot(run.out / "ablation.png", result["rows"], result["baselines"], cfg)
    return result


class Run:
    """A run directory: checkpoints/<cell>/result.json, with the classifier next to it where models are saved."""

    def __init__(self, cfg: ClassifyConfig, origin: Origin, keep_models: bool) -> None:
        self.keep_models, self.origin = keep_models, origin
        self.rows: list[Row] = []
        self.stopped: str | None = None
        if not cfg.data:
            raise UserError("which texts? give a .csv, .tsv or .jsonl with texts and labels: --data=reviews.csv")
        keep_allocations()
        device = pick_device(cfg.device)
        dtype = pick_dtype(cfg.dtype, device)
        data, base = read_labelled(cfg), open_base(cfg)
        self.out = run_directory(cfg, origin, base)
        self.experiment = Experiment(dataclasses.replace(cfg, out_dir=str(self.out)), base, data, device, dtype)
        self.identity = identity(cfg, data, base)
        self.counts = count(data, cfg)

    def go(self, cells: list[Cell]) -> dict[str, Any]:
        """Train the cells that are not finished, in order; an interruption gives up the one at hand.

        Raises UserError, before anything is written, where one of them was trained as something else.
        """
        refuse_others(self.out, cells, self.identity)
        events = self.experiment.cfg.tensorboard_path
        with self.enter(), on_signals(self.interrupt):
            for cell in cells:
                row = self.finished(cell)
                if row is None:
                    try:
                        row = self.train(cell, events and Path(events, cell.name if len(cells) > 1 else ""))
                    except Interrupted:
                        log(f"{self.stopped}: finished cells are kept; the same command again goes on after them")
                        break
                self.rows.append(row)
        simple = (
            [] if self.stopped or not self.experiment.cfg.baselines else self.baselines({cell.seed for cell in cells})
        )
        self.point_at_best()
        return {"run": str(self.out), "rows": self.rows, "baselines": simple, "data": self.counts,
                "stopped": self.stopped}  # fmt: skip

    def enter(self) -> ExitStack:
        """Make the run directory, whose only writer this is until the stack is closed, and write config.yaml."""
        stack = ExitStack()
        no_links(self.out, "checkpoints", "baselines")
        try:
            stack.enter_context(locked(self.out))
            (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_yaml(self.out / "config.yaml", with_origins(self.experiment.cfg, self.origin))
        except OSError as e:
            stack.close()
            raise UserError(f"out_dir {self.out} cannot be written: {e.strerror}; choose another --out_dir") from e
        return stack

    def interrupt(self, reason: str) -> None:
        """Ask the cell at hand to give up; asked again, stop at once."""
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = reason

    def finished(self, cell: Cell) -> Row | None:
        """Figures of an earlier command, with the classifier where it is to be kept."""
        path = self.out / "checkpoints" / cell.name
        saved = read_result(path / RESULT)
        if saved is None or (self.keep_models and not (path / "config.json").is_file()):
            return None
        log(f"{cell.name}: finished earlier, accuracy {saved['row']['accuracy']:.2%}")
        return saved["row"]

    def train(self, cell: Cell, events: Path | None) -> Row:
        """Train a cell and write it down, whole or not at all. events: where TensorBoard's go as well."""
        logs = self.out / "logs" / cell.name
        judge, _, row = finetune(self.experiment, cell, logs, lambda: self.stopped is not None, events)
        place = self.out / "checkpoints" / cell.name
        with written_whole(place) as directory:
            if self.keep_models:
                head.save(directory, judge)
                write_card(directory, card_of(self.experiment, judge, row, self.identity), place)
            write_json(directory / RESULT, {"settings": self.identity, "row": row})
            with Checksums() as checksums:
                checksums.write(directory)
        log(f"{cell.name}: accuracy {row['accuracy']:.2%}, macro-F1 {row['macro_f1']:.4f}, "
            f"calibration error {row['calibration_error']:.4f}, {row['seconds']:.0f} s")  # fmt: skip
        return row

    def earlier(self, cells: list[Cell]) -> list[Row]:
        """Figures that other commands left here, of the same split of the same texts but another pooling or part."""
        now, dated = {(cell.pooling, cell.trainable) for cell in cells}, []
        for path in (self.out / "checkpoints").glob(f"*/{RESULT}"):
            saved = read_result(path)
            if saved is None or any(saved["settings"].get(key) != self.identity[key] for key in SPLIT):
                continue
            if path.parent.name != "best" and (saved["row"]["pooling"], saved["row"]["trainable"]) not in now:
                dated.append((path.stat().st_mtime, saved["row"]))
        return [row for _, row in sorted(dated, key=lambda one: one[0])]

    def baselines(self, seeds: Iterable[int]) -> list[Row]:
        """Both baselines on the split of every seed."""
        results, cfg, data = [], self.experiment.cfg, self.experiment.data
        for seed in sorted(seeds):
            path = self.out / "baselines" / f"{seed}.json"
            saved = read_result(path, "rows")
            if saved is None or changed(saved["settings"], self.identity) is not None:
                _, tokenizer, reading = prepare_base(cfg, self.experiment.base, seed)
                split = make_split(data, cfg, seed, reading, tokenizer)
                saved = {"settings": self.identity, "rows": baselines(split, data.names, seed)}
                path.parent.mkdir(exist_ok=True)
                write_json(path, saved)
            results += saved["rows"]
        return results

    def point_at_best(self) -> None:
        """`checkpoints/best` names this command's classifier that does best on its dev part; of equals the first."""
        rows = [row for row in self.rows if self.keep_models]
        if rows:
            best = max(rows, key=lambda row: row["dev_accuracy"])
            point(self.out / "checkpoints" / "best", cell_of(best).name)


def count(data: Labelled, cfg: ClassifyConfig) -> dict[str, Any]:
    """`differences` of the protocols for the log and the result; {} where a label is too rare for both."""
    try:
        counts = differences(data, cfg.seed, cfg.block_size or 256, cfg.train_fraction)
    except UserError:
        if cfg.protocol == "corrected":
            raise
        return {}
    published = counts["as_published"]
    log(
        f"{number_of(counts['reviews'], 'text')}, {number_of(len(data.names), 'label')}: {counts['empty']} empty, "
        f"{number_of(counts['duplicates'], 'duplicate')} "
        f"({number_of(counts['duplicates_with_two_labels'], 'text')} with two labels), "
        f"{number_of(data.skipped, 'row')} left out"
    )
    log(
        f"as-published: {number_of(published['chunks'], 'chunk')}, {published['test_chunks']:,} of them to test; "
        f"{published['test_chunks_whose_review_is_also_trained_on']} of a text that is also trained on, "
        f"{published['test_chunks_with_a_duplicate_trained_on']} of a text with a duplicate there"
    )
    parts = counts["corrected"]
    log(
        f"corrected: {number_of(parts['train'], 'text')} to train, {parts['dev']:,} to choose, "
        f"{parts['test']:,} to test"
    )
    return counts


# Figures


def spread(rows: list[Row], figure: str) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; 0 for one row)."""
    values = [row[figure] for row in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def versus_svm(rows: list[Row], simple: list[Row]) -> dict[str, float | None]:
    """Accuracy of rows minus that of the SVM on the same splits: mean, and its 95% interval."""
    svm = {row["seed"]: row["accuracy"] for row in simple if row["name"] == "svm"}
    gap, low, high = paired_interval([row["accuracy"] for row in rows], [svm[row["seed"]] for row in rows])
    only_one = len(rows) < 2
    return {"difference": gap, "low": None if only_one else low, "high": None if only_one else high}


def by_cell(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """(pooling, trainable) -> rows of its seeds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["pooling"], row["trainable"]), []).append(row)
    return groups


def write_csv(path: Path, rows: list[Row], simple: list[Row]) -> None:
    """One line per cell and seed; baselines have their name under pooling."""
    columns = ("protocol", "pooling", "trainable", "seed", *FIGURES)
    text = io.StringIO()
    lines = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    lines.writerows({"pooling": row["name"], **row} for row in simple)
    write_text(path, text.getvalue())


def plot(path: Path, rows: list[Row], simple: list[Row], cfg: ClassifyConfig) -> None:
    """Accuracy of every cell as bars with deviations, the SVM as a line."""
    from matplotlib import rc_context

    with rc_context(plot_fonts()):
        _plot(path, rows, simple, cfg)


def _plot(path: Path, rows: list[Row], simple: list[Row], cfg: ClassifyConfig) -> None:
    from matplotlib.figure import Figure

    cells = by_cell(rows)
    poolings, shown = (list(dict.fromkeys(side)) for side in zip(*cells, strict=True))
    step = 0.8 / len(poolings)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for side, pooling in enumerate(poolings):
        aside = step * (side - (len(poolings) - 1) / 2)
        places = [i for i, trainable in enumerate(shown) if (pooling, trainable) in cells]
        spreads = [spread(cells[pooling, shown[i]], "accuracy") for i in places]
        bars = axes.bar([i + aside for i in places], [100 * mean for mean, _ in spreads], 0.95 * step,
                        yerr=[100 * deviation for _, deviation in spreads], label=pooling)  # fmt: skip
        axes.bar_label(bars, fmt="%.1f")
    for name in dict.fromkeys(row["name"] for row in simple):
        mean, _ = spread([row for row in simple if row["name"] == name], "accuracy")
        axes.axhline(100 * mean, linestyle="--", color="gray")
        axes.text(len(shown) - 0.5, 100 * mean, name, va="bottom", ha="right", color="gray")
    lowest = min(row["accuracy"] for row in [*rows, *simple])
    axes.set(xticks=range(len(shown)), xticklabels=shown, ylabel="accuracy, %", ylim=(max(0, 100 * lowest - 8), 100))
    axes.set_title(f"{cfg.protocol}: {cfg.data}", parse_math=False)  # a name may have $ in it
    axes.legend(loc="lower left")
    temporary = aside_of(path)  # in place of a link, not through it
    try:
        figure.savefig(temporary, dpi=150, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
