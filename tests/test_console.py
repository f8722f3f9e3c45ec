"""The bar of what writes tokens: nothing for short waits, and nothing left behind. Streams of any encoding, or none."""

import io
import json
import re
import sys

import pytest
from rich.console import Console

from miaobi import console


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal that remembers what it was shown."""
    shown = Console(file=io.StringIO(), force_terminal=True, width=90, highlight=False)
    monkeypatch.setattr(console, "_console", lambda: shown)
    return shown


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, moved by hand."""
    now = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    return now


def plain(shown: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.file.getvalue())


def test_a_bar_appears_after_two_seconds_with_speed(terminal, clock):
    with console.token_bar("sample", 400) as wrote:
        wrote(100)
        clock[0] += 1.9
        wrote(100)
        assert not plain(terminal)
        clock[0] += 0.6
        wrote(50)
    assert "sample" in plain(terminal)
    assert "100 tokens/s" in plain(terminal)
    assert "ETA" in plain(terminal)


def test_a_short_wait_and_a_file_show_nothing(terminal, clock, monkeypatch):
    with console.token_bar("sample", 4) as wrote:
        wrote(4)
    assert not plain(terminal)
    file = Console(file=io.StringIO())
    monkeypatch.setattr(console, "_console", lambda: file)
    with console.token_bar("sample", 400) as wrote:
        clock[0] += 10
        wrote(100)
    assert not file.file.getvalue()


def test_the_bar_goes_when_writing_is_broken_off(terminal, clock):
    def write() -> None:
        with console.token_bar("sample", 400) as wrote:
            clock[0] += 3
            wrote(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert terminal.file.getvalue().rstrip().endswith("\x1b[2K"), "the line is cleared"


@pytest.fixture
def stdout(monkeypatch: pytest.MonkeyPatch):
    """`stdout("gbk")`: a standard output of that encoding."""

    def of(encoding: str, errors: str = "strict") -> io.TextIOWrapper:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors))
        return sys.stdout

    return of


@pytest.mark.parametrize(
    ("encoding", "errors", "shown"),
    [("gbk", "strict", "皇马?"), ("ascii", "surrogateescape", "???"), ("utf-8", "strict", "皇马😀"),
     ("ascii", "backslashreplace", r"\u7687\u9a6c\U0001f600")],
)  # fmt: skip
def test_a_character_that_the_output_lacks_is_replaced(stdout, encoding, errors, shown):
    out = stdout(encoding, errors)
    console.mend_streams()
    print("皇马😀", end="", flush=True)
    assert out.buffer.getvalue().decode(encoding) == shown


@pytest.mark.parametrize("value", ["皇马", "皇马😀", {"半个": "\ud83d"}])
def test_json_loses_no_character_whatever_the_output_lacks(stdout, value):
    for encoding in ("utf-8", "gbk", "ascii"):
        stdout(encoding)
        text = console.json_text(value).encode(encoding).decode(encoding)
        assert json.loads(text) == value
    stdout("utf-8")
    assert console.json_text("皇马😀") == '"皇马😀"', "readable where it can be read"


def test_closed_streams_lead_nowhere(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    console.mend_streams()
    print("out", flush=True)
    print("err", file=sys.stderr, flush=True)
    assert sys.stdin.read() == sys.stdin.buffer.read().decode() == ""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()
