"""Labelled texts: read from tables, split by either protocol, cut into pieces of token ids."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from miaobi.classify.config import ClassifyConfig
from miaobi.console import log
from miaobi.corpus import cutting
from miaobi.corpus.cutting import decode_block, text_blocks
from miaobi.corpus.dataset import derive
from miaobi.corpus.sources import Source, find_sources
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

TEXT_COLUMNS = ("text", "review", "content", "sentence")
LABEL_COLUMNS = ("label", "labels", "sentiment", "class")
NO_LABEL = ("", "nan")  # what an empty cell becomes in a table that pandas wrote
LEAST = 3  # examples of a label: one for each part


@dataclass(frozen=True)
class Row:
    """One text of a file. label: None where there is no such column, "" where the cell is empty."""

    place: str
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
    """How a text becomes rows of token ids; saved beside a classifier."""

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
    """Rows of .csv, .tsv and .jsonl files one by one, None for one that `skip_bad` leaves out; of others, their lines.

    labels: whether a label column is needed. Quoted cells may hold line breaks.

    Raises:
        UserError: missing files and columns, rows that cannot be read.
    """
    for source in find_sources([name]):
        if source.format == "parquet":
            raise UserError(f"{source.name}: classify reads .csv, .tsv, .jsonl and lines of text; save it as one")
        if source.format == "text":
            for number, line in enumerate(lines_of(source, skip_bad), start=1):
                yield Row(f"{source.name}, line {number}", line.rstrip("\r\n"))
            continue
        columns: tuple[str, str | None] | None = None
        for place, record in json_records(source, skip_bad) if source.format == "jsonl" else table(source, skip_bad):
            if columns is None and record is not None:
                columns = find_columns(source, list(record), text_column, label_column, labels)
            yield None if record is None else row_of(place, record, *columns, skip_bad)


def lines_of(source: Source, skip_bad: bool) -> Iterator[str]:
    """Decoded lines with their ends."""
    for block in text_blocks(source, 0, whole=True):
        yield from io.StringIO(decode_block(block, skip_bad)[0], newline="")


def table(source: Source, skip_bad: bool) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(place, column -> cell) of the rows of a .csv or .tsv."""
    csv.field_size_limit(cutting.MAX_DOCUMENT_BYTES)
    lines = lines_of(source, skip_bad)
    header = next(lines, "")
    is_tsv = source.inner_name.lower().endswith(".tsv") or ("\t" in header and "," not in header)
    delimiter = "\t" if is_tsv else ","
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    quoting = csv.QUOTE_NONE if is_tsv and not is_quoted(source, skip_bad) else csv.QUOTE_MINIMAL
    # Strict: else a quote that is never closed swallows the rest of the file without a word.
    rows, line = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True), 2
    try:
        for cells in rows:
            place = f"{source.name}, line {line}"
            line = rows.line_num + 2
            if len(cells) >= len(names):
                yield place, dict(zip(names, cells, strict=False))
            elif cells and not skip_bad:
                raise UserError(f"{place}: {len(cells)} columns where the header has {len(names)}; quote cells that "
                                "contain the delimiter, or leave such rows out with --skip_bad=True")  # fmt: skip
            elif cells:
                yield place, None
    except csv.Error as e:
        raise UserError(f"{source.name}, line {line}: {e}; is a quote not closed? Quotes inside a cell are doubled, "
                        'and the whole cell is quoted: "他说""好""。"') from e  # fmt: skip


def is_quoted(source: Source, skip_bad: bool) -> bool:
    """Whether quotes in a .tsv are those of a table; in many they are nothing but text."""
    try:
        for _ in csv.reader(lines_of(source, skip_bad), delimiter="\t", strict=True):
            pass
    except csv.Error:
        log(f"{source.name}: quotes do not pair up, they are read as text")
        return False
    return True


def json_records(source: Source, skip_bad: bool) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(place, field -> value) of the lines of a .jsonl."""
    for number, line in enumerate(lines_of(source, skip_bad), start=1):
        if not line.strip():
            continue
        place = f"{source.name}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) and not skip_bad:
            raise UserError(f"{place}: not a JSON object; every line must be one (--skip_bad=True leaves others out)")
        yield place, record if isinstance(record, dict) else None


def find_columns(
    source: Source, names: list[str], text: str | None, label: str | None, labels: bool
) -> tuple[str, str | None]:
    """The text and the label column. Raises UserError where one is missing."""
    found = []
    for asked, known, key in (text, TEXT_COLUMNS, "text_column"), (label, LABEL_COLUMNS, "label_column"):
        if key == "label_column" and asked is None and not labels:
            return found[0], None
        name = asked if asked is not None else next((n for n in known if n in names), None)
        if name is None or name not in names:
            asked = f"no column {asked!r}" if asked is not None else f"no column called {', '.join(known)}"
            raise UserError(f"{source.name}: {asked}; there are {', '.join(map(str, names)) or 'none'}. "
                            f"Name one with --{key}")  # fmt: skip
        found.append(name)
    return found[0], found[1]


def row_of(place: str, record: dict[str, Any], text: str, label: str | None, skip_bad: bool) -> Row | None:
    """A record as text and label. Raises UserError for a text that is none."""
    value = record.get(text)
    if not isinstance(value, str):
        if skip_bad:
            return None
        raise UserError(f"{place}: {text} is {type(value).__name__}, not text (--skip_bad=True leaves such rows out)")
    if label is None:
        return Row(place, value)
    found = record.get(label)
    return Row(place, value, "" if found is None else str(found).strip())


def read_labelled(cfg: ClassifyConfig) -> Labelled:
    """All of `cfg.data`. Labels are sorted, as numbers where all are.

    Raises:
        UserError: what `read_rows` raises; rows without a label; fewer than two labels.
    """
    texts, labels, skipped, unlabelled = [], [], 0, []
    for row in read_rows(cfg.data, cfg.text_column, cfg.label_column, cfg.skip_bad):
        if row is not None and row.label is None:
            raise UserError(f"{cfg.data}: lines of text have no labels; give a .csv, .tsv or .jsonl")
        if row is None or row.label.lower() in NO_LABEL:
            skipped += 1
            unlabelled += [row.place] if row is not None else []
        else:
            texts.append(row.text)
            labels.append(row.label)
    if unlabelled and not cfg.skip_bad:
        raise UserError(f"{unlabelled[0]}: no label ({len(unlabelled)} such rows in all); fill them in, "
                        "or leave them out with --skip_bad=True")  # fmt: skip
    names = sorted(set(labels))
    if all(name.removeprefix("-").isdecimal() for name in names):
        names.sort(key=int)
    if len(names) < 2:
        raise UserError(f"{cfg.data}: {'only one label, ' + repr(names[0]) if names else 'no labelled rows'}; "
                        "a classifier needs at least two labels: check --label_column")  # fmt: skip
    index = {name: i for i, name in enumerate(names)}
    return Labelled(texts, np.array([index[label] for label in labels], np.int64), names, skipped)


# Protocols


def normalized(text: str) -> str:
    """What two texts must share to be duplicates: letters and digits, width and case aside (NFKC)."""
    kept = "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())
    return kept or text.strip()


def distinct(data: Labelled) -> Labelled:
    """The first of every text that is not empty."""
    first: dict[str, int] = {}
    for i, text in enumerate(data.texts):
        if key := normalized(text):
            first.setdefault(key, i)
    kept = list(first.values())
    return Labelled([data.texts[i] for i in kept], data.labels[kept], data.names, data.skipped)


def stratified(labels: np.ndarray, names: list[str], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices of train, dev and test: 80/10/10 of every label, drawn by `seed`.

    Raises UserError for a label with fewer than LEAST examples.
    """
    parts: list[list[np.ndarray]] = [[], [], []]
    for label, name in enumerate(names):
        found = np.flatnonzero(labels == label)
        if len(found) < LEAST:
            raise UserError(f"label {name!r} has {len(found)} distinct texts; at least {LEAST} are needed, one each to "
                            "train, to choose and to test: add some, or remove the label")  # fmt: skip
        order = np.random.default_rng(derive(seed, "split", label)).permutation(found)
        tenth = max(1, round(0.1 * len(found)))
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
            raise UserError(f"{cfg.data}: {len(rows)} chunks cannot be cut at {cfg.train_fraction}; give more texts")
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
