"""SHA-256 of the files of a directory, remembered for as long as nobody touches them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from miaobi.cache import NotPrivateError, private_cache, private_directory
from miaobi.files import sha256

JUST_NOW = 0.05
"""Seconds in which a file may be written twice with one time: one that is so young is read again."""


def hashes(directory: Path, files: list[Path]) -> dict[str, str]:
    """SHA-256 of the files of a directory by name; remembered for those that were not touched since.

    Of processes that ask at the same time, one reads and the others wait.
    """
    with _remembered(directory) as known:
        digests = {}
        for file in files:
            state = _state(file)
            entry = known.get(file.name)
            if isinstance(entry, list) and len(entry) == 2 and entry[0] == state and isinstance(entry[1], str):
                digests[file.name] = entry[1]
                continue
            digests[file.name] = sha256(file)
            changed = max(state[1:3]) / 1e9
            if _state(file) == state and time.time() - changed > JUST_NOW:
                known[file.name] = [state, digests[file.name]]
            else:
                known.pop(file.name, None)
    return digests


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


@contextlib.contextmanager
def _remembered(directory: Path) -> Iterator[dict[str, Any]]:
    """What is known of a directory's files, in the user's own cache; written back when it was changed.

    Without a cache that can be written, and is this user's alone, nothing is known.
    """
    try:
        import fcntl

        home = private_directory(private_cache() / "checked")
        file = open(home / hashlib.sha256(os.fsencode(directory.resolve())).hexdigest(), "a+b")  # noqa: SIM115
    except (ImportError, OSError, NotPrivateError):
        yield {}
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        try:
            known = json.loads(text)
        except (ValueError, RecursionError):
            known = {}
        known = known if isinstance(known, dict) else {}
        yield known
        if (now := json.dumps(known).encode()) != text:
            file.truncate(0)
            file.write(now)
