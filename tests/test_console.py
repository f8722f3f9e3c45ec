"""The bar of what writes tokens: nothing for short waits, and nothing left behind. Streams of any encoding, or none."""

import io
import json
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
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


HOSTILE = "a\x1b]0;owned\x07b\x1b[2Jc\x9b31md\u202ee\x7f\rf\x08"
SPELLED = r"a\x1b]0;owned\x07b\x1b[2Jc\u009b31md\u202ee\u007f\rf\x08"
SAYS = """
import sys, warnings
from miaobi import console
console.mend_streams()
text = {text!r}
print(text)
for piece in text: print(piece, end="", flush=True)
print()
sys.stdout.writelines([text, "\\n"])
console.log("log [bold] :smile: " + text)
console.warn("warn " + text)
console.error("error " + text)
print("print " + text, file=sys.stderr)
warnings.warn(text)
with console.progress() as bar: bar.add_task("work")
raise ValueError(text)
"""


def in_terminal(*command: str) -> str:
    """What a terminal gets to see of a command, its own colours aside."""
    pexpect = pytest.importorskip("pexpect")
    child = pexpect.spawn(command[0], list(command[1:]), timeout=60, encoding="utf-8", dimensions=(50, 300))
    child.expect(pexpect.EOF)
    return re.sub(r"\x1b\[[0-9;?]*[mlhKGA]", "", child.before).replace("\r\n", "\n").replace("\r", "")


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_no_text_steers_a_terminal():
    seen = in_terminal(sys.executable, "-c", SAYS.format(text=HOSTILE))
    for line in (SPELLED, f"log [bold] :smile: {SPELLED}", f"warning: warn {SPELLED}", f"miaobi: error {SPELLED}",
                 f"print {SPELLED}"):  # fmt: skip
        assert line in seen.splitlines()
    assert seen.splitlines().count(SPELLED) == 3, "printed, in pieces, and by writelines"
    assert f"UserWarning: {SPELLED}" in seen
    assert f"ValueError: {SPELLED}" in seen
    assert "work" in seen, "a bar of our own is drawn"
    for steering in "\x1b\x07\x9b\u202e\x7f\x08":
        assert steering not in seen


def test_pipes_get_texts_as_they_are_and_logs_do_not_steer():
    done = subprocess.run([sys.executable, "-c", SAYS.format(text=HOSTILE)], capture_output=True)
    assert done.stdout.decode() == f"{HOSTILE}\n" * 3
    said = done.stderr.decode().splitlines()
    for line in (f"log [bold] :smile: {SPELLED}", f"warning: warn {SPELLED}", f"miaobi: error {SPELLED}"):
        assert line in said


@given(st.text(), st.integers(0))
def test_pieces_give_the_pieces_and_plain_text_stays(text, at):
    cut = at % (len(text) + 1)
    if text[cut - 1 : cut + 1] != "\r\n":
        assert console.shown(text) == console.shown(text[:cut]) + console.shown(text[cut:])
    for c in console.shown(text):
        assert c in "\t\n\r" or not (ord(c) < 32 or 127 <= ord(c) < 160)
    assert console.shown(console.shown(text)) == console.shown(text)


def test_writing_of_all_kinds_is_left_alone():
    for text in ("皇马 3:0\n\t巴萨", "👩‍👩‍👧 e\u0301 שלום", "Windows\r\nlines", r"\x1b as typed"):
        assert console.shown(text) == text


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
@pytest.mark.parametrize("reader", ["2>&1 >/dev/null | true", "2>/dev/full", "2>&-"])
def test_a_log_that_nobody_reads_costs_nothing(reader: str, tmp_path):
    program = tmp_path / "says.py"
    program.write_text("import time\nfrom miaobi import console\nconsole.mend_streams()\ntime.sleep(0.3)\n"
                       "for i in range(5):\n    console.log('x' * 9000); console.warn('y'); console.error('z')\n"
                       f"open({str(tmp_path / 'done')!r}, 'w').write('whole')\n")  # fmt: skip
    subprocess.run(["sh", "-c", f"{sys.executable} {program} {reader}"], check=False)
    assert (tmp_path / "done").read_text() == "whole"


def test_what_others_named_begins_no_line_of_its_own(capsys):
    """A file may be called `a\nwarning: all is well`."""
    for say in (console.warn, console.error):
        say("no such file: a\nmiaobi: done\r\n\x1b[2Jb\n")
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "a\\nmiaobi: done" in said
        assert "\x1b" not in said
