"""Settings of `miaobi plan`: those of `miaobi train`, and the machines to plan for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from miaobi import settings
from miaobi.config import RunConfig
from miaobi.errors import UserError
from miaobi.plan.cards import find_card
from miaobi.seeds import OURS
from miaobi.settings import Origin


@dataclass(frozen=True)
class PlanOptions:
    """The machine to plan for, and its costs."""

    gpu: str | None = None
    """Plan for this card, such as "RTX 4080" or A100-80GB; default: the device at hand."""
    price_per_hour: float | None = None
    """What an hour of the machine costs, in any currency."""
    watts: float | None = None
    """What the machine draws; default: what the card's data sheet says."""
    measure: bool = False
    """Run 20 steps here, of which nothing is kept, and take time and memory from them."""

    def __post_init__(self) -> None:
        for name in ("price_per_hour", "watts"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; it must be finite and cannot be negative")
        if self.gpu is not None:
            find_card(self.gpu)
            if self.measure:
                raise UserError("--measure runs on the device at hand, and --gpu names another one: leave one out")


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """A run, and the options of its plan."""

    plan: PlanOptions = field(default_factory=PlanOptions)


def load_config(path: Path | None, given: list[tuple[str, str]]) -> tuple[PlanConfig, Origin]:
    """The settings of the run, read as `miaobi train` does, and the options of the plan. Raises UserError."""
    ours = settings.keys(PlanOptions)
    options, _ = settings.load(PlanOptions, OURS, "miaobi plan", [pair for pair in given if pair[0] in ours])
    cfg, origin = settings.load_config(path, [pair for pair in given if pair[0] not in ours])
    parts = {key: getattr(cfg, key) for key in ("data", "model", "optim", "train", "lora")}
    return PlanConfig(**parts, plan=options), origin
