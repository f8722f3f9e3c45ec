"""One console for logs, progress bars and warnings: stderr, so that stdout carries only results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)


def quiet() -> None:
    """Say nothing from here on: of several processes only the first one speaks. Errors are not the console's."""
    console.quiet = True


def log(message: str) -> None:
    """One plain line on stderr; markup in user text (brackets) stays as typed."""
    console.print(message, markup=False)


def warn(message: str) -> None:
    """One line that stands out on stderr."""
    console.print(f"warning: {message}", style="yellow", markup=False)


def progress(*columns: str | ProgressColumn) -> Progress:
    """A progress bar with elapsed time and ETA; `columns` are shown between the bar and the times."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        *columns,
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        transient=not console.is_terminal,
    )
