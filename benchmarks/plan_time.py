"""What `miaobi plan --measure` says a run will take in time, against what it takes then: on this CPU.

    python -m benchmarks.plan_time [--json]

Measured is what summary.json says of the run: from its first step to its end, evaluations and checkpoints included.
Reading the text and starting Python are not foretold.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import machine, parse, report
from benchmarks.plan_memory import some_text

CONFIGS = {
    "qwen3 4x128": "--n_layer=4 --n_head=4 --n_embd=128 --block_size=128 --batch_size=16 --max_iters=100",
    "gpt2 4x192": "--family=gpt2 --n_layer=4 --n_head=4 --n_embd=192 --block_size=128 --batch_size=8 --max_iters=100",
    "qwen3 6x256": "--n_layer=6 --n_head=4 --n_embd=256 --block_size=256 --batch_size=4 --max_iters=50 "
                   "--eval_interval=25",
    "gpt2 3x96 dropout": "--family=gpt2 --n_layer=3 --n_head=3 --n_embd=96 --block_size=64 --batch_size=32 "
                         "--max_iters=100 --dropout=0.1",
}  # fmt: skip
COMMON = "--eval_interval=50 --eval_iters=5 --sample_tokens=0 --device=cpu"


@dataclass(frozen=True)
class Args:
    """Command line."""

    only: str = ""
    """Configurations whose name contains this."""
    json: bool = False
    """Print one line of JSON as well."""


def command(verb: str, name: str, text: Path, out: Path) -> dict:
    """The JSON of `miaobi plan` or `train` for a configuration."""
    given = [*COMMON.split(), *CONFIGS[name].split(), f"--data={text}", f"--out_dir={out}", "--json"]
    given = list({word.partition("=")[0]: word for word in given}.values())  # what stands later counts
    given += ["--measure"] * (verb == "plan")
    done = subprocess.run([sys.executable, "-m", "miaobi", verb, *given], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Entry point."""
    args = parse("plan_time", Args, __doc__)
    rows, result = [], {"machine": machine(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        some_text(text)
        for name in CONFIGS:
            if args.only not in name:
                continue
            out = Path(folder) / name.replace(" ", "-")
            told = command("plan", name, text, out)["time"]
            command("train", name, text, out)
            measured = json.loads((out / "summary.json").read_text(encoding="utf-8"))["wall_seconds"]
            wrong = told["seconds"] / measured - 1
            rows.append([name, told["seconds"], measured, f"{wrong:+.1%}"])
            result["rows"].append({"config": name, "told": told, "measured": measured, "error": wrong})
    report("plan_time", ["configuration", "planned s", "measured s", "error"], rows, result, args.json)


if __name__ == "__main__":
    main()
