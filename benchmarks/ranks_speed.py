"""Training speed of two processes with one thread each against one process with two threads, in turns.

    python -m benchmarks.ranks_speed --data TEXT

All train the same model on the same global batches as `miaobi train` does, two processes under DDP over gloo. The loss
after the last step must agree.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import statistics
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import Worker, machine, parse, ratio, report, take_turns
from benchmarks.train_speed import OPTIM, SAME, open_data
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
    batch_size: int = 32
    ranks: int = 2
    """Processes with one thread, and threads of the one process."""
    steps: int = 2
    """Optimizer steps of a turn."""
    pairs: int = 3
    """Turns of each side."""
    json: bool = False
    """Print one line of JSON as well."""


class Rank:
    """One process of a run."""

    def __init__(self, args: Args, work: Path, rank: int, size: int, port: int) -> None:
        self.args, self.work, self.rank, self.size, self.done = args, work, rank, size, 0
        if size > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
                           "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}  # fmt: skip
        torch.set_num_threads(args.ranks // size)

    def open(self) -> None:
        """Meet the others and make the run."""
        keep_allocations()
        keys = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
        given = {key: getattr(self.args, key) for key in keys} | OPTIM
        given |= {"family": "gpt2", "data": self.work / "data", "out_dir": self.work / f"run-{self.size}",
                  "device": "cpu", "warmup_iters": 0, "decay_lr": False}  # fmt: skip
        cfg, origin = load_config(None, [(key, str(value)) for key, value in given.items()])
        world = join(cfg.train)
        device = rank_device(cfg.train.device, world)
        self.run = Run(set_up(cfg, origin, world, device, pick_dtype(cfg.train.dtype, device)))
        if self.size > 1:
            self.run.objective = DistributedDataParallel(self.run.objective, gradient_as_bucket_view=True)
        self.run.model.train()

    def steps(self, count: int) -> tuple[float, float]:
        """(seconds, last loss) of `count` optimizer steps."""
        started = time.perf_counter()
        for _ in range(count):
            loss, _, _ = self.run.step(self.done)
            self.done += 1
        loss = self.run.world.sum(loss.double())
        return time.perf_counter() - started, loss.item()


class Side:
    """The processes of one run."""

    def __init__(self, args: Args, work: Path, size: int, stack: ExitStack) -> None:
        with socket.create_server(("127.0.0.1", 0)) as s:
            port = s.getsockname()[1]
        self.workers = [stack.enter_context(closing(Worker(Rank, args, work, r, size, port))) for r in range(size)]
        self.call("open")

    def call(self, method: str, *given: object) -> list:
        """What the method returns in each of them; they run it at the same time."""
        for worker in self.workers:
            worker.pipe.send((method, given))
        return [worker._answer() for worker in self.workers]


def main() -> None:
    """Measure and print."""
    args, last = parse("ranks_speed", Args, __doc__), {}
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        open_data(args.data, Path(work) / "data")
        sides = {f"{size} x {args.ranks // size}": Side(args, Path(work), size, stack) for size in (args.ranks, 1)}
        for side in sides.values():
            side.call("steps", 1)

        def turn(name: str) -> float:
            told = sides[name].call("steps", args.steps)
            last[name] = told[0][1]
            return args.steps * args.batch_size * args.block_size / max(seconds for seconds, _ in told)

        rates = take_turns({name: partial(turn, name) for name in sides}, args.pairs)
    many, one = sides
    speed = ratio(rates[many], rates[one])
    same = abs(last[many] - last[one]) < SAME
    columns = ["processes x threads", "tokens/s", f"{many} / {one}", "loss of the last step"]
    rows = [
        [name, statistics.median(rates[name]), speed if name == many else "", f"{last[name]:.4f}"] for name in rates
    ]
    report("ranks_speed", columns, rows, {
        "machine": machine(), "settings": dataclasses.asdict(args), "tokens_per_second": rates, "ratio": speed,
        "same_loss": same, "last_loss": last,
    }, args.json)  # fmt: skip
    if not same:
        raise SystemExit(f"the sides do not compute the same; their losses of the last step: {last}")


if __name__ == "__main__":
    main()
