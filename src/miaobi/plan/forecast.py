"""The validation curve of a run before it begins, and what its text carries.

bits per character = E + A N^-a + B D^-b + overfitting, with N parameters and D tokens (Hoffmann et al. 2022,
arXiv:2203.15556). A repeated token counts less each time: D = U (1 + R (1 - exp(-(e - 1) / R))) for e passes over U
tokens (Muennighoff et al. 2023, arXiv:2305.16264). Learning by heart adds P e^g (N / U)^d, a power of the passes and
of the parameters per token, which decay and dropout make less. Fitted to `grid.csv`: small models on little text.
`benchmarks/forecast_fit.py` fits, and says how far runs were off that the fit had not seen.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

MOST_EPOCHS = 64
"""Passes that are looked at."""
UNIT_N, UNIT_U = 1e6, 1e6
"""N and U count in millions: the constants are of a size then."""


@dataclass(frozen=True)
class Setting:
    """A run, as far as the forecast knows it."""

    parameters: float
    tokens: float
    """Distinct ones of the training text."""
    muon_weight_decay: float = 0.0
    dropout: float = 0.0


@dataclass(frozen=True)
class Law:
    """The constants of the formula above."""

    floor: float
    size: float
    size_power: float
    data: float
    data_power: float
    worth: float
    """R: passes after which a repetition is worth little."""
    heart: float
    """P."""
    heart_passes: float
    """g."""
    heart_ratio: float
    """d."""
    decay: float
    """The penalty is divided by e^(this x muon_weight_decay)."""
    dropout: float
    """And by e^(this x dropout)."""

    def bits(self, run: Setting, epochs: float) -> float:
        """Bits per character of the validation text after `epochs` passes."""
        n, u = run.parameters / UNIT_N, run.tokens / UNIT_U
        seen = u * min(1.0, epochs)
        if epochs > 1:
            seen += u * self.worth * (1 - math.exp(-(epochs - 1) / self.worth))
        spared = math.exp(-self.decay * run.muon_weight_decay - self.dropout * run.dropout)
        heart = self.heart * epochs**self.heart_passes * (n / u) ** self.heart_ratio * spared
        return self.floor + self.size * n**-self.size_power + self.data * seen**-self.data_power + heart

    def best(self, run: Setting, most: float = MOST_EPOCHS) -> float:
        """Passes after which the curve is lowest, in halves; `most` where it still falls then."""
        halves = range(1, max(2, round(2 * most)) + 1)
        return min(halves, key=lambda half: self.bits(run, half / 2)) / 2


@dataclass(frozen=True)
class Basis:
    """`forecast.json`: the constants, and what they stand on."""

    law: dict[str, float]
    runs: int
    parameters: list[float]
    """Fewest and most."""
    tokens: list[float]
    bits_error: float
    """Root mean square on runs held out, after the level of each run's text is known."""
    epoch_error: float
    """Median of |forecast / measured - 1| of the pass with the lowest loss, on runs held out."""
    epochs_right: float
    """Share of held-out runs in which that pass is right to 25% or one pass."""


def basis() -> Basis:
    """What the package ships."""
    return Basis(**json.loads(files(__package__).joinpath("forecast.json").read_text(encoding="utf-8")))


def grid() -> list[dict[str, Any]]:
    """The runs that were measured, one each, with their curves: `bits` after each pass."""
    text = files(__package__).joinpath("grid.csv").read_text(encoding="utf-8")
    return [row | {"bits": [float(b) for b in row["bits"].split()]} for row in csv.DictReader(text.splitlines())]


def forecast(run: Setting, epochs: float) -> dict[str, Any]:
    """What is to be expected of `run` for `epochs` passes: JSON."""
    found = basis()
    law = Law(**found.law)
    best = law.best(run, max(MOST_EPOCHS, epochs))
    points = sorted({epoch for epoch in (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if epoch < epochs} | {epochs})
    return {
        "curve": [[epoch, round(law.bits(run, epoch), 3)] for epoch in points],
        "best_epoch": best,
        "bits_at_best": law.bits(run, min(best, epochs)),
        "bits_at_end": law.bits(run, epochs),
        "carries": carries(law, run),
        "inside": all(low / 2 <= value <= high * 2 for (low, high), value in
                      ((found.parameters, run.parameters), (found.tokens, run.tokens))),
        "basis": {key: value for key, value in asdict(found).items() if key != "law"},
    }  # fmt: skip


def carries(law: Law, run: Setting) -> float:
    """Parameters of the model that is best on the text of `run`, each at its own best pass."""
    sizes = [run.tokens * 10 ** (power / 10) for power in range(-20, 31)]
    return min(sizes, key=lambda n: law.bits(replace(run, parameters=n), law.best(replace(run, parameters=n))))
