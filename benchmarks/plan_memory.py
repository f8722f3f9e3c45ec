"""What `miaobi plan` says a run will take in memory, against what the run then takes: on this CPU, six configurations.

    python -m benchmarks.plan_memory [--json]

Measured is the growth of the process's resident memory over what Python and the libraries took before the run, at its
peak, checkpoints written in the background included.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import machine, parse, report
from miaobi.command_line import split
from miaobi.config import RunConfig
from miaobi.seeds import TRAIN

CONFIGS = {
    "gpt2 6x256": "--family=gpt2 --n_layer=6 --n_head=4 --n_embd=256 --block_size=256 --batch_size=16",
    "gpt2 6x256 dropout": "--family=gpt2 --n_layer=6 --n_head=4 --n_embd=256 --block_size=256 --batch_size=8 "
                          "--dropout=0.2",
    "qwen3 6x320": "--n_layer=6 --n_head=5 --n_embd=320 --block_size=256 --batch_size=8",
    "qwen3 4x256 dropout": "--n_layer=4 --n_head=4 --n_embd=256 --block_size=512 --batch_size=4 --dropout=0.1",
    "qwen3 6x256 recompute": "--n_layer=6 --n_head=4 --n_embd=256 --block_size=256 --batch_size=16 "
                             "--micro_batch_size=16 --activation_checkpointing=True",
    "gpt2 8x256 dropout recompute": "--family=gpt2 --n_layer=8 --n_head=4 --n_embd=256 --block_size=256 "
                                    "--batch_size=16 --micro_batch_size=8 --dropout=0.1 "
                                    "--activation_checkpointing=True",
}  # fmt: skip
COMMON = "--max_iters=4 --eval_interval=2 --eval_iters=1 --sample_tokens=0 --device=cpu --dtype=float32 --compile=False"


@dataclass(frozen=True)
class Args:
    """Command line."""

    one: str = ""
    """Run this configuration alone, in this process, and print its bytes."""
    text: str = ""
    """The text of it."""
    json: bool = False
    """Print one line of JSON as well."""


def some_text(path: Path) -> None:
    """Words drawn from 3,000 characters, in paragraphs."""
    draw = random.Random(0)
    characters = [chr(0x4E00 + i) for i in range(3000)]
    lines = ("".join(draw.choices(characters, k=200)) for _ in range(500))
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def flags(name: str, text: Path, out: Path) -> list[tuple[str, str]]:
    """The command line of a configuration, as keys and values."""
    line = [*CONFIGS[name].split(), *COMMON.split(), f"--data={text}", f"--out_dir={out}"]
    return split(RunConfig, TRAIN, line).given


def measure(name: str, text: Path, out: Path) -> int:
    """Train, and return the bytes that the process grew by."""
    import torch
    import torch.utils.tensorboard

    from miaobi.device import keep_allocations, peak_memory, reset_peak_memory
    from miaobi.settings import load_config
    from miaobi.train.loop import train

    keep_allocations()
    a = torch.randn(512, 512, requires_grad=True)
    (a @ a).sum().backward()  # the libraries of the products make themselves ready
    del a
    reset_peak_memory(torch.device("cpu"))
    before = peak_memory(torch.device("cpu"))
    train(*load_config(None, flags(name, text, out)))
    return peak_memory(torch.device("cpu")) - before


def predict(name: str, text: Path, out: Path) -> dict[str, int]:
    """The parts of the plan."""
    from miaobi.plan.config import load_config
    from miaobi.plan.plan import plan

    cfg, origin = load_config(None, flags(name, text, out))
    return plan(cfg, origin)["memory"]


def main() -> None:
    """Entry point."""
    args = parse("plan_memory", Args, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(args.text or Path(folder) / "text.txt")
        if args.one:
            print(json.dumps(measure(args.one, text, Path(folder) / "run")))
            return
        some_text(text)
        rows, result = [], {"machine": machine(), "rows": []}
        for name in CONFIGS:
            command = [sys.executable, "-m", "benchmarks.plan_memory", f"--one={name}", f"--text={text}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            measured, parts = int(done.stdout.splitlines()[-1]), predict(name, text, Path(folder) / "run")
            wrong = parts["run"] / measured - 1
            rows.append([name, parts["run"] / 2**20, measured / 2**20, f"{wrong:+.1%}"])
            result["rows"].append({"config": name, "parts": parts, "measured": measured, "error": wrong})
    report("plan_memory", ["configuration", "planned MiB", "measured MiB", "error"], rows, result, args.json)


if __name__ == "__main__":
    main()
