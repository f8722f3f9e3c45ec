"""Text as arrays of code points: out of a string, counted, and set aside on disk between the passes of `prepare`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

N_CODE_POINTS = 0x110000
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


def of_documents(documents: list[str]) -> np.ndarray:
    """(characters + documents,) uint16 or uint32: code points of all documents, a newline behind each."""
    return code_points("\n".join([*documents, ""]))


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


@dataclass(frozen=True)
class Aside:
    """Characters of one task in a file, so that the second pass need not read, decode and split the sources again."""

    path: Path
    lengths: np.ndarray  # (documents,) int64, of its documents in characters
    n: int
    """Characters in the file: those, and the newlines behind documents."""

    @classmethod
    def put(cls, path: Path, points: np.ndarray, lengths: np.ndarray) -> Aside:
        """Writes (n,) uint16 or uint32 code points."""
        points.tofile(path)
        return cls(path, lengths, len(points))

    def take(self) -> np.ndarray:
        """(n,) uint16 or uint32."""
        return np.fromfile(self.path, np.uint16 if os.path.getsize(self.path) == 2 * self.n else np.uint32)
