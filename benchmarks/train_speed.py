"""Training speed and memory of one gpt2-family model: miaobi, nanoGPT and transformers, same weights and batches.

    python -m benchmarks.train_speed --data TEXT --nanogpt DIR

Each side lives in its own process and does `--steps` optimizer steps in its turn, while the others wait. miaobi runs
as `miaobi train` does, with its own choice of precision and compilation, and draws its batches inside the clock;
peers get theirs ready made (see peers.py for how each is set up).
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Worker, clock, git_version, machine, parse, ratio, report, take_turns
from benchmarks.peers import Trainer, copy_nanogpt
from miaobi.console import log
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.dataset import IGNORE, batch
from miaobi.corpus.prepared import PreparedData
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.device import keep_allocations, peak_memory, pick_device, pick_dtype, reset_peak_memory
from miaobi.model.checkpoint import save_model
from miaobi.model.loss import linear_cross_entropy
from miaobi.settings import load_config
from miaobi.train.computing import decide_mode
from miaobi.train.layout import is_compiled
from miaobi.train.loop import Run
from miaobi.train.setup import set_up
from miaobi.train.threads import Threads
from miaobi.train.world import World

SEED = 1337
OPTIM = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "grad_clip": 1.0}
SAME = 1e-3  # nats: how far apart the sides' first losses may be


@dataclass(frozen=True)
class Args:
    """Command line."""

    data: Path
    """Text, or a directory made by miaobi prepare."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT to compare with."""
    nanogpt_tuned: bool = False
    """Add that nanoGPT with bf16 where there is, whole-model compilation, explicit attention and kept allocations."""
    transformers: bool = True
    """Compare with transformers, too."""
    transformers_fast: bool = False
    """Add transformers with torch.compile and, where the hardware has it, bf16."""
    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    block_size: int = 256
    batch_size: int = 32
    steps: int = 3
    """Optimizer steps of a turn."""
    warmup: int = 2
    """Steps of each side before the first turn, at least 1."""
    pairs: int = 5
    """Turns of each side."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    compile: str = "auto"
    """miaobi's own --compile: auto, True, False."""
    json: bool = False
    """Print one line of JSON as well."""


class Miaobi:
    """The run that `miaobi train` would make; saves its first weights for the peers."""

    def __init__(self, args: Args, work: Path) -> None:
        keep_allocations()
        torch.set_float32_matmul_precision("high")
        self.device = pick_device(args.device)
        keys = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "device", "compile")
        given = {key: getattr(args, key) for key in keys} | OPTIM  # constant rate: after n steps all sides agree
        given |= {"family": "gpt2", "data": work / "data", "out_dir": work / "run", "seed": SEED,
                  "warmup_iters": 0, "decay_lr": False}  # fmt: skip
        cfg, origin = load_config(None, [(key, str(value)) for key, value in given.items()])
        data = PreparedData.open(work / "data")
        tokenizer = Tokenizer.load(data.path)
        dtype = pick_dtype(cfg.train.dtype, self.device)
        self.run = Run(set_up(cfg, origin, World(), self.device, dtype))
        self.done = 0
        (work / "weights").mkdir()
        save_model(work / "weights", self.run.model, tokenizer, data.end_ids)
        self.first = self.loss_fp32(*batch(data.train, args.block_size, args.batch_size, SEED, 0))
        self.run.plan, self.run.flex = decide_mode(self.run.plan, self.run.objective)
        self.run.model.train()

    @torch.no_grad()
    def loss_fp32(self, inputs: Any, targets: Any) -> float:
        """Mean nats per token of a batch without autocast."""
        x, y = (torch.from_numpy(a).to(self.device) for a in (inputs, targets))
        total = linear_cross_entropy(self.run.model.hidden(x), self.run.model.head_weight, y)
        return (total / (y != IGNORE).sum()).item()

    def about(self) -> dict[str, Any]:
        """What was chosen, and the loss of the first batch in fp32 before any step."""
        compiled = is_compiled(self.run.objective)
        dtype = str(self.run.plan.dtype).removeprefix("torch.")
        return {"first_loss": self.first, "dtype": dtype, "compiled": compiled,
                "parameters": self.run.plan.parameters}  # fmt: skip

    def steps(self, count: int) -> tuple[float, float]:
        """(seconds, last loss) of `count` optimizer steps."""
        threads = Threads()  # anew: in between the others had their turns, which are no strangers
        start = clock(self.device)
        for _ in range(count):
            loss, _, _ = self.run.step(self.done)
            threads.check()
            self.done += 1
        return clock(self.device) - start, loss.item()

    def memory(self, reset: bool = False) -> int:
        """Most bytes held at once since this was called with `reset`."""
        if reset:
            reset_peak_memory(self.device)
        return peak_memory(self.device)


def open_data(source: Path, at: Path) -> None:
    """Prepared data at `at`: the directory `source`, or a text cut as nanoGPT cuts it."""
    if (source / "manifest.json").is_file():
        at.symlink_to(source.resolve())
        return
    from miaobi.corpus.prepare import prepare

    prepare([str(source)], PrepareConfig(out=at, split="tail"))


def open_sides(args: Args, work: Path, stack: ExitStack) -> dict[str, Worker]:
    """A process for each side; miaobi's first, for it writes the weights that the others read."""
    sides = {"miaobi": stack.enter_context(closing(Worker(Miaobi, args, work)))}
    kinds = {"transformers": "transformers"} if args.transformers else {}
    if args.transformers_fast:
        kinds["transformers, compiled"] = "transformers-fast"
    if args.nanogpt:
        copy_nanogpt(args.nanogpt, work / "nanoGPT")
        kinds["nanoGPT"] = "nanogpt"
        if args.nanogpt_tuned:
            kinds["nanoGPT, tuned"] = "nanogpt-tuned"
    for name, kind in kinds.items():
        worker = Worker(Trainer, kind, work, args.device, args.batch_size, SEED, OPTIM)
        sides[name] = stack.enter_context(closing(worker))
    return sides


def main() -> None:
    """Measure and print."""
    args = parse("train_speed", Args, __doc__)
    warmup, last = max(1, args.warmup), {}
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        open_data(args.data, Path(work) / "data")
        sides = open_sides(args, Path(work), stack)
        about = {name: side.call("about") for name, side in sides.items()}
        for name, side in sides.items():
            log(f"{name}: {about[name]}; warming up")
            side.call("steps", warmup)
            side.call("memory", True)

        def turn(name: str) -> float:
            seconds, last[name] = sides[name].call("steps", args.steps)
            return args.steps * args.batch_size * args.block_size / seconds

        rates = take_turns({name: partial(turn, name) for name in sides}, args.pairs)
        memory = {name: side.call("memory") / 2**20 for name, side in sides.items()}
    ratios = {name: ratio(rates["miaobi"], rates[name]) for name in sides if name != "miaobi"}
    first = {name: told["first_loss"] for name, told in about.items()}
    same = max(first.values()) - min(first.values()) < SAME
    columns = [
        "side",
        "dtype",
        "tokens/s",
        "miaobi / side",
        "peak MiB",
        "first loss",
        f"after {warmup + args.pairs * args.steps}",
    ]
    rows = [[name, about[name]["dtype"] + (", compiled" if about[name]["compiled"] else ""),
             statistics.median(rates[name]), ratios.get(name, ""), f"{memory[name]:,.0f}",
             f"{first[name]:.4f}", f"{last[name]:.4f}"]
            for name in sides]  # fmt: skip
    report("train_speed", columns, rows, {
        "machine": machine(args.device), "settings": dataclasses.asdict(args), "sides": about,
        "nanogpt": git_version(args.nanogpt) if args.nanogpt else None, "tokens_per_second": rates, "ratios": ratios,
        "peak_mib": memory, "same_first_loss": same, "last_loss": last,
    }, args.json)  # fmt: skip
    if not same:
        raise SystemExit(f"the sides do not compute the same; their losses of the first batch: {first}")


if __name__ == "__main__":
    main()
