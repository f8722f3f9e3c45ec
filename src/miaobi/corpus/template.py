"""Chat templates: messages -> token ids, the ones that transformers' `apply_chat_template` gives.

A template is Jinja source in the model directory. It is rendered in a sandbox, and what a user typed never becomes a
control token: control strings inside a message are broken up before rendering and mended after it.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import tokenizers

from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

Messages = list[dict[str, str]]
"""[{"role": "user", "content": "你好"}, ...]"""
ROLES = ("system", "user", "assistant")
SEP_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ raise_exception('a chit-chat model has two speakers alike and no system message') }}"
    "{% endif %}"
    "{{ message['content'] }}"
    "{{ '<pad>' if loop.last and not add_generation_prompt else '<sep>' }}"
    "{% endfor %}"
)
"""small-gpt's: both speakers alike, `<sep>` between turns, `<pad>` at the end of a dialogue."""
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Unicode noncharacters, which no text contains: they travel through the template inside the messages.
BREAK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token")
_NONCHARACTER = re.compile("[\ufdd0-\ufdef]")


@dataclass(frozen=True)
class Rendered:
    """A dialogue in tokens."""

    ids: list[int]
    is_reply: np.ndarray
    """(len(ids),) bool: the assistant's replies, each with the control token that ends it."""
    turns: list[int]
    """Where each message begins in ids, with what the template puts in front of it."""


class ChatTemplate:
    """A template and the tokenizer whose control tokens it writes."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """Raises UserError when `source` is not a Jinja template."""
        self._template = _compile(source)
        settings = json.loads(tokenizer.backend.to_str())
        added = settings["added_tokens"]
        self._control = {token["content"]: token["id"] for token in added}
        self._stripping = {t["content"]: (t["lstrip"], t["rstrip"]) for t in added}
        names = sorted(self._control, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._parsing = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())  # knows control tokens, as HF's does
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(settings | {"added_tokens": [], "post_processor": None}))
        self._values = {role: _content(tokenizer.config[role]) for role in _NAMED if tokenizer.config.get(role)}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template that a model directory brings. Raises UserError when it has none."""
        source = tokenizer.config.get("chat_template")
        if isinstance(source, list):  # several named ones, as some hub models have
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not source:
            raise UserError(
                "this model has no chat template, so it cannot be talked to. A model trained on dialogues "
                "(miaobi prepare --format=dialogue) has one; a model of plain text continues text: miaobi sample"
            )
        return cls(str(source), tokenizer)

    def encode(self, messages: Messages, add_generation_prompt: bool = False) -> list[int]:
        """Ids of a dialogue; with `add_generation_prompt` up to where the assistant begins to speak.

        Raises UserError when the template refuses the messages.
        """
        text = self._text([{**m, "content": self._guarded(m["content"])} for m in messages], add_generation_prompt)
        return self._tokens(text)[0]

    def render(self, messages: Messages) -> Rendered:
        """A whole dialogue for training. Raises UserError when the template refuses the messages."""
        marked = self._text([{**m, "content": _marked(self._guarded(m["content"]))} for m in messages], False)
        opens, closes, parts, length = [], [], [], 0
        for part in re.split(f"([{OPEN}{CLOSE}])", marked):
            if part == OPEN:
                opens.append(length)
            elif part == CLOSE:
                closes.append(length)
            else:
                parts.append(part)
                length += len(part) - part.count(BREAK)
        if not len(opens) == len(closes) == len(messages):
            raise UserError("the chat template leaves messages out or repeats them; it cannot be trained on")
        ids, starts, is_control = self._tokens("".join(parts))
        is_reply, turns = np.zeros(len(ids), bool), [0]
        for i, message in enumerate(messages):
            first, after = np.searchsorted(starts, (opens[i], closes[i]))
            following = int(np.searchsorted(starts, opens[i + 1])) if i + 1 < len(messages) else len(ids)
            controls = np.flatnonzero(is_control[after:following])
            end = after + int(controls[0]) + 1 if len(controls) else int(after)
            if message["role"] == "assistant":
                is_reply[first:end] = True
            if i + 1 < len(messages):
                text, ends = "".join(parts).replace(BREAK, ""), np.append(starts[1:], length)
                while end < following and not is_control[end] and text[starts[end] : ends[end]].isspace():
                    end += 1  # ChatML's newline belongs to the turn that it ends
                turns.append(end)
        return Rendered(ids, is_reply, turns)

    def _text(self, messages: Messages, add_generation_prompt: bool) -> str:
        import jinja2

        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._values,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as e:
            raise UserError(
                f"the chat template fails to render this dialogue: {e}. Check the order of the roles, or replace "
                "chat_template.jinja in the model directory"
            ) from e

    def _guarded(self, content: str) -> str:
        """`content` with its control strings broken up."""
        if found := _NONCHARACTER.search(content):
            raise UserError(f"a message contains U+{ord(found[0]):04X}, which is not a character; remove it")
        while self._names.search(content):
            content = self._names.sub(lambda m: m[0][0] + BREAK + m[0][1:], content)
        return content

    def _tokens(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        """ids; where each begins in the text without BREAKs; whether it is a control token."""
        if BREAK not in text:
            found = self._parsing.encode(text, add_special_tokens=False)
            starts = np.fromiter((start for start, _ in found.offsets), np.int64, len(found.ids))
            control = set(self._control.values())
            names = [id_ in control and self._names.fullmatch(text[a:b].strip()) is not None
                     for id_, (a, b) in zip(found.ids, found.offsets, strict=True)]  # fmt: skip
            return found.ids, starts, np.array(names, bool)
        ids, starts, is_control, position = [], [], [], 0
        pieces = self._pieces(text)
        for piece, control in pieces:
            if control is not None:
                ids.append(control)
                starts.append(position)
                is_control.append(True)
            else:
                piece = piece.replace(BREAK, "")
                found = self._plain.encode(piece, add_special_tokens=False)
                ids += found.ids
                starts += [position + start for start, _ in found.offsets]
                is_control += [False] * len(found.ids)
            position += len(piece)
        return ids, np.array(starts, np.int64), np.array(is_control, bool)

    def _pieces(self, text: str) -> list[tuple[str, int | None]]:
        """Stretches of text, and control tokens with their ids; the white space a control token swallows is its."""
        pieces: list[tuple[str, int | None]] = []
        position = 0
        for match in self._names.finditer(text):
            start, end = match.span()
            left, right = self._stripping[match[0]]
            while left and start > position and text[start - 1].isspace():
                start -= 1
            while right and end < len(text) and text[end].isspace():
                end += 1
            if start > position:
                pieces.append((text[position:start], None))
            pieces.append((text[start:end], self._control[match[0]]))
            position = end
        if position < len(text):
            pieces.append((text[position:], None))
        return pieces


def _content(token: str | dict) -> str:
    """A token as tokenizer_config.json names it, in either of its two ways."""
    return token["content"] if isinstance(token, dict) else token


def _marked(content: str) -> str:
    """`content` between marks, outside of which is the white space that templates trim."""
    core = content.strip()
    before, after = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
    return f"{before}{OPEN}{core}{CLOSE}{after}" if core else f"{OPEN}{content}{CLOSE}"


@functools.lru_cache(maxsize=8)
def _compile(source: str):
    """As transformers compiles a template: sandboxed, blocks trimmed."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which only marks the assistant's words."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own spelling

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as e:
        raise UserError(f"the chat template is not valid Jinja ({e}); replace chat_template.jinja") from e
