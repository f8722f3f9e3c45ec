"""Scaling law that predicts the validation curve of a run before it begins, and the best model size for its text.

bits per character = E + A N^-a + B D^-b + overfitting, with N parameters and D tokens (Hoffmann et al. 2022,
arXiv:2203.15556). A repeated token counts less each time: D = U (1 + R (1 - exp(-(e - 1) / R))) for e passes over U
tokens (Muennighoff et al. 2023, arXiv:2305.16264). Overfitting adds P e^g (N / U)^d, a power of the passes and of the
parameters per token; weight decay, dropout and averaged weights reduce it. `benchmarks/forecast_fit.py` fits the
constants to the small models and texts of `grid.csv`, and measures the error on runs that the fit did not see.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

import numpy as np

MOST_EPOCHS = 64
"""Passes up to which the minimum of the curve is searched."""
GUESSING = 16.0
"""Bits per character of a guess among 65,536. The formula has no bound; where it says more, `forecast` says this."""
UNIT_N, UNIT_U = 1e6, 1e6
"""N and U are in millions, so that the constants are of similar size."""


@dataclass(frozen=True)
class RunSize:
    """The properties of a run that the forecast depends on."""

    parameters: float
    tokens: float
    """Tokens of the training text, each counted once."""
    muon_weight_decay: float = 0.0
    dropout: float = 0.0
    averaged: bool = False
    """Whether averaged weights are evaluated too."""


@dataclass(frozen=True)
class ScalingLaw:
    """The constants of the formula above."""

    floor: float
    size: float
    size_power: float
    data: float
    data_power: float
    repeats: float
    """R: passes after which further repetition adds little."""
    overfit: float
    """P."""
    overfit_epochs_power: float
    """g."""
    overfit_ratio_power: float
    """d."""
    decay: float
    """Overfitting is divided by e^(this x muon_weight_decay)."""
    dropout: float
    """And by e^(this x dropout)."""
    average: float
    """And by e^this where the weights are averaged."""

    def bits(self, run: RunSize, epochs: float | np.ndarray) -> float | np.ndarray:
        """Bits per character of the validation text after `epochs` passes."""
        n, u = run.parameters / UNIT_N, run.tokens / UNIT_U
        again = np.maximum(0.0, epochs - 1.0)
        seen = u * (np.minimum(1.0, epochs) + self.repeats * (1 - np.exp(-again / self.repeats)))
        reduced = np.exp(-self.decay * run.muon_weight_decay - self.dropout * run.dropout - self.average * run.averaged)
        overfit = self.overfit * epochs**self.overfit_epochs_power * (n / u) ** self.overfit_ratio_power * reduced
        return self.floor + self.size * n**-self.size_power + self.data * seen**-self.data_power + overfit

    def best(self, run: RunSize, most: float = MOST_EPOCHS) -> float:
        """Passes after which the curve is lowest, in steps of half a pass; `most` where it still falls then."""
        passes = np.arange(1, max(2, round(2 * most)) + 1) / 2
        return float(passes[np.argmin(self.bits(run, passes))])


@dataclass(frozen=True)
class FitQuality:
    """`forecast.json`: the constants, the range of the runs they were fitted to, and their error."""

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


def fit_quality() -> FitQuality:
    """The fit that comes with the package."""
    return FitQuality(**json.loads(files(__package__).joinpath("forecast.json").read_text(encoding="utf-8")))


def forecast(run: RunSize, epochs: float) -> dict[str, Any]:
    """The predicted curve of `run` over `epochs` passes, as JSON."""
    fit = fit_quality()
    law = ScalingLaw(**fit.law)
    best, size = law.best(run, max(MOST_EPOCHS, epochs)), best_size(law, run)
    points = sorted({epoch for epoch in (0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if epoch < 0.95 * epochs} | {epochs})

    def bits(after: float) -> float:
        return min(GUESSING, float(law.bits(run, after)))

    return {
        "curve": [[epoch, round(bits(epoch), 3)] for epoch in points],
        "best_epoch": best,
        "bits_at_best": bits(min(best, epochs)),
        "bits_at_end": bits(epochs),
        "carries": size if size <= 2 * fit.parameters[1] else None,  # larger ones were not measured
        "inside": all(low / 2 <= value <= high * 2 for (low, high), value in
                      ((fit.parameters, run.parameters), (fit.tokens, run.tokens))),
        "basis": {key: value for key, value in asdict(fit).items() if key != "law"},
    }  # fmt: skip


def advice(expected: dict[str, Any], run: RunSize, epochs: float) -> list[str]:
    """Advice for the run, in words; first of all, whether the run is unlike those that were measured."""
    basis, words = expected["basis"], []
    if not expected["inside"]:
        words.append("this run is outside the range that was measured: take the forecast as a rough guide")
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
        words.append(f"the best model for this text has about {expected['carries'] / 1e6:.2g}M parameters: take a "
                     "smaller model or more text; --dropout=0.2 and up delays the turn")  # fmt: skip
    words.append(
        f"the forecast was fitted to {basis['runs']} small runs ({basis['parameters'][0] / 1e6:.2g}M to "
        f"{basis['parameters'][1] / 1e6:.2g}M parameters); on runs it had not seen it was {basis['bits_error']:.1f} "
        f"bits/char off, and the turn was within a quarter or one pass in {basis['epochs_right']:.0%} of them"
    )
    return words


def best_size(law: ScalingLaw, run: RunSize) -> float:
    """Parameters of the model that is best on the text of `run`, each size trained for its best number of passes."""

    def lowest(n: float) -> float:
        other = replace(run, parameters=n)
        return float(law.bits(other, law.best(other)))

    return min((run.tokens * 10 ** (power / 10) for power in range(-20, 31)), key=lowest)
