"""What happens to a document between reading and encoding: normalising, cutting, exact duplicates, the split."""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata

import numpy as np

PIECE_CHARACTERS = 4000
"""About how long the pieces of a cut document are."""

_SENTENCE_END = re.compile(r"[。！？!?…][”’」』）)]*")


def normalize_text(text: str, normalize: str = "none", simplify: bool = False) -> str:
    """NFKC (full-width letters and digits become ASCII, and so on), then Traditional -> Simplified by OpenCC's t2s."""
    if normalize == "nfkc":
        text = unicodedata.normalize("NFKC", text)
    return _opencc().convert(text) if simplify else text


@functools.cache
def _opencc():
    from opencc import OpenCC  # loads its dictionaries, 0.1 s

    return OpenCC("t2s")


def cut_document(text: str) -> list[str]:
    """A long document in pieces of about 4,000 characters, cut at paragraph ends (line ends).

    A paragraph of more than twice that is cut at sentence ends, and where there are none, anywhere. The newline between
    two pieces is left out, like the blank line between two documents.
    """
    if len(text) <= PIECE_CHARACTERS * 3 // 2:
        return [text]
    pieces, current, size = [], [], 0
    for paragraph in _short_paragraphs(text):
        current.append(paragraph)
        size += len(paragraph)
        if size >= PIECE_CHARACTERS:
            pieces.append("".join(current))
            current, size = [], 0
    rest = "".join(current)
    if pieces and len(rest) < PIECE_CHARACTERS // 2:
        pieces[-1] += rest
    else:
        pieces.append(rest)
    return [piece.strip("\n") for piece in pieces if piece and not piece.isspace()]


def _short_paragraphs(text: str) -> list[str]:
    limit = 2 * PIECE_CHARACTERS
    paragraphs = []
    for line in text.splitlines(keepends=True) if "\n" not in text else re.split(r"(?<=\n)", text):
        start = 0
        while len(line) - start > limit:
            ends = [match.end() for match in _SENTENCE_END.finditer(line, start, start + PIECE_CHARACTERS)]
            end = ends[-1] if ends else start + PIECE_CHARACTERS
            paragraphs.append(line[start:end])
            start = end
        paragraphs.append(line[start:])
    return paragraphs


def content_digests(documents: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(documents, 16) uint8: BLAKE2b of each without the white space around it; (documents,) int64: its UTF-8 bytes."""
    digests, sizes = [], np.empty(len(documents), np.int64)
    for i, document in enumerate(documents):
        content = document.strip()
        data = content.encode()
        digests.append(hashlib.blake2b(data, digest_size=16).digest())
        sizes[i] = len(data) if len(content) == len(document) else len(document.encode())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16), sizes


def first_occurrences(digests: np.ndarray) -> np.ndarray:
    """(n, 16) uint8 -> (n,) bool: True where a digest appears for the first time.

    Takes 16 bytes a document for the digests and 24 more while sorting.
    """
    keys = _keys(digests)
    first = np.zeros(len(keys), bool)
    if len(keys):
        order = np.lexsort((keys["low"], keys["high"]))  # stable, so equal digests stay in source order
        ordered = keys[order]
        first[order[0]] = True
        first[order[1:]] = ordered[1:] != ordered[:-1]
    return first


def are_among(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n, 16) and (m, 16) uint8 -> (n,) bool: which of the digests are among the others."""
    numbers = np.unique(np.concatenate((_keys(others), _keys(digests))), return_inverse=True)[1]
    is_other = np.zeros(len(numbers), bool)
    is_other[numbers[: len(others)]] = True
    return is_other[numbers[len(others) :]]


def _keys(digests: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(digests).view([("high", "<u8"), ("low", "<u8")]).ravel()


def is_validation(digests: np.ndarray, val_fraction: float) -> np.ndarray:
    """(n, 16) uint8 -> (n,) bool: the hash split. Depends on a document's own content only."""
    return split_numbers(digests) < np.uint64(min(int(val_fraction * 2**64), 2**64 - 1))


def split_numbers(digests: np.ndarray) -> np.ndarray:
    """(n, 16) uint8 -> (n,) uint64: the documents with the smallest are for validation."""
    return np.ascontiguousarray(digests)[:, 8:].copy().view("<u8").reshape(len(digests))
