"""Labelled texts: split by either protocol, cut into pieces of token ids."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from miaobi.classify.config import ClassifyConfig
from miaobi.classify.tables import read_rows
from miaobi.corpus.dataset import derive
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

NO_LABEL = ("", "nan")  # what an empty cell becomes in a table that pandas wrote
LEAST = 3  # examples of a label: one for each part


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
