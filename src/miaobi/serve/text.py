"""From tokens to what a client receives: pieces of text, and each token with its bytes and its probability."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from miaobi.corpus.tokenizer import Tokenizer
from miaobi.generate.engine import LanguageModel, first_stop, held_back
from miaobi.generate.stream import Score


class Told(NamedTuple):
    """A token of a text."""

    id: int
    score: Score | None
    """None where none was asked for, and of the first token of a prompt."""
    begin: int
    """Where it begins, in characters; a byte inside a character, where that does."""
    end: int
    """Where the whole characters up to it end."""


class Piece(NamedTuple):
    """What is new of one choice."""

    index: int
    text: str
    tokens: list[Told]
    finish: str | None
    """stop or length, once there is no more."""


class Names:
    """What tokens are called, and the bytes that they stand for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        decoder = json.loads(tokenizer.backend.to_str()).get("decoder") or {}
        self.by_level = decoder.get("type") == "ByteLevel"
        self.control = {id_: token.content for id_, token in tokenizer.backend.get_added_tokens_decoder().items()}
        self.bytes_of = functools.lru_cache(maxsize=1 << 16)(self._bytes_of)

    def _bytes_of(self, id_: int) -> bytes:
        """Maybe a part of a character; nothing of a row of the embedding that no token has."""
        if id_ in self.control:
            return self.control[id_].encode()
        if (known := self.tokenizer.bytes_of(np.array([id_]))) is not None:
            return known[0]
        token = self.tokenizer.backend.id_to_token(id_)
        if token is None:
            return b""
        if self.by_level:
            table = byte_letters()
            return bytes(table[letter] for letter in token if letter in table)
        return self.tokenizer.decode([id_], before=[id_]).encode()

    def name(self, id_: int, mark: str = "") -> str:
        """The token as text; `mark` and \\x.. for bytes that are no whole characters, as OpenAI writes them."""
        data = self.bytes_of(id_)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return mark + "".join(f"\\x{byte:02x}" for byte in data)


@functools.cache
def byte_letters() -> dict[str, int]:
    """The letters that GPT-2's vocabulary writes bytes with: printable ones are themselves, the others come behind
    U+0100 (github.com/openai/gpt-2, encoder.py).
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(rest)}


class Writer:
    """One text as its tokens come: ends it where it ends, and gives out what is certain."""

    def __init__(self, lm: LanguageModel, ends: Sequence[int], before: Sequence[int], stop: tuple[str, ...]) -> None:
        """ends: tokens that end it. before: ids of the text that it goes on from. stop: strings that end it."""
        self.tokenizer, self.ends, self.stop = lm.tokenizer, frozenset(ends), stop
        self.context = list(before)[-64:]
        self.longest = max(map(len, stop), default=0)
        self.loose: list[int] = []  # ids behind the last whole character
        self.whole = ""  # text up to there
        self.text = ""
        self.given = 0
        self.waiting: list[Told] = []
        self.finish: str | None = None
        self.count = 0
        """Tokens of the text, without the one that ended it."""

    def take(self, id_: int, score: Score | None) -> None:
        """One more token; nothing once the text has ended."""
        if self.finish:
            return
        if id_ in self.ends:
            self.end("stop")
            return
        self.count += 1
        begin = len(self.text)
        self.loose.append(id_)
        stable = self.tokenizer.decode_stable(self.loose, self.context)
        self.text = self.whole + stable
        if self.tokenizer.decode(self.loose, self.context) == stable:
            self.context = [*self.context, *self.loose][-64:]
            self.whole, self.loose = self.text, []
        self.waiting.append(Told(id_, score, begin, len(self.text)))
        if self.stop:
            self.look_for_stop(begin)

    def look_for_stop(self, begin: int) -> None:
        """End before a stop string that what stands behind `begin` made whole."""
        at = max(0, begin - self.longest)
        if (found := first_stop(self.text[at:], self.stop)) is not None:
            self.text, self.finish = self.text[: at + found], "stop"

    def end(self, why: str) -> None:
        """No more tokens come: bytes that wait for others become U+FFFD."""
        if self.finish:
            return
        begin = len(self.text)
        self.text = self.whole + self.tokenizer.decode(self.loose, self.context)
        self.finish = why
        if self.stop:
            self.look_for_stop(begin)

    def ready(self) -> tuple[str, list[Told]]:
        """Text and tokens that were not given out yet; held back is what could still begin a stop string."""
        until = len(self.text)
        if not self.finish:
            until -= held_back(self.text[-self.longest :], self.stop) if self.stop else 0
            sure = next((i for i, told in enumerate(self.waiting) if told.end > until), len(self.waiting))
        else:
            sure = next((i for i, told in enumerate(self.waiting) if told.begin > until), len(self.waiting))
        piece, tokens = self.text[self.given : until], self.waiting[:sure]
        self.given, self.waiting = max(until, self.given), self.waiting[sure:]
        return piece, tokens


def prompt_told(
    lm: LanguageModel, ids: Sequence[int], silent: int, scores: Sequence[Score | None]
) -> tuple[str, list[Told]]:
    """The text of a prompt and its tokens with their scores, of which the first has none.

    silent: so many of the first ids stand for no text.
    """
    scored = list(zip(ids, [None, *scores], strict=True))
    writer = Writer(lm, (), (), ())
    for id_, score in scored[silent:]:
        writer.take(id_, score)
    writer.end("length")
    text, tokens = writer.ready()
    return text, [Told(id_, score, 0, 0) for id_, score in scored[:silent]] + tokens
