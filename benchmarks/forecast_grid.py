"""The runs that `miaobi plan` forecasts from: small models on little text, repeated, scored once per pass.

    python -m benchmarks.forecast_grid TEXT [TEXT...] --out DIR [--minutes 60]

Cheap runs come first. Every run that is done is a row of DIR/grid.csv, and the same command again goes on where it was
ended. `src/miaobi/plan/grid.csv` is such a table; `python -m benchmarks.forecast_fit` turns it into the constants.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.common import parse
from miaobi.console import log
from miaobi.kinds import Location, Positional
from miaobi.settings import load_config
from miaobi.train.loop import train

SIZES = {"2x48": (2, 2, 48), "4x64": (4, 2, 64), "4x96": (4, 3, 96), "4x128": (4, 4, 128), "4x192": (4, 4, 192)}
"""n_layer, n_head, n_embd."""
DEFAULT = {"weight_decay": 0.1, "muon_weight_decay": 0.0, "dropout": 0.0, "average_weights": True}
RECIPES = {
    "plain": DEFAULT,
    "unaveraged": DEFAULT | {"average_weights": False},
    "dropout": DEFAULT | {"dropout": 0.3},
    "decay": DEFAULT | {"weight_decay": 0.5, "muon_weight_decay": 1.0},
    "both": DEFAULT | {"weight_decay": 0.5, "muon_weight_decay": 1.0, "dropout": 0.1},
}
VALIDATION = 40_000  # characters, the same for all
BLOCK, BATCH = 64, 16
EVALUATED = 6
"""Batches of validation text that are scored, the same at every pass."""


@dataclass(frozen=True)
class Args:
    """Command line."""

    texts: Positional[tuple[Location, ...]]
    """Texts in UTF-8. The last 40,000 characters are for validation, the first ones for training. Of the second text
    and those after it fewer runs are made."""
    out: Path
    """Where the table and the runs' directories go; the latter are removed when a run is done."""
    minutes: float = 1e9
    """No run begins later than that."""
    only: str = ""
    """Runs whose name contains this."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    text: str
    size: str
    characters: int
    """Of training text."""
    epochs: int
    recipe: str
    seed: int = 1337

    @property
    def name(self) -> str:
        """Directory of the run."""
        return "-".join(str(value) for value in asdict(self).values())

    def cost(self) -> float:
        """Roughly, for the order."""
        layers, _, width = SIZES[self.size]
        return self.characters * self.epochs * (12 * layers * width**2 + 2000 * width + 1e5)


def cells(texts: list[str]) -> list[Cell]:
    """The grid, cheap ones first. One text, whole; of others a few, to see whether they turn at the same pass."""
    text, *others = texts
    grid = {Cell(text, size, 20_000, 8, "plain") for size in ("2x48", "4x64", "4x96", "4x128")}
    grid |= {Cell(text, size, 40_000, 8, "plain") for size in ("2x48", "4x64", "4x96", "4x128")}
    grid |= {Cell(text, size, 80_000, 4, "plain") for size in ("2x48", "4x96")}
    grid |= {Cell(text, size, 80_000, 8, "plain") for size in ("2x48", "4x64", "4x96")}
    grid |= {Cell(text, size, 160_000, 8, "plain") for size in ("2x48", "4x96")}
    grid |= {Cell(text, "4x96", 320_000, 3, "plain"), Cell(text, "4x192", 40_000, 8, "plain")}
    grid |= {Cell(text, "4x64", 20_000, 8, recipe) for recipe in ("dropout", "decay", "both")}
    grid |= {Cell(text, size, characters, 8, recipe) for size, characters in (("4x64", 40_000), ("4x128", 20_000))
             for recipe in ("dropout", "both")}  # fmt: skip
    grid |= {Cell(text, "4x64", 20_000, 16, recipe, seed) for recipe in ("unaveraged", "plain", "both")
             for seed in (1, 2)}  # fmt: skip
    grid |= {Cell(other, size, characters, 8, "plain") for other in others for size in ("2x48", "4x96")
             for characters in (20_000, 40_000)}  # fmt: skip
    return sorted(grid, key=lambda cell: (cell.cost(), cell.name))


def run(cell: Cell, args: Args) -> dict[str, object]:
    """Train one cell; its row."""
    whole = next(Path(text) for text in args.texts if Path(text).stem == cell.text).read_text(encoding="utf-8")
    out = args.out / cell.name
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.txt").write_text(whole[: cell.characters], encoding="utf-8")
    (out / "val.txt").write_text(whole[-VALIDATION:], encoding="utf-8")
    layers, heads, width = SIZES[cell.size]
    steps = max(1, cell.characters // (BLOCK * BATCH))  # of an epoch
    settings = {
        "data": out / "train.txt", "val": out / "val.txt", "out_dir": out / "run", "n_layer": layers, "n_head": heads,
        "n_embd": width, "block_size": BLOCK, "batch_size": BATCH, "max_iters": steps * cell.epochs,
        "eval_interval": steps, "eval_iters": EVALUATED, "patience": 0, "sample_tokens": 0, "bigram_init": False,
        "compile": False, "device": "cpu", "log_interval": 10**6, "seed": cell.seed, **RECIPES[cell.recipe],
    }  # fmt: skip
    started = time.process_time()
    result = train(*load_config(None, [(key, str(value)) for key, value in settings.items()]))
    if result["stopped"] in ("interrupted", "terminated"):
        sys.exit(f"{result['stopped']}: the same command goes on with {cell.name}")
    lines = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [round(line["val_bits_per_char"], 4) for line in lines if "val_bits_per_char" in line]
    fit = [round(line["train_eval_loss"], 4) for line in lines if "train_eval_loss" in line]
    manifest = json.loads((out / "run" / "data" / "manifest.json").read_text(encoding="utf-8"))
    tokens = manifest["train"]["tokens"]
    shutil.rmtree(out)
    return {
        **asdict(cell), **RECIPES[cell.recipe], "parameters": result["parameters"], "tokens": tokens,
        "tokens_per_epoch": steps * BLOCK * BATCH, "seconds": round(time.process_time() - started),
        "passes": "",
        "bits": " ".join(map(str, curve)), "train_nats": " ".join(map(str, fit)),
    }  # fmt: skip


def main() -> None:
    """Entry point."""
    args = parse("forecast_grid", Args, __doc__)
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    table, until = args.out / "grid.csv", time.monotonic() + 60 * args.minutes
    done = set()
    if table.exists():
        fields = [field.name for field in dataclasses.fields(Cell)]
        with table.open(encoding="utf-8") as file:
            done = {"-".join(row[name] for name in fields) for row in csv.DictReader(file)}
    for cell in cells([Path(text).stem for text in args.texts]):
        if cell.name in done or args.only not in cell.name or time.monotonic() > until:
            continue
        row = run(cell, args)
        begins = not table.exists()
        with table.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if begins:
                writer.writeheader()
            writer.writerow(row)
        log(f"{cell.name}: {row['bits']}  ({row['seconds']} s)")


if __name__ == "__main__":
    main()
