"""Pretraining on dialogues: useful tokens a second, miaobi against small-gpt's own train.py, in turns.

    python -m benchmarks.chat_speed --data chat/train.txt --small-gpt DIR

Useful tokens are those of dialogues; small-gpt also computes on the padding of each dialogue to a whole block. Its
train.py runs unchanged with its train90M.yaml but for the device, the data, the batch and, if asked, the compiler; only
its progress bar is replaced by one that counts, times and waits. miaobi runs configs/chat-90m.yaml as `miaobi train`
does, with the same number of positions in a step.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

from benchmarks.common import Worker, clock, git_version, machine, parse, ratio, report, take_turns
from miaobi.console import log
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.device import keep_allocations, pick_device, pick_dtype
from miaobi.settings import load_config, read_yaml, shipped_config
from miaobi.train.computing import decide_mode
from miaobi.train.loop import Run
from miaobi.train.setup import set_up
from miaobi.train.world import World


@dataclass(frozen=True)
class Args:
    """Command line."""

    data: Path
    """Dialogues: one utterance a line, a blank line between them."""
    small_gpt: Path
    """A checkout of small-gpt."""
    batch_size: int = 16
    """Blocks of 256 positions in a step, on both sides."""
    steps: int = 1
    """Optimizer steps of a turn."""
    pairs: int = 5
    """Turns of each side."""
    device: str = "auto"
    """auto, cpu, cuda."""
    compile: bool = True
    """Whether small-gpt compiles its model, as its configuration says."""
    json: bool = False
    """Print one line of JSON as well."""


class Miaobi:
    """The run that `miaobi train configs/chat-90m.yaml` makes."""

    def __init__(self, args: Args, work: Path) -> None:
        keep_allocations()
        given = {"data": work / "data", "out_dir": work / "run", "batch_size": args.batch_size,
                 "device": args.device}  # fmt: skip
        cfg, origin = load_config(shipped_config("chat-90m.yaml"), [(k, str(v)) for k, v in given.items()])
        self.device = pick_device(args.device)
        dtype = pick_dtype(cfg.train.dtype, self.device)
        self.run = Run(set_up(cfg, origin, World(), self.device, dtype))
        self.run.plan, self.run.flex = decide_mode(self.run.plan, self.run.objective)
        self.run.model.train()
        self.done = 0

    def steps(self, count: int) -> tuple[int, int, float]:
        """(useful tokens, positions, seconds) of `count` optimizer steps."""
        useful, start = 0, clock(self.device)
        for _ in range(count):
            loss, _, scored = self.run.step(self.done)
            useful, self.done = useful + scored, self.done + 1
        loss.item()
        cfg = self.run.cfg
        return useful, count * cfg.train.global_batch * cfg.model.block_size, clock(self.device) - start


class SmallGPT:
    """small-gpt's train.py in a thread; its progress bar hands over one batch at a time."""

    def __init__(self, args: Args, work: Path) -> None:
        copy = work / "small-gpt"
        shutil.copytree(args.small_gpt, copy, ignore=shutil.ignore_patterns(".git", "*.pth", "__pycache__"))
        os.chdir(copy)
        os.environ["TQDM_DISABLE"] = "1"
        sys.path.insert(0, str(copy))
        self.device = pick_device(args.device)
        settings, _ = read_yaml(copy / "config" / "train90M.yaml")
        settings |= {"data_path": str(args.data.resolve()), "device": self.device.type, "train_batch": args.batch_size,
                     "compile": args.compile, "eval_freq": 10**9, "save_freq": 10**9, "resume_from": None}  # fmt: skip
        self.wanted: Queue[int] = Queue()
        self.told: Queue[Any] = Queue()
        module = importlib.import_module("train")
        module.tqdm = self.bar
        config = SimpleNamespace(**settings)
        threading.Thread(target=self._train, args=(module, config), daemon=True).start()

    def _train(self, module: Any, config: Any) -> None:
        try:
            module.main(config)
        except BaseException as e:
            self.told.put(e)
            raise

    def bar(self, loader: Any) -> Any:
        """What train.py iterates over: batches, as many as were asked for, timed."""
        pad = 2  # its vocabulary begins <unk>, <sep>, <pad>

        class Bar:
            def __iter__(bar):  # noqa: N805
                batches = iter(loader)
                while True:
                    useful = positions = 0
                    count, start = self.wanted.get(), clock(self.device)
                    for _ in range(count):
                        x, y = next(batches)
                        useful += int((x != pad).sum())
                        positions += x.numel()
                        yield x, y
                    self.told.put((useful, positions, clock(self.device) - start))

            def set_description(bar, text: str) -> None:  # noqa: N805
                pass

        return Bar()

    def steps(self, count: int) -> tuple[int, int, float]:
        """(useful tokens, positions, seconds) of `count` optimizer steps."""
        self.wanted.put(count)
        told = self.told.get()
        if isinstance(told, BaseException):
            raise told
        return told


def main() -> None:
    """Measure and print."""
    args = parse("chat_speed", Args, __doc__)
    shares: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        at = Path(work) / "data"
        prepare(
            [str(args.data)], PrepareConfig(out=at, format="dialogue", split="tail", val_fraction=0.2, vocab_size=7587)
        )
        kinds = {"miaobi": Miaobi, "small-gpt": SmallGPT}
        sides = {name: stack.enter_context(closing(Worker(kind, args, Path(work)))) for name, kind in kinds.items()}
        for name, side in sides.items():
            started = time.perf_counter()
            side.call("steps", 1)
            log(f"{name}: first step, with what has to be read and compiled, {time.perf_counter() - started:.0f} s")

        def turn(name: str) -> float:
            useful, positions, seconds = sides[name].call("steps", args.steps)
            shares[name] = useful / positions
            return useful / seconds

        rates = take_turns({name: partial(turn, name) for name in sides}, args.pairs)
    times = ratio(rates["miaobi"], rates["small-gpt"])
    columns = ["side", "useful tokens/s", "share of positions that is useful", "miaobi / side"]
    rows = [[name, statistics.median(rates[name]), f"{shares[name]:.1%}", times if name == "small-gpt" else ""]
            for name in rates]  # fmt: skip
    report("chat_speed", columns, rows, {
        "machine": machine(args.device), "settings": dataclasses.asdict(args),
        "small_gpt": git_version(args.small_gpt), "useful_tokens_per_second": rates, "useful_share": shares,
        "ratios": {"small-gpt": times},
    }, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
