"""`miaobi chat`: a conversation in a terminal, or through a pipe."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from miaobi.config import RunConfig
from miaobi.console import error, warn_of_encoding
from miaobi.errors import UserError, number_of
from miaobi.generate.config import ChatConfig, ChatRequest
from miaobi.model.generation import SAMPLING
from miaobi.released import released
from miaobi.seeds import PRETRAINING
from miaobi.settings import Origin, find_config, load_config, read_yaml

if TYPE_CHECKING:  # torch is imported after the command line has been understood
    from miaobi.generate.chat import Chat
    from miaobi.generate.engine import LanguageModel

COMMANDS = {
    "/help": "this list",
    "/flush": "forget the conversation (also: flush)",
    "/retry": "another reply to the last message",
    "/system TEXT": "tell a model with roles how to behave; without TEXT no more",
    "/save FILE": "write the conversation: .jsonl as OpenAI messages, else as text",
    "/exit": "leave (also: exit, Ctrl-D)",
    "//TEXT": "a message that begins with /; other words behind a / are no commands and are sent as they are",
}
TAKE_TEXT = ("/system", "/save")  # the others are commands only when they stand alone
PROMPT = ">>>"


def configured(path: Path) -> tuple[RunConfig, ChatConfig]:
    """A configuration file, and the sampling settings that go with it.

    small-gpt's own chat.py draws at temperature 0.5, at most 100 tokens, from the seed and device of its YAML file.
    Raises UserError for a file that is not a configuration.
    """
    cfg, _ = load_config(path, [])
    if not PRETRAINING & read_yaml(path)[0].keys():
        return cfg, ChatConfig(device=cfg.train.device)
    return cfg, ChatConfig(max_new_tokens=100, temperature=0.5, top_p=1.0, repetition_penalty=1.0,
                           seed=cfg.train.seed, device=cfg.train.device)  # fmt: skip


def model_of(cfg: RunConfig) -> Path:
    """The MODEL that a configuration names: its `resume_from`, a .pth file of small-gpt's too, or else its run."""
    if cfg.train.resume_from is None:
        return Path(cfg.train.out_dir)
    path = Path(cfg.train.resume_from)
    if path.suffix not in (".pth", ".pt"):
        return path
    from miaobi.convert.small_gpt import converted

    return converted(path, corpus=cfg.data.data)


def chat(cfg: ChatRequest, origin: Origin, as_json: bool = False) -> dict[str, Any]:
    """`miaobi chat [MODEL|CONFIG.yaml]`; returns the messages.

    Settings that the command line does not give (`origin`) come with a CONFIG. Raises UserError.
    """
    run, settings = None, ChatConfig()
    if cfg.model.endswith((".yaml", ".yml")):
        run, settings = configured(find_config(cfg.model))
    flags = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(ChatConfig) if f.name in origin}
    settings = dataclasses.replace(settings, **flags)
    from miaobi.generate import engine
    from miaobi.generate.chat import Chat, model_settings

    chosen = {name for name in SAMPLING if getattr(settings, name) != getattr(ChatConfig, name)} | origin.keys()
    model = model_of(run) if run is not None else cfg.model or released("chat")[0]
    lm = engine.load(model, settings.device, settings.dtype, cfg.checkpoint)
    conversation = Chat(lm, model_settings(settings, lm.model.generation, chosen))
    failed = talk(conversation, silent=as_json)
    if failed and not as_json and not sys.stdin.isatty():
        raise UserError(f"{number_of(failed, 'line')} of the input got no answer; what was wrong stands above")
    more = {"failed": failed, "not_used": lm.model.not_used}
    return {"messages": conversation.messages} | {key: value for key, value in more.items() if value}


def about(lm: LanguageModel) -> str:
    """A line on the model that one talks with: parameters, and the step of a run's checkpoint."""
    what = f"{lm.model.cfg.family}, {lm.model.num_parameters() / 1e6:.1f}M parameters"
    step = re.fullmatch(r"step-(\d+)", lm.path.resolve().name) if lm.path is not None else None
    return f"{what}, step {int(step[1]):,}" if step else what


def talk(chat: Chat, silent: bool = False) -> int:
    """Read messages and commands until `exit` or the end of the input, and print the replies. Returns how many lines
    ended in an error, which is printed.

    silent: stdout is left to the caller. A person is talked with on stderr; to a pipe no reply is printed.
    In a terminal Ctrl-C stops a reply, clears a line, and the second time in a row leaves; in a pipe it raises
    KeyboardInterrupt as everywhere.
    """
    out = sys.stderr if silent else sys.stdout
    for_humans = sys.stdin.isatty() and out.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape", encoding=encoding_of_pipe(sys.stdin))  # for `readable`
    if not silent:
        warn_of_encoding()
    ask = line_reader(for_humans, out)
    if for_humans:
        print(f"{about(chat.lm)}; /help lists the commands, exit leaves", file=out)
    interrupted, failed = False, 0
    while True:
        try:
            line = ask()
            interrupted = False
            if not obey(chat, readable(line), out, silent and not for_humans):
                return failed
        except EOFError:
            if for_humans:
                print(file=out)
            return failed
        except KeyboardInterrupt:
            if not for_humans:
                raise
            if interrupted:
                return failed
            interrupted = True
            print("(Ctrl-C again leaves, so do Ctrl-D and exit)", file=out)
        except UserError as e:  # the conversation goes on
            error(e)
            failed += 1


def obey(chat: Chat, line: str, out: TextIO, silent: bool) -> bool:
    """Do what one line says, a message or a command, on `out`, without replies where `silent`; False to leave.

    Only a known command is one: a path, a fraction or a slip of the pen behind a / is a message as any other.
    """
    command, _, rest = line.strip().partition(" ")
    if command in ("flush", "exit") and not rest:
        command = f"/{command}"
    known = {name.split()[0] for name in COMMANDS} - {"//TEXT"}
    if command not in known or (rest.strip() and command not in TAKE_TEXT):
        say(chat.reply(line.replace("//", "/", 1) if line.lstrip().startswith("//") else line), out, silent)
        close = [] if command.startswith("//") else difflib.get_close_matches(command.lower(), known, n=1, cutoff=0.75)
        if out.isatty() and close:
            why = "takes no text and was sent as a message; alone it is the command"
            if command not in known:
                why = f"is no command and was sent as a message. Did you mean {close[0]}?"
            print(f"miaobi: {command} {why}", file=sys.stderr)
    elif command == "/exit":
        return False
    elif command == "/flush":
        chat.flush()
    elif command == "/retry":
        if not chat.messages or chat.messages[-1]["role"] == "system":
            raise UserError("/retry: there is no reply yet that could be tried again; say something first")
        say(chat.retry(), out, silent)
    elif command == "/system":
        chat.system(rest.strip())
    elif command == "/save":
        if not rest.strip():
            raise UserError("/save needs a file name, such as: /save chat.jsonl")
        chat.save(Path(rest.strip()).expanduser())
    elif command == "/help":
        print("\n".join(f"  {name:<14}{what}" for name, what in COMMANDS.items()), file=out)
    return True


def say(pieces: Iterator[str], out: TextIO, silent: bool) -> None:
    """Print a reply as it is written, on a line of its own; in a terminal Ctrl-C stops it."""
    printed = False
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                printed = True
                if not silent:
                    print(piece, end="", flush=True, file=out)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    finally:
        if printed and not silent:
            print(flush=True, file=out)


def line_reader(for_humans: bool, out: TextIO) -> Callable[[], str]:
    """A function that reads a line and raises EOFError at the end of the input.

    Lines are edited, and remembered from one session to the next, in a terminal that can do that.
    """
    if for_humans and os.environ.get("TERM") != "dumb":
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        session = PromptSession(history=line_history(), output=create_output(out))
        return lambda: session.prompt(PROMPT)

    def read() -> str:
        if for_humans:
            print(PROMPT, end="", flush=True, file=out)
        if not (line := sys.stdin.readline()):
            raise EOFError
        return line.rstrip("\r\n")

    return read


def line_history():
    """What was typed in earlier sessions, in a file that only the user can read; in memory where that is refused."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            super().store_string(string.encode("utf-8", "replace").decode())  # bytes that were no UTF-8

    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    file = Path(state).expanduser() / "miaobi" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError:
        return InMemoryHistory()
    return History(str(file))


def encoding_of_pipe(stream: io.TextIOWrapper) -> str | None:
    """The encoding of what a pipe or a file begins with, as `prepare` finds it; None where it is the stream's own, a
    terminal is typed at, or the beginning is of no single one.
    """
    if stream.isatty() or not isinstance(stream.buffer, io.BufferedReader):
        return None
    from miaobi.corpus.encodings import detect

    head = stream.buffer.peek()
    if b"\0" not in head and not head.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        with contextlib.suppress(UnicodeDecodeError, LookupError):
            codecs.getincrementaldecoder(stream.encoding)().decode(head)
            return None
    name, mark = detect(head, is_whole=False) or ("", 0)
    name = name.removesuffix("-le").removesuffix("-be") if mark else name  # these know the mark
    with contextlib.suppress(UnicodeDecodeError, LookupError):
        codecs.getincrementaldecoder(name)().decode(head)
        return name
    return None


def readable(line: str) -> str:
    """`line`; where bytes of it did not fit the input's encoding (lone surrogates stand for them), in the one that they
    are in.

    Raises UserError for what is no text.
    """
    try:
        line.encode("utf-8")
        return line
    except UnicodeEncodeError:
        from miaobi.corpus.encodings import detect
    with contextlib.suppress(UnicodeError):
        data = line.encode(sys.stdin.encoding or "utf-8", "surrogateescape")
        return data.decode((detect(data) or ("utf-8", 0))[0])
    raise UserError("this line is neither UTF-8, GB18030 nor Big5; set the terminal to UTF-8 and type it again")
