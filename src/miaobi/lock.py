"""One writer: a directory that is being written belongs to the process that holds its lock, and says who that is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from miaobi.console import log
from miaobi.errors import UserError
from miaobi.files import is_running, read_record

BEAT = 5.0  # seconds between two signs of life
SILENCE = 30.0  # seconds without one after which a holder on another machine is taken to be dead


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    pid: int
    host: str
    machine: str
    """The running system: another after a restart; containers on one machine share it."""
    started: str
    command: str
    token: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.started}: {self.command[:200]})"


def this_process() -> Holder:
    """The holder that this process would be."""
    command = " ".join(sys.argv)[:1000]
    return Holder(os.getpid(), socket.gethostname(), machine(), time.strftime("%Y-%m-%d %H:%M:%S"), command,
                  os.urandom(16).hex())  # fmt: skip


def machine() -> str:
    """What tells running systems apart: Linux' boot id, elsewhere the host's name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return socket.gethostname()


@contextmanager
def locked(
    directory: Path, advice: str = "wait for it, or take another directory", file: Path | None = None
) -> Iterator[None]:
    """Hold the lock of a directory while the body runs.

    file: where the lock is; default `.lock` in the directory, which is made where it is missing.

    The system's own lock on a file says whether a holder on this machine lives, and lets go when it dies. Of one on
    another machine (a network disk whose locks do not reach) its signs of life say so: where none comes for SILENCE
    seconds, it is dead and its lock is taken over.

    Raises UserError naming the holder where it lives; OSError where the directory cannot be written.
    """
    path = file or directory / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, mine = opened(path), this_process()
    try:
        taken, other = system_lock(fd), read_holder(path)
        if taken is False:
            raise held(directory, other, advice)
        if other is not None and other.machine != mine.machine:
            lives = beats(lambda: os.stat(path).st_mtime_ns, other)
        else:
            lives = taken is None and other is not None and other.pid != mine.pid and is_running(other.pid)
        if lives:
            raise held(directory, other, advice)
        os.ftruncate(fd, 0)
        os.write(fd, json.dumps(asdict(mine)).encode())
        try:
            with beating(lambda: os.utime(path)):
                yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        os.close(fd)


def opened(path: Path) -> int:
    """The lock's file, made where it is missing; a link there is not followed."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    while True:
        fd = os.open(path, flags, 0o644)
        with contextlib.suppress(OSError):
            if os.fstat(fd).st_ino == os.stat(path).st_ino:
                return fd
        os.close(fd)  # its last holder has just removed it


def system_lock(fd: int) -> bool | None:
    """Take the operating system's lock: False where another process has it, None where the disk knows no locks."""
    if os.name == "nt":
        import msvcrt

        try:
            os.lseek(fd, 1 << 20, os.SEEK_SET)  # beyond the text, which others read
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            os.lseek(fd, 0, os.SEEK_SET)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def read_holder(path: Path) -> Holder | None:
    """Who wrote the lock; None where nobody did, or by halves."""
    try:
        return read_record(path, Holder)
    except UserError:
        return None


def refuse_held(directory: Path, advice: str) -> None:
    """Raise UserError where another process of this machine holds the lock of a directory; asks, and takes nothing."""
    other = read_holder(directory / ".lock")
    if other and other.pid != os.getpid() and other.machine == machine() and is_running(other.pid):
        raise held(directory, other, advice)


def held(what: object, holder: Holder | None, advice: str) -> UserError:
    """The error that somebody else is writing there."""
    return UserError(f"{what} is being written by {holder or 'another process'}: {advice}")


def beats(sign: Callable[[], object], holder: Holder, silence: float | None = None) -> bool:
    """Whether `sign` changes within `silence` seconds (default SILENCE): the clocks of two machines may differ."""
    before, until = sign(), time.monotonic() + (SILENCE if silence is None else silence)
    log(f"waiting up to {until - time.monotonic():.0f} s to see whether {holder} still lives")
    while time.monotonic() < until:
        time.sleep(0.2)
        if sign() != before:
            return True
    log("it does not: its place is taken over")
    return False


@contextmanager
def beating(beat: Callable[[], object], every: float | None = None) -> Iterator[None]:
    """Call `beat` every so many seconds (default BEAT) in the background while the body runs."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(BEAT if every is None else every):
            with contextlib.suppress(Exception):  # a sign that cannot be given must not cost the run
                beat()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=1)
