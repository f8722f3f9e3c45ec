"""`miaobi chat` as a person, a pipe and a poor terminal meet it: pseudo-terminals, real signals, real bytes."""

import fcntl
import io
import json
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests import processes
from tests.processes import Process

from miaobi.console import TerminalStream, shown
from miaobi.errors import UserError
from miaobi.generate import terminal
from miaobi.generate.config import ChatConfig

pexpect = pytest.importorskip("pexpect", reason="no pseudo-terminals here")
from pexpect.fdpexpect import fdspawn  # noqa: E402

pyte = pytest.importorskip("pyte")

EXACT = ["--temperature=0", "--top_p=1", "--repetition_penalty=1", "--device=cpu", "--max_new_tokens=20"]


class Screen:
    """`miaobi chat` in a pseudo-terminal, and what a person sees of it."""

    def __init__(self, *args: object, stdout: Path | None = None, **environment: str) -> None:
        """stdout: a file for it, where that is not the terminal too."""
        self.terminal = pyte.Screen(100, 60)
        self.stream = pyte.ByteStream(self.terminal)
        ours, self.theirs = os.openpty()
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 60, 100, 0, 0))
        tty = Path(os.ttyname(self.theirs))
        env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))} | environment
        self.process = Process(["-m", "miaobi", "chat", *args], env=env, stdin=tty, stdout=stdout or tty, stderr=tty)
        self.child = fdspawn(ours, timeout=240)

    @property
    def lines(self) -> list[str]:
        """The lines on the screen, without the spaces after wide characters and at the end."""
        return [line.rstrip() for line in self.terminal.display if line.strip()]

    def until(self, seen) -> list[str]:
        """Read the terminal until `seen(lines)`; the lines then."""
        while not seen(self.lines):
            data = self.child.read_nonblocking(1 << 16, timeout=240)
            self.stream.feed(data)
            if b"\x1b[6n" in data:  # where is the cursor? a real terminal answers
                self.child.send(f"\x1b[{self.terminal.cursor.y + 1};{self.terminal.cursor.x + 1}R")
        return self.lines

    def ready(self) -> list[str]:
        """Wait for an empty prompt on the last line."""
        return self.until(lambda lines: lines and lines[-1] == ">>>")

    def say(self, text: str) -> list[str]:
        """Type a line, wait for the next prompt; the lines in between."""
        before = len(self.ready())
        self.child.send(text + "\r")
        return self.until(lambda lines: len(lines) > before and lines[-1] == ">>>")[before:-1]

    def leave(self, keys: str) -> int:
        """Type what ends the session, wait for its end and all that was written; its exit code."""
        self.until(lambda lines: lines and lines[-1].endswith(">>>"))
        self.child.send(keys)
        code = self.process.wait().returncode
        os.close(self.theirs)
        self.child.expect(pexpect.EOF)
        return code


def test_a_conversation_in_a_terminal(talker, tmp_path):
    screen = Screen(talker, *EXACT, TERM="xterm", LANG="C.UTF-8", XDG_STATE_HOME=str(tmp_path))
    assert screen.say("你好") == ["你好呀"]
    assert screen.say("我叫小明") == ["幸会"]
    assert screen.say("我叫什么") == ["你叫小明"]
    assert screen.say("") == []
    assert screen.say("/retry") == ["你叫小明"]
    assert screen.say("flush") == []
    assert screen.say("我叫什么") == ["我不知道"]
    assert screen.say("/flsh")[-1] == "miaobi: /flsh is no command and was sent as a message. Did you mean /flush?"
    assert "/flush takes no text and was sent as a message; alone it is" in screen.say("/flush it")[-1]
    assert len(screen.say("/srv/me/a.txt")) == 1, "a path is a message"
    assert screen.say("flush") == []
    assert screen.say("我叫什么") == ["我不知道"]
    assert "no system message" in "".join(screen.say("/system 你是猫"))
    assert "/retry" in "".join(screen.say("/help"))
    assert screen.say(f"/save {tmp_path / 'talk.jsonl'}") == []
    saved = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))["messages"]
    assert [m["content"] for m in saved] == ["我叫什么", "我不知道"]
    assert screen.say("\x1b[A\x1b[A\x1b[A\x1b[A") == ["我不知道"], "the line typed four lines ago, by cursor keys"
    screen.ready()
    screen.child.send("不想说了\x03")
    screen.until(lambda lines: "Ctrl-C again leaves" in "".join(lines[-2:]) and lines[-1] == ">>>")
    assert screen.say("再见") == ["下次再聊"]
    assert screen.leave("exit\r") == 0
    history = tmp_path / "miaobi" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "+我叫小明\n" in history.read_text(encoding="utf-8")


def test_ctrl_c_stops_a_reply_and_keeps_what_was_said(talker, tmp_path):
    screen = Screen(talker, *EXACT[:-1], "--max_new_tokens=1000000", TERM="xterm", XDG_STATE_HOME=str(tmp_path))
    screen.ready()
    screen.child.send("数数\r")
    screen.until(lambda lines: "九十一二三" in "".join(lines))
    screen.child.send("\x03")
    screen.ready()
    assert screen.say(f"/save {tmp_path / 'talk.jsonl'}") == []
    (_, told) = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))["messages"]
    assert told["content"].startswith("一二三四五六七八九十一二三")
    assert screen.say("你好") == ["你好呀"]
    screen.ready()
    screen.child.send("\x03")
    screen.until(lambda lines: "Ctrl-C again leaves" in "".join(lines[-2:]) and lines[-1] == ">>>")
    assert screen.leave("\x03") == 0


@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_json_of_a_conversation_in_a_terminal_goes_elsewhere_alone(talker, tmp_path, kind):
    (tmp_path / "out.json").touch()
    screen = Screen(talker, "--json", *EXACT, stdout=tmp_path / "out.json", TERM=kind, LANG="C.UTF-8",
                    XDG_STATE_HOME=str(tmp_path))  # fmt: skip
    assert screen.say("你好")[-1] == "你好呀"
    assert "/retry" in "".join(screen.say("/help"))
    screen.ready()
    screen.child.send("\x03")
    screen.until(lambda lines: "Ctrl-C again leaves" in "".join(lines[-2:]) and lines[-1].endswith(">>>"))
    assert screen.leave("exit\r") == 0
    said = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["messages"]
    assert [m["content"] for m in said] == ["你好", "你好呀"]


def test_a_dumb_terminal_without_colour(talker):
    screen = Screen(talker, *EXACT, TERM="dumb", NO_COLOR="1", LANG="C.UTF-8")
    screen.ready()
    screen.child.send("你好\n")
    assert screen.until(lambda lines: "你好呀" in lines)
    screen.ready()
    screen.child.send("/flsh\n")
    screen.until(lambda lines: "no command" in "".join(lines))
    assert screen.leave("\x04") == 0
    assert b"\x1b" not in (screen.child.before or b"")


def piped(lines: bytes, *args: object, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONIOENCODING"))} | environment
    return subprocess.run([sys.executable, "-m", "miaobi", "chat", *map(str, args)], input=lines, capture_output=True,
                          env=env, check=False)  # fmt: skip


def test_through_a_pipe_only_replies_are_printed(talker):
    command = ["-m", "miaobi", "chat", talker, *EXACT]
    done = processes.run(command, input="你好\nflush\n\n你是谁\nexit\n再见\n")
    assert (done.returncode, done.stdout) == (0, "你好呀\n我叫妙笔\n"), done.stderr
    assert not done.stderr


def test_a_closed_standard_input_is_the_end_of_the_input(talker):
    command = ["sh", "-c", f"{sys.executable} -m miaobi chat {talker} --device=cpu <&-"]
    done = subprocess.run(command, check=False, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030", "big5", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_pipe_is_decoded_as_a_file_is(encoding, monkeypatch):
    """As `prepare` and `classify predict` read it; the first lines show what it is."""
    text = "你好\n你是誰\n我們去公園\n" if encoding == "big5" else "你好\n你是谁\n我们去公园\n"
    for lines in (text, text[:3]):
        stream = io.TextIOWrapper(io.BufferedReader(io.BytesIO(lines.encode(encoding))), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stream)
        heard = []
        monkeypatch.setattr(terminal, "obey", lambda chat, line, out, silent, heard=heard: heard.append(line) or True)
        terminal.talk(None, silent=True)
        assert heard == lines.splitlines()


def test_what_only_later_lines_show_is_decoded_line_by_line(monkeypatch):
    lines = [b"hello", "你好".encode(), "你是谁".encode("gb18030"), "我們去公園玩".encode("big5")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert [terminal.readable(line.decode("utf-8", "surrogateescape")) for line in lines] == [
        "hello", "你好", "你是谁", "我們去公園玩"]  # fmt: skip


def test_an_ascii_terminal_and_bytes_of_another_encoding(talker):
    lines = "你好\n".encode() + "你是谁\n".encode("gb18030") + b"\xff\xff\n" + "再见\n".encode()
    done = piped(lines, talker, *EXACT, LANG="C", PYTHONIOENCODING="ascii", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert (done.returncode, done.stdout) == (2, b"???\n????\n????\n")
    err = done.stderr.decode("ascii")
    assert err.count("set PYTHONIOENCODING=utf-8") == 1
    assert err.count("neither UTF-8, GB18030 nor Big5") == 1
    assert "Traceback" not in err


# --- inside this process -------------------------------------------------------------------------------------------


@pytest.fixture
def typed(monkeypatch):
    """`typed("你好", "exit")`: what standard input will give."""

    def lines(*texts: str) -> None:
        data = io.BytesIO("".join(f"{text}\n" for text in texts).encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data, encoding="utf-8"))

    return lines


def test_json_gives_the_conversation_and_nothing_else(miaobi, typed, talker):
    typed("你好", "/help", "再见", "exit")
    answer = miaobi("chat", talker, *EXACT, "--json")
    assert answer.code == 0
    assert answer.err == "".join(f"  {name:<14}{what}\n" for name, what in terminal.COMMANDS.items())
    contents = [m["content"] for m in json.loads(answer.out)["messages"]]
    assert contents == ["你好", "你好呀", "再见", "下次再聊"]


def test_the_end_of_the_input_leaves(miaobi, typed, talker):
    typed("你好")
    assert miaobi("chat", f"--out_dir={talker}", *EXACT)[:2] == (0, "你好呀\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [("/srv/me/a.txt", "/srv/me/a.txt"), ("/etc", "/etc"), ("/exot", "/exot"), ("/help me", "/help me"), ("/", "/"),
     ("//exit", "/exit"), ("//", "/"), ("//srv/x", "/srv/x"), ("1/2", "1/2"), ("flush it", "flush it"),
     ("/exit now", "/exit now"), ("  /tmp", "  /tmp")],
)  # fmt: skip
def test_what_is_no_command_is_a_message(miaobi, typed, talker, monkeypatch, line, message):
    from miaobi.generate.chat import Chat

    said = []
    monkeypatch.setattr(Chat, "reply", lambda self, text: iter_closing([said.append(text) or "好"]))
    typed(line, "exit")
    assert miaobi("chat", talker, *EXACT) == (0, "好\n", "")
    assert said == [message]


@pytest.mark.parametrize(
    ("line", "words"),
    [("/retry", "say something first"), ("/save", "needs a file name"),
     ("/save /nowhere/at/all.txt", "cannot be written")],
)  # fmt: skip
def test_a_mistaken_command_is_told_and_the_conversation_goes_on(miaobi, typed, talker, line, words):
    typed(line, "你好")
    answer = miaobi("chat", talker, *EXACT)
    assert (answer.code, answer.out) == (2, "你好呀\n")
    assert words in answer.err
    assert answer.err.startswith("miaobi: ")
    assert answer.err.endswith("miaobi: 1 line of the input got no answer; what was wrong stands above\n")


@pytest.mark.parametrize(("line", "meant"), [("/EXIT", "/exit"), ("/Flush", "/flush"), ("/exot", "/exit"),
                                             ("/opt/me", ""), ("//EXIT", ""), ("1/2", "")])  # fmt: skip
def test_a_person_hears_which_command_was_meant(line, meant, capsys):
    """Whatever its case: a message all the same."""
    said = []
    screen = SimpleNamespace(isatty=lambda: True, write=said.append, flush=lambda: None)
    chat = SimpleNamespace(reply=lambda text: iter_closing([said.append(text) or "好"]))
    assert terminal.obey(chat, line, screen, silent=True)
    assert said[0] == line.replace("//", "/")
    told = capsys.readouterr().err
    assert (f"Did you mean {meant}?" in told) if meant else not told


def test_there_is_no_reply_to_retry_after_a_system_message_alone():
    chat = SimpleNamespace(messages=[{"role": "system", "content": "你是猫"}])
    with pytest.raises(UserError, match="no reply yet"):
        terminal.obey(chat, "/retry", sys.stdout, silent=False)


def iter_closing(pieces):
    yield from pieces


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_terminal_does_not_obey_a_reply_however_its_pieces_are_cut(size):
    """Newline, tab and all that can be read stay; a pipe gets the bytes as they are."""
    evil = "好\x1b]0;title\x07\x9b31m\x1b[2Jend\x00\x7f\n\t妙笔😀"
    pieces = [evil[i : i + size] for i in range(0, len(evil), size)]
    there, elsewhere = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    terminal.say(iter_closing(pieces), TerminalStream(there), silent=False)
    terminal.say(iter_closing(pieces), elsewhere, silent=False)
    written = there.buffer.getvalue().decode()
    assert written == shown(evil) + "\n"
    assert not any((c < " " and c not in "\n\t") or "\x7f" <= c < "\xa0" for c in written)
    assert elsewhere.buffer.getvalue().decode() == evil + "\n"


def test_a_chat_begins_with_the_size_and_the_step_of_its_model(talker, trained, tmp_path):
    from miaobi.generate.engine import load

    lm = load(talker, "cpu")
    assert terminal.about(lm) == f"qwen3, {lm.model.num_parameters() / 1e6:.1f}M parameters, step 240"
    lm.path = tmp_path
    assert "step" not in terminal.about(lm)


def test_a_model_of_plain_text_is_refused(miaobi, trained):
    answer = miaobi("chat", trained("gpt2", "char"))
    assert answer.code == 2
    assert "no chat template" in answer.err


def test_ctrl_c_in_a_pipe_ends_the_command(miaobi, typed, talker, monkeypatch):
    from miaobi.generate.chat import Chat

    def interrupted(self, text):
        yield "你"
        raise KeyboardInterrupt

    monkeypatch.setattr(Chat, "reply", interrupted)
    typed("你好", "再见")
    answer = miaobi("chat", talker, *EXACT)
    assert (answer.code, answer.out) == (130, "你\n")


# --- configurations ------------------------------------------------------------------------------------------------

SMALL_GPT_YAML = """\
data_path: data/train.txt
train_percent: 0.8
block_size: 256
vocab_size: 7587
bias: True
compile: True
max_epoch : 1919810
tensorboard_path :  ./tensorboard
device: cuda
train_batch: 24
lr : 2e-4
decay_steps: 100000
checkpoint_root: {root}
save_freq: 4000 # save when global_step % save_freq == 0
resume_from: {resume}
seed :  114514
"""


@pytest.fixture
def opened(miaobi, typed, monkeypatch):
    """`opened("chat.yaml", ...)`: the settings of the chat that a command line opens."""

    def settings(*args: object) -> ChatConfig:
        chats = []
        monkeypatch.setattr(terminal, "talk", lambda chat, silent: chats.append(chat))
        answer = miaobi("chat", *args)
        assert answer.code == 0, answer.err
        return chats[0].cfg

    return settings


def test_small_gpts_own_file_opens_its_model_with_its_defaults(opened, talker, tmp_path):
    config = tmp_path / "chat300M.yaml"
    config.write_text(SMALL_GPT_YAML.format(root="none", resume=talker), encoding="utf-8")
    cfg = opened(config)
    assert (cfg.temperature, cfg.max_new_tokens, cfg.top_k, cfg.top_p, cfg.repetition_penalty) == (0.5, 100, 0, 1, 1)
    assert (cfg.seed, cfg.device) == (114514, "cuda")
    changed = opened(config, "--temperature=0.9", "--max_new_tokens=7", "--device=cpu")
    assert (changed.temperature, changed.max_new_tokens, changed.device) == (0.9, 7, "cpu")


def test_without_resume_from_the_run_of_the_file_is_opened(opened, talker, tmp_path):
    config = tmp_path / "chat.yaml"
    config.write_text(f"out_dir: {talker}\n", encoding="utf-8")
    assert opened(config) == ChatConfig(), "our own files keep our own defaults"
    config.write_text(SMALL_GPT_YAML.format(root=talker, resume="null"), encoding="utf-8")
    assert opened(config).temperature == 0.5


def test_a_pth_file_is_converted_with_the_corpus_of_the_configuration(opened, talker, tmp_path, monkeypatch):
    import types

    asked = []

    def converted(path: Path, corpus: str | None) -> Path:
        asked.append((path, corpus))
        return talker

    monkeypatch.setitem(sys.modules, "miaobi.convert.small_gpt", types.SimpleNamespace(converted=converted))
    config = tmp_path / "chat300M.yaml"
    config.write_text(SMALL_GPT_YAML.format(root="none", resume="checkpoints/cpt300M.pth"), encoding="utf-8")
    opened(config)
    assert asked == [(Path("checkpoints/cpt300M.pth"), "data/train.txt")]


def test_a_missing_configuration_is_told(miaobi, tmp_path):
    answer = miaobi("chat", tmp_path / "none.yaml")
    assert answer.code == 2
    assert "no configuration file" in answer.err


def test_the_command_line_is_understood_before_torch_is_imported():
    code = ("import sys; from miaobi import cli\ntry: cli.main(['chat', '--help'])\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'tensorboard', 'prompt_toolkit', 'jinja2'} & set(sys.modules)\n"
            "assert not heavy, heavy")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--repetition_penalty" in done.stdout
