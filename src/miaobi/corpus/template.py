"""Chat templates: messages -> token ids, the ones that transformers' `apply_chat_template` gives.

A template is Jinja source in the model directory. It is rendered in a sandbox with bounds, and what a user typed never
becomes a control token: control strings inside a message are broken up before rendering and restored after it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tokenizers

from miaobi.corpus import rendering
from miaobi.corpus.foreign import without_panic
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

Messages = list[dict[str, Any]]
"""[{"role": "user", "content": "你好"}, ...]; `messages.messages_of` says what else there may be."""
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


class ChatTemplate:
    """A template and the tokenizer whose control tokens it writes."""

    def __init__(self, source: str, tokenizer: Tokenizer, enable_thinking: bool | None = None) -> None:
        """
        Args:
            enable_thinking: for templates that ask (Qwen3's): whether the model thinks before it answers. None leaves
                it to the template.

        Raises:
            UserError: `source` is not a Jinja template, or does not ask for `enable_thinking` where that is given.
        """
        refuse_needless(source, enable_thinking)
        self.source = source
        self.is_ours = source in (SEP_TEMPLATE, CHATML_TEMPLATE)
        if not self.is_ours:
            rendering.check(source)
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
        if enable_thinking is not None:
            self._values["enable_thinking"] = enable_thinking

    @classmethod
    def of(cls, tokenizer: Tokenizer, enable_thinking: bool | None = None) -> ChatTemplate:
        """The template that a model directory brings. Raises UserError when it has none."""
        source = source_of(tokenizer)
        if source is None:
            raise UserError(
                "this model has no chat template, so it cannot be talked to. A model trained on dialogues "
                "(miaobi prepare --format=dialogue) has one; a model of plain text continues text: miaobi sample"
            )
        return cls(source, tokenizer, enable_thinking)

    def encode(self, messages: Messages, add_generation_prompt: bool = False) -> list[int]:
        """Ids of a dialogue; with `add_generation_prompt` up to where the assistant begins to speak.

        Raises UserError when the template refuses the messages.
        """
        (text,) = self.texts([self.call(list(map(self.safe, messages)), add_generation_prompt)])
        return self.tokens(text)[0]

    @functools.cached_property
    def extras(self) -> frozenset[str]:
        """What the template renders besides system, user, assistant and their text: tool (a role), tools, tool_calls,
        reasoning_content."""
        user, assistant = {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}
        function = {"name": "zeta", "description": "eta", "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": function}]
        call = {"type": "function", "function": {"name": "zeta", "arguments": {"kappa": "theta"}}}
        tried = {
            "tool": (
                [user, assistant | {"tool_calls": [call]}, {"role": "tool", "name": "zeta", "content": "iota"}],
                ["iota"],
            ),
            "tools": ([user | {"tools": tools}, assistant], ["zeta"]),
            "tool_calls": ([user, assistant | {"content": "", "tool_calls": [call]}], ["zeta", "theta"]),
            "reasoning_content": ([user, assistant | {"reasoning_content": "lambda"}], ["lambda"]),
        }
        extras = set()
        for name, (messages, expected) in tried.items():
            try:
                (text,) = self.texts([self.call(messages, False)])
            except UserError:
                continue
            extras |= {name} if all(word in text for word in expected) else set()
        return frozenset(extras)

    def marked(self, messages: Messages, marks: list[str]) -> tuple[str, list[int], list[int]]:
        """The dialogue's text, and where in it (BREAKs not counted) messages begin and end; no places at all where the
        marks come out in another order than they went in.

        marks: what stands in front of each message's words: OPEN, REPLY, or nothing. CLOSE stands behind all.
        """
        safe = [{**self.safe(m), "content": _marked(self._guarded(m), mark)}
                for m, mark in zip(messages, marks, strict=True)]  # fmt: skip
        (text,) = self.texts([self.call(safe, False)])
        opens, closes, parts, length, order = [], [], [], 0, []
        for part in re.split(f"([{OPEN}{CLOSE}{REPLY}])", text):
            if part in (OPEN, REPLY, CLOSE):
                order.append(part)
                (closes if part == CLOSE else opens).append(length)
            else:
                parts.append(part)
                length += length_of(part)
        if order != [part for mark in marks for part in (mark, CLOSE) if part]:
            opens, closes = [], []
        return "".join(parts), opens, closes

    def call(self, messages: Messages, add_generation_prompt: bool) -> dict[str, Any]:
        """The variables of a template for some messages."""
        shown = [{key: value for key, value in m.items() if key not in ("tools", "weight")} for m in messages]
        return {
            "messages": shown,
            "add_generation_prompt": add_generation_prompt,
            "tools": (messages[0].get("tools") if messages else None) or None,
            "documents": None,
            **self._values,
        }

    def texts(self, calls: list[dict[str, Any]]) -> list[str]:
        return rendering.render(self.source, calls, self.is_ours)

    def safe(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with all control strings in it broken up."""
        safe = {**message, "content": self._guarded(message)}
        names = self._special if message["role"] == "assistant" else self._names
        for key in ("reasoning_content", "tool_calls", "name", "tool_call_id"):
            if key in message:
                safe[key] = _each_text(message[key], functools.partial(_broken_up, names=names))
        if "tools" in message:
            safe["tools"] = _each_text(message["tools"], functools.partial(_broken_up, names=self._names))
        return safe

    def _guarded(self, message: dict[str, Any]) -> str:
        """The message's content with its control strings broken up.

        The model's own words may hold tokens that are not special, such as `<think>`.
        """
        names = self._special if message["role"] == "assistant" else self._names
        return self._fenced(_broken_up(message["content"], names))

    def _fenced(self, content: str) -> str:
        """`content`, apart from template text with which it would make a control string."""
        core = content.strip()
        shortest = range(1, min(self._longest, len(core) + 1))
        inside = 0 < len(core) < self._longest and core in self._all_names
        before = BREAK if inside or any(core[:n] in self._tails for n in shortest) else ""
        after = BREAK if inside or any(core[-n:] in self._heads for n in shortest) else ""
        return content.replace(core, before + core + after, 1) if before or after else content

    def tokens(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray, np.ndarray]:
        """ids; where each begins and ends in the text without BREAKs; whether it is a control token."""
        if BREAK not in text:
            with without_panic():
                encoding = self._parsing.encode(text, add_special_tokens=False)
            control = set(self._control.values())
            spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            names = [id_ in control and self._names.fullmatch(text[a:b].strip()) is not None
                     for id_, (a, b) in zip(encoding.ids, encoding.offsets, strict=True)]  # fmt: skip
            return encoding.ids, spans[:, 0], spans[:, 1], np.array(names, bool)
        ids, spans, is_control, position = [], [], [], 0
        for piece, control in self._pieces(text):
            if control is not None:
                ids.append(control)
                spans.append((position, position + len(piece)))
                is_control.append(True)
            else:
                piece = piece.replace(BREAK, "")
                with without_panic():
                    encoding = self._plain.encode(piece, add_special_tokens=False)
                ids += encoding.ids
                spans += [(position + start, position + end) for start, end in encoding.offsets]
                is_control += [False] * len(encoding.ids)
            position += len(piece)
        bounds = np.array(spans, np.int64).reshape(-1, 2)
        return ids, bounds[:, 0], bounds[:, 1], np.array(is_control, bool)

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


def with_thinking(source: str, enable_thinking: bool | None) -> str:
    """`source` with `enable_thinking` as its default, so that training, chat and transformers agree on it.

    Raises UserError for a template that does not ask.
    """
    refuse_needless(source, enable_thinking)
    if enable_thinking is None:
        return source
    default = str(enable_thinking).lower()
    return f"{{% if enable_thinking is not defined %}}{{% set enable_thinking = {default} %}}{{% endif %}}" + source


def refuse_needless(source: str, enable_thinking: bool | None) -> None:
    """Raise UserError where `enable_thinking` is given and the template `source` does not ask for it."""
    if enable_thinking is not None and "enable_thinking" not in source:
        raise UserError("--enable_thinking is for templates that ask for it, and this one does not; leave it out")


def source_of(tokenizer: Tokenizer) -> str | None:
    """Jinja source of the tokenizer's own template; of several named ones, as some hub models have, the default."""
    source = tokenizer.config.get("chat_template")
    if isinstance(source, list):
        source = next((e.get("template") for e in source if isinstance(e, dict) and e.get("name") == "default"), None)
    return source if isinstance(source, str) and source else None


def _broken_up(text: str, names: re.Pattern[str]) -> str:
    """`text` without the control strings `names` in one piece. Raises UserError for noncharacters."""
    if match := NONCHARACTER.search(text):
        raise UserError(f"a message contains U+{ord(match[0]):04X}, which is not a character; remove it")
    while names.search(text):
        text = names.sub(lambda m: m[0][0] + BREAK + m[0][1:], text)
    return text


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _each_text(item, change) for key, item in value.items()}
    return [_each_text(item, change) for item in value] if isinstance(value, list) else value


def length_of(text: str) -> int:
    """Characters of a text, BREAKs not counted."""
    return len(text) - text.count(BREAK)


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
