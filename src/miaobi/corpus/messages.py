"""A JSON record in one of the usual shapes -> the messages of a dialogue, or what is wrong with it.

Nothing that is said in a dialogue is dropped: what cannot be rendered is refused by its name. What is only said about
it (`id`, `name`) is not read, and `ignored_keys` names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from miaobi.corpus.template import NONCHARACTER, ROLES, Messages
from miaobi.errors import brief, names_listed

ALL_EXTRAS = frozenset(("tool", "tools", "tool_calls", "reasoning_content", "weight"))
"""What a record may have besides system, user, assistant and their text, where the template can render it."""
_SPEAKERS = {  # ShareGPT's names and their relatives
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "developer": "system", "tool": "tool",
    "observation": "tool", "function": "tool", "function_call": "assistant",
}  # fmt: skip
_SHAPES = "`messages` (OpenAI), `conversations` (ShareGPT) or `instruction` and `output` (Alpaca)"
_UNREADABLE = (
    "images", "image", "videos", "video", "audios", "audio", "files", "file", "attachments", "documents",
    "chosen", "rejected", "refusal", "reasoning_details", "thinking_blocks", "train_detail", "training_detail",
)  # fmt: skip
"""Keys whose content cannot be learned from the words of turns alone: without it the rest would say something else."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_TURN_LEARNED = ("weight", "train", "training", "loss", "loss_scale", "loss_mask")  # OpenAI's, axolotl's, ms-swift's
_TURN_MASKED = "masked"  # torchtune's, which says the opposite
_UNFINISHED = {
    "prefix": True, "partial": True, "eot": False, "end_turn": False, "finish_reason": "length",
    "stop_reason": "max_tokens",
}  # fmt: skip
"""What says of a turn that it goes on: DeepSeek's, Moonshot's and Qwen's, torchtune's; why a model was stopped."""
_UNDESIRABLE = ("kto_tag", "label")
"""KTO's: false says that the reply is one not to give."""
_AROUND = {"system", "tools", "functions"}
_ALPACA = {"instruction", "input", "output", "history", *_AROUND}


class _RefusedError(ValueError):
    """A record holds something that would be lost, or is no dialogue."""


def messages_of(record: dict, extras: frozenset[str] = ALL_EXTRAS) -> tuple[Messages, str]:
    """(messages, "") of a JSON record in OpenAI's, ShareGPT's or Alpaca's shape, or ([], what is wrong).

    A message has role and content, and where the record has them reasoning_content, tool_calls, tool_call_id and name
    (of a tool's answer), weight (0: not learned); the first one has the tools that are offered.

    Args:
        extras: which of ALL_EXTRAS the template can render. A record that has others is wrong: without them it would
            say something else.
    """
    try:
        return _messages(record, extras), ""
    except _RefusedError as refused:
        return [], str(refused)


def _messages(record: dict, extras: frozenset[str]) -> Messages:
    _refuse_unreadable(record, "")
    if key := next((key for key in _UNDESIRABLE if record.get(key) is False), ""):
        raise _RefusedError(f"`{key}` is false: its reply is one not to give; leave such records out")
    listed = [key for key in ("messages", "conversations") if record.get(key) not in (None, [])]
    is_alpaca = record.get("output") is not None and record.get("instruction") is not None
    if len(listed) + is_alpaca > 1:
        shapes = [*listed, *["instruction and output"] * is_alpaca]
        raise _RefusedError(f"two dialogues in it: {' and '.join(shapes)}; remove one of them")
    empty = next((key for key in ("messages", "conversations") if key in record), None)
    if listed or (empty is not None and not is_alpaca):
        messages = _listed(record[listed[0] if listed else empty], listed[0] if listed else empty)
    elif is_alpaca:
        messages = _alpaca(record)
    else:
        raise _RefusedError(f"no dialogue in it: needs {_SHAPES}; the fields are {names_listed(record)}")
    messages = _with_system(record.get("system"), messages)
    if tools := _tools(record):
        messages[0]["tools"] = tools
    _check(messages, extras, record)
    return messages


def _refuse_unreadable(item: dict, location: str) -> None:
    for key in _UNREADABLE:
        if item.get(key):
            raise _RefusedError(
                f"{location}`{key}` cannot be learned: only the words of whole turns can; leave such records out, or "
                "remove the key"
            )


def ignored_keys(record: dict) -> Iterator[str]:
    """The keys of a record that `messages_of` takes, and of its turns, which are not read though they hold something:
    `id`, `messages[].name`.
    """
    shape = next((key for key in ("messages", "conversations") if record.get(key) not in (None, [])), None)
    known = {*_ALPACA, _thought_key(record)} if shape is None else {shape, *_AROUND}
    yield from _unread(record, known | {key for key in _UNDESIRABLE if record.get(key) is True})
    for turn in record[shape] if shape else ():
        content = "content" if turn.get("content") is not None else "value"
        known = {"role" if turn.get("role") is not None else "from", content, "tool_calls", "function_call"}
        known |= {_thought_key(turn), *_TURN_LEARNED, _TURN_MASKED}
        known |= {key for key, value in _UNFINISHED.items() if isinstance(turn.get(key), type(value))}
        if _SPEAKERS[turn.get("role") or turn["from"]] == "tool":
            known |= {"tool_call_id", "name"}
        yield from (f"{shape}[].{key}" for key in _unread(turn, known))
        for part in turn[content] if isinstance(turn.get(content), list) else ():
            if isinstance(part, dict):
                yield from (f"{shape}[].{content}[].{key}" for key in _unread(part, {"type", "text"}))


def _unread(item: dict, known: set[str]) -> list[str]:
    return [key for key, value in item.items() if key not in known and value not in (None, "", [], {})]


def _check(messages: Messages, extras: frozenset[str], record: dict) -> None:
    """Raises _RefusedError for what the template cannot render, and for text that cannot be kept."""
    for number, message in enumerate(messages, start=1):
        has = {key for key in ("tools", "tool_calls", "reasoning_content", "weight") if key in message}
        has |= {"tool"} & {message["role"]}
        if lost := sorted(has - extras):
            what = f"the role {lost[0]!r}" if lost[0] == "tool" else f"`{_as_written(record, lost[0])}`"
            raise _RefusedError(f"turn {number} has {what}, which {_REMEDY.get(lost[0], _REMEDY[''])}")
        text = "".join(_strings(message))
        if match := NONCHARACTER.search(text):  # it would be taken for one of our own marks
            raise _RefusedError(f"U+{ord(match[0]):04X} is not a character")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise _RefusedError("it has half a character (a lone surrogate)") from None


_REMEDY = {
    "": "the chat template does not render: take --tokenizer=MODEL whose template does, or remove it",
    "weight": "asks not to learn it, but all turns are learned here: add --template=chatml --loss=assistant",
}


def _as_written(record: dict, key: str) -> str:
    """Under which name a record has what a message has as `key`: somebody will look for it there."""
    others = {"reasoning_content": _THOUGHTS, "tool_calls": ("tool_calls", "function_call"),
              "tools": ("tools", "functions"), "weight": (*_TURN_LEARNED, _TURN_MASKED)}  # fmt: skip
    turns = (turn for shape in ("messages", "conversations") for turn in record.get(shape) or ())
    written = {name for item in (record, *turns) for name, value in item.items() if value not in (None, "", [])}
    return next((name for name in others.get(key, ()) if name in written), key)


def _strings(value: Any) -> list[str]:
    """All texts in a JSON value, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.items() for text in _strings(list(item))]
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []


def _with_system(system: object, messages: Messages) -> Messages:
    """`messages` with the system message that a record holds next to them."""
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    if not isinstance(system, str):
        raise _RefusedError(f"`system` is {type(system).__name__}, not text")
    inside = [m["content"] for m in messages if m["role"] == "system"]
    if inside and inside != [system.strip()]:
        raise _RefusedError("`system` stands next to the turns and in them, and the two differ; remove one of them")
    return messages if inside else [{"role": "system", "content": system.strip()}, *messages]


def _tools(record: dict) -> list:
    """The tools on offer: OpenAI's `tools`, its older `functions`, ShareGPT's list in a string."""
    tools = _parsed(record.get("tools"), "tools") or []
    functions = _parsed(record.get("functions"), "functions") or []
    if not isinstance(tools, list) or not isinstance(functions, list):
        raise _RefusedError(f"`{'tools' if not isinstance(tools, list) else 'functions'}` is not a list")
    return tools + [{"type": "function", "function": function} for function in functions]


def _parsed(value: object, key: str) -> Any:
    """A value that may be JSON in a string."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise _RefusedError(f"`{key}` is text, but not JSON ({error})") from error


def _listed(turns: object, key: str) -> Messages:
    if not isinstance(turns, list) or not turns:
        raise _RefusedError(f"`{key}` is not a list of turns")
    return [_turn(turn, number) for number, turn in enumerate(turns, start=1)]


def _turn(turn: object, number: int) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise _RefusedError(f"turn {number} is {type(turn).__name__}, not an object with role and content")
    _refuse_unreadable(turn, f"turn {number}: ")
    speaker, content = _first(turn, "role", "from"), _first(turn, "content", "value")
    role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise _RefusedError(
            f"turn {number} has the unknown role {brief(speaker)}; the roles are {', '.join((*ROLES, 'tool'))}"
        )
    if turn.get("content") is not None and turn.get("value") not in (None, "", turn["content"]):
        raise _RefusedError(f"turn {number} has `content` and `value`, and they differ; remove one of them")
    message: dict[str, Any] = {"role": role}
    if speaker == "function_call":  # ShareGPT's: the call is the content
        content, calls = "", _calls(_parsed(content, "function_call"), number)
    else:
        calls = _calls(_parsed(turn.get("tool_calls"), "tool_calls"), number)
        calls += _calls(_parsed(turn.get("function_call"), "function_call"), number)
    thought = turn.get(_thought_key(turn), "")
    if not isinstance(thought, str):
        raise _RefusedError(f"turn {number}: the thought is {type(thought).__name__}, not text")
    content = _text_of(content, number, may_lack=bool(calls))
    if not content and not calls:
        raise _RefusedError(f"turn {number} is empty")
    message["content"] = content
    if thought.strip() and role != "assistant":
        raise _RefusedError(f"turn {number}: only the assistant has thoughts")
    if thought.strip():
        message["reasoning_content"] = thought.strip()
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message |= {key: turn[key] for key in ("tool_call_id", "name") if isinstance(turn.get(key), str)}
    if key := next((key for key, value in _UNFINISHED.items() if turn.get(key) == value), ""):
        raise _RefusedError(
            f"turn {number} is not whole: `{key}` is {brief(turn[key])}; finish it and remove the key, or leave it out"
        )
    if not _is_learned(turn, number):
        message["weight"] = 0
    return message


def _thought_key(item: dict) -> str:
    """Under which key a turn's thoughts are, "" for none."""
    return next((key for key in _THOUGHTS if item.get(key)), "")


def _first(turn: dict, *keys: str) -> object:
    """The first value that is there: a key may be there with null."""
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _text_of(content: object, number: int, may_lack: bool) -> str:
    """A turn's words, also from OpenAI's list of parts."""
    if content is None and may_lack:
        return ""
    if isinstance(content, list):
        content = "".join(_part(part, number) for part in content)
    if not isinstance(content, str):
        raise _RefusedError(f"turn {number} has no text ({type(content).__name__})")
    return content.strip()


def _part(part: object, number: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if not isinstance(part, dict) or kind not in ("text", "input_text", "output_text"):
        raise _RefusedError(f"turn {number} has a part of the type {brief(kind)}: it is no text and cannot be learned")
    if not isinstance(part.get("text"), str):
        raise _RefusedError(f"turn {number} has a part without text")
    return part["text"]


def _calls(calls: object, number: int) -> list[dict[str, Any]]:
    """Calls of tools in OpenAI's shape, arguments as an object where they are one."""
    found = []
    for call in calls if isinstance(calls, list) else [] if calls is None else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _RefusedError(f"turn {number}: a call of a tool has no name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):  # some templates want text anyway
                arguments = function["arguments"]
        entry = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        found.append(entry | ({"id": call["id"]} if isinstance(call.get("id"), str) else {}))
    return found


def _is_learned(turn: dict, number: int) -> bool:
    """What weight (OpenAI), train (axolotl), loss (ms-swift), masked (torchtune) say of a turn."""
    learned = True
    for key in (*_TURN_LEARNED, _TURN_MASKED):
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            meaning = "not masked) and 1 (masked" if key == _TURN_MASKED else "not learned) and 1 (learned"
            raise _RefusedError(f"turn {number}: `{key}` is {brief(value)}; only 0 ({meaning}) count")
        learned = learned and bool(value) != (key == _TURN_MASKED)
    return learned


def _alpaca(record: dict) -> Messages:
    instruction, more, answer = (record.get(key) or "" for key in ("instruction", "input", "output"))
    if not all(isinstance(part, str) for part in (instruction, more, answer)):
        raise _RefusedError("instruction, input and output must be texts")
    if not instruction.strip() or not answer.strip():
        raise _RefusedError(f"`{'instruction' if not instruction.strip() else 'output'}` is empty")
    messages: Messages = []
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and p.strip() for p in pair)):
            raise _RefusedError("`history` must be a list of [question, answer]")
        messages += [{"role": role, "content": p.strip()} for role, p in zip(ROLES[1:], pair, strict=True)]
    question = f"{instruction.strip()}\n{more.strip()}" if more.strip() else instruction.strip()
    messages.append({"role": "user", "content": question})
    thought = record.get(_thought_key(record), "")
    if not isinstance(thought, str):
        raise _RefusedError(f"the thought is {type(thought).__name__}, not text")
    messages.append({"role": "assistant", "content": answer.strip()})
    if thought.strip():
        messages[-1]["reasoning_content"] = thought.strip()
    return messages
