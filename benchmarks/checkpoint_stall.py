"""How long training stands still for a checkpoint: written in the background, and waited for, in turns.

    python -m benchmarks.checkpoint_stall --data TEXT

One run, whose AdamW has its moments, saves again and again as `miaobi train` does. Standing still for an asynchronous
checkpoint is the time until `Saver.save` returns; for a synchronous one, until the files are on the disk as well.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import machine, parse, ratio, report, take_turns
from benchmarks.train_speed import OPTIM, open_data
from miaobi.device import keep_allocations, pick_dtype
from miaobi.settings import load_config
from miaobi.train.loop import Run
from miaobi.train.rendezvous import join, rank_device
from miaobi.train.setup import set_up


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
        cfg, origin = load_config(None, [(key, str(value)) for key, value in given.items()])
        world = join(cfg.train)
        device = rank_device(cfg.train.device, world)
        self.run = Run(set_up(cfg, origin, world, device, pick_dtype(cfg.train.dtype, device)))
        self.args = args

    def milliseconds(self, wait: bool) -> float:
        """Train, save, and with `wait` see it written: how long the training stood still."""
        for _ in range(self.args.steps):
            loss, _, _ = self.run.step(self.run.progress.step)
            self.run.progress.step += 1
        loss.item()
        started = time.perf_counter()
        self.run.saver.save()
        if wait:
            self.run.saver.finish()
        stood_still = time.perf_counter() - started
        self.run.saver.finish()
        if not (self.run.saver.root / f"step-{self.run.progress.step}" / "train_state").is_dir():
            raise SystemExit("the checkpoint was not written")
        return 1000 * stood_still


def main() -> None:
    """Measure and print."""
    args = parse("checkpoint_stall", Args, __doc__)
    with tempfile.TemporaryDirectory() as work:
        open_data(args.data, Path(work) / "data")
        saving = Saving(args, Path(work))
        saving.milliseconds(wait=True)  # the first one imports, and finds no page of memory ready
        stalls = take_turns({"asynchronous": lambda: saving.milliseconds(wait=False),
                             "synchronous": lambda: saving.milliseconds(wait=True)}, args.pairs)  # fmt: skip
        parameters = saving.run.plan.parameters
    share = ratio(stalls["asynchronous"], stalls["synchronous"])
    columns = ["checkpoint", "ms the training stands still", "asynchronous / synchronous"]
    rows = [[name, statistics.median(times), share if name == "asynchronous" else ""] for name, times in stalls.items()]
    report("checkpoint_stall", columns, rows, {
        "machine": machine(args.device), "settings": dataclasses.asdict(args), "parameters": parameters,
        "milliseconds": stalls, "ratio": share,
    }, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
