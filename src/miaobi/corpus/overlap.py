"""Which documents share text with an evaluation set, and so must not be learned (`--without=FILES`).

A document shares text when its normalised form (letters and digits) begins like a text of the set (60 characters), or
has any 20 characters in a row with one.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Iterator

import numpy as np

from miaobi.corpus.dialogue import without_marks
from miaobi.corpus.messages import messages_of
from miaobi.corpus.records import open_records, taker
from miaobi.corpus.sources import Source, find_sources
from miaobi.corpus.tables import lines_of
from miaobi.errors import UserError, names_listed

PREFIX, WINDOW = 60, 20
TEXT_COLUMNS = ("text", "review", "content", "sentence")
"""What the text of a labelled table is usually called."""
_POWERS = np.array([pow(1_000_003, i, 1 << 64) for i in range(WINDOW)], np.uint64)


def normalized(text: str) -> str:
    """What two texts must share to be duplicates: letters and digits, width and case aside (NFKC)."""
    letters = "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())
    return letters or text.strip()


def window_hashes(text: str) -> np.ndarray:
    """Polynomial hashes modulo 2^64 of every WINDOW characters in a row: (max(0, n - WINDOW + 1),) uint64."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    if len(codes) < WINDOW:
        return np.empty(0, np.uint64)
    return np.lib.stride_tricks.sliding_window_view(codes, WINDOW) @ _POWERS


class Evaluation:
    """Texts that must not be seen before they are judged."""

    def __init__(self, texts: Iterable[str]) -> None:
        keys = [key for text in texts if (key := normalized(text))]
        self.prefixes = {key[:PREFIX] for key in keys}
        self.windows = np.unique(np.concatenate([np.empty(0, np.uint64), *map(window_hashes, keys)]))

    def overlaps(self, text: str) -> str:
        """prefix or window, by what the text shares with one of these; "" for nothing."""
        key = normalized(text)
        if key[:PREFIX] in self.prefixes:
            return "prefix"
        hashes = window_hashes(key)
        indices = np.searchsorted(self.windows, hashes)
        indices[indices == len(self.windows)] = 0
        return "window" if len(self.windows) and bool((self.windows[indices] == hashes).any()) else ""


@functools.lru_cache(maxsize=2)
def evaluation_of(files: tuple[str, ...]) -> Evaluation:
    """The texts of some files, read once in every process: lines of text, text columns of tables, turns of dialogues.

    Raises UserError for a file that cannot be read or has no column of a known name.
    """
    return Evaluation(text for source in find_sources(list(files)) for text in _texts(source))


def _texts(source: Source) -> Iterator[str]:
    if source.format == "text":
        yield from lines_of(source, skip_bad=False)
        return
    names, records = open_records(source, skip_bad=False)
    for record in records:
        if record.problem:
            record.refuse()
        column = next((name for name in TEXT_COLUMNS if name in record.values), None)
        if column is not None:
            text, problem = taker(source, column)(record.values)
            if problem:
                record.refuse(problem)
            yield text
            continue
        yield from _turns(source, record.values, names or list(record.values))


def _turns(source: Source, values: dict, names: list[str]) -> Iterator[str]:
    messages, problem = messages_of(values)
    if problem:
        raise UserError(f"{source.name}: no column called {', '.join(TEXT_COLUMNS)}, nor dialogues; there are "
                        f"{names_listed(names)}. Rename the one with the text")  # fmt: skip
    yield from (message["content"] for message in messages)


def without(documents: list[str], files: tuple[str, ...]) -> list[str]:
    """Those of the documents (dialogues packed or not) that share no text with the files."""
    evaluation = evaluation_of(files)
    return [document for document in documents if not evaluation.overlaps(without_marks(document))]
