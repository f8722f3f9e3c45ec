"""Which texts are behind the paths a user gives: files, directories, globs, packed files, zip archives."""

from __future__ import annotations

import contextlib
import difflib
import functools
import glob
import gzip
import io
import lzma
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

from miaobi.errors import UserError

_COMPRESSION = {".gz": "gz", ".xz": "xz", ".zst": "zst", ".zip": "zip"}
FORMAT_BY_NAME = dict.fromkeys((".jsonl", ".ndjson", ".jsonlines", ".json"), "jsonl")
FORMAT_BY_NAME |= {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# Left out of directories: nanoGPT keeps prepare.py and meta.pkl beside its text, and `prepare` writes its own files.
_NOT_TEXT = {".bin", ".idx", ".pkl", ".pt", ".pth", ".py", ".pyc", ".safetensors", ".npy", ".npz", ".md5", ".sha256"}
_NOT_TEXT |= {".turns", ".scored", ".jinja"}
_OWN_FILES = {"manifest.json", "tokenizer.json", "tokenizer_config.json"}
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError, zipfile.BadZipFile)
DAMAGED += (RuntimeError, UnicodeDecodeError)
"""What the unpacking libraries raise (zipfile: RuntimeError for a password or an unknown version, UnicodeDecodeError
for broken names)."""


@dataclass(frozen=True)
class Source:
    """One text: a file, or a member of a zip archive."""

    path: Path
    format: str
    """text, lines, files, dialogue, jsonl, csv or parquet."""
    compression: str = ""
    """gz, xz, zst, zip or nothing."""
    member: str = ""
    """Name inside the zip archive; only ever read, never a path to write."""
    entry: int = 0
    """Its position in the zip archive, as two members may have one name."""
    size: int = 0
    """Bytes on disk (a zip member: unpacked)."""

    @property
    def name(self) -> str:
        """The path as the user knows it; `archive.zip!member` for a member."""
        path = printable(self.path)
        return f"{path}!{self.member}" if self.member else path

    @property
    def inner_name(self) -> str:
        """File name without the directory and without .gz, .xz, .zst."""
        if self.member:
            return self.member
        return self.path.stem if self.compression else self.path.name

    def open(self) -> BinaryIO:
        """The unpacked bytes as a stream. Raises UserError when it cannot be opened."""
        try:
            if self.compression == "gz":
                return gzip.open(self.path, "rb")
            if self.compression == "xz":
                return lzma.open(self.path, "rb")
            if self.compression == "zst":
                return io.BufferedReader(_ZstdFrames(self.path))
            if self.compression == "zip":
                archive = _archive(self.path)
                return archive.open(archive.infolist()[self.entry])
            return open(self.path, "rb")
        except DAMAGED as error:
            raise UserError(f"{self.name} cannot be opened: {error}") from error

    def read(self, stream: BinaryIO, size: int) -> bytes:
        """Up to `size` bytes of a stream that `open` gave. Raises UserError when the file is damaged."""
        try:
            return stream.read(size)
        except DAMAGED as error:
            raise UserError(f"{self.name} is damaged or cut short: {error}; fetch or pack it again") from error


class _ZstdFrames(io.RawIOBase):
    """The unpacked bytes of a .zst. zstandard's own reader takes a frame that was cut short for the end of the file."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb")  # noqa: SIM115 - closed with this
        self.frame, self.packed, self.unpacked = None, b"", b""

    def readinto(self, buffer: memoryview) -> int:
        while not self.unpacked:
            packed = self.packed or self.file.read(4096)  # of which zstd makes 128 MiB at most
            if not packed and self.frame is not None:
                raise EOFError("the last frame has no end")
            if not packed:
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.unpacked, self.packed = memoryview(self.frame.decompress(packed)), b""
            if self.frame.eof:
                self.frame, self.packed = None, self.frame.unused_data
        taken = min(len(buffer), len(self.unpacked))
        buffer[:taken], self.unpacked = self.unpacked[:taken], self.unpacked[taken:]
        return taken

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()


def find_sources(paths: list[str], format: str = "auto") -> list[Source]:
    """The texts behind files, directories (recursive, sorted, hidden ones left out), globs and zip archives.

    Raises:
        UserError: a path is missing (close names are suggested) or a pipe, a directory or an archive holds no text.
    """
    sources: list[Source] = []
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            found = sorted(_files_below(path))
            if not found:
                raise UserError(
                    f"{printable(given)}: no text in this directory; put .txt, .jsonl, .csv or .parquet files there"
                )
        elif path.is_fifo():
            raise UserError(
                f"{printable(given)} is a pipe: it can be read but once, and its name does not say what it holds; "
                "save what comes out of it as a file, and give that"
            )
        elif path.exists():
            found = [path]
        else:
            found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
            if not found:
                raise UserError(_missing(given, path))
        for file in found:
            sources.extend(_sources_in(file, format))
    if not sources:
        raise UserError("no source given; name a text file, a directory or a glob")
    return sources


def printable(path: str | Path) -> str:
    """A path for people and JSON. Its parts need not be UTF-8 on the disk: old archives leave names in GBK there."""
    return os.sep.join(map(_printable_part, str(path).split(os.sep)))


def _printable_part(name: str) -> str:
    try:
        name.encode()
        return name
    except UnicodeEncodeError:  # Python's way to show bytes that are not UTF-8
        data = os.fsencode(name)
    try:
        return data.decode("gb18030")
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace")


def _archive(path: Path) -> zipfile.ZipFile:
    """The archive, opened once for all its members: to read the list of 4,000 members 4,000 times takes minutes."""
    found = path.stat()
    return _open_archive(path, found.st_mtime_ns, found.st_size, os.getpid())  # processes may not share a position


@functools.lru_cache(maxsize=2)
def _open_archive(path: Path, *_: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _files_below(root: Path) -> Iterator[Path]:
    """Files that are taken for text. Links to directories are followed; each real directory is read once."""
    seen, waiting = set(), deque([root])
    while waiting:
        for name, directories, files in os.walk(waiting.popleft()):  # links wait, so that a directory's own path wins
            directory, found = Path(name), os.stat(name)
            if (found.st_dev, found.st_ino) in seen:
                directories.clear()
                continue
            seen.add((found.st_dev, found.st_ino))
            directories[:] = sorted(child for child in directories if not _is_hidden(child))
            waiting.extend(directory / child for child in directories if (directory / child).is_symlink())
            yield from (directory / file for file in files if _is_text_name(file) and (directory / file).is_file())


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _is_text_name(name: str) -> bool:
    """Whether a file of this name, in a directory or an archive, is taken for text."""
    return not _is_hidden(name) and Path(name).suffix.lower() not in _NOT_TEXT and name not in _OWN_FILES


def _missing(given: str, path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"{printable(given)}: no such file; its directory {printable(parent)} does not exist either"
    names = [entry.name for entry in parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(printable(parent / name) for name in close)}?" if close else ""
    return f"{printable(given)}: no such file or directory{hint}"


def _sources_in(file: Path, format: str) -> list[Source]:
    compression = _COMPRESSION.get(file.suffix.lower(), "")
    if compression != "zip":
        inner = file.stem if compression else file.name
        return [Source(file, _format_of(inner, format), compression, size=file.stat().st_size)]
    try:
        members = [(m, entry) for entry, m in enumerate(_archive(file).infolist()) if _is_corpus_member(m)]
    except DAMAGED as error:
        raise UserError(f"{printable(file)} is not a readable zip archive: {error}") from error
    if not members:
        raise UserError(f"{printable(file)}: no text in this zip archive")
    named = sorted((_member_name(member), entry, member.file_size) for member, entry in members)
    return [Source(file, _format_of(name, format), "zip", name, entry, size) for name, entry, size in named]


def _member_name(member: zipfile.ZipInfo) -> str:
    """Its name. Archives made on Chinese Windows have names in GBK, which zipfile takes for IBM's code page 437."""
    for encoding in () if member.flag_bits & 0x800 else ("utf-8", "gb18030"):  # the flag says UTF-8
        with contextlib.suppress(UnicodeError):
            return member.filename.encode("cp437").decode(encoding)
    return member.filename


def _is_corpus_member(member: zipfile.ZipInfo) -> bool:
    parts = [part for part in member.filename.split("/") if part not in ("", ".", "..")]
    return bool(parts) and not member.is_dir() and not any(map(_is_hidden, parts)) and _is_text_name(parts[-1])


def _format_of(name: str, format: str) -> str:
    """Raises UserError for a format that the file's name contradicts: cells or JSON would be learned as text."""
    by_name = FORMAT_BY_NAME.get(Path(name).suffix.lower(), "text")
    if format == "dialogue" and by_name in ("jsonl", "parquet"):
        return "messages"
    if format not in ("auto", by_name) and by_name != "text":
        remedy = "save it as .jsonl with instruction and output" if format == "dialogue" else "leave --format out"
        raise UserError(f"{printable(name)} is {by_name} by its name, which --format={format} contradicts; {remedy}")
    return by_name if format == "auto" else format
