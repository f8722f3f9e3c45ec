"""Parts in C++: built by the system's compiler the first time they are wanted, kept for the next time.

Nobody waits for the compiler: callers do without until the library is there, and where there is none.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
from functools import cache
from pathlib import Path

FLAGS = "-std=c++17 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fPIC -shared"


def compiler() -> str | None:
    """The system's C++ compiler, where a library of its making can be loaded."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None) if sys.platform == "linux" else None


@cache
def build(source: Path) -> Path | None:
    """Where the library of `source` is, or will be once the compiler that this starts is done; None without a compiler.

    Some seconds, once per machine; it goes on when this process ends.
    """
    program = compiler()
    if program is None:
        return None
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line for line in info if line.startswith(("flags", "Features"))), os.uname().machine)
    key = hashlib.sha256("\n".join((source.read_text(encoding="utf-8"), program, FLAGS, cpu)).encode()).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miaobi"
    made = home / f"{source.stem}-{key[:16]}.so"
    if not made.exists():
        import shlex  # of use once per machine
        import subprocess

        command = shlex.join([program, *FLAGS.split(), str(source)])
        whole_or_not = f'{command} -o "$0.$$" && mv "$0.$$" "$0" || rm -f "$0.$$"'
        try:
            home.mkdir(parents=True, exist_ok=True)
            nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
            subprocess.Popen(["sh", "-c", whole_or_not, str(made)], start_new_session=True, **nowhere)
        except OSError:  # a home that cannot be written
            return None
    return made


def library(source: Path) -> ctypes.CDLL | None:
    """The compiled `source`; None while or where there is none."""
    made = build(source)
    return opened(made) if made is not None and made.exists() else None


@cache
def opened(made: Path) -> ctypes.CDLL | None:
    """The library at `made`; None if it does not fit this system."""
    try:
        return ctypes.CDLL(str(made))
    except OSError:
        return None
