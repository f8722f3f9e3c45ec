"""One console for logs, progress bars and warnings: stderr, so that stdout carries only results."""

from __future__ import annotations

import functools
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


@functools.cache
def _console() -> Console:
    from rich.console import Console  # a command that has nothing to say need not wait for it

    return Console(stderr=True, highlight=False, soft_wrap=True)


def __getattr__(name: str) -> Console:
    """`console`, made when it is first asked for."""
    if name == "console":
        return _console()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def quiet() -> None:
    """Say nothing from here on: of several processes only the first one speaks. Errors are not the console's."""
    _console().quiet = True


def log(message: str) -> None:
    """One plain line on stderr; markup in user text (brackets) stays as typed."""
    _console().print(message, markup=False)


def warn(message: str) -> None:
    """One line that stands out on stderr."""
    _console().print(f"warning: {message}", style="yellow", markup=False)


@functools.cache
def warn_once(message: str) -> None:
    """`warn`, unless this process has already said it."""
    warn(message)


def mend_streams() -> None:
    """A closed standard stream leads nowhere, and a character that stdout's encoding lacks is a ?: neither is a reason
    to lose a result.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process lives
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and out.errors in ("strict", "surrogateescape"):  # not the user's own choice
        out.reconfigure(errors="replace")


def can_show(text: str) -> bool:
    """Whether stdout's encoding has every character of `text`."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def warn_of_encoding() -> None:
    """One line where stdout cannot show Chinese."""
    if not can_show("妙笔"):
        warn(f"the output's encoding is {sys.stdout.encoding}: Chinese shows as ?; set PYTHONIOENCODING=utf-8")


def json_text(value: Any) -> str:
    """`value` as JSON for stdout, whose encoding may lack characters: then all but ASCII is escaped, and none lost."""
    text = json.dumps(value, ensure_ascii=False)
    return text if can_show(text) else json.dumps(value)


def progress(*columns: str | ProgressColumn) -> Progress:
    """A progress bar with elapsed time and ETA; `columns` are shown between the bar and the times."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = _console()
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


@contextmanager
def token_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Call what this gives with the number of tokens written: after two seconds a terminal shows a bar of `total`, with
    tokens/s and the time that is left at most.
    """
    started, done, bar = time.perf_counter(), 0, None

    def wrote(tokens: int) -> None:
        nonlocal done, bar
        done += tokens
        seconds = time.perf_counter() - started
        if seconds < 2 or not _console().is_terminal:
            return
        if bar is None:
            from rich.progress import TextColumn

            bar = progress(TextColumn("{task.fields[speed]:,.0f} tokens/s"))
            bar.live.transient = True  # what was written is what stays
            bar.add_task(description, total=total, speed=0.0)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, speed=done / seconds)

    try:
        yield wrote
    finally:
        if bar is not None:
            bar.stop()
