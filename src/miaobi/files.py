"""Files that are written whole or not at all, pointers between siblings, JSON, and SHA-256: the only place for them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from miaobi.errors import UserError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A directory that appears at `path` complete: filled aside, flushed to the disk, then renamed.

    If the body raises (a full disk, Ctrl-C) nothing is left behind and an older directory at `path` stays. Directories
    cannot be exchanged in one go everywhere: the older one is renamed too, and `put_back` finds it after a kill.
    """
    aside, older = aside_of(path), older_of(path)
    put_back(path)
    shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in [p for p in aside.rglob("*") if p.is_file()] + [aside]:
            flush(file)
        if path.exists():
            path.rename(older)
        aside.rename(path)
        flush(path.parent)
        shutil.rmtree(older, ignore_errors=True)
    except BaseException:
        put_back(path)
        shutil.rmtree(aside, ignore_errors=True)
        raise


def put_back(path: Path) -> None:
    """Clear away what a killed `written_whole` left of an older `path`; if that is all there is, it is `path` again."""
    older = older_of(path)
    if older.exists() and not path.exists():
        older.rename(path)
    shutil.rmtree(older, ignore_errors=True)


def aside_of(path: Path) -> Path:
    """Where a directory is while it is being written."""
    return path.parent / f".{path.name}.tmp"


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


def point(link: Path, target: str) -> None:
    """Make `link` name its sibling `target`: a relative symlink, or a one-line file where those are refused."""
    aside = link.with_name(f".{link.name}.tmp")
    aside.unlink(missing_ok=True)
    try:
        aside.symlink_to(target)
    except OSError:
        aside.write_text(target + "\n", encoding="utf-8")
    os.replace(aside, link)


def pointed(link: Path) -> Path | None:
    """The sibling directory that `link` names, or None. A copy that knows no links made a directory of it: that one."""
    if (link / "config.json").is_file() and not link.is_symlink():
        return link
    if link.is_symlink():
        name = os.readlink(link)
    elif link.is_file():
        name = link.read_text(encoding="utf-8").strip()
    else:
        return None
    target = link.parent / Path(name).name  # only ever a sibling
    return target if target.is_dir() else None


@contextmanager
def text_written_whole(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file that appears at `path`, or where that links to, when it is whole; else what was there stays."""
    path = Path(os.path.realpath(path))
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    """Indented UTF-8 JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds a JSON object; {} where there is no such file. Raises UserError if it is damaged."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({str(error)[:200]}); copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no settings; copy it again")
    return value


def checksum(file: Path, digest: hashlib._Hash) -> str:
    """Hexadecimal digest of what `digest` has seen, followed by a file."""
    with file.open("rb") as f:
        while piece := f.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return checksum(file, hashlib.sha256())
