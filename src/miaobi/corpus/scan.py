"""The usual block of text read by scan.cpp, other encodings and line ends first made UTF-8. Python reads all others."""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miaobi import native
from miaobi.corpus.blocks import NOISE, Block, block_bytes, decoded, without_noise
from miaobi.corpus.characters import MOST_BEYOND, wide
from miaobi.corpus.sources import Source
from miaobi.errors import UserError

SOURCE = Path(__file__).with_name("scan.cpp")
KINDS = ("whole", "text", "lines")  # in the order of scan.cpp; as in Source.format, or one stream
WORTH_COMPILING = 1 << 20  # bytes of a block; smaller ones are read while a compiler would start
UNITS = 65536
_NOISE = np.array([ord(character) for character in NOISE])


class Result(ctypes.Structure):
    """As in scan.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("characters", "written", "documents", "beyond")]


@dataclass(frozen=True)
class Text:
    """The characters of some text, and what is counted of them."""

    points: np.ndarray
    """(n,) uint16 or uint32: all characters of a stream, or those of documents with a newline behind each."""
    beyond: np.ndarray
    """Characters of more than 16 bits; see characters.wide."""
    lengths: np.ndarray
    """(documents,) int64, characters; of a stream its own."""
    digests: np.ndarray
    """(documents, 16) uint8, see `clean.content_digests`; (0, 16) of a stream."""
    sizes: np.ndarray
    """(documents,) int64, UTF-8 bytes."""
    code_points: np.ndarray
    """(distinct,) int64, of the documents, ascending."""
    counts: np.ndarray
    """(distinct,) int64: their occurrences."""
    distinct: np.ndarray
    """(n,) int64: the different characters of all that was read, ascending."""


def get_ready(sources: list[Source]) -> None:
    """Begin to build the library where it will be wanted, before workers start that would all do so."""
    if any(source.size >= WORTH_COMPILING and source.format in KINDS for source in sources):
        native.build(SOURCE)


def scan(block: Block, whole: bool) -> tuple[Text, str, int, int] | None:
    """The documents of a block, or (`whole`) all of it as one stream; its encoding; its characters as read; and how
    many were `blocks.NOISE` and taken out.

    None where Python has to read it, and be it to say what is wrong with it.
    """
    format = block.source.format
    if block.records is not None or format not in KINDS or block.end - block.start < WORTH_COMPILING:
        return None
    try:
        data, encoding, removed = _as_utf8(block)
    except UserError:
        return None
    kind = "whole" if whole else format
    result = scan_bytes(data, kind)
    if result is not None and np.isin(result[0].code_points, _NOISE).any():  # looked for here, where it costs nothing
        before, result = result[1], scan_bytes(without_noise(data.decode(), encoding).encode(), kind)
        removed += before - result[1]
    return None if result is None else (result[0], encoding, result[1], removed)


def _as_utf8(block: Block) -> tuple[bytes, str, int]:
    """The text of a block in UTF-8 with line ends `\\n`, the encoding it was in, and characters already taken out."""
    data, _, encoding = block_bytes(block)
    removed = 0
    if encoding not in ("utf-8", "utf-8-sig"):
        text, _, _, removed = decoded(block)
        data = text.encode()
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in data else data, encoding, removed


def scan_bytes(data: bytes, kind: str) -> tuple[Text, int] | None:
    """`scan` of UTF-8; None also while or where there is no library."""
    library = native.library(SOURCE)
    if library is None:
        return None
    points, beyond = np.empty(len(data) + 1, np.uint16), np.empty(MOST_BEYOND, np.uint32)
    counts, dropped, result = np.zeros(UNITS, np.uint32), np.zeros(UNITS, np.uint8), Result()
    documents = np.empty((0 if kind == "whole" else data.count(b"\n") + 1, 5), np.int64)
    arrays = [ctypes.c_void_p(array.ctypes.data) for array in (points, counts, dropped, beyond, documents)]
    size = ctypes.c_int64(len(data))
    if not library.miaobi_scan(data, size, KINDS.index(kind), *arrays, ctypes.byref(result)):
        return None
    points, beyond = points[: result.written], beyond[: result.beyond].copy()
    used = counts.astype(bool)  # whose places are found ten times as fast as of numbers
    present, distinct = np.flatnonzero(used), np.flatnonzero(dropped.view(bool) | used)
    counts = counts[present].astype(np.int64)
    if kind == "whole":
        lengths, sizes, digests = np.array([result.characters]), np.array([len(data)]), np.empty((0, 16), np.uint8)
    else:
        documents = documents[: result.documents]
        lengths, sizes = documents[:, 4].copy(), documents[:, 1] - documents[:, 0]
        view = memoryview(data)
        digests = b"".join(
            hashlib.blake2b(view[begin:end], digest_size=16).digest() for begin, end in documents[:, 2:4].tolist()
        )
        digests = np.frombuffer(digests, np.uint8).reshape(-1, 16)
    if result.beyond:
        present, distinct = wide(present, beyond), np.sort(wide(distinct, beyond))
        order = np.argsort(present)
        present, counts = present[order], counts[order]
    return Text(points, beyond, lengths, digests, sizes, present, counts, distinct), result.characters
