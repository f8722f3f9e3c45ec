"""A conversation: messages in, a streamed reply out. No terminal in here."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from miaobi.console import log, warn
from miaobi.corpus.template import ChatTemplate, Messages
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.device import explain_memory
from miaobi.errors import UserError
from miaobi.files import json_of
from miaobi.generate.config import ChatConfig, SampleConfig
from miaobi.generate.engine import Completion, Draft, LanguageModel, control_ids
from miaobi.generate.stream import Stream
from miaobi.model.generation import GENERATION_CONFIG, sampling_settings
from miaobi.model.transformer import Transformer

UNKNOWN = ("<unk>", "[UNK]")  # control tokens that do not end a reply; a reply of them alone would be empty


def model_settings(cfg: ChatConfig, generation: dict[str, Any] | None, given: Collection[str]) -> ChatConfig:
    """`cfg` with what a model's makers recommend in place of our own defaults; one line on stderr says what that is.

    generation: what `generation_settings` gave. given: names of settings that the user chose; these stay.
    """
    stated = sampling_settings(generation)
    advice = {name: value for name, value in stated.items() if name not in given and value != getattr(cfg, name)}
    if not advice:
        return cfg
    listed = ", ".join(f"{name}={value}" for name, value in advice.items())
    log(f"sampled as the model's {GENERATION_CONFIG} says: {listed} (flags win)")
    return replace(cfg, **advice)


class Chat:
    """A conversation with a model, through the model's own chat template.

    Attributes:
        messages: the whole of it, an optional system message first, then user and assistant in turn.
    """

    def __init__(self, lm: LanguageModel, cfg: ChatConfig) -> None:
        """Raises UserError when the model has no chat template, or one that does not know `enable_thinking`."""
        self.lm, self.cfg = lm, cfg
        self.template = ChatTemplate.of(lm.tokenizer, cfg.enable_thinking)
        self.messages: Messages = []
        control = control_ids(lm.tokenizer)
        self.unknown = [control[name] for name in UNKNOWN if name in control]
        # Whatever generation_config.json forgot to list: no control token is part of what somebody says.
        self.ends = {*lm.end_ids, *control.values()}.difference(self.unknown)
        self._generator = lm.generator(cfg.seed)
        self._slots = lm.slots()
        self._first = 0  # the oldest message, not counting a system message, that still fits the block
        self._saved: set[Path] = set()
        self._told = False

    def reply(self, text: str) -> Iterator[str]:
        """Pieces of the model's reply as they are written; an empty message gets none.

        Closed or interrupted in the middle, what was written until then stays in the conversation; a message whose
        reply had not begun is forgotten. Raises UserError when the template refuses the conversation.
        """
        if text.strip():
            yield from self._answer([*self.messages, {"role": "user", "content": text}])

    def retry(self) -> Iterator[str]:
        """Another reply to the last message; nothing when there is none."""
        messages = self.messages[:-1] if self.messages and self.messages[-1]["role"] == "assistant" else []
        if messages:
            yield from self._answer(messages)

    def restart(self, seed: int | None) -> None:
        """As a new conversation that draws with this seed; a system message stays."""
        self.flush()
        self._generator = self.lm.generator(seed)

    def flush(self) -> None:
        """Forget the conversation; a system message stays."""
        self.messages, self._first = self._system(), 0

    def system(self, text: str) -> None:
        """Set the system message, or remove it with an empty text.

        Raises UserError when the template has no place for one, or it leaves no room for a message.
        """
        turns = self.messages[len(self._system()) :]
        system = [{"role": "system", "content": text}] if text.strip() else []
        if len(self._encode([*system, {"role": "user", "content": "？"}])) > self.room:
            raise UserError(f"the system message is too long: with it no message fits into {self.room} tokens; "
                            "shorten it")  # fmt: skip
        self.messages, self._first = [*system, *turns], 0

    def save(self, path: Path) -> None:
        """Write the conversation: .jsonl as one line of OpenAI's `messages`, anything else as readable text.

        Raises UserError for a file that is there already, unless this conversation wrote it.
        """
        if path.suffix == ".jsonl":
            text = json_of({"messages": self.messages}) + "\n"
        else:
            marks = {"system": "/system ", "user": ">>>", "assistant": ""}
            text = "".join(f"{marks[m['role']]}{m['content']}\n" for m in self.messages)
        try:
            with path.open("w" if path in self._saved else "x", encoding="utf-8") as f:
                f.write(text)
        except FileExistsError as e:
            raise UserError(f"{path} exists already and is left alone; choose another name") from e
        except OSError as e:
            raise UserError(f"{path} cannot be written ({e.strerror}); choose another name") from e
        self._saved.add(path)

    @property
    def room(self) -> int:
        """Tokens of the block that the prompt may take: what a reply may need is kept free, but at most half."""
        block = self.lm.model.cfg.block_size
        return block - min(self.cfg.max_new_tokens, block // 2)

    def prompt(self, messages: Messages) -> list[int]:
        """Ids of a conversation that ends in a message of the user, at most `room` of them.

        The oldest exchanges that do not fit are left out; a last message that is too long by itself is cut to its end.
        """
        system = messages[: int(messages[0]["role"] == "system")]
        turns = messages[len(system) :]
        while len(ids := self._encode([*system, *turns[self._first :]])) > self.room:
            if self._first >= len(turns) - 1:
                return self._shortened(system, turns[-1]["content"])
            self._first += 2  # an exchange: some templates insist on user and assistant in turn
        return ids

    def stream(self, prompt: list[int]) -> Stream:
        """The reply to a prompt."""
        return Stream(list(prompt), self.cfg, self._generator, self.ends, self.unknown, never_empty=True)

    def _shortened(self, system: Messages, text: str) -> list[int]:
        """Ids of the longest end of a message that fits."""

        def ids(length: int) -> list[int]:
            return self._encode([*system, {"role": "user", "content": text[len(text) - length :]}])

        length = bisect.bisect_right(range(1, len(text) + 1), self.room, key=lambda n: len(ids(n)))
        if not length:
            raise UserError(f"not even one character fits into {self.room} tokens besides the chat template; "
                            "use a model with a larger block_size")  # fmt: skip
        if not self._told:
            self._told = True
            warn(f"the message is too long for the model: only its last {length} of {len(text)} characters are read")
        return ids(length)

    def _encode(self, messages: Messages) -> list[int]:
        return self.template.encode(messages, add_generation_prompt=True)

    def _system(self) -> Messages:
        return [m for m in self.messages[:1] if m["role"] == "system"]

    def _answer(self, messages: Messages) -> Iterator[str]:
        """Stream a reply to the last of `asked`; then, or where it was broken off, the conversation is that far."""
        tokens = self._slots.write(self.stream(self.prompt(messages)))
        reply = ""
        try:
            with explain_memory(self.lm.device, "`flush` forgets the conversation; a smaller --max_new_tokens helps"):
                for piece in self.lm.pieces(tokens, self.ends):
                    reply += piece
                    yield piece
        finally:
            if reply:
                self.messages = [*messages, {"role": "assistant", "content": reply}]


def replies(lm: LanguageModel, conversations: Iterable[Messages], cfg: ChatConfig) -> Iterator[Completion]:
    """One reply to each conversation, in their order and as many at a time as go well together. The nth, from 0, is
    what a `Chat` with the seed `seed + n` would answer.

    Raises UserError where the model has no chat template.
    """
    chat = Chat(lm, cfg)

    def begun() -> Iterator[tuple[Stream, Draft]]:
        for number, messages in enumerate(conversations):
            chat.restart(None if cfg.seed is None else cfg.seed + number)
            yield chat.stream(chat.prompt(messages)), Draft(lm, "", [], (), chat.ends)

    return lm.written(begun())


def preview(
    model: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int, end_ids: tuple[int, ...], is_dialogue: bool
) -> str:
    """A short continuation, or `>>>` and a message with its reply, always drawn the same way, for the log of a run."""
    lm, cfg = LanguageModel(model, tokenizer, end_ids), SampleConfig(num_samples=1, max_new_tokens=tokens)
    if not is_dialogue:
        return lm.generate(prompt, cfg)[0].text
    chat = Chat(lm, ChatConfig(max_new_tokens=tokens, seed=cfg.seed))
    prompt_ids = chat.template.encode([{"role": "user", "content": prompt}], add_generation_prompt=True)
    # Not chat.reply: it refuses a template that fills a small block, and a sample is no reason to end a run.
    drawn = lm.slots().write(chat.stream(prompt_ids))
    return f">>>{prompt}\n" + "".join(lm.pieces(drawn, chat.ends))
