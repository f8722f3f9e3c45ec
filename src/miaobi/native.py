"""Parts in C++: built by the system's compiler the first time they are wanted, kept for the next time.

Nobody waits for the compiler: callers do without until the library is there, and where there is none.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from miaobi.cache import is_ours, private_cache
from miaobi.console import log, warn

if TYPE_CHECKING:
    import subprocess  # of use once per machine

FLAGS = "-std=c++17 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fPIC -shared"
TRY_AGAIN = 24 * 3600
"""Seconds after which a compiler that failed is asked again: a disk may have been full."""


def compiler() -> str | None:
    """The system's C++ compiler, where a library of its making can be loaded."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None) if sys.platform == "linux" else None


_compiling: dict[Path, subprocess.Popen] = {}
"""Compilers that this process has started and not waited for, by their source."""


@cache
def build(source: Path) -> Path | None:
    """Where the library of `source` is, or will be once the compiler that this starts is done; None without a compiler.

    Some seconds, once per machine; it goes on when this process ends. A compiler that failed is not asked again for a
    day, which is said in one line.
    """
    program = compiler()
    if program is None:
        return None
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line for line in info if line.startswith(("flags", "Features"))), os.uname().machine)
    version = Path(program).stat()  # a repaired compiler is another one
    code = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    identity = (*code, program, f"{version.st_size} {version.st_mtime_ns}", FLAGS, cpu)
    key = hashlib.sha256("\n".join(identity).encode()).hexdigest()
    made = private_cache() / f"{source.stem}-{key[:16]}.so"
    failed = made.with_suffix(".failed")
    if made.exists():
        return made
    try:
        if failed.exists() and time.time() - failed.stat().st_mtime < TRY_AGAIN:
            why = next(iter(failed.read_text(encoding="utf-8", errors="replace").splitlines()), "it gave no reason")
            log(f"{program} could not build {source.name} ({why[:200]}); going on without. Delete {failed} to retry")
            return None
        import shlex
        import subprocess

        command = shlex.join([program, *FLAGS.split(), str(source)])
        whole_or_not = (
            f'umask 077; if {command} -o "$0.$$" 2> "$0.$$.log"; then rm -f "$0.$$.log" "$1"; mv "$0.$$" "$0"; '
            'else rm -f "$0.$$"; mv "$0.$$.log" "$1"; fi'
        )
        nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        words = ["sh", "-c", whole_or_not, str(made), str(failed)]
        _compiling[source] = subprocess.Popen(words, start_new_session=True, **nowhere)
    except OSError:  # no shell, no room for another process
        return None
    return made


def library(source: Path) -> ctypes.CDLL | None:
    """The compiled `source`; None while or where there is none."""
    made = build(source)
    return opened(made) if made is not None and made.exists() else None


def awaited(source: Path, seconds: float = 30.0) -> ctypes.CDLL | None:
    """`library`; where this process has started the compiler, that is waited for, once and no longer than `seconds`."""
    build(source)
    if process := _compiling.pop(source, None):
        until = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
    return library(source)


@cache
def opened(made: Path) -> ctypes.CDLL | None:
    """The library at `made`; None if it does not fit this system, or anybody else could have written it."""
    try:
        if not is_ours(made):
            warn(f"{made} is not loaded: it is a link, another user's, or others can write to it. Remove it")
            return None
        return ctypes.CDLL(str(made))
    except OSError:
        return None
