"""Recovery from a loss that is not finite: one rollback to the last checkpoint, with a lower rate; then an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from miaobi.console import warn
from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.settings import Origin
from miaobi.train.setup import Plan, set_up

RATE_FACTOR = 0.5
"""Factor on the learning rates after a rollback."""


class NotFiniteError(Exception):
    """The loss or the gradient of all ranks was NaN or infinite for so many steps that no single batch is to blame."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(f"the {what} is not finite at step {step}")


def with_recovery(plan: Plan, origin: Origin, go: Callable[[Plan], dict]) -> dict:
    """Run `go(plan)`; after a NotFiniteError, run it again from the last checkpoint. Raises UserError as `roll_back`
    does.
    """
    while True:
        try:
            return go(plan)
        except NotFiniteError as e:
            plan = roll_back(plan, origin, e)


def roll_back(plan: Plan, origin: Origin, found: NotFiniteError) -> Plan:
    """The run as it was at its last checkpoint, with its learning rates multiplied by RATE_FACTOR.

    Raises UserError if there is no checkpoint, or if the run was rolled back before.
    """
    last, before = plan.out / "checkpoints" / "last", plan.progress.slowed
    if not last.exists() or before < 1.0:
        raise not_finite_error(found, last, plan.optim.learning_rate, before < 1.0) from None
    warn(f"{found}: rolling back to {pointed(last)} and continuing at half the learning rate")
    plan.world.restarted = True  # --init_from=scratch has already been carried out
    plan = set_up(plan.cfg, origin, plan.world, plan.device, plan.dtype)
    plan.progress.slowed = RATE_FACTOR
    return plan


def not_finite_error(found: NotFiniteError, last: Path, learning_rate: float, slowed: bool) -> UserError:
    """The error for a run that cannot continue. last: the latest checkpoint. slowed: whether the run was already rolled
    back to it and tried again at a lower rate.
    """
    there = f"The last good checkpoint is {last}." if last.exists() else "No checkpoint was written yet."
    again = ", even after a rollback at half the learning rate" if slowed else ""
    return UserError(
        f"{found}{again}. {there} "
        f"Try a lower --learning_rate (now {learning_rate:g}), a longer --warmup_iters, "
        "or --dtype=float32, in another --out_dir"
    )
