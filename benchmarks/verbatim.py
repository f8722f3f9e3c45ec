"""What a model copies: the longest run of characters that its texts share with the text it was trained on.

    python -m benchmarks.verbatim MODEL DATA [MORE_DATA ...]

DATA are prepared directories; all of their training parts is searched. The prompts are from the first one's
validation part: the first characters of its documents or, of dialogues, the openings; only what the model writes behind
them counts. Texts are compared as they are, punctuation and line ends included, and never across two documents.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine, parse, report
from miaobi.corpus.prepared import PreparedData, TokenStream
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.generate.chat import Chat, model_settings
from miaobi.generate.config import ChatConfig, SampleConfig
from miaobi.generate.engine import LanguageModel, control_ids, load
from miaobi.kinds import Location, Positional

LENGTHS = (10, 20, 30, 50, 100)
"""For each of these: which share of the texts have so many characters in a row from the training text."""
PROMPT = 10  # characters of a document that the model goes on from
DOCUMENTS = 256  # that are read at once
PIECE = 1 << 20  # characters that are hashed at once
END = "\0"  # between two documents or turns; no text has it
BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
TABLE_BITS = 22


@dataclass(frozen=True)
class Args:
    """Command line."""

    model: Positional[Location]
    """Run or model directory."""
    data: Positional[tuple[Path, ...]] = ()
    """Prepared directories that it was trained on; the prompts come from the first one."""
    samples: int = 1000
    """Texts that the model writes."""
    max_new_tokens: int = 150
    seed: int = 1337
    device: str = "auto"
    json: bool = False
    """Print one line of JSON as well."""


def documents(stream: TokenStream, tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of a split, some hundred documents at a time, with END behind each document and each turn."""
    starts = [*stream.starts[::DOCUMENTS].tolist(), len(stream)]
    for start, end in itertools.pairwise(starts):
        text = tokenizer.decode(stream.read(start, end))
        for name in control_ids(tokenizer):
            text = text.replace(name, END)
        yield text


def prompts(data: PreparedData, count: int) -> list[str]:
    """What the first validation documents begin with; of dialogues, their openings. Raises UserError where there are
    too few.
    """
    if data.val.documents < count:
        most = data.val.documents
        raise UserError(f"{data.path} has {most} validation documents; give --samples={most} at most")
    tokenizer, found = data.tokenizer, []
    control = list(control_ids(tokenizer).values())
    for start, end in itertools.pairwise([*data.val.starts.tolist(), len(data.val)][: count + 1]):
        ids = data.val.read(start, end)
        ends = np.flatnonzero(np.isin(ids, control))
        text = tokenizer.decode(ids[: ends[0] if len(ends) else None]).strip()
        found.append(text if data.is_dialogue else text[:PROMPT])
    return found


def write(lm: LanguageModel, data: PreparedData, args: Args) -> list[str]:
    """What the model writes behind the prompts; replies where the data is dialogues."""
    begun = prompts(data, args.samples)
    if not data.is_dialogue:
        settings = SampleConfig(max_new_tokens=args.max_new_tokens, seed=args.seed)
        return [c.text[len(prompt) :] for prompt, c in zip(begun, lm.complete(begun, settings), strict=True)]
    return replies(lm, begun, args.max_new_tokens, args.seed)


def replies(lm: LanguageModel, openings: list[str], max_new_tokens: int, seed: int) -> list[str]:
    """What the model answers to each of the openings, in conversations of their own, as `miaobi chat` samples."""
    settings = model_settings(ChatConfig(max_new_tokens=max_new_tokens, seed=seed), lm.model.generation, ())
    chat, found = Chat(lm, settings), []
    for opening in openings:
        chat.flush()
        found.append("".join(chat.reply(opening)))
    return found


def powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1, ... modulo 2^64: (count,) uint64."""
    factors = np.full(count, base & (2**64 - 1), np.uint64)
    factors[:1] = 1
    return np.multiply.accumulate(factors)


class Windows:
    """Hashes of every run of `length` characters of a text of at most `most`, a polynomial modulo 2^64."""

    def __init__(self, length: int, most: int) -> None:
        self.length = length
        self.up = powers(BASE, most)
        self.down = powers(pow(BASE, -1, 2**64), most)

    def of(self, text: str) -> np.ndarray:
        """(len(text) - length + 1,) uint64."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * self.up[: len(codes)])])
        count = max(0, len(codes) - self.length + 1)
        return (sums[self.length : self.length + count] - sums[:count]) * self.down[:count]


def shared(texts: list[str], corpus: Iterable[str], length: int) -> dict[int, str]:
    """Which of the texts have a run of `length` characters that the corpus has: number of the text -> the first run."""
    if not texts:
        return {}
    windows = Windows(length, max(PIECE + length, *map(len, texts)))
    mine = [windows.of(text) for text in texts]
    owners = np.repeat(np.arange(len(texts)), [len(hashes) for hashes in mine])
    places = np.concatenate([np.arange(len(hashes)) for hashes in mine])
    hashes, first = np.unique(np.concatenate(mine), return_inverse=True)
    found = np.zeros(len(hashes), bool)
    may_be = np.zeros(1 << TABLE_BITS, bool)  # by a hash's first bits: most of the corpus is in none, at once
    may_be[hashes >> np.uint64(64 - TABLE_BITS)] = True
    for text in corpus if len(hashes) else ():
        for start in range(0, len(text), PIECE):
            theirs = windows.of(text[start : start + PIECE + length - 1])
            theirs = theirs[may_be[theirs >> np.uint64(64 - TABLE_BITS)]]
            at = np.minimum(np.searchsorted(hashes, theirs), len(hashes) - 1)
            found[at[hashes[at] == theirs]] = True
    runs: dict[int, str] = {}
    for index in np.flatnonzero(found[first]):
        owner, place = int(owners[index]), int(places[index])
        runs.setdefault(owner, texts[owner][place : place + length])
    return runs


def longest(texts: list[str], corpus: list[str]) -> tuple[int, str]:
    """The longest run of characters of any of the texts that the corpus has, and how long it is; (0, "") for none."""
    low, run, high = 0, "", max(map(len, texts), default=0) + 1
    guess = min(32, high - 1)
    while high - low > 1:
        found = shared(texts, corpus, guess)
        if found:
            low, run = guess, next(iter(found.values()))
        else:
            high = guess
        texts = [text for text in texts if len(text) > low]
        guess = min(guess * 2, high - 1) if found and high - low > guess else (low + high) // 2
    return low, run


def corpus_of(data: Iterable[PreparedData]) -> list[str]:
    """The training text of prepared directories, for `measure`."""
    return [text for part in data for text in documents(part.train, part.tokenizer)]


def measure(texts: list[str], corpus: list[str]) -> dict[str, Any]:
    """samples and characters (of the texts), searched (characters of the corpus), longest, longest_text, shares:
    {length: share of the samples}.
    """
    texts = [text.replace(END, "") for text in texts]
    length, run = longest(texts, corpus)
    shares = {n: len(shared(texts, corpus, n)) / len(texts) if n <= length else 0.0 for n in LENGTHS}
    return {"samples": len(texts), "characters": sum(map(len, texts)), "searched": sum(map(len, corpus)),
            "longest": length, "longest_text": run, "shares": shares}  # fmt: skip


def main() -> None:
    """Measure and print."""
    args = parse("verbatim", Args, __doc__)
    if not args.data:
        raise SystemExit("miaobi: verbatim needs the prepared directories that the model was trained on")
    data = [PreparedData.open(place) for place in args.data]
    found = measure(write(load(args.model, args.device), data[0], args), corpus_of(data))
    rows: list[list[Any]] = [[f"{n} characters or more", f"{share:.1%}"] for n, share in found["shares"].items()]
    rows.append([f"longest: {found['longest_text']}", f"{found['longest']}"])
    result = {"machine": machine(args.device), "settings": dataclasses.asdict(args), **found}
    report("verbatim", ["in a row from the training text", "share of texts"], rows, result, args.json)


if __name__ == "__main__":
    main()
