"""Dialogues, from a file to tokens.

Between reading and encoding a dialogue is one string: small-gpt's utterances, one a line; or, where roles matter, every
message behind a noncharacter that stands for its role, so that digests, counts and splits need not know of dialogues.
What a message has besides its text (reasoning, tool calls) follows it, each behind a noncharacter of its own.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from miaobi import console
from miaobi.corpus.examples import TrainingTemplate
from miaobi.corpus.store import Encoded
from miaobi.corpus.template import ROLES, ChatTemplate, Messages
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

MARKS = dict(zip((*ROLES, "tool", "reasoning_content", "unscored", "extras"),
                 "\ufdd8\ufdd9\ufdda\ufddb\ufddc\ufddd\ufdde", strict=True))  # fmt: skip
ROLE_OF = {mark: role for role, mark in MARKS.items()}
"""Of every mark what it stands for: a role, or what the message before it has besides its text."""
GREETING = "你好"
_MARK = re.compile(f"([{''.join(ROLE_OF)}])")
_PACKED_AS_JSON = ("tools", "tool_calls", "tool_call_id", "name")


def packed(messages: Messages) -> str:
    """Messages as one string."""
    return "".join(map(_packed_message, messages))


def _packed_message(message: dict[str, Any]) -> str:
    parts = [MARKS[message["role"]], message["content"]]
    if "reasoning_content" in message:
        parts += [MARKS["reasoning_content"], message["reasoning_content"]]
    if extras := {key: message[key] for key in _PACKED_AS_JSON if key in message}:
        parts += [MARKS["extras"], json.dumps(extras, ensure_ascii=False)]
    if message.get("weight") == 0:
        parts.append(MARKS["unscored"])
    return "".join(parts)


def unpacked(document: str) -> Messages:
    """The messages of `packed`, or of utterances one a line: user and assistant in turn."""
    if document[:1] not in ROLE_OF:
        return [{"role": ROLES[1 + i % 2], "content": line} for i, line in enumerate(document.split("\n"))]
    messages: Messages = []
    parts = _MARK.split(document)
    for mark, text in zip(parts[1::2], parts[2::2], strict=True):
        what = ROLE_OF[mark]
        if what == "reasoning_content":
            messages[-1][what] = text
        elif what == "extras":
            messages[-1] |= json.loads(text)
        elif what == "unscored":
            messages[-1]["weight"] = 0
        else:
            messages.append({"role": what, "content": text})
    return messages


def without_marks(text: str, instead: str = "") -> str:
    """The words alone."""
    return _MARK.sub(instead, text)


def as_lines(document: str) -> str:
    """A dialogue as utterances, one a line, for the template that knows no roles."""
    if document[:1] not in ROLE_OF:
        return document
    return "\n".join(" ".join(m["content"].split("\n")) for m in unpacked(document) if m["role"] != "system")


def encode_lines(tokenizer: Tokenizer, documents: Sequence[str]) -> Encoded:
    """Utterances with `<sep>` between them and `<pad>` at the end: what SEP_TEMPLATE renders, vectorised."""
    ids, starts = tokenizer.encode_documents(documents, tokenizer.pad_id, tokenizer.sep_id)
    turns = np.union1d(starts, np.flatnonzero(ids == tokenizer.sep_id) + 1)
    return Encoded(ids, starts, turns)


def encode_roles(tokenizer: Tokenizer, documents: Sequence[str], replies_only: bool) -> Encoded:
    """Dialogues through the tokenizer's chat template; a dialogue may be cut in front of the user's messages.

    Where only replies are learned, one dialogue may become several examples, see `TrainingTemplate.examples`.

    Raises UserError when the template refuses one, or has no place for something in it.
    """
    template = _template_of(tokenizer)
    ids, starts, turns, scored, position = [], [], [], [], 0
    for document in documents:
        messages = unpacked(document)
        _refuse_lost(messages, template)
        examples = template.examples(messages) if replies_only else [template.render(messages)]
        for example in examples:
            starts.append(position)
            roles = [m["role"] for m in messages]
            turns += [position + at for at, role in zip(example.turns, roles, strict=False) if role == "user"]
            ids += example.ids
            scored.append(example.is_reply)
            position += len(example.ids)
    cuts = np.union1d(np.array(starts, np.int64), np.array(turns, np.int64))
    flags = np.concatenate(scored) if scored else np.empty(0, bool)
    return Encoded(np.array(ids, np.uint32), np.array(starts, np.int64), cuts, flags if replies_only else None)


def _refuse_lost(messages: Messages, template: ChatTemplate) -> None:
    """Raises UserError for what a template would leave out; `prepare` has refused it by file and line."""
    for message in messages:
        has = {key for key in ("tools", "tool_calls", "reasoning_content") if key in message}
        has |= {"tool"} & {message["role"]}
        if lost := has - template.extras if has else has:
            raise UserError(f"a dialogue has {min(lost)}, which the chat template does not render "
                            f"(it begins {messages[0]['content'][:20]!r})")  # fmt: skip


@functools.lru_cache(maxsize=2)
def _template_of(tokenizer: Tokenizer) -> TrainingTemplate:
    return TrainingTemplate.of(tokenizer)


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The control token with which the tokenizer's template ends a reply, or None. Raises UserError as `render`."""
    example = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    rendered = _template_of(tokenizer).render(example)
    last = [id_ for id_, scored in zip(rendered.ids, rendered.is_reply, strict=True) if scored][-1]
    controls = {id_ for id_ in rendered.ids if tokenizer.is_control(id_)}
    return last if last in controls else None


def first_message(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What the user says first in a dialogue of token ids: the text between what the template puts around a message.

    GREETING where the template does not show it. Raises UserError as `encode`.
    """
    template = _template_of(tokenizer)
    for words in ("12", "ab", "你好", "的是"):  # a small vocabulary may know neither of two
        one, two = (template.encode([{"role": "user", "content": word}], add_generation_prompt=True) for word in words)
        start = next((i for i, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]), None)
        if start is not None:
            break
    else:
        return GREETING
    before, after = one[:start], one[start + 1 :]
    marks = [i for i, id_ in enumerate(before) if tokenizer.is_control(id_)]
    before = before[marks[-1] :] if marks else before  # without a system message that the template adds
    starts = (i + len(before) for i in range(len(ids)) if ids[i : i + len(before)] == before)
    begin = next(starts, len(ids))
    message = itertools.takewhile(lambda id_: not tokenizer.is_control(id_) and id_ not in after[:1], ids[begin:])
    return tokenizer.decode(list(message)).strip() or GREETING


def with_controls(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The tokenizer with these control tokens; those it lacks are added behind its last one, and that is said."""
    missing = [name for name in names if tokenizer.token_to_id(name) is None]
    if not missing:
        return tokenizer
    longer = tokenizer.with_added(missing)
    console.log(f"the tokenizer has no {', '.join(missing)}: added at {longer.token_to_id(missing[0])}, as new rows of "
                "the model")  # fmt: skip
    return longer
