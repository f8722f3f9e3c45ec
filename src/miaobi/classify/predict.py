"""Labels of new texts: one, or files of any size in the order of their lines."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from miaobi.classify import head
from miaobi.classify.config import PredictConfig
from miaobi.classify.data import Row, read_lines, read_rows
from miaobi.classify.evaluation import scores
from miaobi.classify.head import Judge
from miaobi.classify.labels import label_names
from miaobi.console import json_text, log, warn, warn_of_encoding
from miaobi.corpus.sources import FORMAT_BY_NAME, spooled
from miaobi.device import explain_memory, keep_allocations, pick_device, pick_dtype
from miaobi.errors import UserError, brief, number_of
from miaobi.released import released

FILES = (".txt", *FORMAT_BY_NAME, ".gz", ".xz", ".zst", ".zip")
"""What ends like this is the name of a file, and never a text."""


def predict(cfg: PredictConfig, as_json: bool = False) -> None:
    """`miaobi classify predict`: labels on stdout as they come; see `write`."""
    try:
        judge = load(cfg.model or released("sentiment")[0], cfg)
    except UserError as e:
        if cfg.input is None and cfg.model and not os.path.exists(cfg.model):  # one word, which may be meant as a TEXT
            raise UserError(f"{e}. A TEXT for the classifier that comes with miaobi is given as --input=TEXT") from e
        raise
    write(judge, read_input(cfg), cfg, as_json)


def load(model: str, cfg: PredictConfig) -> Judge:
    """A classifier ready to predict. Raises UserError."""
    keep_allocations()
    device = pick_device(cfg.device)
    judge = head.load(model, device, pick_dtype(cfg.dtype, device))
    judge.micro_tokens = cfg.micro_tokens
    judge.classifier.eval()
    return judge


def read_input(cfg: PredictConfig) -> Iterator[Row]:
    """The texts that `cfg.input` means, one by one: a text, a file, or a text a line of - (standard input) or a pipe.

    Rows that `skip_bad` leaves out are counted. Raises UserError for a file that is missing, has no such column or
    cannot be read, and for a directory.
    """
    texts, skipped = cfg.input, 0
    if texts is None or texts == "-":
        rows = read_stream(sys.stdin.buffer, "standard input", cfg.skip_bad)
    elif os.path.isdir(texts):  # pathlib's raises on a long text
        raise UserError(f"{texts} is a directory; give a text, a file, or - for lines of standard input")
    elif os.path.isfile(texts) or Path(texts).suffix.lower() in FILES:
        rows = read_file(texts, cfg)
    elif os.path.exists(texts):  # <(...) of a shell
        rows = read_pipe(texts, cfg.skip_bad)
    else:
        rows = iter([Row("the text", texts)])
    for row in rows:
        if row is None:
            skipped += 1
        else:
            yield row
    if skipped:
        log(f"{number_of(skipped, 'row')} left out")


def read_file(name: str, cfg: PredictConfig) -> Iterator[Row | None]:
    """Rows of a file, None for those that are left out. Raises UserError."""
    if not os.path.exists(name):
        raise UserError(f"{name}: no such file; a TEXT that is to be judged does not end like a file's name")
    return read_rows(name, cfg.text_column, cfg.label_column, cfg.skip_bad, cfg.label_column is not None)


def read_pipe(name: str, skip_bad: bool) -> Iterator[Row | None]:
    """`read_stream` of a pipe with a name."""
    with open(name, "rb") as stream:
        yield from read_stream(stream, name, skip_bad)


def read_stream(stream: BinaryIO, name: str, skip_bad: bool) -> Iterator[Row]:
    """The lines of a stream, in any encoding that a file may have. Raises UserError for what is no text."""
    with spooled(stream, name) as source:
        if source.size:
            yield from read_lines(source, skip_bad)


def predictions(judge: Judge, rows: Iterator[Row], cfg: PredictConfig) -> Iterator[tuple[Row, dict[str, Any]]]:
    """(row, {label, probability, probabilities}) in the order of `rows`, read `batch_size` at a time."""
    advice = "try --micro_tokens=1024, then a smaller --batch_size"
    while batch := list(islice(rows, cfg.batch_size)):
        with explain_memory(judge.device, advice):
            probabilities = judge.probabilities([row.text for row in batch])
        for row, values in zip(batch, probabilities, strict=True):
            best = int(values.argmax())
            chances = {name: round(float(p), 4) for name, p in zip(judge.labels, values, strict=True)}
            yield row, {"label": judge.labels[best], "probability": chances[judge.labels[best]],
                        "probabilities": chances}  # fmt: skip


class Score:
    """Right and wrong answers where the true labels are known."""

    def __init__(self, labels: list[str]) -> None:
        self.labels, self.true, self.predicted, self.unseen = list(labels), [], [], set()
        self.unlabelled = 0

    def add(self, row: Row, label: str) -> None:
        """Count one answer; a true label that the classifier has not learned is always a wrong one."""
        if row.label is None:
            return
        name = label_names([row.label], known=self.labels).get(row.label)  # 1.0 is 1; nan may be a word
        if name is None:
            self.unlabelled += 1
            return
        if name not in self.labels:
            self.labels.append(name)
            self.unseen.add(name)
            warn(f"{row.location}: label {brief(name)} was not in training; such rows count as wrong")
        self.true.append(self.labels.index(name))
        self.predicted.append(self.labels.index(label))

    def result(self) -> dict[str, Any]:
        """accuracy, macro_f1 and confusion over `labels`; {} without true labels."""
        if not self.true:
            return {}
        figures = scores(np.array(self.predicted), np.array(self.true), len(self.labels))
        return figures | {"labels": self.labels, "unseen_labels": sorted(self.unseen)}


def write(judge: Judge, rows: Iterator[Row], cfg: PredictConfig, as_json: bool) -> None:
    """Print the predictions: lines of label, probability and text as they come; or one JSON object, once all is read,
    so that a row that cannot be read leaves no half of it.

    Where the true labels are known, accuracy and macro-F1 follow: in the object, else on stderr.
    """
    score = Score(judge.labels)
    if as_json:
        with tempfile.TemporaryFile("w+", encoding="utf-8", newline="") as buffer:  # as long as the input may be
            separator = ""
            for row, prediction in predictions(judge, rows, cfg):
                score.add(row, prediction["label"])
                buffer.write(separator + json_text({"text": row.text, **prediction}))
                separator = ", "
            buffer.seek(0)
            print('{"predictions": [', end="")
            shutil.copyfileobj(buffer, sys.stdout)
            print("]", *(f"{json_text(k)}: {json_text(v)}" for k, v in score.result().items()), sep=", ", end="}\n")
    else:
        warn_of_encoding()
        for row, prediction in predictions(judge, rows, cfg):
            score.add(row, prediction["label"])
            # one line, three columns
            label, text = (" ".join(value.split()) for value in (prediction["label"], row.text))
            print(f"{label}\t{prediction['probability']:.4f}\t{text}")
        if result := score.result():
            log(f"accuracy {result['accuracy']:.2%}, macro-F1 {result['macro_f1']:.4f}")
    if score.unlabelled:
        log(f"not scored, without a label: {number_of(score.unlabelled, 'row')}")
