"""One console for logs, progress bars and warnings: stderr, so that stdout carries only results.

Texts of others (replies, labels, names of files and tensors) never steer a terminal: see `shown`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

_STEERING = re.compile(
    "[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)"
)
"""Control characters (C0 but tab and newline, DEL, C1), what turns the direction of writing, and halves of characters,
which names of files that are not UTF-8 have.
"""


def shown(text: str) -> str:
    """`text` with the characters that steer a terminal, or hide what is written, spelled out: ESC becomes \\x1b.

    Each by itself, so that pieces of a text give the pieces of this.
    """
    if text.isprintable():
        return text
    return _STEERING.sub(_spelled, text)


def one_line(text: str) -> str:
    """`shown`, and line breaks too: what names or values of others put into a message begins no line of its own."""
    return shown(text).replace("\n", "\\n")


def _spelled(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode() if match[0] < " " else f"\\u{ord(match[0]):04x}"


class TerminalStream:
    """A terminal's text stream to which everything is written as `shown`. rich, whose own sequences are wanted, and
    prompt_toolkit (through `buffer`) write past it.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self.rich_proxied_file = stream  # where rich looks

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(shown(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rich_proxied_file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@functools.cache
def _console() -> Console:
    from rich.console import Console  # a command that has nothing to say need not wait for it

    class Ours(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process
            nobody_listens()

        def _check_buffer(self) -> None:  # through which all that is printed goes
            try:
                super()._check_buffer()
            except OSError:  # the disk that stderr leads to is full: what is said is lost, the work is not
                nobody_listens()

    return Ours(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def nobody_listens() -> None:
    """What read stderr is gone (`2>&1 | head`): from here on it leads nowhere."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


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
    _say(shown(message), None)


def warn(message: str) -> None:
    """One line that stands out on stderr."""
    _say(f"warning: {one_line(message)}", "yellow")


def _say(line: str, style: str | None) -> None:
    with contextlib.suppress(OSError):  # a full disk, a terminal that is gone: a log never costs a run
        _console().print(line, style=style, markup=False)


def error(message: object, program: str = "miaobi") -> None:
    """The line that a command ends with, on stderr, also where `quiet` was asked for."""
    try:
        print(f"{program}: {one_line(str(message))}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        nobody_listens()
    except OSError:
        pass


@functools.cache
def warn_once(message: str) -> None:
    """`warn`, unless this process has already said it."""
    warn(message)


def mend_streams() -> None:
    """A closed standard stream leads nowhere, and a character that stdout's encoding lacks is a ?: neither is a reason
    to lose a result. What goes to a terminal is `shown`; files and pipes get texts as they are.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process lives
    out = sys.stdout
    if isinstance(out, io.TextIOWrapper) and out.errors in ("strict", "surrogateescape"):  # not the user's own choice
        out.reconfigure(errors="replace")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream.isatty():
            setattr(sys, name, TerminalStream(stream))


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
