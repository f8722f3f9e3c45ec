"""What every benchmark shares: the machine in words, sides that take turns, ratios with their spread, the report."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from miaobi.console import log, warn
from miaobi.device import cpu_has_bf16

SETTLE = 0.3  # seconds between turns: OpenMP threads of the side before still spin for a moment
Args = TypeVar("Args")


@dataclass(frozen=True)
class Ratio:
    """How many times a peer's figure ours is, turn by turn."""

    pairs: list[float]
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratio(ours: list[float], theirs: list[float]) -> Ratio:
    """Ratio of each pair, their median, least and largest. Raises ValueError unless both have as many, all positive."""
    if len(ours) != len(theirs) or not ours or min(ours + theirs) <= 0:
        raise ValueError(f"not pairs of positive figures: {ours} and {theirs}")
    pairs = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(pairs, statistics.median(pairs), min(pairs), max(pairs))


def take_turns(sides: dict[str, Callable[[], float]], pairs: int) -> dict[str, list[float]]:
    """Run every side once, then all of them again, `pairs` times (A B A B ...); side -> what it returned each time.

    A slow spell of the machine then falls on neighbours, and the ratio of a pair hardly notices.
    """
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1, pairs + 1):
        for name, turn in sides.items():
            time.sleep(SETTLE)
            figures[name].append(turn())
            log(f"pair {number}/{pairs}  {name}: {figures[name][-1]:,.1f}")
    return figures


class Worker:
    """An object in a process of its own. Calls run there, one at a time; between them it waits on a pipe, idle."""

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads half alive
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def call(self, method: str, *args: Any) -> Any:
        """`object.method(*args)` over there. Raises RuntimeError with its traceback where it fails."""
        self.pipe.send((method, args))
        return self._answer()

    def _answer(self) -> Any:
        try:
            done, value = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"a side died with exit code {self.process.exitcode} (out of memory?)") from None
        if not done:
            raise RuntimeError(value)
        return value

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join()


def _serve(pipe: Any, make: Callable[..., Any], args: tuple) -> None:
    os.dup2(2, 1)  # stdout is for the result; what libraries and peers print goes to stderr
    try:
        side = make(*args)
        pipe.send((True, None))
        while True:
            method, given = pipe.recv()
            pipe.send((True, getattr(side, method)(*given)))
    except EOFError:
        return
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def clock(device: torch.device) -> float:
    """Seconds, read once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, GPU, versions and date, for the record."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "bf16": cpu_has_bf16(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "miaobi": version("miaobi"),
        "date": datetime.date.today().isoformat(),
    }


def version(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_version(directory: str | Path) -> str:
    """Commit of a checkout, shortened."""
    told = subprocess.run(["git", "-C", str(directory), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return told.stdout.strip() or "no git"


def parse(name: str, kind: type[Args], description: str | None) -> Args:
    """The command line as a dataclass whose attribute docstrings are the help."""
    from miaobi.command_line import parse as parse_command_line

    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5:
        warn(f"load is {os.getloadavg()[0]:.1f} before starting: something else runs here, figures will scatter")
    return parse_command_line(kind, f"python -m benchmarks.{name}", description)


def plain(value: Any) -> Any:
    """What json cannot write by itself."""
    return asdict(value) if isinstance(value, Ratio) else str(value)


def report(name: str, columns: list[str], rows: list[list[Any]], result: dict[str, Any], as_json: bool) -> None:
    """A table for people, and with `as_json` one line of JSON on stdout (the table then goes to stderr)."""
    where = result["machine"]
    gpu = f", {where['gpu']}" if where["gpu"] else ""
    title = f"{name}: {where['cpu']}, {where['cores']} cores{gpu}, torch {where['torch']}, {where['date']}"
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{cell:,.1f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(stderr=as_json, width=None if sys.stderr.isatty() else 120).print(table)
    if as_json:
        line = {"benchmark": name, "command": " ".join(sys.orig_argv[1:]), **result}
        print(json.dumps(line, ensure_ascii=False, default=plain))
