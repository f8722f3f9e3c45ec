"""Large files over HTTP: a download goes on where an earlier one stopped, and is compared with what it should be.

The client is huggingface_hub's (proxies and certificates of the environment, HF_HUB_OFFLINE); it leaves out
credentials where a server sends it to another host. Its own downloads begin anew in every process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from miaobi.console import console, progress
from miaobi.files import sha256 as sha256_of
from miaobi.files import small_text

TRIES = 5
"""In a row that bring nothing; after one that brought something they count anew."""
TIMEOUT = 30
"""Seconds without a byte after which a connection counts as broken."""


class AlteredError(Exception):
    """What came is not what was to come; it was removed."""


class AnswerError(Exception):
    """The server's answer is no file. `status`: HTTP's number."""

    def __init__(self, status: int, url: str) -> None:
        super().__init__(f"HTTP {status} for {url}")
        self.status = status


def broken() -> tuple[type[Exception], ...]:
    """What the client raises for a connection that broke, or was never made."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(kind for kind in HfHubHTTPError.__bases__ if kind is not OSError)


def fetch(
    url: str, target: Path, name: str, sha256: str = "", size: int | None = None, headers: dict[str, str] | None = None
) -> None:
    """Download to `target`. What a try left behind lies in `target`.part, which the next one goes on with.

    name: what a bar says. sha256, size: of the whole, where they are known.
    Raises AlteredError; AnswerError; what `broken` lists after TRIES; OSError.
    """
    part, idle = target.with_name(f"{target.name}.part"), 0
    for left in (part, tag_of(part)):
        if left.is_symlink() or (left.exists() and not left.is_file()):
            left.unlink()  # a link is not written through, a pipe not waited for
    if size == 0:
        part.touch()
    with bar(name, size) as came:
        while length(part) != size:
            before = length(part)
            try:
                if receive(url, part, headers or {}, came, size):
                    break
                raise broken()[0](f"the connection broke after {length(part):,} bytes")
            except broken():
                idle = 0 if length(part) > before else idle + 1
                if idle >= TRIES:
                    raise
                time.sleep(min(8, 2**idle / 2))
    if size not in (None, length(part)) or (sha256 and sha256_of(part) != sha256):
        part.unlink()
        tag_of(part).unlink(missing_ok=True)
        raise AlteredError(name)
    tag_of(part).unlink(missing_ok=True)
    part.replace(target)


def receive(url: str, part: Path, headers: dict[str, str], came: Any, size: int | None) -> bool:
    """One try, from where `part` ends; whether all came. A file that changed on the server since begins anew.

    A server that sends more than `size` is not heard to its end.
    """
    from huggingface_hub import get_session

    start, tag = length(part), tag_of(part)
    asked = {**headers, "Accept-Encoding": "identity"}  # bytes as they lie there: their places count
    if start:
        asked["Range"] = f"bytes={start}-"
        if tag.is_file():
            asked["If-Range"] = small_text(tag)
    with get_session().stream("GET", url, headers=asked, timeout=TIMEOUT) as answer:
        if start and answer.status_code == 416:  # nothing is left, or the file is shorter now
            whole = answer.headers.get("Content-Range", "").rpartition("/")[2] == str(start)
            if not whole:
                part.unlink()
            return whole
        if answer.status_code not in (200, 206):
            raise AnswerError(answer.status_code, url)
        goes_on = answer.status_code == 206 and start > 0
        first = start if goes_on else 0
        length_header = answer.headers.get("Content-Length")
        etag = answer.headers.get("ETag", "")
        if etag and not etag.startswith("W/"):
            tag.write_text(etag, encoding="utf-8")
        came(first, first + int(length_header) if length_header else None)
        with part.open("ab" if goes_on else "wb") as file:
            for piece in answer.iter_raw():
                file.write(piece)
                came(file.tell(), None)
                if size is not None and file.tell() > size:
                    return True
        return length_header is None or length(part) == first + int(length_header)


def length(part: Path) -> int:
    """Bytes that are there."""
    return part.stat().st_size if part.exists() else 0


def tag_of(part: Path) -> Path:
    """Where the server's name for the contents of `part` is kept."""
    return part.with_name(f"{part.name}.etag")


@contextmanager
def bar(name: str, size: int | None) -> Iterator[Any]:
    """Call what this gives with the bytes that came and, once known, how many there are; a terminal shows a bar."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    with progress(DownloadColumn(), TransferSpeedColumn()) as shown:
        task = shown.add_task(name, total=size, visible=console.is_terminal)

        def came(done: int, total: int | None) -> None:
            shown.update(task, completed=done, **({} if total is None else {"total": total}))

        yield came
