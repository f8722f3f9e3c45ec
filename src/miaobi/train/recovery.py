"""What a run does after steps that are not finite: it goes back once, on with a lower rate, and stops if that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from miaobi.console import warn
from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.settings import Origin
from miaobi.train.setup import Plan, set_up

SLOWER = 0.5
"""Of the learning rates, after going back."""


class NotFiniteError(Exception):
    """The loss or the gradient, which all ranks share, was NaN or infinite so often that no batch is to blame."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"the {what} is not finite at step {step}")


def recovering(plan: Plan, origin: Origin, go: Callable[[Plan], dict]) -> dict:
    """`go(plan)`, again from the last checkpoint where it raises NotFiniteError. Raises UserError as `go_back` does."""
    while True:
        try:
            return go(plan)
        except NotFiniteError as e:
            plan = go_back(plan, origin, e)


def go_back(plan: Plan, origin: Origin, found: NotFiniteError) -> Plan:
    """The run as it was at its last checkpoint, with SLOWER rates.

    Raises UserError where there is no checkpoint, or the run has gone back before.
    """
    last, before = plan.out / "checkpoints" / "last", plan.progress.slowed
    if not last.exists() or before < 1.0:
        raise not_finite(found, last, plan.optim.learning_rate, before < 1.0) from None
    warn(f"{found}: the run goes back to {pointed(last)} and on with half the learning rate")
    plan.world.restarted = True  # --init_from=scratch was obeyed before
    plan = set_up(plan.cfg, origin, plan.world, plan.device, plan.dtype)
    plan.progress.slowed = SLOWER
    return plan


def not_finite(found: NotFiniteError, last: Path, learning_rate: float, slowed: bool) -> UserError:
    """The error for a run that cannot go on. last: the latest checkpoint. slowed: whether the run has gone back to it
    and tried again with a lower rate.
    """
    there = f"The last good checkpoint is {last}." if last.exists() else "No checkpoint was written yet."
    again = ", also after going back and on with half the learning rate" if slowed else ""
    return UserError(
        f"{found}{again}. {there} "
        f"Try a lower --learning_rate (now {learning_rate:g}), a longer --warmup_iters, "
        "or --dtype=float32, in another --out_dir"
    )
