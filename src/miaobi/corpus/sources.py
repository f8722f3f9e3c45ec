"""Which texts are behind the paths a user gives: files, directories, globs, packed files, zip archives."""

from __future__ import annotations

import contextlib
import difflib
import functools
import glob
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from miaobi.corpus import folders, unpack
from miaobi.corpus.folders import COMPRESSION, FORMAT_BY_NAME, LeftOut
from miaobi.corpus.unpack import DAMAGED
from miaobi.errors import UserError

TEXTS = ("text", "dialogue")
"""What a file is taken for, with and without --format=dialogue, where its name says nothing."""


class NotTextError(UserError):
    """A file out of which nothing can be read: it is binary, damaged, closed, or points to a file elsewhere.

    Where it was not named but found in a directory, it is left out and listed.
    """


class DamagedError(NotTextError):
    """A packed file, a member of an archive or a table that cannot be unpacked: cut short, altered, with a password, or
    larger than any text becomes. In what the user named it is an error.
    """


@dataclass(frozen=True)
class Source:
    """One text: a file, or a member of a zip archive."""

    path: Path
    format: str
    """text, lines, files, dialogue, jsonl, messages (records of dialogues), csv or parquet."""
    compression: str = ""
    """gz, bz2, xz, zst, zip or nothing."""
    member: str = ""
    """Name inside the zip archive; only ever read, never a path to write."""
    entry: int = 0
    """Its position in the zip archive, as two members may have one name."""
    size: int = 0
    """Bytes on disk (a zip member: unpacked)."""
    is_listed: bool = field(default=False, compare=False)
    """Found in a directory or an archive, not named by the user: what turns out to be no text at all is left out."""
    is_named: bool = field(default=True, compare=False)
    """It, or the archive that it is in, was named by the user: what is damaged there is an error."""
    is_guess: bool = field(default=False, compare=False)
    """Nobody said the format: it is text where its name says nothing else."""
    is_exact: bool = field(default=False, compare=False)
    """Every character is kept: nothing is taken for padding or for a byte order mark inside."""

    @property
    def name(self) -> str:
        """The path as the user knows it; `archive.zip!member` for a member."""
        path = printable(self.path)
        return f"{path}!{self.member}" if self.member else path

    @property
    def inner_name(self) -> str:
        """File name without the directory and without .gz, .bz2, .xz, .zst."""
        if self.member:
            return self.member
        return self.path.stem if self.compression else self.path.name

    def open(self) -> BinaryIO:
        """The unpacked bytes as a stream. Raises UserError when it cannot be opened."""
        try:
            if self.compression == "zip":
                archive = _archive(self.path)
                return archive.open(archive.infolist()[self.entry])
            return unpack.opened(self.path, self.compression)
        except DAMAGED as error:
            raise DamagedError(f"{self.name} cannot be opened: {error}") from error

    def opened(self) -> BinaryIO:
        """The file as it is on the disk. Raises UserError where it may not be read."""
        try:
            return open(self.path, "rb")
        except PermissionError as error:
            raise NotTextError(f"{self.name} cannot be read: {error.strerror}") from error

    def read(self, stream: BinaryIO, size: int) -> bytes:
        """Up to `size` bytes of a stream that `open` gave. Raises UserError when the file is damaged, or becomes more
        than unpack.MAX_GROWTH times its size.
        """
        try:
            if not self.compression or self.member:  # of archives `_in_zip` has looked at the sizes
                return stream.read(size)
            left = unpack.most(self.size) - stream.tell()
            found = stream.read(min(size, left + 1))
        except DAMAGED as error:
            raise DamagedError(f"{self.name} is damaged or cut short: {error}; fetch or pack it again") from error
        if len(found) > left:
            raise DamagedError(unpack.grows(self.name))
        return found

    def leaves_out(self, error: UserError) -> bool:
        """Whether the source is left out and listed for this error, instead of ending the command with it."""
        damaged = isinstance(error, DamagedError) and self.is_named
        return self.is_listed and isinstance(error, NotTextError) and not damaged


def find_sources(paths: list[str], format: str = "auto") -> list[Source]:
    """The texts behind files, directories (recursive, sorted), globs and zip archives; see `list_sources`."""
    return [source for group in list_sources(paths, format)[0] for source in group]


def list_sources(paths: list[str], format: str = "auto") -> tuple[list[list[Source]], list[LeftOut]]:
    """The texts behind each of `paths`, and what in directories and archives was not taken for text.

    A file that is named, by itself or by a glob, is taken whatever its suffix.

    Raises:
        UserError: a path is missing (close names are suggested) or a pipe, a directory or an archive holds no text.
    """
    left: list[LeftOut] = []
    groups = [_sources_of(given, format, left) for given in paths]
    if not groups:
        raise UserError("no source given; name a text file, a directory or a glob")
    return groups, folders.grouped(left)


def _sources_of(given: str, format: str, left: list[LeftOut]) -> list[Source]:
    path = Path(given).expanduser()
    if path.is_dir():
        return _in_directory(path, given, format, left)
    if path.is_fifo() or (given == "-" and not path.exists()):
        name = "standard input (-)" if given == "-" else printable(given)
        raise UserError(
            f"{name} is a pipe: it can be read but once, and its name does not say what it holds; "
            "save what comes out of it as a file, and give that"
        )
    if path.exists():
        files = [path]
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not files:
            raise UserError(_missing(given, path))
    return [source for file in files for source in _in_file(file, format, left)]


def _first_of(left: list[LeftOut], before: int) -> str:
    """In brackets, the first files that were left out since there were `before`, and why."""
    listed = "; ".join(f"{entry.path}: {entry.reason}" for entry in left[before : before + 3])
    return f" ({listed})" if listed else ""


def _in_directory(path: Path, given: str, format: str, left: list[LeftOut]) -> list[Source]:
    sources, before = [], len(left)

    def leave(file: Path, reason: str) -> None:
        left.append(LeftOut(printable(file), reason))

    for file in sorted(folders.files_below(path, leave)):
        if file.suffix.lower() == ".zip":
            try:
                sources += _in_zip(file, format, left, is_named=False)
            except UserError as error:
                leave(file, str(error).partition(": ")[2] or str(error))
            continue
        try:
            reason = _reason(file.name, format, functools.partial(_head, file))
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
        if reason:
            leave(file, reason)
        else:
            sources.append(_in_file(file, format, left, is_listed=True)[0])
    if not sources:
        raise UserError(
            f"{printable(given)}: no text in this directory{_first_of(left, before)}; "
            "put .txt, .jsonl, .csv or .parquet files there"
        )
    return sources


def _reason(name: str, format: str, head: Callable[[], bytes]) -> str:
    """Why a file of a directory or an archive is left out, or ""."""
    inner = Path(name).stem if Path(name).suffix.lower() in COMPRESSION else name
    if contradiction(inner, format):
        return f"{Path(inner).suffix.lower()} is not what --format={format} reads"
    if Path(name).suffix.lower() in COMPRESSION:
        return ""
    return folders.reason_by_content(inner, head())


def contradiction(name: str, format: str) -> bool:
    """Whether a file of this name is of another format than the user says."""
    by_name = FORMAT_BY_NAME.get(Path(name).suffix.lower(), format)
    if format == "dialogue":
        return by_name == "csv"
    return format != "auto" and by_name not in (format, "parquet")


def refuse_contradictions(sources: list[Source], format: str) -> None:
    """Raises UserError for a file that is named and is of another format by its name: cells or JSON would be text."""
    for source in sources:
        if contradiction(source.inner_name, format):
            raise UserError(
                f"{source.name}: --format={format} contradicts its name; prepare it with --format=auto, by itself if "
                "need be, or rename it to .txt if it is text all the same"
            )


def _head(file: Path) -> bytes:
    """The beginning of a small file, or of one whose name does not say that it is text."""
    if folders.is_clear(file.name, file.stat().st_size):
        return b"text"
    with open(file, "rb") as stream:
        return stream.read(folders.HEAD)


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
    status = path.stat()
    return _open_archive(path, status.st_mtime_ns, status.st_size, os.getpid())  # processes may not share a position


@functools.lru_cache(maxsize=2)
def _open_archive(path: Path, *_: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _missing(given: str, path: Path) -> str:
    parent = path.parent
    if path.is_symlink():
        return f"{printable(given)} is a link that leads nowhere, to {printable(os.readlink(path))}"
    if not parent.is_dir():
        return f"{printable(given)}: no such file; its directory {printable(parent)} does not exist either"
    names = [entry.name for entry in parent.iterdir()]
    close = difflib.get_close_matches(path.name, [name for name in names if name != path.name], n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(printable(parent / name) for name in close)}?" if close else ""
    return f"{printable(given)}: no such file or directory{hint}"


def _in_file(file: Path, format: str, left: list[LeftOut], is_listed: bool = False) -> list[Source]:
    compression = COMPRESSION.get(file.suffix.lower(), "")
    if compression == "zip":
        return _in_zip(file, format, left)
    inner = file.stem if compression else file.name
    if {file.suffix.lower(), Path(inner).suffix.lower()} & folders.ARCHIVES:
        raise UserError(f"{printable(file)} is an archive; unpack it (tar -xf, 7z x) and give what is in it")
    return [
        Source(file, _format_of(inner, format), compression, size=file.stat().st_size, is_listed=is_listed,
               is_named=not is_listed, is_guess=format in ("auto", "dialogue"))
    ]  # fmt: skip


def _in_zip(file: Path, format: str, left: list[LeftOut], is_named: bool = True) -> list[Source]:
    try:
        archive = _archive(file)
        named = sorted((unpack.member_name(m), entry, m.file_size) for entry, m in enumerate(archive.infolist()))
    except DAMAGED as error:
        raise UserError(f"{printable(file)} is not a readable zip archive: {error}") from error
    if sum(size for _, _, size in named) > unpack.most(file.stat().st_size):
        raise UserError(unpack.grows(printable(file)))
    sources, before = [], len(left)
    for name, entry, size in named:
        source = Source(file, _format_of(name, format), "zip", name, entry, size, is_listed=True, is_named=is_named,
                        is_guess=format in ("auto", "dialogue"))  # fmt: skip
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        if not parts or name.endswith("/"):
            continue
        reason = "hidden" if any(map(folders.is_hidden, parts)) else folders.reason_by_name(parts[-1])
        if Path(name).suffix.lower() in COMPRESSION:
            reason = reason or "packed again; unpack it first"
        try:
            reason = reason or _reason(parts[-1], format, functools.partial(_member_head, source))
        except NotTextError as error:  # else whoever reads it says so, or leaves it out for --skip_bad
            reason = str(error).removeprefix(f"{source.name} ") if source.leaves_out(error) else ""
        if reason:
            left.append(LeftOut(source.name, reason))
        else:
            sources.append(source)
    if not sources:
        raise UserError(f"{printable(file)}: no text in this zip archive{_first_of(left, before)}")
    return sources


def _member_head(source: Source) -> bytes:
    if folders.is_clear(source.member, source.size):
        return b"text"
    with source.open() as stream:
        return source.read(stream, folders.HEAD)


def _format_of(name: str, format: str) -> str:
    by_name = FORMAT_BY_NAME.get(Path(name).suffix.lower(), "text")
    if format == "dialogue" and by_name in ("jsonl", "parquet"):
        return "messages"
    return by_name if format == "auto" or by_name == "parquet" else format


# Streams


class _Spooled(Source):
    """A stream that was put into a file, under the stream's own name."""

    @property
    def name(self) -> str:
        return self.member


@contextlib.contextmanager
def spooled(stream: BinaryIO, name: str) -> Iterator[Source]:
    """A stream as a source of text, so that its encoding is found out as a file's is; gone afterwards.

    The whole is read first: only later lines may show the encoding of the first ones.
    """
    import tempfile  # with random and more, for which files need not wait

    handle, path = tempfile.mkstemp(prefix="miaobi-")
    try:
        with open(handle, "wb") as file:
            while piece := stream.read(1 << 20):
                file.write(piece)
        yield _Spooled(Path(path), "text", member=name, size=os.path.getsize(path))
    finally:
        os.unlink(path)
