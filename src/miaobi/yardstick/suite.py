"""The texts of `miaobi eval --suite`: held-out documents of several genres, the same ones everywhere.

The texts themselves are not part of miaobi: suite.json names their files, how many documents are taken, and the SHA-256
of what is taken. A genre's documents are those with the smallest numbers by which `prepare --split=hash` divides
(`clean.split_numbers`): what `prepare` makes of the same files has them in its validation part, never in training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from miaobi.corpus import clean
from miaobi.corpus.documents import read_documents
from miaobi.corpus.overlap import normalized, window_hashes
from miaobi.errors import UserError, names_listed
from miaobi.files import json_of, text_written_whole


@dataclass(frozen=True)
class Genre:
    """A genre of the suite; a row of suite.json."""

    genre: str
    files: tuple[str, ...]
    """Below the directory that --suite names."""
    documents: int
    """Number of documents that are taken."""
    characters: int
    """Number of their characters."""
    sha256: str
    """Of the JSON lines that `as_lines` makes of them."""
    format: str = "auto"
    """What a document is, as in `miaobi prepare`."""
    field: str = "text"
    """Key or column of a record that holds the text."""
    cut: bool = False
    """Long documents are cut into pieces of about 4,000 characters, as `prepare` does with a novel."""


def genres() -> list[Genre]:
    """The genres of suite.json, in its order."""
    rows = json.loads(resources.files("miaobi.yardstick").joinpath("suite.json").read_text(encoding="utf-8"))
    return [Genre(**row | {"files": tuple(row["files"])}) for row in rows["genres"]]


def read(genre: Genre, root: Path) -> list[str]:
    """The documents of a genre, from the files below `root`.

    Raises UserError for a file that is missing, or of which other documents come than the suite has.
    """
    paths = [root / file for file in genre.files]
    if missing := [file for file, path in zip(genre.files, paths, strict=True) if not path.is_file()]:
        raise UserError(f"the suite's genre {genre.genre} needs {names_listed(missing)}: no such file in {root}; "
                        f"--suite names the directory with {names_listed(genre.files)}")  # fmt: skip
    documents = chosen(candidates(genre, paths), genre.documents)
    found = hashlib.sha256(as_lines(documents).encode()).hexdigest()
    if found != genre.sha256:
        raise UserError(f"the suite's genre {genre.genre}: the text chosen from {names_listed(genre.files)} in {root} "
                        f"has SHA-256 {found[:12]}..., the suite's has {genre.sha256[:12]}...; a file is of another "
                        "version, and figures on it would not compare: copy the original again")  # fmt: skip
    return documents


def candidates(genre: Genre, paths: list[Path]) -> list[str]:
    """All documents of the files."""
    documents: Iterable[str] = read_documents([str(path) for path in paths], genre.format, field=genre.field)
    if genre.cut:
        documents = (piece for document in documents for piece in clean.cut_document(document))
    return [text for document in documents if (text := document.strip())]


def chosen(documents: list[str], count: int) -> list[str]:
    """The `count` different documents with the smallest numbers of the hash split, smallest first."""
    digests, _ = clean.content_digests(documents)
    order = np.argsort(clean.split_numbers(digests), kind="stable")
    return [documents[i] for i in order[clean.first_occurrences(digests)[order]][:count]]


def as_lines(documents: list[str]) -> str:
    """One JSON object with its text for each document, a line each."""
    return "".join(json_of({"text": document}) + "\n" for document in documents)


def write(texts: dict[str, list[str]], out: Path) -> None:
    """GENRE.jsonl of each genre in a directory, which `miaobi prepare --without` takes."""
    out.mkdir(parents=True, exist_ok=True)
    for genre, documents in texts.items():
        with text_written_whole(out / f"{genre}.jsonl") as file:
            file.write(as_lines(documents))


def seen(texts: dict[str, list[str]], sources: tuple[str, ...], field: str) -> dict[str, int]:
    """How many documents of each genre share 20 letters and digits in a row with a text of some sources; those that
    are shorter count where they are a text of the sources.

    Raises UserError for sources that cannot be read.
    """
    documents = [(genre, normalized(text)) for genre, genre_texts in texts.items() for text in genre_texts]
    hashes = [window_hashes(key) for _, key in documents]
    windows = np.concatenate([np.empty(0, np.uint64), *hashes])
    owners = np.repeat(np.arange(len(documents)), [len(found) for found in hashes])
    order = np.argsort(windows, kind="stable")
    windows, owners = windows[order], owners[order]
    short: dict[str, list[int]] = {}
    for i, (_, key) in enumerate(documents):
        if not len(hashes[i]):
            short.setdefault(key, []).append(i)
    is_seen = np.zeros(len(documents), bool)
    for text in read_documents(list(sources), field=field):
        key = normalized(text)
        is_seen[short.get(key, [])] = True
        found = np.unique(window_hashes(key))
        left, right = (np.searchsorted(windows, found, side) for side in ("left", "right"))
        for start, end in zip(left[left < right], right[left < right], strict=True):
            is_seen[owners[start:end]] = True
    counts = dict.fromkeys(texts, 0)
    for (genre, _), was_seen in zip(documents, is_seen, strict=True):
        counts[genre] += int(was_seen)
    return counts
