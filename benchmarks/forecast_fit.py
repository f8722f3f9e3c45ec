"""Fits the forecast of `miaobi plan` to the grid, and says how far it is off on runs that the fit did not see.

python -m benchmarks.forecast_fit [--grid CSV] [--write]
"""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

import miaobi.plan
from benchmarks.common import machine, parse, report
from miaobi.plan.forecast import FitQuality, RunSize, ScalingLaw

HERE = Path(miaobi.plan.__file__).parent
NAMES = [field.name for field in dataclasses.fields(ScalingLaw)]
USUAL = ScalingLaw(4.0, 0.8, 0.34, 1.6, 0.28, 15.4, 0.05, 1.0, 0.5, 0.3, 2.0, 0.5)
"""Where the fit begins and what it is drawn to, where the runs say little: the powers of Hoffmann et al., the worth of
Muennighoff et al., and for the rest what the first runs looked like."""
DRAWN = 0.02
"""Bits that a constant costs that is e times as large, or as small, as usual."""
FOLDS, STARTS = 4, 2


@dataclass(frozen=True)
class Args:
    """Command line."""

    grid: Path = HERE / "grid.csv"
    """Table of runs, as benchmarks.forecast_grid writes it."""
    write: bool = False
    """Write the constants, and the error on runs held out, into the package."""
    json: bool = False
    """Print one line of JSON as well."""


@dataclass(frozen=True)
class Curve:
    """One run of the grid."""

    name: str
    setting: RunSize
    epochs: np.ndarray
    bits: np.ndarray


def curves(path: Path) -> list[Curve]:
    """The runs of a table."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [curve(row) for row in rows]


def curve(row: dict[str, Any]) -> Curve:
    """A row of the table."""
    bits = np.array([float(b) for b in row["bits"].split()])
    tokens = float(row["tokens"])
    passes = [float(p) for p in row["passes"].split()] or 1.0 + np.arange(len(bits))
    epochs = np.array(passes) * float(row["tokens_per_epoch"]) / tokens
    setting = RunSize(float(row["parameters"]), tokens, float(row["muon_weight_decay"]), float(row["dropout"]),
                      row["average_weights"] == "True")  # fmt: skip
    name = "-".join(row[key] for key in ("text", "size", "characters", "epochs", "recipe", "seed"))
    return Curve(name, setting, epochs, bits)


def joined(runs: list[Curve]) -> Curve:
    """All points of several runs, each with its setting: one array for each field."""
    points = [len(one.bits) for one in runs]
    settings = zip(*(astuple(one.setting) for one in runs), strict=True)
    setting = RunSize(*(np.repeat(values, points) for values in settings))
    return Curve("", setting, np.concatenate([one.epochs for one in runs]), np.concatenate([one.bits for one in runs]))


def fitted(known: list[Curve]) -> ScalingLaw:
    """The law that is nearest to the runs, in Huber's sense: one that went astray pulls less. From several starts."""
    usual, every = np.array([getattr(USUAL, name) for name in NAMES]), joined(known)
    weights = np.concatenate([np.full(len(one.bits), len(one.bits) ** -0.5) for one in known])  # a run weighs as one
    draw, best = np.random.default_rng(0), None

    def off(logs: np.ndarray) -> np.ndarray:
        law = ScalingLaw(*(usual * np.exp(logs)))
        return np.concatenate([weights * (law.bits(every.setting, every.epochs) - every.bits), DRAWN * logs])

    for number in range(STARTS):
        start = 0.3 * draw.standard_normal(len(usual)) * bool(number)
        found = least_squares(off, start, bounds=(-4.0, 2.0), loss="huber", f_scale=0.05, max_nfev=200)
        best = found if best is None or found.cost < best.cost else best
    return ScalingLaw(*(float(round(x, 5)) for x in usual * np.exp(best.x)))


def minima(law: ScalingLaw, one: Curve) -> tuple[float, float]:
    """The passes after which the measured curve and the forecast one are lowest, among those that were measured."""
    told = law.bits(one.setting, one.epochs)
    return float(one.epochs[int(np.argmin(one.bits))]), float(one.epochs[int(np.argmin(told))])


def is_right(measured: float, told: float) -> bool:
    """Within a quarter, or one pass."""
    return abs(told - measured) <= max(1.01, 0.25 * measured)


def main() -> None:
    """Entry point."""
    args = parse("forecast_fit", Args, __doc__)
    runs = curves(args.grid)
    order = np.random.default_rng(1).permutation(len(runs))
    rows, errors, ratios, right = [], [], [], []
    for fold in range(FOLDS):  # every run is held out once
        held = {int(i) for i in order[fold::FOLDS]}
        law = fitted([one for i, one in enumerate(runs) if i not in held])
        for i in sorted(held):
            error = float(np.sqrt(np.mean(np.square(law.bits(runs[i].setting, runs[i].epochs) - runs[i].bits))))
            measured, told = minima(law, runs[i])
            errors.append(error)
            if len(runs[i].bits) < 4:  # of which only a few points are known
                continue
            ratios.append(abs(told / measured - 1))
            right.append(is_right(measured, told))
            rows.append([runs[i].name, error, measured, told, "yes" if right[-1] else "no"])
    law = fitted(runs)
    sizes, tokens = [one.setting.parameters for one in runs], [one.setting.tokens for one in runs]
    basis = FitQuality(asdict(law), len(runs), [min(sizes), max(sizes)], [min(tokens), max(tokens)],
                  round(float(np.sqrt(np.mean(np.square(errors)))), 3), round(statistics.median(ratios), 3),
                  round(statistics.fmean(right), 3))  # fmt: skip
    if args.write:
        (HERE / "forecast.json").write_text(json.dumps(asdict(basis), indent=1) + "\n", encoding="utf-8")
    report("forecast_fit, each run held out once", ["run", "bits off", "lowest at", "forecast", "right"], rows,
           {"machine": machine(), **asdict(basis)}, args.json)  # fmt: skip
    print(f"{len(runs)} runs: {basis.bits_error} bits/char off (rms), lowest pass right in {basis.epochs_right:.0%}")
    print(law)


if __name__ == "__main__":
    main()
