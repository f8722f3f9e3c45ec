"""Processes that need no seconds to import torch: forks of a server that has done it, once per worker of pytest.

What is run this way: commands whose output, files, losses or signals a test is about. Where the start itself counts
(what is imported when, torchrun, terminals, shells), tests start Python.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "torch._dynamo", "torch.distributed.fsdp", "torch.utils.tensorboard", "miaobi.train.loop", "miaobi.train.score",
    "miaobi.corpus.prepare", "miaobi.convert.small_gpt", "miaobi.generate.chat", "miaobi.generate.sample",
    "miaobi.classify.ablation", "miaobi.demo", "sklearn.svm",
])  # fmt: skip
STREAMS = ("stdin", "stdout", "stderr")


def python(arguments: Sequence[str], environment: Mapping[str, str], cwd: str, streams: Sequence[Path]) -> None:
    """In the fork: what `python ARGUMENTS` does, with `streams` as stdin, stdout and stderr, files or a terminal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest in the background of a shell ignores it
    os.setsid()  # the first terminal that is opened is then its own, and Ctrl-C there its signal
    for number, (name, path) in enumerate(zip(STREAMS, streams, strict=True)):
        os.dup2(os.open(path, os.O_WRONLY if number else os.O_RDONLY), number)
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = open(number, "w" if number else "r", encoding="utf-8", errors=errors, buffering=1, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    kind, what, *rest = arguments
    sys.argv = [kind, *rest]
    sys.path.insert(0, cwd)
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


class Process:
    """`python -m MODULE ...` or `python -c CODE ...` without its start; otherwise as subprocess.Popen with texts."""

    def __init__(self, arguments: Sequence[object], *, input: str | bytes = "", cwd: Path | None = None,
                 env: Mapping[str, str] | None = None, **streams: Path) -> None:  # fmt: skip
        """streams: stdin, stdout, stderr, where they are not files of this object."""
        self.args = [str(a) for a in arguments]
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        for name in STREAMS:
            (self.folder / name).touch()
        (self.folder / "stdin").write_bytes(input.encode() if isinstance(input, str) else input)
        environment = dict(os.environ if env is None else env)
        opened = [streams.get(name, self.folder / name) for name in STREAMS]
        what = (self.args, environment, str(cwd or Path.cwd()), opened)
        self._process = SERVER.Process(target=python, args=what)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code; None while it runs; the negative number of the signal that ended it."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """As `kill` does; nothing if it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def said(self, stream: str = "stderr") -> str:
        """What it has printed so far."""
        return (self.folder / stream).read_text(encoding="utf-8")

    def wait(self, timeout: float = 600) -> subprocess.CompletedProcess:
        """Its exit code and what it printed. After `timeout` seconds it is killed, and TimeoutError raised."""
        self._process.join(timeout)
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            self._process.join()
            raise TimeoutError(f"{self.args} did not end within {timeout:.0f} s\n{self.said()[-3000:]}")
        return subprocess.CompletedProcess(self.args, self.poll(), self.said("stdout"), self.said())


def run(arguments: Sequence[object], **options: object) -> subprocess.CompletedProcess:
    """Run a command to its end."""
    return Process(arguments, **options).wait()


def ranks(size: int, *arguments: object, of_rank: Mapping[int, Sequence[object]] | None = None,
          timeout: float = 600) -> list[subprocess.CompletedProcess]:  # fmt: skip
    """What torchrun starts with `-m miaobi train ARGUMENTS`, in its environment and with its store, one per rank.

    of_rank: other arguments of some ranks. When one fails, the others are ended, as torchrun does it.
    """
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = os.environ | {
        "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    command = ["-m", "miaobi", "train", *arguments]
    processes = [
        Process((of_rank or {}).get(rank, command), env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
    give_up = time.monotonic() + timeout
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        if time.monotonic() > give_up:
            break
        time.sleep(0.01)
    failed = [p for p in processes if p.poll()]
    if failed or time.monotonic() > give_up:
        for p in processes:
            p.send_signal(signal.SIGTERM)
    return [p.wait(60) for p in processes]
