"""Prepared data on disk, written aside and then renamed: a directory is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from miaobi.errors import UserError
from miaobi.files import MOST_OF_A_LIST, is_running, json_of, read_whole
from miaobi.lock import locked, refuse_held

SHARD_BYTES = 1 << 31
"""A split that is longer goes into several numbered shards."""
FORMAT, VERSION = "miaobi-prepared", 1
OWN_NAMES = re.compile(
    r"(train|val)(-\d{5})?\.bin|(train|val)\.(idx|turns|scored)|tokenizer(_config)?\.json|chat_template\.jinja|manifest\.json"
)


@dataclass(frozen=True)
class Encoded:
    """Documents in tokens: what is written."""

    ids: np.ndarray  # (n,) uint16 or uint32
    starts: np.ndarray  # (documents,) int64
    turns: np.ndarray | None = None  # (turns,) int64, where a dialogue may be cut; None for plain text
    scored: np.ndarray | None = None  # (n,) bool, the tokens to learn; None for all


class SplitWriter:
    """One split: its tokens in shards, the start of every document, and the counts for the manifest."""

    def __init__(self, directory: Path, name: str, dtype: str):
        self.directory, self.name, self.dtype = directory, name, np.dtype(dtype).newbyteorder("<")
        self.tokens = self.characters = self.bytes = self.documents = 0
        self._shards: list[dict] = []
        self._shard_tokens = 0
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._beside: dict[str, tuple[BinaryIO, hashlib._Hash]] = {}  # idx, turns, scored
        self._add("idx", b"")

    def write(self, part: Encoded) -> None:
        """Appends documents."""
        ids = part.ids
        self._add("idx", (part.starts + self.tokens).astype("<u8").tobytes())
        if part.turns is not None:
            self._add("turns", (part.turns + self.tokens).astype("<u8").tobytes())
        if part.scored is not None:
            self._add("scored", part.scored.astype(np.uint8).tobytes())
        self.documents += len(part.starts)
        self.tokens += len(ids)
        capacity = max(1, SHARD_BYTES // self.dtype.itemsize)
        while len(ids):
            if self._file is None or self._shard_tokens == capacity:
                self._next_shard()
            part, ids = np.split(ids, [capacity - self._shard_tokens])
            data = memoryview(np.ascontiguousarray(part, self.dtype)).cast("B")
            self._file.write(data)
            self._digest.update(data)
            self._shard_tokens += len(part)

    def close(self) -> dict:
        """Flushes to the disk. Returns this split's part of the manifest."""
        if self._file is None:
            self._next_shard()
        self._end_shard()
        for file, _ in self._beside.values():
            _flush(file)
        if len(self._shards) == 1:
            only = self._shards[0]
            os.replace(self.directory / only["file"], self.directory / f"{self.name}.bin")
            only["file"] = f"{self.name}.bin"
        return {
            "tokens": self.tokens,
            "characters": self.characters,
            "bytes": self.bytes,
            "documents": self.documents,
            "shards": self._shards,
            "beside": [
                {"file": Path(file.name).name, "bytes": os.path.getsize(file.name), "sha256": digest.hexdigest()}
                for file, digest in self._beside.values()
            ],
        }

    def abandon(self) -> None:
        """Closes the files of a split that will not be finished; a full disk may refuse even that."""
        for file in (self._file, *(file for file, _ in self._beside.values())):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def _add(self, kind: str, data: bytes) -> None:
        if kind not in self._beside:
            file = open(self.directory / f"{self.name}.{kind}", "wb")  # noqa: SIM115 - close() does
            self._beside[kind] = file, hashlib.sha256()
        file, digest = self._beside[kind]
        file.write(data)
        digest.update(data)

    def _next_shard(self) -> None:
        if self._file is not None:
            self._end_shard()
        self._file = open(self.directory / f"{self.name}-{len(self._shards) + 1:05d}.bin", "wb")  # noqa: SIM115

    def _end_shard(self) -> None:
        file = Path(self._file.name).name
        _flush(self._file)
        self._shards.append({"file": file, "tokens": self._shard_tokens, "sha256": self._digest.hexdigest()})
        self._shard_tokens, self._digest = 0, hashlib.sha256()


class PreparedWriter:
    """Context manager around a directory next to `out` that replaces it on `commit`, and is removed otherwise."""

    def __init__(self, out: Path, dtype: str):
        self.out = out
        self.directory = _beside(out, "tmp")
        self._dtype = dtype

    def __enter__(self) -> PreparedWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        self.train = SplitWriter(self.directory, "train", self._dtype)
        self.val = SplitWriter(self.directory, "val", self._dtype)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self.train.abandon()
            self.val.abandon()
        shutil.rmtree(self.directory, ignore_errors=True)

    def commit(self, manifest: dict) -> None:
        """Writes the manifest and puts the new directory in place of the old one."""
        with open(self.directory / "manifest.json", "w", encoding="utf-8") as file:
            file.write(json_of(manifest, indent=1) + "\n")
            _flush(file)
        for path in self.directory.glob("*.j*"):  # the tokenizer's files
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if self.out.is_dir() and any(not OWN_NAMES.fullmatch(entry.name) for entry in self.out.iterdir()):
            self._move_in()
        else:
            self._swap()

    def _swap(self) -> None:
        old = _beside(self.out, "old")
        if self.out.is_dir():
            os.replace(self.out, old)
        os.replace(self.directory, self.out)
        _sync_directory(self.out.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _move_in(self) -> None:
        """Into a directory that also holds the source text. The manifest, which makes it prepared data, goes last.

        Until then there is one that says whose these files are and nothing else: killed here, the next run may go on.
        """
        unfinished = self.directory / "unfinished"
        unfinished.write_text(json.dumps({"format": FORMAT}), encoding="utf-8")
        os.replace(unfinished, self.out / "manifest.json")
        for entry in list(self.out.iterdir()):
            if OWN_NAMES.fullmatch(entry.name) and entry.name != "manifest.json":
                entry.unlink()
        for entry in sorted(self.directory.iterdir(), key=lambda e: e.name == "manifest.json"):
            os.replace(entry, self.out / entry.name)
        _sync_directory(self.out)


@contextlib.contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A temporary directory next to `out`, for what one pass of `prepare` leaves for the next."""
    directory = _beside(out, "aside")
    shutil.rmtree(directory, ignore_errors=True)
    with explain_refusal(out):
        directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def one_writer(out: Path) -> Iterator[None]:
    """The lock of `out` while the body runs; it lies next to it, as `out` is replaced as a whole.

    Raises UserError naming the process that holds it, or trains in the run whose data `out` is.
    """
    if out.name == "data":
        refuse_held(out.absolute().parent, "its data must stay as they are; choose another --out")
    with contextlib.ExitStack() as stack:
        with explain_refusal(out):
            file = out.with_name(f".{out.name}.lock")
            stack.enter_context(locked(out, "wait for it, or choose another --out", file))
        yield


def clear_leftovers(out: Path) -> None:
    """Removes what killed runs on this machine left next to `out`; data that one had just moved away is restored."""
    if os.name != "posix" or not out.parent.is_dir():  # elsewhere one cannot ask whether a process lives
        return
    name = re.compile(re.escape(_beside(out, "KIND", 0).name[:-1]).replace("KIND", "(tmp|aside|old)") + r"(\d+)")
    for path in list(out.parent.iterdir()):
        match = name.fullmatch(path.name)
        if not match or is_running(int(match[2])):
            continue
        if match[1] == "old" and not out.exists():
            os.replace(path, out)
        shutil.rmtree(path, ignore_errors=True)


def _beside(out: Path, kind: str, process: int | None = None) -> Path:
    """A name of this process, on the same disk as `out`; of this machine too, as disks are shared."""
    return out.with_name(f".{out.name}.{kind}-{socket.gethostname()}-{os.getpid() if process is None else process}")


def check_replaceable(out: Path, sources: list[Path]) -> None:
    """Raises UserError when writing `out` would mix with or destroy files that are not prepared data.

    Allowed: nothing there, an empty directory, prepared data, and a directory that holds one of the sources (nanoGPT's
    data/NAME/input.txt), whose other files stay.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out={out} is a file; give the name of a directory")
    names = {entry.name for entry in out.iterdir()}
    if not names or is_prepared(out):
        return
    clash = sorted(name for name in names if OWN_NAMES.fullmatch(name))
    if clash:
        raise UserError(f"--out={out} already has {clash[0]}, which miaobi prepare did not write; choose another --out")
    if not any(source.resolve().is_relative_to(out.resolve()) for source in sources):
        raise UserError(f"--out={out} holds other files ({sorted(names)[0]}, ...); choose a new or empty directory")


def is_prepared(directory: Path) -> bool:
    """Whether a directory has a manifest of ours."""
    try:
        manifest = json.loads(read_whole(directory / "manifest.json", MOST_OF_A_LIST).decode())
    except (UserError, OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


@contextlib.contextmanager
def explain_full_disk(out: Path) -> Iterator[None]:
    """Turns "no space left" into a UserError; the temporary files are gone by then."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk of {out} is full; the unfinished files were removed. Free some space (about 4 bytes a "
                "character are needed for a while, 6 beyond 65,535 tokens) or choose another --out"
            ) from error
        raise


@contextlib.contextmanager
def explain_refusal(out: Path) -> Iterator[None]:
    """Turns a refused write into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise UserError(
                f"{error.filename or out} cannot be written ({error.strerror}); choose another --out"
            ) from error
        raise


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sync_directory(directory: Path) -> None:
    """A rename is on the disk once its directory is; Windows has no such call and needs none."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
