"""Statistics of a run's text: documents and their lengths, most frequent characters, what was left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from miaobi.corpus.prepared import PIECE, PreparedData
from miaobi.errors import UserError
from miaobi.files import is_a

MOST = 64 * PIECE
"""Tokens that are counted at most, from the beginning of the text."""
COMMON = 40
"""Number of characters that are listed."""
CLASSES = 12
"""Classes of document lengths."""
TOKENS_SPELLED = 20_000
"""Number of the most frequent tokens that are split into characters."""


@dataclass(frozen=True)
class Source:
    """A file that was read."""

    name: str
    characters: int
    encoding: str
    skipped: int


@dataclass(frozen=True)
class TextStatistics:
    """A prepared text."""

    path: Path
    kind: str
    vocab_size: int
    tokens: dict[str, int]
    characters: dict[str, int]
    documents: dict[str, int]
    """Each of `train` and `val`."""
    counts: dict[str, int]
    """characters, distinct_characters, duplicates, near_duplicates, in_validation, empty, skipped, removed: of the
    whole text as it was read."""
    lengths: list[tuple[int, int, int]]
    """(from, below, documents): approximate lengths of the training documents, in characters."""
    median_length: int
    common: list[tuple[str, float]]
    """The most frequent characters, with their shares."""
    counted: int
    """Number of tokens that `common` was counted on."""
    sources: list[Source] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """(path, why) of what was not read."""


def text_statistics(directory: Path) -> TextStatistics:
    """Read a directory of `miaobi prepare`. Raises UserError where it is damaged."""
    data = PreparedData.open(directory)
    manifest, splits = data.manifest, {"train": data.train, "val": data.val}
    lengths, median = document_lengths(data)
    common, counted = commonest(data)
    return TextStatistics(
        path=directory, kind=str(manifest["kind"]), vocab_size=data.vocab_size,
        tokens={name: len(split) for name, split in splits.items()},
        characters={name: split.characters for name, split in splits.items()},
        documents={name: split.documents for name, split in splits.items()},
        counts=counts_of(manifest.get("statistics")), lengths=lengths, median_length=median, common=common,
        counted=counted, sources=sources_of(manifest.get("sources")), left_out=left_out_of(manifest),
    )  # fmt: skip


def document_lengths(data: PreparedData) -> tuple[list[tuple[int, int, int]], int]:
    """Histogram of the training documents' lengths with geometric classes, and their median.

    Tokens are counted, and converted to characters by the text's mean.
    """
    starts = data.train.starts
    if len(starts) < 2 or not len(data.train):
        return [], data.train.characters
    tokens = np.diff(np.append(starts, len(data.train)))
    lengths = np.maximum(1, np.rint(tokens * (data.train.characters / len(data.train)))).astype(np.int64)
    borders = np.unique(np.rint(np.geomspace(lengths.min(), lengths.max() + 1, CLASSES + 1)).astype(np.int64))
    found = np.histogram(lengths, borders)[0].tolist()
    rows = list(zip(borders[:-1].tolist(), borders[1:].tolist(), found, strict=True))
    return rows, int(np.median(lengths))


def commonest(data: PreparedData) -> tuple[list[tuple[str, float]], int]:
    """The most frequent characters of the training text with their shares, and the number of tokens counted."""
    counted = min(len(data.train), MOST)
    counts = np.zeros(data.vocab_size, np.int64)
    for start in range(0, counted, PIECE):
        found = np.bincount(data.train.read(start, min(start + PIECE, counted)), minlength=data.vocab_size)
        if len(found) > data.vocab_size:
            raise UserError(f"{data.path} has tokens beyond its vocabulary of {data.vocab_size}; prepare it again")
        counts += found
    tokenizer, total = data.tokenizer, Counter()
    special = set(tokenizer.backend.get_added_tokens_decoder())
    known = tokenizer.backend.get_vocab_size(with_added_tokens=True)
    for id_ in np.argsort(-counts)[:TOKENS_SPELLED].tolist():
        if not counts[id_]:
            break
        if id_ in special or id_ >= known:
            continue
        for character in tokenizer.decode([id_]):
            if character != "\ufffd":  # a byte of a character that has no token
                total[character] += int(counts[id_])
    every = sum(total.values())
    return [(character, n / every) for character, n in total.most_common(COMMON)], counted


def counts_of(recorded: Any) -> dict[str, int]:
    """The integers of a manifest's statistics under flat names; missing or invalid ones are left out."""
    if not isinstance(recorded, dict):
        return {}
    duplicates = recorded.get("duplicates_removed")
    duplicates = duplicates if isinstance(duplicates, dict) else {}
    flat = {
        "characters": recorded.get("characters"),
        "distinct_characters": recorded.get("distinct_characters"),
        "duplicates": duplicates.get("exact"),
        "near_duplicates": duplicates.get("near"),
        "in_validation": recorded.get("also_in_validation"),
        "by_weights": recorded.get("left_out_by_weights"),
        "by_without": recorded.get("left_out_by_without"),
        "empty": recorded.get("empty_removed"),
        "skipped": recorded.get("skipped"),
        "removed": recorded.get("removed"),
    }
    return {key: value for key, value in flat.items() if is_a(value, int)}


def sources_of(entries: Any) -> list[Source]:
    """The source files, as far as the manifest lists them."""
    found = []
    for record in entries if isinstance(entries, list) else []:
        if isinstance(record, dict):
            numbers = [value if is_a(value := record.get(key), int) else 0 for key in ("characters", "skipped")]
            found.append(Source(str(record.get("path")), numbers[0], str(record.get("encoding") or ""), numbers[1]))
    return found


def left_out_of(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """(path, why) of what was not read."""
    files = [entry for key in ("left_out", "sources") if isinstance(entries := manifest.get(key), list)
             for entry in entries if isinstance(entry, dict)]  # fmt: skip
    return [(str(entry.get("path")), str(entry["reason"])) for entry in files if entry.get("reason")]
