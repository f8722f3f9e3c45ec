"""Quality for the same tokens: nanoGPT, miaobi with nanoGPT's settings, and miaobi's default recipe.

    python -m benchmarks.quality_race --data TEXT --nanogpt DIR --results race.json --plot race.png

Each side prepares TEXT by its own means (last tenth for validation), trains with its own command, and its last
checkpoint is scored on the whole validation part in non-overlapping windows. Sides may be run on different days:
--results keeps what was measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import Worker, git_version, machine, parse, report
from benchmarks.peers import Scorer, copy_nanogpt
from miaobi.console import log

SIDES = ("nanogpt", "miaobi-gpt2", "miaobi")
PROGRESS = re.compile(r"(?:iter |step )(\d+)(?:/\d+)?:? +loss ([\d.]+)")  # a training step in either log


@dataclass(frozen=True)
class Race:
    """The text, the model and nanoGPT's run of it."""

    data: Path
    """UTF-8 text."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT; without it the side `nanogpt` is left out."""
    results: Path | None = None
    """JSON file to add to; sides measured earlier with the same settings appear in the table again."""
    plot: Path | None = None
    """PNG of training loss against seconds."""
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    block_size: int = 256
    batch_size: int = 32
    steps: int = 400
    device: str = "cpu"
    """cpu, cuda, mps; nanoGPT trains in fp32 without compilation on any."""
    json: bool = False
    """Print one line of JSON as well."""

    @property
    def shared(self) -> dict[str, Any]:
        """What all sides are told."""
        keys = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "device")
        return {key: getattr(self, key) for key in keys} | {
            "max_iters": self.steps, "eval_interval": self.steps, "eval_iters": 5, "log_interval": 10, "dropout": 0.0,
        }  # fmt: skip

    @property
    def adamw(self) -> dict[str, Any]:
        """nanoGPT's settings for small models."""
        return {"learning_rate": 1e-3, "min_lr": 1e-4, "beta2": 0.99, "warmup_iters": min(50, self.steps // 2),
                "lr_decay_iters": self.steps}  # fmt: skip

    @property
    def race(self) -> dict[str, Any]:
        """What results must share to be compared: the settings and the text."""
        return self.shared | {"data_sha256": hashlib.sha256(self.data.read_bytes()).hexdigest()}

    def earlier(self) -> dict[str, Any]:
        """Sides measured before. Exits where `results` holds those of another race."""
        if self.results is None or not self.results.exists():
            return {}
        found = json.loads(self.results.read_text(encoding="utf-8"))
        if found["settings"] != self.race:
            sys.exit(f"{self.results} holds a race with other settings; name another --results")
        return found["sides"]

    def keep(self, sides: dict[str, dict[str, Any]]) -> None:
        """Write what was measured to `results`."""
        if self.results:
            kept = {"settings": self.race, "sides": sides}
            self.results.write_text(json.dumps(kept, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Args(Race):
    """Command line."""

    sides: tuple[str, ...] = SIDES
    """Which to run now: nanogpt, miaobi-gpt2 (gpt2 family, AdamW, nanoGPT's settings), miaobi (default recipe)."""
    recipe_batch: int = 16
    """Batch of the default recipe, which then takes more steps over the same number of tokens."""

    @property
    def recipe(self) -> dict[str, Any]:
        """The default recipe with its own batch: as many tokens, all else by default."""
        steps = self.steps * self.batch_size // self.recipe_batch
        return {"batch_size": self.recipe_batch, "max_iters": steps, "eval_interval": steps}


def flags(values: dict[str, Any]) -> list[str]:
    """--key=value for each."""
    return [f"--{key}={value}" for key, value in values.items()]


def call(command: list[str], cwd: Path | None = None) -> dict[str, Any]:
    """Run a command to its end: seconds, the curve [seconds, step, loss] of its log, its lines, its JSON result if any.

    Exits, showing the log's end, where the command fails.
    """
    start, curve, lines = time.perf_counter(), [], []
    env = {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    for line in process.stdout:
        lines.append(line.rstrip())
        if found := PROGRESS.search(line):
            curve.append([round(time.perf_counter() - start, 2), int(found[1]), float(found[2])])
            log(f"  {lines[-1]}")
    if process.wait():
        sys.exit("\n".join([*lines[-20:], f"exit code {process.returncode}: {' '.join(command)}"]))
    told = [line for line in lines if line.startswith("{")]
    run = {"seconds": time.perf_counter() - start, "curve": curve, "lines": lines}
    return run | (json.loads(told[-1]) if told else {})


def prepare_nanogpt(args: Race, work: Path) -> tuple[Path, float]:
    """A copy of nanoGPT with the text prepared by its prepare.py in data/race; and the seconds that took."""
    copy = copy_nanogpt(args.nanogpt, work / "nanoGPT")
    data = copy / "data" / "race"
    data.mkdir()
    script = (copy / "data" / "shakespeare_char" / "prepare.py").read_bytes()
    (data / "prepare.py").write_bytes(script)
    (data / "requests.py").write_text("")  # it downloads nothing where input.txt exists
    (data / "input.txt").symlink_to(args.data.resolve())
    return copy, call([sys.executable, "prepare.py"], cwd=data)["seconds"]


def train_nanogpt(args: Race, copy: Path, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    """What `call` tells of its train.py with nanoGPT's settings and `changes`; and its flags."""
    own = {"compile": False, "dtype": "float32", "dataset": "race", "gradient_accumulation_steps": 1, "out_dir": "out"}
    command = flags(own | args.shared | args.adamw | changes)
    return call([sys.executable, "train.py", *command], cwd=copy), command


def run_nanogpt(args: Race, copy: Path) -> dict[str, Any]:
    """Its train.py in a copy where the text is prepared, its model for the score."""
    data = copy / "data" / "race"
    run, command = train_nanogpt(args, copy)
    with closing(Worker(Scorer, copy, copy / "out" / "ckpt.pt", data)) as scorer:
        scored = scorer.call("score")
    return {"nats_per_char": scored["loss"], "parameters": scored["parameters"], "characters": scored["tokens"],
            "seconds": run["seconds"], "curve": run["curve"], "command": " ".join(["train.py", *command]),
            "version": git_version(args.nanogpt)}  # fmt: skip


def run_miaobi(args: Args, work: Path, family: str, settings: dict[str, Any]) -> dict[str, Any]:
    """`miaobi prepare`, `miaobi train`, `miaobi eval`."""
    miaobi, data, out = [sys.executable, "-m", "miaobi"], work / "data", work / family
    if not data.exists():
        call([*miaobi, "prepare", str(args.data), f"--out={data}", "--split=tail"])
    own = {"family": family, "sample_tokens": 0, "patience": 0}
    command = flags(own | args.shared | settings)
    run = call([*miaobi, "train", f"--data={data}", f"--out_dir={out}", *command, "--json"])
    score = ["--stride=block", "--checkpoint=last", f"--device={args.device}"]
    scored = call([*miaobi, "eval", str(out), str(data), *score, "--json"])
    return {"nats_per_char": scored["loss"] * scored["tokens"] / scored["characters"],
            "parameters": run["parameters"], "characters": scored["characters"], "seconds": run["seconds"],
            "curve": run["curve"], "command": " ".join(["miaobi train", *command])}  # fmt: skip


def draw(sides: dict[str, dict[str, Any]], path: Path) -> None:
    """Training loss against seconds since the command was typed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name, side in sides.items():
        seconds, _, losses = zip(*side["curve"], strict=True)
        axes.plot(seconds, losses, label=f"{name}: {side['nats_per_char']:.3f} on validation")
    axes.set(xlabel="seconds", ylabel="training loss, nats per character")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    """Measure, merge and print."""
    args = parse("quality_race", Args, __doc__)
    if unknown := set(args.sides) - set(SIDES):
        sys.exit(f"no such side: {', '.join(unknown)}; there are {', '.join(SIDES)}")
    result: dict[str, Any] = {"settings": args.race, "sides": args.earlier()}
    run = {
        "nanogpt": lambda work: run_nanogpt(args, prepare_nanogpt(args, work)[0]),
        "miaobi-gpt2": lambda work: run_miaobi(args, work, "gpt2", args.adamw),
        "miaobi": lambda work: run_miaobi(args, work, "qwen3", args.recipe),
    }
    with tempfile.TemporaryDirectory() as work:
        for name in SIDES:
            if name in args.sides and (name != "nanogpt" or args.nanogpt):
                log(name)
                result["sides"][name] = run[name](Path(work)) | {"machine": machine(args.device)}
                args.keep(result["sides"])
    sides = {name: result["sides"][name] for name in SIDES if name in result["sides"]}
    base = sides.get("nanogpt", {}).get("nats_per_char")
    rows = [[name, f"{side['nats_per_char']:.4f}", f"{side['nats_per_char'] - base:+.4f}" if base else "",
             f"{side['parameters']:,}", f"{side['characters']:,}", side["seconds"]]
            for name, side in sides.items()]  # fmt: skip
    columns = ["side", "nats/char", "minus nanoGPT's", "parameters", "characters scored", "seconds of training"]
    report("quality_race", columns, rows, {"machine": machine(args.device), **result}, args.json)
    if args.plot:
        draw(sides, args.plot)
    if len({side["characters"] for side in sides.values()}) > 1:
        raise SystemExit("the sides did not score the same characters")


if __name__ == "__main__":
    main()
