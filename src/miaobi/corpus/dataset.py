"""The batch as a pure function of (seed, step), over the tokens of `prepared`.

There is no cursor: sample number n of a run is window `permute(n mod W)` of epoch `n div W`. Resuming, or another
number of ranks, changes nothing; each target token is seen exactly once per epoch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from miaobi.corpus.prepared import TokenStream
from miaobi.errors import UserError

IGNORE = -100  # target that is not scored


class Batch(NamedTuple):
    """Windows to train on, int64 (rows, block_size) each."""

    inputs: np.ndarray
    targets: np.ndarray
    """The next token, or IGNORE."""
    positions: np.ndarray | None = None
    """Where each token stands in its document; None: in the window."""
    documents: np.ndarray | None = None
    """Tokens with the same number may attend to each other; None: all may."""


def _mix(x: np.ndarray, key: int) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): a keyed hash of uint64."""
    x = x + np.uint64(key & 0xFFFFFFFFFFFFFFFF)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """A keyed pseudo-random permutation of range(size), evaluated only where asked.

    Four Feistel rounds over the next even number of bits, walked until the value falls inside (Black & Rogaway 2002):
    no table, however large the corpus. index: integers in [0, size). Returns int64 of the same shape.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    out = index.astype(np.uint64)
    todo = np.ones(out.shape, bool)
    with np.errstate(over="ignore"):
        while todo.any():
            left, right = out[todo] >> half, out[todo] & low
            for round_ in range(4):
                left, right = right, left ^ (_mix(right, key * 4 + round_ + 1) & low)
            out[todo] = (left << half) | right
            todo = out >= size
    return out.astype(np.int64)


def derive(*parts: int | str) -> int:
    """A 63-bit seed for a purpose: derive(seed, "order", epoch) and derive(seed, "dropout", ...) are unrelated."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def windows_per_epoch(tokens: int, block_size: int) -> int:
    """Windows that cover every target of a stream of `tokens` once."""
    return -(-(tokens - 1) // block_size)


def batch(
    stream: TokenStream, block_size: int, batch_size: int, seed: int, step: int, rows: slice = slice(None)
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of `step`, or the given rows of them.

    Each epoch shifts its windows by a random offset, which leaves a short first and last window: those two overlap
    their neighbours and the tokens seen there are IGNOREd, so that every target counts once per epoch.

    Returns two int64 arrays (rows, block_size). Raises UserError when the stream is shorter than one block.
    """
    T, M = block_size, len(stream) - 1  # targets are positions 1..M
    if M < T:
        raise UserError(f"the training text has {M + 1} tokens, less than one block of {T}; "
                        f"add text or use --block_size={max(1, M // 4)}")  # fmt: skip
    inputs, targets = [], []
    for n in range(step * batch_size, (step + 1) * batch_size)[rows]:
        low, high = window(M + 1, T, seed, n)
        start = min(low, M - T)
        tokens = stream.read(start, start + T + 1)
        target = tokens[1:].copy()
        target[: low - start] = IGNORE
        target[high - start :] = IGNORE
        inputs.append(tokens[:-1])
        targets.append(target)
    return np.stack(inputs), np.stack(targets)


def window(tokens: int, block_size: int, seed: int, n: int) -> tuple[int, int]:
    """Inputs low to high, exclusive, of a stream of `tokens` that the n-th window since the run began learns from."""
    T, M = block_size, tokens - 1
    W = windows_per_epoch(tokens, T)
    epoch, i = divmod(n, W)
    w = int(permute(np.array([i]), W, derive(seed, "order", epoch))[0])
    tail = M % T or T
    shift = tail + derive(seed, "shift", epoch) % (T - tail + 1)  # in [tail, T]: the count of windows stays W
    return 0 if w == 0 else shift + (w - 1) * T, min(shift + w * T, M)


def fixed_windows(stream: TokenStream, block_size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` non-overlapping windows spread evenly over the stream, always the same ones.

    Fewer where the stream is short; a last short window is filled up with IGNOREd targets.
    Returns two int64 arrays (windows, block_size).
    """
    W = windows_per_epoch(len(stream), block_size)
    chosen = np.unique(np.linspace(0, W - 1, min(count, W)).astype(np.int64))
    inputs = np.zeros((len(chosen), block_size), np.int64)
    targets = np.full((len(chosen), block_size), IGNORE, np.int64)
    for row, w in enumerate(chosen):
        tokens = stream.read(w * block_size, min((w + 1) * block_size + 1, len(stream)))
        inputs[row, : len(tokens) - 1] = tokens[:-1]
        targets[row, : len(tokens) - 1] = tokens[1:]
    return inputs, targets


@dataclass(frozen=True)
class TextWindows:
    """A stream of text as windows; the interface of `packing.PackedDialogues`."""

    stream: TokenStream
    block_size: int

    def __len__(self) -> int:
        """Windows in an epoch."""
        return windows_per_epoch(len(self.stream), self.block_size)

    def batch(self, batch_size: int, seed: int, step: int, rows: slice = slice(None)) -> Batch:
        """The windows of `step`; see the function `batch`."""
        return Batch(*batch(self.stream, self.block_size, batch_size, seed, step, rows))

    def documents(self, batch_size: int, seed: int, step: int) -> np.ndarray:
        """Numbers of the documents, counted from 0, that the windows of `step` are cut from: int64, ascending."""
        found = set()
        for n in range(step * batch_size, (step + 1) * batch_size):
            low, high = window(len(self.stream), self.block_size, seed, n)
            first, last = np.searchsorted(self.stream.starts, (low, high), side="right") - 1
            found.update(range(int(first), int(last) + 1))
        return np.array(sorted(found))

    def fixed(self, count: int) -> Batch:
        """The same `count` windows at every call; see `fixed_windows`."""
        return Batch(*fixed_windows(self.stream, self.block_size, count))
