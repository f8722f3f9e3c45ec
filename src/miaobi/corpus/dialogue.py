"""Dialogues on their way from a file to tokens.

Between reading and encoding a dialogue is one string: small-gpt's utterances, one a line; or, where roles matter, every
message behind a noncharacter that stands for its role, so that digests, counts and splits need not know of dialogues.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence

import numpy as np

from miaobi.corpus.store import Encoded
from miaobi.corpus.template import NONCHARACTER, ROLES, ChatTemplate, Messages
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

MARKS = dict(zip(ROLES, "\ufdd8\ufdd9\ufdda", strict=True))
ROLE_OF = {mark: role for role, mark in MARKS.items()}
GREETING = "你好"
_MARK = re.compile("([\ufdd8-\ufdda])")
_SPEAKERS = {  # ShareGPT's names and their relatives
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip
_SHAPES = "`messages` (OpenAI), `conversations` (ShareGPT) or `instruction` and `output` (Alpaca)"


def messages_of(record: dict) -> tuple[Messages, str]:
    """(messages, "") of a JSON record in OpenAI's, ShareGPT's or Alpaca's shape, or ([], what is wrong)."""
    if "messages" in record or "conversations" in record:
        key = "messages" if "messages" in record else "conversations"
        messages, problem = _listed(record[key], key, record.get("system"))
    elif "instruction" in record and "output" in record:
        messages, problem = _alpaca(record)
    else:
        messages, problem = [], _no_shape(record)
    for message in messages:
        if found := NONCHARACTER.search(message["content"]):  # it would be taken for one of our own marks
            return [], f"U+{ord(found[0]):04X} is not a character"
    return messages, problem


def _no_shape(record: dict) -> str:
    return f"no dialogue in it: needs {_SHAPES}; the fields are {', '.join(map(str, record)) or 'none'}"


def _listed(turns: object, key: str, system: object) -> tuple[Messages, str]:
    if not isinstance(turns, list) or not turns:
        return [], f"`{key}` is not a list of turns"
    messages: Messages = []
    if isinstance(system, str) and system.strip():
        messages.append({"role": "system", "content": system.strip()})
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            return [], f"turn {number} is {type(turn).__name__}, not an object with role and content"
        speaker, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if isinstance(content, list):  # OpenAI's parts
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            return [], f"turn {number} has the unknown role {speaker!r}; the roles are {', '.join(ROLES)}"
        if not isinstance(content, str):
            return [], f"turn {number} has no text ({type(content).__name__})"
        if not content.strip():
            return [], f"turn {number} is empty"
        messages.append({"role": role, "content": content.strip()})
    return messages, ""


def _alpaca(record: dict) -> tuple[Messages, str]:
    asked, more, answer = (record.get(key) or "" for key in ("instruction", "input", "output"))
    if not all(isinstance(part, str) for part in (asked, more, answer)):
        return [], "instruction, input and output must be texts"
    if not asked.strip() or not answer.strip():
        return [], f"`{'instruction' if not asked.strip() else 'output'}` is empty"
    messages: Messages = []
    if isinstance(record.get("system"), str) and record["system"].strip():
        messages.append({"role": "system", "content": record["system"].strip()})
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and p.strip() for p in pair)):
            return [], "`history` must be a list of [question, answer]"
        messages += [{"role": role, "content": p.strip()} for role, p in zip(ROLES[1:], pair, strict=True)]
    question = f"{asked.strip()}\n{more.strip()}" if more.strip() else asked.strip()
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": answer.strip()})
    return messages, ""


def packed(messages: Messages) -> str:
    """Messages as one string."""
    return "".join(MARKS[m["role"]] + m["content"] for m in messages)


def unpacked(document: str) -> Messages:
    """The messages of `packed`, or of utterances one a line: user and assistant in turn."""
    if document[:1] not in ROLE_OF:
        return [{"role": ROLES[1 + i % 2], "content": line} for i, line in enumerate(document.split("\n"))]
    parts = _MARK.split(document)
    return [{"role": ROLE_OF[mark], "content": text} for mark, text in zip(parts[1::2], parts[2::2], strict=True)]


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

    Raises UserError when the template refuses one.
    """
    template = _template_of(tokenizer)
    ids, starts, turns, scored, position = [], [], [], [], 0
    for document in documents:
        messages = unpacked(document)
        rendered = template.render(messages)
        starts.append(position)
        turns += [position + at for at, m in zip(rendered.turns, messages, strict=True) if m["role"] == "user"]
        ids += rendered.ids
        scored.append(rendered.is_reply)
        position += len(rendered.ids)
    places = np.union1d(np.array(starts, np.int64), np.array(turns, np.int64))
    flags = np.concatenate(scored) if scored else np.empty(0, bool)
    return Encoded(np.array(ids, np.uint32), np.array(starts, np.int64), places, flags if replies_only else None)


@functools.lru_cache(maxsize=2)
def _template_of(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate.of(tokenizer)


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The control token with which the tokenizer's template ends a reply, or None. Raises UserError as `render`."""
    example = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    rendered = _template_of(tokenizer).render(example)
    last = [id_ for id_, scored in zip(rendered.ids, rendered.is_reply, strict=True) if scored][-1]
    controls = {id_ for id_ in rendered.ids if tokenizer.is_control(id_)}
    return last if last in controls else None


def first_message(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What the user says first in a dialogue of token ids: the text between what the template puts around a message.

    GREETING where the template keeps that from being told. Raises UserError as `encode`.
    """
    template = _template_of(tokenizer)
    one, two = (template.encode([{"role": "user", "content": c}], add_generation_prompt=True) for c in "12")
    start = next(i for i, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1])
    before, after = one[:start], one[start + 1 :]
    marks = [i for i, id_ in enumerate(before) if tokenizer.is_control(id_)]
    before = before[marks[-1] :] if marks else before  # without a system message that the template adds
    found = (i + len(before) for i in range(len(ids)) if ids[i : i + len(before)] == before)
    begin = next(found, len(ids))
    message = itertools.takewhile(lambda id_: not tokenizer.is_control(id_) and id_ not in after[:1], ids[begin:])
    return tokenizer.decode(list(message)).strip() or GREETING


def require(tokenizer: Tokenizer, names: Sequence[str], what: str) -> None:
    """Raises UserError when `tokenizer` lacks one of the control tokens."""
    for name in names:
        if tokenizer.token_to_id(name) is None:
            raise UserError(
                f"the tokenizer has no {name} token, which {what} needs; take --tokenizer=char or bpe, or a model "
                "that has its own chat template"
            )
