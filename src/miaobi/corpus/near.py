"""Near duplicates: documents whose sets of character 5-grams are alike (MinHash with locality-sensitive hashing).

Broder, "On the resemblance and containment of documents" (1997); the sketches are rensa's R-MinHash.
"""

from __future__ import annotations

import functools

import numpy as np

N_PERMUTATIONS = 128
SHINGLE = 5
"""Characters in a shingle; near duplicates are found by the sets of their shingles."""
_SEED = 42
_AT_ONCE = 128
"""Documents per call of rensa: from 256 on it works on a thread pool, which hangs in a process forked after that."""
_BASE, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


def sketches(points: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(documents, N_PERMUTATIONS) uint32: how many of its values two rows share estimates the documents' similarity.

    Args:
        points: (n,) code points of the documents, one newline behind each.
        lengths: (documents,) characters of each, without that newline. White space makes no difference.
    """
    from rensa import RMinHash

    keep = ~np.take(_white_space(), points, mode="clip")
    starts = np.concatenate(([0], np.cumsum(lengths + 1)))
    points, bounds = points[keep], np.concatenate(([0], np.cumsum(keep)))[starts]
    hashes, n_hashes = _shingle_hashes(points, bounds)
    offsets = np.concatenate(([0], np.cumsum(n_hashes))).astype(np.uint64)
    rows = []
    for low in range(0, len(lengths), _AT_ONCE):
        part = offsets[low : low + _AT_ONCE + 1]
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            hashes[part[0] : part[-1]], part - part[0], N_PERMUTATIONS, _SEED
        )
        rows.append(np.array(matrix.to_rows(), np.uint32))
    return np.concatenate(rows) if rows else np.empty((0, N_PERMUTATIONS), np.uint32)


def _shingle_hashes(points: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all shingles of documents points[bounds[i]:bounds[i + 1]], uint64, and how many each has.

    A document shorter than a shingle has one, itself.
    """
    lengths = np.diff(bounds)
    padded = np.zeros(len(points) + SHINGLE, np.uint64)
    padded[: len(points)] = points
    hashes = padded[: len(points)].copy()
    for step in range(1, SHINGLE):  # Horner's rule, modulo 2^64
        hashes *= _BASE
        hashes += padded[step : len(points) + step]
    for i in np.flatnonzero((lengths < SHINGLE) & (lengths > 0)).tolist():
        alone = np.uint64(0)
        with np.errstate(over="ignore"):
            for point in padded[bounds[i] : bounds[i + 1]]:
                alone = alone * _BASE + point
        hashes[bounds[i]] = alone
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MIX
    hashes ^= hashes >> np.uint64(32)
    inside = np.ones(len(points), bool)  # a shingle that begins here ends in the same document
    for back in range(1, SHINGLE):
        inside[bounds[1:][lengths >= back] - back] = False
    inside[bounds[:-1][(lengths < SHINGLE) & (lengths > 0)]] = True
    return hashes[inside], np.where(lengths >= SHINGLE, lengths - SHINGLE + 1, np.minimum(lengths, 1))


@functools.cache
def _white_space() -> np.ndarray:
    """(0x3002,) bool: code points that str.isspace() holds for; the highest is the ideographic space, U+3000."""
    return np.array([chr(point).isspace() for point in range(0x3002)])


def first_of_their_kind(sketches: np.ndarray, threshold: float) -> np.ndarray:
    """(documents, N_PERMUTATIONS) -> (documents,) bool: False where an earlier document that is itself the first of its
    kind has an estimated Jaccard similarity at or above the threshold.

    Only documents that share a band of their sketches are compared.
    A sketch is 512 bytes, and there are two copies while `prepare` joins those of all tasks: 1,024 bytes a document. A
    document that shares a band has entries in the tables as well, some hundred bytes for each of its bands.
    """
    n_bands = bands_for(threshold)
    rows = N_PERMUTATIONS // n_bands
    alike = np.zeros(len(sketches), bool)  # shares a band with another document
    for band in range(n_bands):
        keys = _band_keys(sketches[:, band * rows : (band + 1) * rows])
        order = np.argsort(keys, kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
        alike[order[1:][same]] = alike[order[:-1][same]] = True
    first = np.ones(len(sketches), bool)
    tables: list[dict[int, list[int]]] = [{} for _ in range(n_bands)]
    for i in np.flatnonzero(alike).tolist():
        keys = [int(key) for key in _band_keys(sketches[i].reshape(n_bands, rows))]
        near = list({j for table, key in zip(tables, keys, strict=True) for j in table.get(key, ())})
        if near and ((sketches[near] == sketches[i]).mean(axis=1) >= threshold).any():
            first[i] = False
            continue
        for table, key in zip(tables, keys, strict=True):
            table.setdefault(key, []).append(i)
    return first


def _band_keys(values: np.ndarray) -> np.ndarray:
    """(n, rows) uint32 -> (n,) uint64."""
    keys = np.zeros(len(values), np.uint64)
    for column in values.T:
        keys = (keys ^ column) * _BASE
        keys ^= keys >> np.uint64(29)
    return keys


def bands_for(threshold: float) -> int:
    """Fewest bands that still catch a pair at the threshold with probability 0.95: 1 - (1 - t^rows)^bands."""
    for rows in (32, 16, 8, 4, 2, 1):
        bands = N_PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= 0.95:
            return bands
    return N_PERMUTATIONS
