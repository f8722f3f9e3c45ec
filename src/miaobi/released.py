"""What comes with miaobi besides code: configurations, and the models that verbs use where no MODEL is named."""

from __future__ import annotations

from pathlib import Path

from miaobi.console import log
from miaobi.errors import UserError

NAMES = {"base": "miaobi-base", "chat": "miaobi-chat", "sentiment": "miaobi-sentiment"}
"""Directory of a released model -> what its card calls it."""


def shipped(kind: str, name: str) -> Path:
    """A file or directory that comes with miaobi: inside an installed package, beside `src` in a checkout.

    kind: configs or models.
    """
    package = Path(__file__).parent
    folders = (package / kind, package.parents[1] / kind)
    return next((f / name for f in folders if (f / name).exists()), folders[0] / name)


def find(name: str) -> Path | None:
    """The directory of a model that comes with miaobi (base, chat, sentiment); None where this copy came without it."""
    place = shipped("models", name)
    return place if (place / "config.json").is_file() else None


def released(*names: str) -> list[str]:
    """Directories of models that come with miaobi; which they are, and where their cards are, is said in a line.

    Raises UserError where this copy came without one.
    """
    places = {name: find(name) for name in names}
    if missing := [NAMES[name] for name, place in places.items() if place is None]:
        raise UserError(f"which model? None was named, and this copy of miaobi came without {missing[0]}, which would "
                        "answer then. Name a run or model directory, or a hub name, as in miaobi sample my_run; or "
                        "install a release of miaobi")  # fmt: skip
    cards = ", ".join(f"{place}/README.md" for place in places.values())
    log(f"no MODEL named: taking {', '.join(NAMES[name] for name in names)}, which comes with miaobi (read {cards})")
    return [str(place) for place in places.values()]
