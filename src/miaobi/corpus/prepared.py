"""Prepared data: a directory written by `miaobi prepare`, or by nanoGPT's prepare.py, checked and read."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from miaobi.corpus import checked, nanogpt, store
from miaobi.corpus.config import MOST_ROWS
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError, number_of
from miaobi.files import MOST_OF_A_LIST, read_whole

PIECE = 1 << 22
"""Tokens that are counted together."""
LITTLE_ENDIAN = {"uint16": "<u2", "uint32": "<u4"}
"""NumPy dtype of the shards."""


class TokenStream:
    """Tokens of one split, over its shards.

    They are read, not mapped: a mapped file that is cut short while it is in use ends the process without a word.
    """

    def __init__(self, directory: Path, manifest: dict, name: str) -> None:
        self.directory, self.name, self.vocab_size = directory, name, manifest["vocab_size"]
        split, dtype = manifest[name], LITTLE_ENDIAN[manifest["dtype"]]
        self._files = [
            _Array(directory / Path(shard["file"]).name, dtype, shard["tokens"])  # a manifest names no other directory
            for shard in split["shards"]
        ]
        self._scored = self._marks("scored", "u1", sum(shard["tokens"] for shard in split["shards"]))
        self.ends = np.cumsum([file.length for file in self._files])
        self.characters: int = split["characters"]
        self.bytes: int = split["bytes"]
        self.documents: int = split["documents"]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each document begins: (documents,) int64."""
        if self.documents == 1 and self._marks("idx", "<u8") is None:  # nanoGPT's
            return np.zeros(1, np.int64)
        starts = self._positions("idx")
        if len(starts) != self.documents or (len(self) and not (len(starts) and starts[0] == 0)):
            raise UserError(f"{self.directory / self.name}.idx is not that of these documents; prepare the data again")
        return starts

    @cached_property
    def turns(self) -> np.ndarray:
        """Where a dialogue may be cut, its beginning included: (turns,) int64."""
        return self._positions("turns")

    @cached_property
    def scored(self) -> np.ndarray | None:
        """Which tokens are learned: (tokens,) uint8; None = all."""
        return None if self._scored is None else self._scored.read(0, self._scored.length)

    def read_scored(self, start: int, stop: int) -> np.ndarray:
        """Whether the tokens [start, stop) are learned."""
        if self._scored is None:
            return np.ones(stop - start, bool)
        return self._scored.read(start, stop).astype(bool)

    def _marks(self, kind: str, dtype: str, length: int | None = None) -> _Array | None:
        file = self.directory / f"{self.name}.{kind}"
        try:
            size = file.stat().st_size
        except OSError:
            return None
        width = np.dtype(dtype).itemsize
        if size % width or length not in (None, size // width):
            raise UserError(f"{file} is truncated or altered; prepare the data again")
        return _Array(file, dtype, size // width)

    def _positions(self, kind: str) -> np.ndarray:
        marks = self._marks(kind, "<u8")
        if marks is None:
            raise UserError(f"{self.directory / self.name}.{kind} is missing; prepare the data again")
        positions = marks.read(0, marks.length).astype(np.int64)
        if ((positions < 0) | (positions > len(self))).any() or (np.diff(positions) < 0).any():
            raise UserError(f"{marks.path} names places that are not in the text; prepare the data again")
        return positions

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64. Raises UserError for a shard that was cut short since it was opened, or that
        has tokens which the vocabulary lacks.
        """
        parts, first = [], int(np.searchsorted(self.ends, start, side="right"))
        for file, end in zip(self._files[first:], self.ends[first:].tolist(), strict=True):
            base = end - file.length
            part = file.read(max(0, start - base), min(file.length, max(0, stop - base)))
            if part.size and (highest := int(part.max())) >= self.vocab_size:
                raise UserError(f"{file.path} has token {highest}, but manifest.json says that there are "
                                f"{self.vocab_size}: it was altered; prepare the data again")  # fmt: skip
            parts.append(part)
            if stop <= end:
                break
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)


class _Array:
    """Integers in a file."""

    def __init__(self, path: Path, dtype: str, length: int) -> None:
        self.path, self.dtype, self.length = path, np.dtype(dtype), length
        self._descriptor: int | None = None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Those at [start, stop)."""
        width = self.dtype.itemsize
        size = max(0, stop - start) * width
        data = self._bytes(start * width, size) if size else b""
        if len(data) != size:
            raise UserError(f"{self.path} was cut short while it was in use; prepare the data again")
        return np.frombuffer(data, self.dtype)

    def _bytes(self, offset: int, size: int) -> bytes:
        try:
            if not hasattr(os, "pread"):  # Windows
                with open(self.path, "rb") as file:
                    file.seek(offset)
                    return file.read(size)
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
            data = os.pread(self._descriptor, size, offset)
            while len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
                data += more  # the kernel gives at most 2 GiB at once
            return data
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


@dataclass(frozen=True)
class PreparedData:
    """A directory written by `miaobi prepare`, or nanoGPT's with a vocabulary of characters."""

    path: Path
    manifest: dict

    @classmethod
    def open(cls, path: str | Path) -> PreparedData:
        """Read the manifest and check every shard, and the files that belong to it, against its size and SHA-256.

        A file that was checked before and has not been touched since is not read again. Raises UserError naming the
        file that is missing, cut short or altered.
        """
        path = Path(path)
        if nanogpt.is_data(path) and not store.is_prepared(path):
            return cls(path, _nanogpt_manifest(path))
        manifest = _read_manifest(path / "manifest.json")
        width = np.dtype(manifest["dtype"]).itemsize
        shards = [shard for split in ("train", "val") for shard in manifest[split]["shards"]]
        expected = {path / Path(s["file"]).name: (s["tokens"] * width, s["sha256"]) for s in shards}
        expected |= {path / Path(b["file"]).name: (b["bytes"], b["sha256"]) for b in _beside(manifest)}
        for file, (size, _) in expected.items():
            if not file.is_file():
                raise UserError(f"{file} is missing; prepare the data again")
            if file.stat().st_size != size:
                raise UserError(f"{file} is truncated or altered: {file.stat().st_size} bytes, the manifest says "
                                f"{size}; prepare the data again")  # fmt: skip
        hashes = checked.hashes(path, list(expected))
        for file, (_, digest) in expected.items():
            if hashes[file.name] != digest:
                raise UserError(f"{file} was altered: its SHA-256 is not the manifest's; prepare the data again")
        return cls(path, manifest)

    @cached_property
    def train(self) -> TokenStream:
        """The training split."""
        return TokenStream(self.path, self.manifest, "train")

    @cached_property
    def val(self) -> TokenStream:
        """The validation split."""
        return TokenStream(self.path, self.manifest, "val")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What the text was encoded with. Raises UserError where it is damaged."""
        if self.manifest["kind"] == "nanogpt":
            return nanogpt.read_tokenizer(self.path)
        return Tokenizer.load(self.path)

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


def is_prepared(directory: str | Path) -> bool:
    """Whether `PreparedData.open` reads a directory: a manifest of ours, or nanoGPT's train.bin and val.bin."""
    return store.is_prepared(Path(directory)) or nanogpt.is_data(Path(directory))


def _beside(manifest: dict) -> list[dict]:
    """Files next to the shards: idx, turns, scored. Directories of the first version do not list them."""
    return [entry for split in ("train", "val") for entry in manifest[split].get("beside", [])]


def _read_manifest(file: Path) -> dict:
    """Raises UserError for one that is missing or damaged; what it gives has every key with a value of its kind."""
    try:
        manifest = json.loads(read_whole(file, MOST_OF_A_LIST).decode())
    except OSError as e:
        raise UserError(
            f"{file.parent} is not prepared data: no manifest.json. Run: miaobi prepare TEXT --out {file.parent}"
        ) from e
    except (ValueError, RecursionError) as e:  # ValueError: neither JSON nor UTF-8
        raise UserError(f"{file} is damaged ({str(e)[:120]}); prepare the data again") from e
    problem = _problem(manifest)
    if problem:
        raise UserError(f"{file} is damaged ({problem}); prepare the data again")
    return manifest


def _problem(manifest: Any) -> str:
    """What is wrong with a manifest, or ""."""
    if not isinstance(manifest, dict) or manifest.get("format") != store.FORMAT:
        return "it is not one of miaobi prepare"
    if manifest.get("dtype") not in ("uint16", "uint32"):
        return "dtype"
    if not _is_number(manifest.get("vocab_size")) or not 1 <= manifest["vocab_size"] <= MOST_ROWS:
        return "vocab_size"
    end_ids = manifest.get("end_ids", [])
    if not isinstance(end_ids, list) or "eot_id" not in manifest:
        return "end_ids"
    if not all(_is_number(id_) and id_ < manifest["vocab_size"] for id_ in [*end_ids, manifest["eot_id"] or 0]):
        return "end_ids"
    if manifest.get("kind") not in ("text", "dialogue"):
        return "kind"
    if manifest.get("template") not in (None, "sep", "roles") or (manifest.get("template") == "sep" and not end_ids):
        return "template"
    for name in ("train", "val"):
        split = manifest.get(name)
        if not isinstance(split, dict):
            return name
        if not all(_is_number(split.get(key)) for key in ("tokens", "characters", "bytes", "documents")):
            return name
        if not _are_files(split.get("shards"), "tokens") or not _are_files(split.get("beside", []), "bytes"):
            return f"{name}: shards"
        if sum(shard["tokens"] for shard in split["shards"]) != split["tokens"]:
            return f"{name}: tokens"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _are_files(entries: Any, size: str) -> bool:
    return isinstance(entries, list) and all(
        isinstance(e, dict) and isinstance(e.get("file"), str) and isinstance(e.get("sha256"), str)
        and Path(e["file"]).name and "\0" not in e["file"] and _is_number(e.get(size))
        for e in entries
    )  # fmt: skip


def _nanogpt_manifest(path: Path) -> dict:
    """What the manifest of a directory of nanoGPT would say. Raises UserError for tokens that are not in its meta.pkl.

    The directory has no word about documents: each split is one.
    """
    pieces = nanogpt.read_characters(path / "meta.pkl") if (path / "meta.pkl").is_file() else None
    if pieces is None:
        nanogpt.read_tokenizer(path)  # says what to do
    sizes = np.array([len(piece.encode()) for piece in pieces])
    hashes = checked.hashes(path, [path / "train.bin", path / "val.bin"])
    manifest = {"format": store.FORMAT, "kind": "nanogpt", "dtype": nanogpt.DTYPE, "eot_id": None, "end_ids": [],
                "vocab_size": len(pieces) + 256}  # fmt: skip
    for name in ("train", "val"):
        file = path / f"{name}.bin"
        size = file.stat().st_size
        if size % 2:
            raise UserError(f"{file} is truncated: {size} bytes are no whole number of tokens; prepare the data again")
        counts = np.zeros(65536, np.int64)
        tokens, is_wider = _Array(file, "<u2", size // 2), size > 64
        for start in range(0, tokens.length, PIECE):
            part = tokens.read(start, min(start + PIECE, tokens.length))
            counts += np.bincount(part, minlength=65536)
            is_wider = is_wider and not part[1::2].any()
        if is_wider:
            raise UserError(
                f"{file}: every second number of two bytes is 0: tokens of four bytes or eight, nanoGPT's have two; "
                "write them as np.uint16, or prepare the text: miaobi prepare"
            )
        if counts[len(pieces) :].any():
            highest = int(np.flatnonzero(counts)[-1])
            raise UserError(f"{file} has token {highest}, but meta.pkl next to it knows "
                            f"{number_of(len(pieces), 'character')}: they "
                            "do not belong together; run nanoGPT's prepare.py again")  # fmt: skip
        shard = {"file": file.name, "tokens": tokens.length, "sha256": hashes[file.name]}
        manifest[name] = {"tokens": tokens.length, "characters": tokens.length, "documents": 1, "shards": [shard],
                          "bytes": int((counts[: len(pieces)] * sizes).sum())}  # fmt: skip
    return manifest
