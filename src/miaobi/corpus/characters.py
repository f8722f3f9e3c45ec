"""Text as arrays of code points: out of a string, counted, and set aside on disk between the passes of `prepare`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

N_CODE_POINTS = 0x110000
NONE = np.empty(0, np.uint32)
FIRST_BEYOND, MOST_BEYOND = 0xD800, 2048
"""Surrogates, which no text has: `scan` writes its i-th character of more than 16 bits as the i-th of them."""
_SLICE = 1 << 20
"""Characters counted at a time, more than a block has: NumPy makes a 64-bit copy of them."""


def code_points(text: str) -> np.ndarray:
    """(len(text),) uint16, or uint32 where that is too little; half a character (a lone surrogate) passes."""
    if not text:
        return np.empty(0, np.uint16)
    # NumPy's own strings are UCS-4: seven times as fast as text.encode("utf-32-le"), which looks for surrogates
    points = np.array([text]).view(np.uint32)
    return points.astype(np.uint16) if points.max() < 65536 else points


def text_of(points: np.ndarray) -> str:
    """(n,) uint16 or uint32 -> the text."""
    return points.astype("<u4", copy=False).tobytes().decode("utf-32-le")


def of_documents(documents: list[str], is_stream: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(characters + documents,) uint16 or uint32: code points of all documents, a newline behind each; their lengths.

    is_stream: there is one document, without a newline behind it.
    """
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    return code_points(documents[0] if is_stream else "\n".join([*documents, ""])), lengths


def count_characters(points: np.ndarray) -> np.ndarray:
    """(n,) -> (65536 or 0x110000,) int64: occurrences of every code point, the longer array only when it is needed."""
    total = np.bincount(points[:_SLICE], minlength=65536)
    for low in range(_SLICE, len(points), _SLICE):
        counts = np.bincount(points[low : low + _SLICE], minlength=len(total))
        counts[: len(total)] += total
        total = counts
    if len(total) > 65536:
        total = np.concatenate((total, np.zeros(N_CODE_POINTS - len(total), np.int64)))
    return total


def utf8_length(points: np.ndarray, counts: np.ndarray) -> int:
    """Bytes in UTF-8 of a text with these characters, each so many times."""
    return int(sum(counts[points >= low].sum() for low in (0, 0x80, 0x800, 0x10000)))


def wide(points: np.ndarray, beyond: np.ndarray) -> np.ndarray:
    """Code points of 16 bits (n,), where FIRST_BEYOND + i stands for beyond[i] -> as they are, in 32 or more."""
    if not len(beyond):
        return points
    at = np.flatnonzero(points // MOST_BEYOND == FIRST_BEYOND // MOST_BEYOND)
    characters = points.astype(np.promote_types(points.dtype, np.uint32))
    characters[at] = beyond[points[at] - FIRST_BEYOND]
    return characters


@dataclass(frozen=True)
class Aside:
    """Characters of one task in a file, so that the second pass need not read, decode and split the sources again."""

    path: Path
    offset: int
    points: int
    """How many: the characters, and the newlines behind documents."""
    dtype: str
    lengths: np.ndarray  # (documents,) int64, of its documents in characters
    beyond: np.ndarray  # see `wide`

    @classmethod
    def put(cls, directory: Path, points: np.ndarray, lengths: np.ndarray, beyond: np.ndarray) -> Aside:
        """Writes (n,) uint16 or uint32 code points, behind those that this process wrote before: one file is 1.5 times
        as fast as many.
        """
        with open(directory / str(os.getpid()), "ab", buffering=0) as file:
            offset = file.tell()
            data = memoryview(points).cast("B")
            while data:
                data = data[file.write(data) :]
        return cls(Path(file.name), offset, len(points), points.dtype.name, lengths, beyond)

    def take(self) -> np.ndarray:
        """(n,) uint16 or uint32."""
        return wide(np.fromfile(self.path, self.dtype, self.points, offset=self.offset), self.beyond)
