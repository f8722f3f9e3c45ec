"""How long training stands still for a checkpoint, and what its checksums cost, in turns.

    python -m benchmarks.checkpoint_stall --data TEXT
    python -m benchmarks.checkpoint_stall --data TEXT --n_layer 40 --n_head 8 --n_embd 512 --pairs 5     # 128.84M

One run, whose AdamW has its moments, saves again and again as `miaobi train` does. It stands still until `Saver.save`
returns; a checkpoint is there when the files are on the disk as well. Then the same command is given again, in a new
process, until it has read everything and would go on (the run counts as finished, so it ends there). All of it as it
is, and with the code that computes and compares SHA-256 taken out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from benchmarks.common import machine, parse, ratio, report, take_turns
from benchmarks.train_speed import OPTIM, open_data
from miaobi.checksums import CHECKSUMS
from miaobi.device import keep_allocations, pick_dtype
from miaobi.settings import load_config
from miaobi.train.loop import Run
from miaobi.train.rendezvous import join, rank_device
from miaobi.train.setup import set_up

WITHOUT = """
from unittest import mock
mock.patch("miaobi.checksums.recorded", lambda *_: ({}, {})).start()
from miaobi.cli import main
main()
"""


@dataclass(frozen=True)
class Args:
    """Command line."""

    data: Path
    """Text, or a directory made by miaobi prepare."""
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    block_size: int = 256
    steps: int = 1
    """Optimizer steps between two checkpoints."""
    pairs: int = 7
    """Checkpoints of each kind."""
    work: Path | None = None
    """Directory on the disk that is to be measured; default: the system's for temporary files."""
    device: str = "auto"
    """auto, cpu, cuda."""
    json: bool = False
    """Print one line of JSON as well."""


class Saving:
    """A run that trains a little and saves."""

    def __init__(self, args: Args, work: Path) -> None:
        keep_allocations()
        keys = ("n_layer", "n_head", "n_embd", "block_size", "device")
        given = {key: getattr(args, key) for key in keys} | OPTIM
        given |= {"family": "gpt2", "data": work / "data", "out_dir": work / "run", "batch_size": 2, "compile": False}
        self.flags = [(key, str(value)) for key, value in given.items()]
        cfg, origin = load_config(None, self.flags)
        world = join(cfg.train)
        device = rank_device(cfg.train.device, world)
        self.run = Run(set_up(cfg, origin, world, device, pick_dtype(cfg.train.dtype, device)))
        self.run.progress.stopped, self.run.progress.planned = "patience", self.run.plan.total_steps
        self.args = args

    def save(self, checksums: bool) -> dict[str, float]:
        """Train and save: milliseconds that the training stood still, and until the checkpoint was whole."""
        for _ in range(self.args.steps):
            self.run.step(self.run.progress.step)
        self.run.progress.step += 1
        with hashing(checksums):
            started = time.perf_counter()
            self.run.saver.save()
            stood_still = time.perf_counter() - started
            self.run.saver.finish()
            whole = time.perf_counter() - started
        directory = self.run.saver.root / f"step-{self.run.progress.step}"
        if not (directory / "train_state").is_dir() or (directory / CHECKSUMS).is_file() != checksums:
            raise SystemExit("the checkpoint was not written as asked")
        return {"stall": 1000 * stood_still, "save": 1000 * whole}

    def resume(self, checksums: bool) -> dict[str, float]:
        """Milliseconds from the command to the moment when the run would go on; the files have just been written."""
        words = ["train", *(f"--{key}={value}" for key, value in self.flags)]
        command = [sys.executable, *(("-m", "miaobi") if checksums else ("-c", WITHOUT)), *words]
        started, seconds, said = time.perf_counter(), None, []
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            for line in process.stderr:
                said.append(line)
                if f"this run is finished (patience, step {self.run.progress.step})" in line:
                    seconds = time.perf_counter() - started
        if seconds is None or process.returncode:
            raise SystemExit("the run was not resumed:\n" + "".join(said)[-3000:])
        return {"resume": 1000 * seconds}


@contextlib.contextmanager
def hashing(wanted: bool) -> Iterator[None]:
    """The code as it is, or without the checksums of checkpoints."""
    with contextlib.ExitStack() as stack:
        if not wanted:
            for name in ("add", "write"):
                stack.enter_context(mock.patch(f"miaobi.checksums.Checksums.{name}"))
        yield


def main() -> None:
    """Measure and print."""
    args = parse("checkpoint_stall", Args, __doc__)
    figures: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        open_data(args.data, Path(work) / "data")
        saving = Saving(args, Path(work))
        saving.save(checksums=True)  # the first one imports, and finds no page of memory ready

        def turn(checksums: bool) -> float:
            taken = saving.save(checksums)
            taken |= saving.resume(checksums)
            side = figures.setdefault("with checksums" if checksums else "without", {})
            for what, milliseconds in taken.items():
                side.setdefault(what, []).append(milliseconds)
            return taken["save"]

        take_turns({"with checksums": lambda: turn(True), "without": lambda: turn(False)}, args.pairs)
        parameters = saving.run.plan.parameters
    ours, bare = figures["with checksums"], figures["without"]
    shares = {what: ratio(ours[what], bare[what]) for what in ours}
    rows = [[what, statistics.median(ours[what]), statistics.median(bare[what]), shares[what]] for what in ours]
    report("checkpoint_stall", ["ms", "with checksums", "without", "with / without"], rows, {
        "machine": machine(args.device), "settings": dataclasses.asdict(args), "parameters": parameters,
        "milliseconds": figures, "ratios": shares, "stall / save": ratio(ours["stall"], ours["save"]),
    }, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
