"""What `miaobi plan` says a run will take in memory, against what the run then takes: on this CPU.

    python -m benchmarks.plan_memory [--json]

Measured is the most that the process held resident (VmHWM of /proc/self/status): Python, torch and the text that is
prepared, the step, checkpoints written in the background. The formula's constant was chosen on the first six.
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
    "llama 5x192, wide vocabulary": "--family=llama --n_layer=5 --n_head=3 --n_embd=192 --block_size=128 "
                                    "--batch_size=32 --vocab_size=12000",
    "gpt2 12x384": "--family=gpt2 --n_layer=12 --n_head=6 --n_embd=384 --block_size=128 --batch_size=8",
}  # fmt: skip
COMMON = "--max_iters=3 --eval_interval=2 --eval_iters=1 --sample_tokens=0 --device=cpu --dtype=float32 --compile=False"


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
    """Train as `miaobi train` does, and return the most bytes that the process held."""
    from miaobi.settings import load_config
    from miaobi.training import train

    train(*load_config(None, flags(name, text, out)))
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))["peak_memory_bytes"]


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
