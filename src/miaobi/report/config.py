"""Settings of `miaobi report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from miaobi.errors import UserError
from miaobi.kinds import Location, Positional


@dataclass(frozen=True)
class ReportConfig:
    """Runs of `miaobi train`, on one page."""

    runs: Positional[tuple[Location, ...]] = ()
    """Run directories; several are compared."""
    out: Path | None = None
    """File to write; default: report.html in the run, or in the current directory for several runs."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("which run? give its directory: miaobi report my_run")
