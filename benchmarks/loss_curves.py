"""Losses of the same runs by two versions of the code, laid over each other: a change of speed or walls changes none.

    git worktree add ../before COMMIT
    python -m benchmarks.loss_curves --data TEXT --before ../before
    python -m benchmarks.loss_curves --data TEXT --before ../venv/bin/python --plot losses.png

Two families, one of them with dropout, in fp32 with one thread and one seed, which leaves no freedom to the machine.
Exits with 1 where a loss is further from the other side's than --tolerance.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import git_version, machine, parse, report
from miaobi.console import log

ROOT = Path(__file__).parents[1]
RUNS = {
    "qwen3, Muon, counted start": {"family": "qwen3", "optimizer": "muon", "bigram_init": True},
    "gpt2, AdamW, dropout 0.1": {"family": "gpt2", "optimizer": "adamw", "bigram_init": False, "dropout": 0.1},
}
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128, "batch_size": 8, "learning_rate": 1e-3,
         "device": "cpu", "dtype": "float32", "compile": False, "log_interval": 1, "sample_tokens": 0}  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Command line."""

    data: Path
    """Text."""
    before: Path
    """The other version: a checkout, which this Python runs, or the Python that it is installed for."""
    after: Path = ROOT
    """This version, or another one that is given in the same way."""
    steps: int = 100
    seed: int = 1337
    tolerance: float = 0.0
    """Nats per token that two losses of one step may differ by."""
    plot: Path | None = None
    """A picture of the curves."""
    json: bool = False
    """Print one line of JSON as well."""


@dataclass(frozen=True)
class Side:
    """One version of the code."""

    python: str
    environment: dict[str, str]
    name: str
    """The commit, or else where the code lies."""


def side(path: Path) -> Side:
    """The version of a checkout or an interpreter. Raises SystemExit where there is none."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    is_checkout = path.is_dir()
    if is_checkout:
        environment["PYTHONPATH"] = str(path.resolve() / "src")
    python = sys.executable if is_checkout else str(path.absolute())
    told = subprocess.run([python, "-c", "import miaobi; print(miaobi.__file__)"], cwd=tempfile.gettempdir(),
                          env=environment, capture_output=True, text=True)  # fmt: skip
    if told.returncode or (is_checkout and not Path(told.stdout.strip()).is_relative_to(path.resolve())):
        raise SystemExit(f"{path} is neither a checkout of miaobi nor a Python that has it\n{told.stderr}")
    code = Path(told.stdout.strip()).parent
    commit = git_version(code)
    return Side(python, environment, str(code) if commit == "no git" else commit)


def losses(one: Side, values: dict[str, object], out: Path) -> list[float]:
    """Training loss of every step, in nats per token, of a run of that version. Raises SystemExit where it fails."""
    flags = [f"--{key}={value}" for key, value in (values | {"out_dir": out}).items()]
    done = subprocess.run([one.python, "-m", "miaobi", "train", *flags], env=one.environment, capture_output=True,
                          text=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{one.name} did not train:\n{done.stderr}")
    rows = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["train_loss"] for row in rows if "train_loss" in row]


def draw(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One picture, a panel for each run, in which the second side is a thin line on the broad one of the first."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(8, 2.9), sharey=True, squeeze=False)
    for panel, (name, sides) in zip(panels[0], curves.items(), strict=True):
        for (version, values), width, colour in zip(sides.items(), (5, 1.2), ("#c6d4ea", "#1f4e9a"), strict=True):
            panel.plot(range(1, len(values) + 1), values, linewidth=width, color=colour, label=version)
        panel.set(title=name, xlabel="step")
        panel.grid(alpha=0.4)
    panels[0][0].set_ylabel("training loss, nats/token")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Train, compare and print."""
    args = parse("loss_curves", Args, __doc__)
    sides = {"before": side(args.before), "after": side(args.after)}
    common = SHAPE | {"data": args.data.resolve(), "seed": args.seed, "max_iters": args.steps,
                      "eval_interval": args.steps}  # fmt: skip
    rows, curves, greatest = [], {}, {}
    for name, values in RUNS.items():
        found = {}
        for when, one in sides.items():
            log(f"{name}: {one.name}")
            with tempfile.TemporaryDirectory() as work:
                found[when] = losses(one, common | values, Path(work) / "run")
        before, after = found.values()
        greatest[name] = max(abs(a - b) for a, b in zip(before, after, strict=True))
        curves[name] = {f"{when} ({sides[when].name})": values for when, values in found.items()}
        rows.append([name, len(before), f"{before[-1]:.6f}", f"{after[-1]:.6f}", f"{greatest[name]:.2e}"])
    if args.plot:
        draw(curves, args.plot)
    names = {when: one.name for when, one in sides.items()}
    columns = ["run", "steps", f"last, {names['before']}", f"last, {names['after']}", "greatest difference"]
    report("loss_curves", columns, rows, {"machine": machine(), "settings": dataclasses.asdict(args), "sides": names,
                                          "greatest_difference": greatest, "losses": curves}, args.json)  # fmt: skip
    if max(greatest.values()) > args.tolerance:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
