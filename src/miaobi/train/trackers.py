"""Experiment trackers besides TensorBoard: Weights & Biases, SwanLab, trackio.

Their APIs are alike by design (trackio and SwanLab follow wandb): `init` returns a run with `log` and `finish`. Offline
they write into the run directory: WANDB_MODE=offline, SWANLAB_MODE=offline; trackio keeps its database in TRACKIO_DIR
and sends nothing unless TRACKIO_SPACE_ID is set.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from miaobi.errors import UserError


class Tracker(Protocol):
    """A run at a tracker."""

    def log(self, values: dict[str, float], step: int) -> None:
        """One point of every curve."""

    def finish(self) -> None:
        """Send or write what is left."""


@dataclass(frozen=True)
class About:
    """What a tracker needs to know of a run."""

    project: str
    name: str | None
    """None = the name of the run directory, with the beginning of `id`."""
    id: str
    """Id of the run, which stays the same when it is continued."""
    config: dict[str, Any]


def start(kind: str, out: Path, about: About) -> Tracker:
    """Start a run at wandb, swanlab or trackio, or continue the one with this id.

    Raises UserError if the package is missing or broken, or refuses (no key, no network).
    """
    package = _package(kind)
    name = about.name or f"{out.resolve().name}-{about.id[:8]}"
    common = {"project": about.project, "name": name, "config": about.config, "resume": "allow"}
    where = {
        "wandb": {"id": about.id, "dir": str(out)},
        "swanlab": {"id": about.id, "log_dir": str(out / "swanlog")},
        "trackio": {"embed": False},  # known by its name
    }[kind]
    try:
        return package.init(**common, **where)
    except Exception as e:  # each has kinds of its own, and some are bare
        raise UserError(f"{kind} could not start ({type(e).__name__}: {e}); log in as it asks, or train without "
                        f"--trackers={kind}") from e  # fmt: skip


def _package(kind: str) -> Any:
    try:
        return importlib.import_module(kind)
    except Exception as e:
        if isinstance(e, ModuleNotFoundError) and e.name == kind:
            raise UserError(f"--trackers={kind} needs the package {kind}: pip install 'miaobi[track]'") from e
        reason = f"{type(e).__name__}: {e}"
        raise UserError(f"{kind} is installed but cannot be imported ({reason}); install it again") from e
