"""The validation curve of a run before it begins, and what its text carries.

bits per character = E + A N^-a + B D^-b + overfitting, with N parameters and D tokens (Hoffmann et al. 2022,
arXiv:2203.15556). A repeated token counts less each time: D = U (1 + R (1 - exp(-(e - 1) / R))) for e passes over U
tokens (Muennighoff et al. 2023, arXiv:2305.16264). Learning by heart adds P e^g (N / U)^d, a power of the passes and
of the parameters per token, which decay, dropout and the average of the weights make less. Fitted to `grid.csv`: small
models on little text.
`benchmarks/forecast_fit.py` fits, and says how far runs were off that the fit had not seen.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

import numpy as np

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
    averaged: bool = False
    """Whether the average of the weights is scored beside them."""


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
    average: float
    """And by e^this where the weights are averaged."""

    def bits(self, run: Setting, epochs: float | np.ndarray) -> float | np.ndarray:
        """Bits per character of the validation text after `epochs` passes."""
        n, u = run.parameters / UNIT_N, run.tokens / UNIT_U
        again = np.maximum(0.0, epochs - 1.0)
        seen = u * (np.minimum(1.0, epochs) + self.worth * (1 - np.exp(-again / self.worth)))
        spared = np.exp(-self.decay * run.muon_weight_decay - self.dropout * run.dropout - self.average * run.averaged)
        heart = self.heart * epochs**self.heart_passes * (n / u) ** self.heart_ratio * spared
        return self.floor + self.size * n**-self.size_power + self.data * seen**-self.data_power + heart

    def best(self, run: Setting, most: float = MOST_EPOCHS) -> float:
        """Passes after which the curve is lowest, in halves; `most` where it still falls then."""
        passes = np.arange(1, max(2, round(2 * most)) + 1) / 2
        return float(passes[np.argmin(self.bits(run, passes))])


@dataclass(frozen=True)
class Basis:
    """`forecast.json`: the constants, and what they stand on."""

    law: dict[str, float]
    runs: int
    parameters: list[float]
    """Fewest and most."""
    tokens: list[float]
    bits_error: float
    """Root mean square, on runs held out."""
    epoch_error: float
    """Median of |forecast / measured - 1| of the pass with the lowest loss, on runs held out."""
    epochs_right: float
    """Share of held-out runs in which that pass is right to 25% or one pass."""


def basis() -> Basis:
    """What the package ships."""
    return Basis(**json.loads(files(__package__).joinpath("forecast.json").read_text(encoding="utf-8")))


def forecast(run: Setting, epochs: float) -> dict[str, Any]:
    """What is to be expected of `run` for `epochs` passes: JSON."""
    found = basis()
    law = Law(**found.law)
    best, carried = law.best(run, max(MOST_EPOCHS, epochs)), carries(law, run)
    points = sorted({epoch for epoch in (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if epoch < 0.95 * epochs} | {epochs})
    return {
        "curve": [[epoch, round(float(law.bits(run, epoch)), 3)] for epoch in points],
        "best_epoch": best,
        "bits_at_best": float(law.bits(run, min(best, epochs))),
        "bits_at_end": float(law.bits(run, epochs)),
        "carries": carried if carried <= 2 * found.parameters[1] else None,  # larger ones were not measured
        "inside": all(low / 2 <= value <= high * 2 for (low, high), value in
                      ((found.parameters, run.parameters), (found.tokens, run.tokens))),
        "basis": {key: value for key, value in asdict(found).items() if key != "law"},
    }  # fmt: skip


def advice(expected: dict[str, Any], run: Setting, epochs: float) -> list[str]:
    """What the forecast means for the run, in words; where it stands on nothing like it, that first."""
    basis, words = expected["basis"], []
    if not expected["inside"]:
        words.append("this run is outside of what was measured: take it as a direction")
    if epochs > 1.25 * expected["best_epoch"] and epochs > expected["best_epoch"] + 1:
        words.append(
            f"the validation loss turns after about {expected['best_epoch']:g} passes over the text: "
            f"--max_epochs={max(1, math.ceil(expected['best_epoch']))} ends there, and --patience stops there"
        )
    elif expected["best_epoch"] > 1.5 * epochs:
        words.append(
            f"the validation loss still falls at the end: about {expected['best_epoch']:g} passes would be best"
        )
    if expected["carries"] is not None and run.parameters > 2 * expected["carries"]:
        words.append(f"this text carries about {expected['carries'] / 1e6:.2g}M parameters: a smaller model, or more "
                     "text; --dropout=0.2 and up delays the turn")  # fmt: skip
    words.append(
        f"it stands on {basis['runs']} small runs ({basis['parameters'][0] / 1e6:.2g}M to "
        f"{basis['parameters'][1] / 1e6:.2g}M parameters), and was {basis['bits_error']:.1f} bits/char off on "
        f"runs it had not seen, the turn right to a quarter or one pass in {basis['epochs_right']:.0%}"
    )
    return words


def carries(law: Law, run: Setting) -> float:
    """Parameters of the model that is best on the text of `run`, each at its own best pass."""

    def lowest(n: float) -> float:
        other = replace(run, parameters=n)
        return float(law.bits(other, law.best(other)))

    return min((run.tokens * 10 ** (power / 10) for power in range(-20, 31)), key=lowest)
