"""Run by test_platforms.py in a process of its own: prepare, train, sample and chat where nothing of POSIX is.

    python tests/elsewhere.py FOLDER

What Windows and macOS lack is taken away after third-party packages are imported and before anything of miaobi is:
their modules and functions, /proc, symbolic links, fork, a compiler, git, Triton. miaobi's modules are told that this
is Windows. stdout is a GBK console that refuses what it does not have. Opening a text without saying its encoding,
which works on a UTF-8 system alone, is an error.
"""

import builtins
import errno
import fcntl
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import signal
import sys
import types
import warnings
from pathlib import Path

for name in ("matplotlib.figure", "rich.console", "rich.progress", "torch._dynamo", "torch.utils.tensorboard"):
    importlib.import_module(name)
POSIX_MODULES = ("fcntl", "resource", "termios", "pwd", "grp", "triton")
POSIX_FUNCTIONS = (
    "fork", "forkpty", "sched_getaffinity", "getuid", "geteuid", "getgid", "getpgid", "setsid", "pread", "pwrite",
    "getloadavg", "sysconf", "register_at_fork", "mkfifo", "chown", "nice", "O_NOFOLLOW", "O_CLOEXEC", "O_DIRECTORY",
)  # fmt: skip
SIGNALS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "setitimer")
LACKED = {  # by Windows, of what the standard library itself needs here: miaobi's modules do not see it
    "os": (
        *POSIX_FUNCTIONS, "chroot", "confstr", "copy_file_range", "ctermid", "environb", "eventfd", "fchdir",
        "fchmod", "fchown", "fdatasync", "fpathconf", "fstatvfs", "fwalk", "getenvb", "getgrouplist",
        "getgroups", "getpgrp", "getpriority", "getsid", "getxattr", "killpg", "lchown", "listxattr", "lockf",
        "memfd_create", "mknod", "openpty", "pathconf", "pidfd_open", "pipe2", "posix_fadvise",
        "posix_fallocate", "posix_spawn", "preadv", "pwritev", "readv", "sched_setaffinity", "sched_yield",
        "sendfile", "setgid", "setpgid", "setpriority", "setuid", "setxattr", "splice", "statvfs", "sync",
        "tcgetpgrp", "ttyname", "uname", "wait", "wait3", "wait4", "waitid", "writev", "O_NONBLOCK", "O_SYNC",
        "O_DSYNC", "O_NOCTTY", "O_TMPFILE", "WNOHANG", "WIFSIGNALED", "WTERMSIG",
    ),
    "signal": (
        *SIGNALS, "alarm", "pthread_kill", "pthread_sigmask", "siginterrupt", "sigpending", "sigwait", "SIG_BLOCK",
        "SIG_SETMASK", "SIGCHLD", "SIGCONT", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP", "SIGWINCH",
    ),
}  # fmt: skip


class Told:
    """A module, but for the attributes that are given, and those that Windows lacks."""

    def __init__(self, module: types.ModuleType, **told: object) -> None:
        self.__dict__.update(told, _module=module, _lacked=frozenset(LACKED.get(module.__name__, ())))

    def __getattr__(self, name: str) -> object:
        if name in self._lacked:
            raise AttributeError(f"module {self._module.__name__!r} has no attribute {name!r} on Windows")
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._module, name, value)


def refuse_links(*_: object, **__: object) -> None:
    """As Windows does for who is no administrator."""
    raise OSError(errno.EPERM, "A required privilege is not held by the client")


def kill(process: int, number: int) -> None:
    """Windows' own: 0 is no question there but Ctrl-C, and what is not Ctrl-C or Ctrl-Break ends the process."""
    raise AssertionError(f"os.kill({process}, {number}) would end a process of Windows")


def without_proc(real):
    """`open` where there is no /proc."""

    def opened(file, *args, **kwargs):
        if not isinstance(file, int) and os.fsdecode(file).startswith("/proc/"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", file)
        return real(file, *args, **kwargs)

    return opened


def windows_locks() -> types.ModuleType:
    """msvcrt's two names that a lock needs, by the system's own."""
    module, flock, flags = types.ModuleType("msvcrt"), fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB
    module.LK_NBLCK = 2
    module.locking = lambda fd, mode, size: flock(fd, flags)
    return module


def take_away() -> None:
    """Everything that is not everywhere."""
    sys.modules["msvcrt"] = windows_locks()
    sys.modules.update(dict.fromkeys(POSIX_MODULES))
    for module, names in ((os, POSIX_FUNCTIONS), (signal, SIGNALS)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    os.symlink = refuse_links
    io.open = builtins.open = without_proc(builtins.open)
    multiprocessing.get_all_start_methods = lambda: ["spawn"]
    os.environ["PATH"] = ""
    warnings.filterwarnings("error", category=EncodingWarning, module=r"miaobi\b")


def tell_windows() -> None:
    """Import all of miaobi, and tell each module where it is."""
    import miaobi

    for found in pkgutil.walk_packages(miaobi.__path__, "miaobi."):
        if found.name not in ("miaobi.__main__", "miaobi.train.symmetric_kernel"):  # that one is for Triton
            importlib.import_module(found.name)
    for name, module in list(sys.modules.items()):
        if name.startswith("miaobi"):
            if getattr(module, "os", None) is os:
                module.os = Told(os, name="nt", kill=kill)
            if getattr(module, "signal", None) is signal:
                module.signal = Told(signal)
            if getattr(module, "sys", None) is sys:
                module.sys = Told(sys, platform="win32")


def main(folder: Path) -> None:
    """The journey; prints the JSON lines of the verbs."""
    take_away()
    tell_windows()
    from miaobi.cli import main as miaobi

    os.chdir(folder)
    shape = ["--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4", "--max_iters=4",
             "--eval_interval=2", "--eval_iters=1", "--sample_tokens=4", "--device=cpu"]  # fmt: skip
    miaobi(["prepare", "文本.txt", "--out=数据", "--workers=2", "--json"])
    miaobi(["train", "--data=数据", "--out_dir=run", *shape, "--json"])
    miaobi(["train", "--data=数据", "--out_dir=run", *shape, "--max_iters=6", "--json"])  # goes on
    miaobi(["sample", "run", "--start=妙笔😀", "--num_samples=1", "--max_new_tokens=4", "--device=cpu"])
    miaobi(["eval", "run", "文本.txt", "--device=cpu", "--json"])
    print(json.dumps({"encoding": sys.stdout.encoding, "methods": multiprocessing.get_all_start_methods()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
