"""Fits the forecast of `miaobi plan` to the grid, and says how far it is off on runs that the fit did not see.

python -m benchmarks.forecast_fit [--grid CSV] [--write]
"""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

import miaobi.plan
from benchmarks.common import machine, parse, report
from miaobi.plan.forecast import Basis, Law, Setting

HERE = Path(miaobi.plan.__file__).parent
NAMES = [field.name for field in dataclasses.fields(Law)]
START = Law(4.0, 0.5, 0.3, 1.5, 0.3, 5.0, 0.05, 1.0, 0.5, 0.5, 2.0)
LIMITS = Law(8.0, 9.0, 1.5, 9.0, 1.5, 60.0, 3.0, 3.0, 3.0, 5.0, 15.0)
FOLDS = 4


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
    setting: Setting
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
    epochs = (1 + np.arange(len(bits))) * float(row["tokens_per_epoch"]) / tokens
    setting = Setting(float(row["parameters"]), tokens, float(row["muon_weight_decay"]), float(row["dropout"]))
    name = "-".join(row[key] for key in ("text", "size", "characters", "epochs", "recipe"))
    return Curve(name, setting, epochs, bits)


def residuals(law: Law, one: Curve) -> np.ndarray:
    """Forecast minus measured; each run weighs as one."""
    told = np.array([law.bits(one.setting, epoch) for epoch in one.epochs])
    return (told - one.bits) / np.sqrt(len(one.bits))


def fitted(known: list[Curve]) -> Law:
    """The law that is nearest to the runs (Huber's loss: a run that went astray pulls less), from several starts."""
    upper, draw = np.array([getattr(LIMITS, name) for name in NAMES]), np.random.default_rng(0)
    start = np.array([getattr(START, name) for name in NAMES])
    best = None
    for number in range(6):
        guess = np.minimum(start * np.exp(0.4 * draw.standard_normal(len(start)) * bool(number)), 0.95 * upper)
        found = least_squares(lambda x: np.concatenate([residuals(Law(*x), one) for one in known]), guess,
                              bounds=(1e-4, upper), loss="huber", f_scale=0.05, max_nfev=400)  # fmt: skip
        best = found if best is None or found.cost < best.cost else best
    return Law(*(float(round(x, 5)) for x in best.x))


def minima(law: Law, one: Curve) -> tuple[float, float]:
    """The passes after which the measured curve and the forecast one are lowest, among those that were measured."""
    told = [law.bits(one.setting, epoch) for epoch in one.epochs]
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
            error = float(np.sqrt(np.mean(np.square(residuals(law, runs[i]) * np.sqrt(len(runs[i].bits))))))
            measured, told = minima(law, runs[i])
            errors.append(error)
            ratios.append(abs(told / measured - 1))
            right.append(is_right(measured, told))
            rows.append([runs[i].name, error, measured, told, "yes" if right[-1] else "no"])
    law = fitted(runs)
    sizes, tokens = [one.setting.parameters for one in runs], [one.setting.tokens for one in runs]
    basis = Basis(asdict(law), len(runs), [min(sizes), max(sizes)], [min(tokens), max(tokens)],
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
