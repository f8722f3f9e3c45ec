"""Texts of tables and lines, with their labels: read, split by either protocol, cut into pieces of token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from miaobi.classify.config import ClassifyConfig
from miaobi.classify.labels import NUMBER, label_names, label_text
from miaobi.console import log, warn
from miaobi.corpus.dataset import derive
from miaobi.corpus.overlap import TEXT_COLUMNS, evaluation_of, normalized
from miaobi.corpus.records import HALF_A_CHARACTER, is_whole, open_records
from miaobi.corpus.sources import NotTextError, Source, find_sources
from miaobi.corpus.tables import Lines, Record, refuse_repeated, repeated, wrong_width
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError, brief, names_listed, number_of

LABEL_COLUMNS = ("label", "labels", "sentiment", "class")
LEAST = 3  # examples of a label: one for each part


@dataclass(frozen=True)
class Row:
    """One text of a file. label: None where there is no such column, "" where the cell is empty."""

    location: str
    text: str
    label: str | None = None


@dataclass(frozen=True)
class Labelled:
    """Texts and their labels: labels (N,) int64 are indices into `names`."""

    texts: list[str]
    labels: np.ndarray
    names: list[str]
    skipped: int = 0
    """Rows that were left out because they could not be read or had no label."""


@dataclass(frozen=True)
class Part:
    """What is trained on or scored: N units (reviews; as-published: chunks) in R >= N rows of token ids.

    texts, labels (N,): of the units. rows: R arrays of ids, wrapped. owner (R,): the unit of each row.
    """

    texts: list[str]
    labels: np.ndarray
    rows: list[np.ndarray]
    owner: np.ndarray


@dataclass(frozen=True)
class Split:
    """The three parts; as-published has no dev of its own: it is the test part."""

    train: Part
    dev: Part
    test: Part


@dataclass(frozen=True)
class Reading:
    """How a text becomes rows of token ids; saved with a classifier."""

    block_size: int
    """Tokens of a row at most, `before` and `after` included."""
    long_texts: str
    """chunks or truncate."""
    before: tuple[int, ...]
    """Ids in front of every row."""
    after: tuple[int, ...]
    """Ids behind it."""
    pad_id: int

    def cut(self, ids: np.ndarray) -> list[np.ndarray]:
        """A text's ids (n,) as rows. Chunks are full but for the last, which reaches back to be full too."""
        room = self.block_size - len(self.before) - len(self.after)
        starts = [0]
        if self.long_texts == "chunks" and len(ids) > room:
            starts = [*range(0, len(ids) - room, room), len(ids) - room]
        pieces = [ids[start : start + room].astype(np.int64) for start in starts]
        wrapped = [np.concatenate((self.before, piece, self.after)).astype(np.int64) for piece in pieces]
        return [row if len(row) else np.array([self.pad_id]) for row in wrapped]

    def rows(self, texts: list[str], tokenizer: Tokenizer) -> tuple[list[np.ndarray], np.ndarray]:
        """Rows of all texts, and whose each is (R,). Raises UserError on a lone surrogate."""
        ids, starts = tokenizer.encode_documents(texts, end_id=None)
        ends = np.append(starts[1:], len(ids))
        cut = [self.cut(ids[start:end]) for start, end in zip(starts, ends, strict=True)]
        return [row for rows in cut for row in rows], np.repeat(np.arange(len(texts)), [len(rows) for rows in cut])


# Reading


def read_rows(name: str, text_column: str | None, label_column: str | None, skip_bad: bool = False,
              labels: bool = True) -> Iterator[Row | None]:  # fmt: skip
    """Rows of tables, JSON lines and parquet one by one, None for one that `skip_bad` leaves out; else their lines.

    labels: whether a label column is needed. Quoted cells may hold line breaks.

    Raises:
        UserError: missing files and columns, rows that cannot be read.
    """
    for source in find_sources([name]):
        try:
            if source.format == "text":
                yield from read_lines(source, skip_bad)
            else:
                yield from _rows(source, text_column, label_column, skip_bad, labels)
        except NotTextError as error:
            if not source.leaves_out(error):
                raise
            warn(f"left out from where it is damaged: {error}")


def read_lines(source: Source, skip_bad: bool) -> Iterator[Row]:
    """The lines of a text as rows without labels; what was replaced in them is said."""
    lines = Lines(source, skip_bad)
    for number, line in enumerate(lines, start=1):
        yield Row(f"{source.name}, line {number}", line.rstrip("\r\n"))
    _say_lost(source, lines.lost)


def _rows(
    source: Source, text_column: str | None, label_column: str | None, skip_bad: bool, labels: bool
) -> Iterator[Row | None]:
    names, records = open_records(source, skip_bad)
    columns = None if names is None else find_columns(source, names, text_column, label_column, labels)
    lost = 0
    for record in records:
        lost += record.lost
        problem = record.problem
        if not problem and columns is None:
            columns = find_columns(source, list(record.values), text_column, label_column, labels)
        problem = problem or _problem(record, columns, names)
        if not problem:
            text, label = columns
            yield Row(
                record.location, record.values[text], None if label is None else label_text(record.values.get(label))
            )
        elif skip_bad:
            yield None
        else:
            record.refuse(problem)
    _say_lost(source, lost)


def _say_lost(source: Source, lost: int) -> None:
    if lost:
        warn(f"{source.name}: replaced, as it could not be read: {number_of(lost, 'byte')}")


def find_columns(
    source: Source, names: list[str], text: str | None, label: str | None, labels: bool
) -> tuple[str, str | None]:
    """The text and the label column. Raises UserError where one is missing, or there several times."""
    columns = []
    for asked, known, key in (text, TEXT_COLUMNS, "text_column"), (label, LABEL_COLUMNS, "label_column"):
        if key == "label_column" and asked is None and not labels:
            return columns[0], None
        name = asked if asked is not None else next((n for n in known if n in names), None)
        if name is None or name not in names:
            asked = f"no column {asked!r}" if asked is not None else f"no column called {', '.join(known)}"
            raise UserError(f"{source.name}: {asked}; there are {names_listed(names)}. "
                            f"Name one with --{key}")  # fmt: skip
        if name in repeated(names):
            refuse_repeated(source.name, name)
        columns.append(name)
    return columns[0], columns[1]


def _problem(record: Record, columns: tuple[str, str | None], names: list[str] | None) -> str:
    """Why a record has no text or no label that can be read, or ""."""
    text, label = columns
    if names is not None and any(column is not None and column not in record.values for column in columns):
        return wrong_width(len(record.values), len(names))
    value = record.values.get(text)
    if not isinstance(value, str):
        return f"{text} is {type(value).__name__}, not text"
    found = None if label is None else record.values.get(label)
    if found is not None and not isinstance(found, str | int | float | Decimal):
        return f"{label} is {type(found).__name__}, and a label is one word or number"
    return "" if is_whole(f"{value}{found}") else HALF_A_CHARACTER


def read_labelled(cfg: ClassifyConfig) -> Labelled:
    """All of `cfg.data`. Labels are sorted, as numbers where all are.

    Raises:
        UserError: what `read_rows` raises; rows without a label; fewer than two labels.
    """
    rows, skipped = [], 0
    for row in read_rows(cfg.data, cfg.text_column, cfg.label_column, cfg.skip_bad):
        if row is not None and row.label is None:
            raise UserError(f"{cfg.data}: lines of text have no labels; give a .csv, .tsv, .jsonl or .parquet")
        rows += [row] if row is not None else []
        skipped += row is None
    if cfg.without:
        evaluation, before = evaluation_of((cfg.without,)), len(rows)
        rows = [row for row in rows if not evaluation.overlaps(row.text)]
        log(f"left out, as in {cfg.without} too: {number_of(before - len(rows), 'text')}")
    found = label_names(row.label for row in rows)
    unlabelled = [row.location for row in rows if row.label not in found]
    if unlabelled and not cfg.skip_bad:
        raise UserError(f"{unlabelled[0]}: no label ({number_of(len(unlabelled), 'such row')} in all); fill them in, "
                        "or leave them out with --skip_bad=True")  # fmt: skip
    skipped += len(unlabelled)
    texts = [row.text for row in rows if row.label in found]
    labels = [found[row.label] for row in rows if row.label in found]
    names = sorted(set(labels))
    if all(map(NUMBER.fullmatch, names)):
        names.sort(key=Decimal)
    if len(names) < 2:
        raise UserError(f"{cfg.data}: {'only one label, ' + repr(names[0]) if names else 'no labelled rows'}; "
                        "a classifier needs at least two labels: check --label_column")  # fmt: skip
    index = {name: i for i, name in enumerate(names)}
    return Labelled(texts, np.array([index[label] for label in labels], np.int64), names, skipped)


# Protocols


def distinct(data: Labelled) -> Labelled:
    """The first of every text that is not empty."""
    first: dict[str, int] = {}
    for i, text in enumerate(data.texts):
        if key := normalized(text):
            first.setdefault(key, i)
    rows_left = list(first.values())
    return Labelled([data.texts[i] for i in rows_left], data.labels[rows_left], data.names, data.skipped)


def stratified(labels: np.ndarray, names: list[str], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of train, dev and test: 80/10/10 of every label, drawn by `seed`.

    Raises UserError for a label with fewer than LEAST examples.
    """
    parts: list[list[np.ndarray]] = [[], [], []]
    for label, name in enumerate(names):
        rows = np.flatnonzero(labels == label)
        if len(rows) < LEAST:
            raise UserError(f"label {brief(name)} has {len(rows)} distinct texts; at least {LEAST} are needed, one "
                            "each to train, to choose and to test: add some, or remove the label")  # fmt: skip
        order = np.random.default_rng(derive(seed, "split", label)).permutation(rows)
        tenth = max(1, round(0.1 * len(rows)))
        for part, chosen in zip(parts, (order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth]), strict=True):
            part.append(chosen)
    train, dev, test = (np.sort(np.concatenate(part)) for part in parts)
    return train, dev, test


def shuffled(data: Labelled, seed: int) -> tuple[list[str], np.ndarray]:
    """small-gpt's order (pandas' `sample(frac=1, random_state=seed)`) and texts: stripped, an empty one is "nan"."""
    order = np.random.RandomState(seed % 2**32).permutation(len(data.texts))
    return [data.texts[i].strip() or "nan" for i in order], data.labels[order]


def make_split(data: Labelled, cfg: ClassifyConfig, seed: int, reading: Reading, tokenizer: Tokenizer) -> Split:
    """The parts that `cfg.protocol` makes. Raises UserError for a label that is too rare, or parts that are empty."""
    if cfg.protocol == "as-published":
        texts, labels = shuffled(data, seed)
        rows, owner = reading.rows(texts, tokenizer)
        cut = int(len(rows) * cfg.train_fraction)
        if not 0 < cut < len(rows):
            raise UserError(
                f"{cfg.data}: {number_of(len(rows), 'chunk')} cannot be cut at {cfg.train_fraction}; give more texts"
            )
        bare = slice(len(reading.before), -len(reading.after) or None)
        chunks = [tokenizer.decode(row[bare]) for row in rows]
        train, test = (
            Part(chunks[part], labels[owner[part]], rows[part], np.arange(len(rows[part])))
            for part in (slice(cut), slice(cut, None))
        )
        return Split(train, test, test)
    data = distinct(data)
    parts = []
    for chosen in stratified(data.labels, data.names, seed):
        texts = [data.texts[i] for i in chosen]
        parts.append(Part(texts, data.labels[chosen], *reading.rows(texts, tokenizer)))
    return Split(*parts)


def differences(data: Labelled, seed: int, block_size: int = 256, train_fraction: float = 0.8) -> dict[str, Any]:
    """What the two protocols do differently with the same file, counted on characters, as small-gpt cuts them."""
    texts, labels = shuffled(data, seed)
    reading = Reading(block_size, "chunks", (0,), (0,), 0)
    pieces = [reading.cut(np.array([ord(c) for c in text])) for text in texts]
    owner = np.repeat(np.arange(len(texts)), [len(rows) for rows in pieces])
    cut = int(len(owner) * train_fraction)
    trained, tested = set(owner[:cut].tolist()), owner[cut:]
    seen = {normalized(texts[i]) for i in trained}
    unique = distinct(data)
    keys = [normalized(text) for text in data.texts]
    by_key: dict[str, set[int]] = {}
    for key, label in zip(keys, data.labels.tolist(), strict=True):
        by_key.setdefault(key, set()).add(label)
    lengths = Counter(len(rows) for rows in pieces)
    train, dev, test = stratified(unique.labels, unique.names, seed)
    share = [float(np.bincount(part, minlength=len(data.names)).max() / len(part)) for part in
             (labels[tested], unique.labels[test])]  # fmt: skip
    return {
        "reviews": len(texts),
        "empty": sum(not key for key in keys),
        "duplicates": sum(bool(key) for key in keys) - len(unique.texts),
        "duplicates_with_two_labels": sum(len(found) > 1 for key, found in by_key.items() if key),
        "as_published": {
            "chunks": len(owner),
            "train_chunks": cut,
            "test_chunks": len(tested),
            "reviews_of_several_chunks": len(texts) - lengths[1],
            "chunks_of_those": len(owner) - lengths[1],
            "test_reviews": len(set(tested.tolist())),
            "test_chunks_of_reviews_of_several_chunks": int(sum(len(pieces[i]) > 1 for i in tested)),
            "test_chunks_whose_review_is_also_trained_on": int(sum(i in trained for i in tested)),
            "test_chunks_with_a_duplicate_trained_on": int(sum(i not in trained and normalized(texts[i]) in seen
                                                               for i in tested)),
            "commonest_label": share[0],
        },
        "corrected": {"train": len(train), "dev": len(dev), "test": len(test), "commonest_label": share[1]},
    }  # fmt: skip
