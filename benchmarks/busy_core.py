"""Training beside another program: tokens/s while the machine is quiet, and while one core is kept busy.

    python -m benchmarks.busy_core

Two models, 1.2M and 12M parameters, eager, as `miaobi train` runs them; the other program is an endless loop on core 0.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import Worker, machine, parse, ratio, report
from benchmarks.train_speed import Args as TrainArgs
from benchmarks.train_speed import Miaobi, open_data

SHAPES = {
    "1.2M": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 16},
    "12M": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 8},
}


@dataclass(frozen=True)
class Args:
    """Command line."""

    data: Path
    """Text, or a directory made by miaobi prepare."""
    models: tuple[str, ...] = tuple(SHAPES)
    """1.2M, 12M."""
    seconds: float = 5.0
    """Of each turn, at least; whole steps."""
    pairs: int = 3
    json: bool = False
    """Print one line of JSON as well."""


@contextmanager
def busy_core() -> Iterator[None]:
    """An endless loop on core 0."""
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(loop.pid, {min(os.sched_getaffinity(0))})
    try:
        time.sleep(0.5)
        yield
    finally:
        loop.kill()
        loop.wait()


def rate(side: Worker, tokens: int, seconds: float) -> float:
    """Tokens per second over steps that take at least so many seconds in all."""
    spent, steps = 0.0, 0
    while spent < seconds:
        took, _ = side.call("steps", 1)
        spent, steps = spent + took, steps + 1
    return steps * tokens / spent


def main() -> None:
    """Measure and print."""
    args = parse("busy_core", Args, __doc__)
    rows, figures = [], {}
    for name in args.models:
        shape = SHAPES[name]
        with tempfile.TemporaryDirectory() as work:
            open_data(args.data, Path(work) / "data")
            with closing(Worker(Miaobi, TrainArgs(args.data, compile="False", **shape), Path(work))) as side:
                tokens = shape["batch_size"] * shape["block_size"]
                side.call("steps", 2)
                quiet, busy = [], []
                for _ in range(args.pairs):
                    quiet.append(rate(side, tokens, args.seconds))
                    with busy_core():
                        busy.append(rate(side, tokens, args.seconds))
        figures[name] = {"quiet": quiet, "busy": busy, "ratio": ratio(busy, quiet)}
        rows.append([name, statistics.median(quiet), statistics.median(busy), str(figures[name]["ratio"])])
    report("busy_core", ["model", "quiet tokens/s", "busy tokens/s", "busy / quiet"], rows,
           {"machine": machine(), "settings": dataclasses.asdict(args), "models": figures,
            "spin": os.environ.get("GOMP_SPINCOUNT")}, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
