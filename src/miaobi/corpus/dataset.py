"""Prepared data on disk, and the batch as a pure function of (seed, step).

There is no cursor: sample number n of a run is window `permute(n mod W)` of epoch `n div W`. Resuming, or another
number of ranks, changes nothing; each target token is seen exactly once per epoch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from miaobi.errors import UserError
from miaobi.files import sha256

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


class TokenStream:
    """Tokens of one split, over its shards, read through memory maps."""

    def __init__(self, directory: Path, split: dict, dtype: str, name: str) -> None:
        self.directory, self.name = directory, name
        files = [directory / Path(s["file"]).name for s in split["shards"]]  # a manifest names no other directory
        self.shards = [np.memmap(f, dtype=dtype, mode="r") if f.stat().st_size else np.empty(0, dtype) for f in files]
        self.ends = np.cumsum([len(s) for s in self.shards])
        self.characters: int = split["characters"]
        self.bytes: int = split["bytes"]
        self.documents: int = split["documents"]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document begins: (documents,) int64."""
        return self._beside("idx", "<u8").astype(np.int64)

    @cached_property
    def turns(self) -> np.ndarray:
        """Where a dialogue may be cut, its beginning included: (turns,) int64."""
        return self._beside("turns", "<u8").astype(np.int64)

    @cached_property
    def scored(self) -> np.ndarray | None:
        """Which tokens are learned: (tokens,) uint8; None = all."""
        return self._beside("scored", "u1") if (self.directory / f"{self.name}.scored").is_file() else None

    def read_scored(self, start: int, stop: int) -> np.ndarray:
        """Whether the tokens [start, stop) are learned."""
        return np.ones(stop - start, bool) if self.scored is None else self.scored[start:stop].astype(bool)

    def _beside(self, kind: str, dtype: str) -> np.ndarray:
        file = self.directory / f"{self.name}.{kind}"
        try:
            return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)
        except (OSError, ValueError) as e:
            raise UserError(f"{file} is missing or truncated; prepare the data again") from e

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64."""
        parts, first = [], int(np.searchsorted(self.ends, start, side="right"))
        for i in range(first, len(self.shards)):
            base = self.ends[i] - len(self.shards[i])
            parts.append(self.shards[i][max(0, start - base) : max(0, stop - base)])
            if stop <= self.ends[i]:
                break
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


@dataclass(frozen=True)
class PreparedData:
    """A directory written by `miaobi prepare`."""

    path: Path
    manifest: dict

    @classmethod
    def open(cls, path: str | Path) -> PreparedData:
        """Read the manifest and check every shard, and what lies beside it, against its size and SHA-256.

        Raises UserError naming the file that is missing, cut short or altered.
        """
        path = Path(path)
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            if manifest["format"] != "miaobi-prepared":
                raise KeyError("format")
            width = np.dtype(manifest["dtype"]).itemsize
            shards = [s for split in ("train", "val") for s in manifest[split]["shards"]]
            expected = [(path / Path(s["file"]).name, s["tokens"] * width, s["sha256"]) for s in shards]
            beside = _beside(manifest)
            expected += [(path / Path(b["file"]).name, b["bytes"], b["sha256"]) for b in beside]
        except FileNotFoundError as e:
            raise UserError(
                f"{path} is not prepared data: no manifest.json. Run: miaobi prepare TEXT --out {path}"
            ) from e
        except (ValueError, KeyError, TypeError) as e:  # ValueError: neither JSON nor UTF-8
            raise UserError(f"{path / 'manifest.json'} is damaged ({e}); prepare the data again") from e
        for shard in expected:
            _check_shard(*shard)
        return cls(path, manifest)

    @cached_property
    def train(self) -> TokenStream:
        """The training split."""
        return TokenStream(self.path, self.manifest["train"], self.little_endian, "train")

    @cached_property
    def val(self) -> TokenStream:
        """The validation split."""
        return TokenStream(self.path, self.manifest["val"], self.little_endian, "val")

    @property
    def little_endian(self) -> str:
        """NumPy dtype of the shards."""
        return {"uint16": "<u2", "uint32": "<u4"}[self.manifest["dtype"]]

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs."""
        return self.manifest["vocab_size"]

    @property
    def eot_id(self) -> int | None:
        """Token after every document; None where the text is one stream (`--split=tail`)."""
        return self.manifest["eot_id"]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text or a turn, the one that ends a document last."""
        eot = () if self.eot_id is None else (self.eot_id,)
        return tuple(self.manifest.get("end_ids", eot))

    @property
    def is_dialogue(self) -> bool:
        """Whether the documents are dialogues."""
        return self.manifest["kind"] == "dialogue"

    @property
    def sep_id(self) -> int | None:
        """Token between two turns where both speakers are alike, else None."""
        return self.end_ids[0] if self.manifest.get("template") == "sep" else None

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens, of turns and of what is learned: two directories with the same one train the same."""
        shards = [s["sha256"] for split in ("train", "val") for s in self.manifest[split]["shards"]]
        marks = [b["sha256"] for b in _beside(self.manifest) if not b["file"].endswith(".idx")]
        return hashlib.sha256(" ".join(shards + marks).encode()).hexdigest()


def _beside(manifest: dict) -> list[dict]:
    """Files beside the shards: idx, turns, scored. Directories of the first version do not list them."""
    return [entry for split in ("train", "val") for entry in manifest[split].get("beside", [])]


def _check_shard(path: Path, expected: int, digest: str) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the data again")
    if path.stat().st_size != expected:
        raise UserError(f"{path} is truncated or altered: {path.stat().st_size} bytes, the manifest says {expected}; "
                        "prepare the data again")  # fmt: skip
    if sha256(path) != digest:
        raise UserError(f"{path} was altered: its SHA-256 is not the manifest's; prepare the data again")


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
    W = windows_per_epoch(M + 1, T)
    inputs, targets = [], []
    for n in range(step * batch_size, (step + 1) * batch_size)[rows]:
        epoch, i = divmod(n, W)
        w = int(permute(np.array([i]), W, derive(seed, "order", epoch))[0])
        tail = M % T or T
        shift = tail + derive(seed, "shift", epoch) % (T - tail + 1)  # in [tail, T]: the count of windows stays W
        low = 0 if w == 0 else shift + (w - 1) * T
        high = min(shift + w * T, M)
        start = min(low, M - T)
        tokens = stream.read(start, start + T + 1)
        target = tokens[1:].copy()
        target[: low - start] = IGNORE
        target[high - start :] = IGNORE
        inputs.append(tokens[:-1])
        targets.append(target)
    return np.stack(inputs), np.stack(targets)


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

    def fixed(self, count: int) -> Batch:
        """The same `count` windows at every call; see `fixed_windows`."""
        return Batch(*fixed_windows(self.stream, self.block_size, count))
