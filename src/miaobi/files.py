"""Files that are written whole or not at all, pointers between siblings, JSON, and SHA-256: the only place for them.

What is written never follows a link: it is made in the same directory, under a temporary name, and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle  # for the name of its error: nothing here reads one
import re
import shutil
import stat
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeVar

from miaobi.errors import UserError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PIECE = 4 << 20
"""Bytes that are hashed at once: between two pieces Python's lock is asked for, which an import keeps for long."""
TARGET = ".target"
"""In a directory of hard links that stands for a symlink: which sibling it is made of."""
MOST = 32 << 20
"""Bytes of a file of settings that are read: JSON takes 25 times as much memory at worst."""
MOST_OF_A_LIST = 512 << 20
"""Of one that lists every source file: THUCNews is 836,000 files, of some 300 bytes each."""
Record = TypeVar("Record")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A directory that appears at `path` complete: filled aside, flushed to the disk, then renamed.

    If the body raises (a full disk, Ctrl-C) nothing is left behind and an older directory at `path` stays. Directories
    cannot be exchanged in one go everywhere: the older one is renamed too, and `put_back` finds it after a kill.
    """
    put_back(path)
    clear_leftovers(path)
    temporary, older = aside_of(path), older_of(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in [p for p in temporary.rglob("*") if p.is_file()] + [temporary]:
            flush(file)
        if os.path.lexists(path):
            path.rename(older)
        temporary.rename(path)
        flush(path.parent)
        remove(older)
    except BaseException:
        put_back(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def no_links(directory: Path, *names: str) -> None:
    """Raise UserError where one of these in `directory` is a link: what is written and deleted there is another's."""
    for path in (directory / name for name in names):
        if path.is_symlink():
            raise UserError(f"{path} is a link to {os.readlink(path)}, where this run would write and delete "
                            "what is not its own; put the directory there, or choose another --out_dir")  # fmt: skip


def put_back(path: Path) -> None:
    """Clear away what a killed `written_whole` left of an older `path`; if that is all there is, it is `path` again."""
    older = older_of(path)
    if older.exists() and not path.exists():
        older.rename(path)
    remove(older)


def remove(path: Path) -> None:
    """Remove a directory, or a link itself and not what it names; what cannot be removed stays."""
    if path.is_symlink():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def aside_of(path: Path) -> Path:
    """Where something is while it is being written: a new name at every call, that tells the process."""
    return path.parent / f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp"


def clear_leftovers(path: Path) -> None:
    """Remove what killed processes left aside of `path`; another living process may be writing there right now."""
    if not path.parent.is_dir():
        return
    for leftover in path.parent.glob(f".{glob_escape(path.name)}*.tmp"):
        owner = re.fullmatch(re.escape(f".{path.name}") + r"(?:\.(\d{1,9})-[0-9a-f]{8})?\.tmp", leftover.name)
        if owner and not (owner[1] and int(owner[1]) != os.getpid() and is_running(int(owner[1]))):
            remove(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def glob_escape(name: str) -> str:
    """A file name as a pattern that matches only itself."""
    return re.sub(r"([*?[])", r"[\1]", name)


def is_running(pid: int) -> bool:
    """Whether a process of this number lives on this machine; where that cannot be asked, it is taken to live."""
    if os.name == "nt" or not 0 < pid < 1 << 31:
        return os.name == "nt"  # os.kill would end it; no process has such a number, which means groups of them
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def older_of(path: Path) -> Path:
    """Where the directory that is replaced is for a moment."""
    return path.parent / f".{path.name}.old"


def flush(path: Path) -> None:
    """fsync a file, or a directory so that the names in it are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open directories
    fd = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- pointers ----------------------------------------------------------------------------------------------------


def point(link: Path, target: str) -> None:
    """Make `link` name its sibling `target`: a relative symlink, or where those are refused a directory of hard links
    (else copies) to the files of `target` itself, so that any program can open it.
    """
    temporary = aside_of(link)
    try:
        temporary.symlink_to(target)
    except OSError:
        temporary.mkdir()
        for file in (p for p in (link.parent / target).iterdir() if p.is_file()):
            try:
                os.link(file, temporary / file.name)
            except OSError:
                shutil.copy2(file, temporary / file.name)
        (temporary / TARGET).write_text(target + "\n", encoding="utf-8")
    if link.is_dir() and not link.is_symlink():
        older = older_of(link)
        remove(older)
        link.rename(older)
        os.replace(temporary, link)
        remove(older)
    else:
        if temporary.is_dir() and not temporary.is_symlink():
            link.unlink(missing_ok=True)  # a directory does not replace a file
        os.replace(temporary, link)


def pointed(link: Path) -> Path | None:
    """The sibling directory that `link` names, or None. A copy that knows no links made a directory of it: that one.

    What a kill left between two renames is found where it is: the next `train` puts it back, a reader only reads.
    """
    if not os.path.lexists(link):
        link = older_of(link)
    if link.is_symlink():
        name = os.readlink(link)
    elif (link / TARGET).is_file():
        name = small_text(link / TARGET)
    elif (link / "config.json").is_file():
        return link
    elif link.is_file():
        name = small_text(link)
    else:
        return None
    name = Path(name).name  # only ever a sibling
    if name in ("", ".", "..", link.name):
        return None
    target = link.parent / name
    return next((place for place in (target, older_of(target)) if place.is_dir()), None)


def small_text(file: Path) -> str:
    """The first line of a small file; empty where it is something else."""
    with file.open("rb") as f:
        return f.read(1000).decode("utf-8", errors="replace").strip().partition("\n")[0].replace("\0", "")


# --- text and JSON -----------------------------------------------------------------------------------------------


@contextmanager
def text_written_whole(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file that appears at `path`, in place of a link that is there, when it is whole; else what was there
    stays.
    """
    temporary = aside_of(path)
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file, or the link that is there and not what it names, by UTF-8 text in one go; a lone surrogate, as
    names of files may have, is written as an escape.
    """
    temporary = aside_of(path)
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_of(value: Any, indent: int | None = None) -> str:
    """JSON that UTF-8 can hold: a lone surrogate, as other JSON and names of files may have, stays an escape."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return text.encode("utf-8", "backslashreplace").decode()


def write_json(path: Path, value: dict) -> None:
    """Indented UTF-8 JSON."""
    write_text(path, json_of(value, indent=2) + "\n")


def read_whole(file: Path, most: int = MOST) -> bytes:
    """The bytes of a small file. Raises UserError for a larger one, and for what is no file: a pipe would never end;
    OSError where there is none.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{file} is not a file")
    with file.open("rb") as opened:
        content = opened.read(most + 1) if status.st_size <= most else b""
    if max(status.st_size, len(content)) > most:  # it may have grown meanwhile
        raise UserError(f"{file} has {max(status.st_size, len(content)):,} bytes; at most {most:,} are read of a file "
                        "of this kind")  # fmt: skip
    return content


def read_json(file: Path, most: int = MOST) -> dict[str, Any]:
    """A file that holds a JSON object; {} where there is no such file. Raises UserError if it is damaged."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(read_whole(file, most).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({str(error)[:200]}); copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no settings; copy it again")
    return value


def read_record(file: Path, kind: type[Record], most: int = MOST, unknown: list[str] | None = None) -> Record:
    """A JSON object as the dataclass `kind`: only its fields, each of the declared type; others keep their defaults.

    unknown: gets the names of fields that `kind` does not have, which are then left out instead of refused.
    Raises UserError naming the file and the field, also where there is no such file.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing")
    value, declared = read_json(file, most), typing.get_type_hints(kind)
    if unknown is not None:
        unknown += [key for key in value if key not in declared]
        value = {key: found for key, found in value.items() if key in declared}
    for key, found in value.items():
        if key not in declared:
            raise UserError(f"{file}: unknown field {key[:80]!r}")
        if not is_a(found, declared[key]):
            raise UserError(f"{file}: {key} is {json.dumps(found)[:80]}, which is not of its type")
    try:
        return kind(**value)
    except TypeError as error:  # a field without a default is missing
        raise UserError(f"{file}: {error}") from error


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is of a declared type: str, bool, 64-bit int, finite float, None, lists and dicts."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(is_a(value, choice) for choice in inner)
    if origin is list:
        return isinstance(value, list) and all(is_a(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(is_a(item, inner[1]) for item in value.values())
    if kind is types.NoneType:
        return value is None
    if kind is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max  # neither NaN nor infinite
    if kind is int:
        return type(value) is int and -(2**63) <= value < 2**63
    return type(value) is kind


# --- checksums ---------------------------------------------------------------------------------------------------


def checksum(file: Path, digest: hashlib._Hash) -> str:
    """Hexadecimal digest of what `digest` has seen, followed by a file."""
    with file.open("rb", buffering=0) as f:
        buffer = memoryview(bytearray(max(1, min(PIECE, os.fstat(f.fileno()).st_size))))
        while count := f.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return checksum(file, hashlib.sha256())


def unreadable(path: Path, error: Exception) -> UserError:
    """torch's own words advise to load with weights_only=False, which would execute what is in the file."""
    text = str(error)
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path}: no such file; copy it again")
    if isinstance(error, pickle.UnpicklingError) and (named := re.search(r"GLOBAL (\S+)", text)):
        return UserError(
            f"{path} was not loaded: besides weights and settings it holds {named[1][:80]}, and to load that could run "
            "a program. If you trust it, save it again on the machine it comes from with plain values only"
        )
    return UserError(f"{path} cannot be read ({reason(error)}); it was cut short or altered: copy it again")


def reason(error: Exception) -> str:
    """The first line of an error, without torch's advice to run what is in a file."""
    line = next(iter(str(error).splitlines()), "").strip()
    if not line or "weights_only" in line or "weights only" in line.lower():
        return f"{type(error).__name__}: not what torch.save writes of weights"
    return line[:120]


def refuse_pointers(files: Iterable[Path]) -> None:
    """Raises UserError for a file of which git clone without git-lfs brought only the pointer."""
    for file in files:
        if file.is_file() and file.stat().st_size < 1024:
            with file.open("rb") as opened:
                if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise UserError(f"{file} is a Git LFS pointer, not the file itself: run `git lfs install` and "
                                    f"`git lfs pull` in {file.parent}, or download the model anew")  # fmt: skip
