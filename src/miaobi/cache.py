"""Where code that was compiled on this machine is kept: a directory that nobody but the user can write to.

What lies there is executed (libraries, the pickles and kernels of torch): who can write to it owns the process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import stat
import sys
import time
from pathlib import Path

from miaobi.console import warn

OURS = "MIAOBI_CACHE_DIR"
"""Names the cache, for processes that this one starts too; checked as any other."""
UNUSED = 60 * 24 * 3600
"""Seconds after which what nobody has read or written is removed."""
LOOKED = "looked-through"
"""A file of the cache whose time is that of the last look for such, at most once a day."""
TAG = "CACHEDIR.TAG"
"""Says that all in a directory is a cache's (bford.info/cachedir); backups leave such out. Where `OURS` names a
directory, only this makes it ours to clear: it may be a home."""
_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55\n# All here is made by miaobi, and made again when removed.\n"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class NotPrivateError(Exception):
    """Why a path cannot be trusted with code."""


def is_ours(path: Path) -> bool:
    """Whether a file or directory belongs to this user, is no link, and can be changed by nobody else."""
    if os.name != "posix":
        return True  # a profile is the user's own there
    status = path.lstat()
    return (
        not stat.S_ISLNK(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & _WRITABLE_BY_OTHERS
    )


def private_directory(path: Path) -> Path:
    """`path`, made with mode 0700 if it is not there.

    Raises NotPrivateError where it is a link, another user's, or others could write there or put another in its place.
    """
    path = Path(os.path.abspath(path))
    try:
        for parent in (*reversed(path.parents[:-1]),):  # `parents=True` would make them as the umask says
            parent.mkdir(exist_ok=True, mode=0o755)
        if os.name == "posix":
            for parent in Path(os.path.realpath(path.parent), "x").parents:
                status = parent.stat()
                replaceable = status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX
                if replaceable or status.st_uid not in (0, os.geteuid(), os.stat("/").st_uid):
                    raise NotPrivateError(f"others can change {parent}")
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            _check_old(path)
        if not os.access(path, os.W_OK | os.X_OK):
            raise NotPrivateError("it cannot be written")
    except (OSError, RuntimeError) as e:
        raise NotPrivateError(getattr(e, "strerror", None) or str(e)) from e
    return path


def _check_old(path: Path) -> None:
    """What earlier processes left is only as good as the directory was all the time."""
    if not path.is_dir() or not is_ours(path):
        raise NotPrivateError("it is a link, another user's, or others can write to it")
    if os.name == "posix" and path.lstat().st_mode & 0o077:  # others could enter: what is in it counts too
        for folder, _, files in os.walk(path):
            for found in (folder, *(os.path.join(folder, name) for name in files)):
                if not is_ours(Path(found)):
                    raise NotPrivateError(f"others can write to {found}")
        path.chmod(0o700)


def private_cache() -> Path:
    """The user's cache of compiled code: $MIAOBI_CACHE_DIR, or miaobi in $XDG_CACHE_HOME or ~/.cache.

    Where that is not the user's alone, or cannot be written, a fresh directory until this process ends, with one line
    of warning: a cache is never a reason to fail.
    """
    folder = None
    try:
        folder = wished_cache()
        is_new = not os.path.lexists(folder) or not os.listdir(folder)
        private_directory(folder)
        if is_new:
            with contextlib.suppress(OSError):
                (folder / TAG).write_text(_SIGNATURE, encoding="utf-8")
        return folder
    except (NotPrivateError, OSError, RuntimeError, KeyError) as e:  # no home, or a user that the system does not know
        import tempfile  # with random and more, which is seldom needed

        fresh = tempfile.mkdtemp(prefix="miaobi-")
        atexit.register(_remove, fresh, os.getpid())
        os.environ[OURS] = fresh
        what = "there is no home directory for the cache" if folder is None else f"the cache {folder} is not used ({e})"
        remedy = "" if folder is None else "remove it, or "
        warn(f"{what}: what is compiled is forgotten when this ends; {remedy}set {OURS} to a directory of your own")
        return Path(fresh)


def wished_cache() -> Path:
    """Where the cache is to be, checked or not. Raises RuntimeError or KeyError where there is no home."""
    if named := os.environ.get(OURS):
        return Path(named).absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "miaobi"


def remove_unused(home: Path) -> None:
    """Remove from the cache what was neither read nor written for `UNUSED` seconds; looked for once a day. What
    another process removes or holds at the same time is none of our business; nor is a directory that the user named
    and that held something before.
    """
    if os.environ.get(OURS) and not (home / TAG).is_file():
        return
    now = time.time()
    try:
        looked = home / LOOKED
        if looked.exists() and now - looked.stat().st_mtime < 24 * 3600:
            return
        looked.touch(mode=0o600)
        for folder, folders, files in os.walk(home, topdown=False):
            for name in files:
                if name == TAG:
                    continue
                status = os.lstat(path := os.path.join(folder, name))
                if now - max(status.st_atime, status.st_mtime) > UNUSED:
                    os.unlink(path)
            for name in folders:
                with contextlib.suppress(OSError):  # not empty
                    os.rmdir(os.path.join(folder, name))
    except OSError:
        return


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # not a process that was forked off
        shutil.rmtree(directory, ignore_errors=True)


@functools.cache
def keep_compiled_code_private() -> None:
    """Give torch.compile and Triton caches of this user's own, before they are first used.

    By default both are in the temporary directory under a name that anybody can take first, and what lies there is
    unpickled and executed. A TORCHINDUCTOR_CACHE_DIR or TRITON_CACHE_DIR of the user's own is checked as well.
    """
    import tempfile

    remove_unused(private_cache())
    shared = os.path.join(tempfile.gettempdir(), "torchinductor_")  # which torch may have set by itself
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        ours = private_cache() / name
        chosen = os.environ.get(variable) or ""
        chosen = ours if chosen == "" or chosen.startswith(shared) else Path(chosen)
        try:
            folder = private_directory(chosen)
        except NotPrivateError as e:
            warn(f"{chosen} is not used for compiled code ({e})")
            folder = private_directory(ours) if chosen != ours else Path(tempfile.mkdtemp(dir=private_cache()))
        os.environ[variable] = str(folder)
    from torch._inductor.runtime import cache_dir_utils, runtime_utils  # only now: dynamo makes its directory at import

    headers = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    for module in (cache_dir_utils, runtime_utils):  # precompiled headers and more, whatever the variable says
        if hasattr(module, "default_cache_dir"):
            module.default_cache_dir = lambda: str(headers)
    if (loaded := sys.modules.get("torch._inductor.codecache")) is not None:
        loaded._HEADER_DIR = str(headers / "precompiled_headers")
        loaded._HEADER_LOCK_DIR = str(headers / "precompiled_headers" / "locks")
