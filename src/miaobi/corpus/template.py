"""Chat templates: messages -> token ids, the ones that transformers' `apply_chat_template` gives.

A template is Jinja source in the model directory. It is rendered in a sandbox, and what a user typed never becomes a
control token: control strings inside a message are broken up before rendering and mended after it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
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
BREAK, OPEN, CLOSE, REPLY = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
NONCHARACTER = re.compile("[\ufdd0-\ufdef]")
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


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
        added = [token for token in settings["added_tokens"] if len(token["content"]) > 1]
        letters = [token for token in settings["added_tokens"] if len(token["content"]) == 1]  # no control strings
        self._control = {token["content"]: token["id"] for token in added}
        self._stripping = {t["content"]: (t["lstrip"], t["rstrip"]) for t in added}
        self._names = _any_of(self._control)
        self._special = _any_of(token["content"] for token in added if token["special"])
        self._tails = {name[i:] for name in self._control for i in range(1, len(name))}
        self._heads = {name[:i] for name in self._control for i in range(1, len(name))}
        self._longest = max(map(len, self._control), default=0)
        self._all_names = "\0".join(self._control)
        self._parsing = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())  # knows control tokens, as HF's does
        plain = settings | {"added_tokens": letters, "post_processor": None}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self._values = {role: _content(tokenizer.config[role]) for role in _NAMED if tokenizer.config.get(role)}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template that a model directory brings. Raises UserError when it has none."""
        source = source_of(tokenizer)
        if source is None:
            raise UserError(
                "this model has no chat template, so it cannot be talked to. A model trained on dialogues "
                "(miaobi prepare --format=dialogue) has one; a model of plain text continues text: miaobi sample"
            )
        return cls(source, tokenizer)

    def encode(self, messages: Messages, add_generation_prompt: bool = False) -> list[int]:
        """Ids of a dialogue; with `add_generation_prompt` up to where the assistant begins to speak.

        Raises UserError when the template refuses the messages.
        """
        text = self._text([{**m, "content": self._guarded(m)} for m in messages], add_generation_prompt)
        return self._tokens(text)[0]

    def render(self, messages: Messages) -> Rendered:
        """A whole dialogue for training. Raises UserError when the template refuses the messages."""
        marks = [REPLY if m["role"] == "assistant" else OPEN for m in messages]
        contents = [_marked(self._guarded(m), mark) for m, mark in zip(messages, marks, strict=True)]
        marked = self._text([{**m, "content": c} for m, c in zip(messages, contents, strict=True)], False)
        found, opens, closes, parts, length = [], [], [], [], 0
        for part in re.split(f"([{OPEN}{CLOSE}{REPLY}])", marked):
            if part == CLOSE:
                closes.append(length)
            elif part in (OPEN, REPLY):
                found.append(part)
                opens.append(length)
            else:
                parts.append(part)
                length += len(part) - part.count(BREAK)
        if not (found == marks and len(closes) == len(messages)):
            raise UserError(
                "the chat template leaves messages out, repeats them or changes their order; it cannot be trained on"
            )
        text = "".join(parts)
        ids, starts, ends, is_control = self._tokens(text)
        text = text.replace(BREAK, "")
        is_reply, turns = np.zeros(len(ids), bool), [0]
        for i, mark in enumerate(marks):
            first = np.searchsorted(ends, opens[i], side="right")  # the token may begin with the template's blank
            after = np.searchsorted(starts, closes[i])
            following = int(np.searchsorted(starts, opens[i + 1])) if i + 1 < len(messages) else len(ids)
            controls = np.flatnonzero(is_control[after:following])
            end = after + int(controls[0]) + 1 if len(controls) else int(after)
            if mark == REPLY:
                is_reply[first:end] = True
            if i + 1 < len(messages):
                while end < following and not is_control[end] and text[starts[end] : ends[end]].isspace():
                    end += 1  # ChatML's newline belongs to the turn that it ends
                turns.append(end)
        return Rendered(ids, is_reply, turns)

    def _text(self, messages: Messages, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._values,
            )
        except Exception as e:  # a template is a program of its own and may fail in any way
            raise UserError(
                f"the chat template fails to render this dialogue: {e}. Check the order of the roles, or replace "
                "chat_template.jinja in the model directory"
            ) from e

    def _guarded(self, message: dict[str, str]) -> str:
        """The message's content with its control strings broken up.

        The model's own words may hold tokens that are not special, such as `<think>`.
        """
        content = message["content"]
        if found := NONCHARACTER.search(content):
            raise UserError(f"a message contains U+{ord(found[0]):04X}, which is not a character; remove it")
        names = self._special if message["role"] == "assistant" else self._names
        while names.search(content):
            content = names.sub(lambda m: m[0][0] + BREAK + m[0][1:], content)
        return self._fenced(content)

    def _fenced(self, content: str) -> str:
        """`content`, apart from template text with which it would make a control string."""
        core = content.strip()
        shortest = range(1, min(self._longest, len(core) + 1))
        inside = 0 < len(core) < self._longest and core in self._all_names
        before = BREAK if inside or any(core[:n] in self._tails for n in shortest) else ""
        after = BREAK if inside or any(core[-n:] in self._heads for n in shortest) else ""
        return content.replace(core, before + core + after, 1) if before or after else content

    def _tokens(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
        """ids; where each begins and ends in the text without BREAKs; whether it is a control token."""
        if BREAK not in text:
            found = self._parsing.encode(text, add_special_tokens=False)
            control = set(self._control.values())
            spans = np.array(found.offsets, np.int64).reshape(-1, 2)
            names = [id_ in control and self._names.fullmatch(text[a:b].strip()) is not None
                     for id_, (a, b) in zip(found.ids, found.offsets, strict=True)]  # fmt: skip
            return found.ids, spans[:, 0], spans[:, 1], np.array(names, bool)
        ids, spans, is_control, position = [], [], [], 0
        for piece, control in self._pieces(text):
            if control is not None:
                ids.append(control)
                spans.append((position, position + len(piece)))
                is_control.append(True)
            else:
                piece = piece.replace(BREAK, "")
                found = self._plain.encode(piece, add_special_tokens=False)
                ids += found.ids
                spans += [(position + start, position + end) for start, end in found.offsets]
                is_control += [False] * len(found.ids)
            position += len(piece)
        places = np.array(spans, np.int64).reshape(-1, 2)
        return ids, places[:, 0], places[:, 1], np.array(is_control, bool)

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


def source_of(tokenizer: Tokenizer) -> str | None:
    """Jinja source of the tokenizer's own template; of several named ones, as some hub models have, the default."""
    source = tokenizer.config.get("chat_template")
    if isinstance(source, list):
        source = next((e.get("template") for e in source if isinstance(e, dict) and e.get("name") == "default"), None)
    return source if isinstance(source, str) and source else None


def _content(token: str | dict) -> str:
    """A token as tokenizer_config.json names it, in either of its two ways."""
    return token.get("content", "") if isinstance(token, dict) else token


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of `names`."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def _marked(content: str, mark: str) -> str:
    """`content` between `mark` and CLOSE, outside of which is the white space that templates trim."""
    core = content.strip()
    if not core:
        return mark + CLOSE + content
    before, after = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
    return f"{before}{mark}{core}{CLOSE}{after}"


def _tojson(value: object, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:  # as HF's
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as e:
        raise UserError(f"the chat template is not valid Jinja ({e}); replace chat_template.jinja") from e
