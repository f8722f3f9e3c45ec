"""How well a chit-chat model answers: openings it was not trained on, one reply each, at several sampling settings.

    python -m benchmarks.chat_quality RUN --data DIR

The openings are the first utterances of the first dialogues of the validation part of DIR (made by `miaobi prepare
--format=dialogue`), which `train` never shows the model. A reply is good when it stops by itself, does not loop and
repeats no 4-gram thrice. distinct-2 (Li et al. 2016) is the number of different character pairs in all replies over
the number of pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine, parse, report
from miaobi.console import progress
from miaobi.corpus.prepared import PreparedData
from miaobi.errors import UserError
from miaobi.generate.chat import Chat
from miaobi.generate.config import ChatConfig
from miaobi.generate.engine import LanguageModel, load
from miaobi.kinds import Location, Positional

LOOP = re.compile(r"(.{2,}?)\1{2,}", re.DOTALL)  # two characters or more, three times running


@dataclass(frozen=True)
class Args:
    """Command line."""

    model: Positional[Location]
    """Run or model directory."""
    data: Path
    """Prepared dialogues; their validation part gives the openings."""
    openings: int = 200
    """How many."""
    temperature: tuple[float, ...] = (0.5, 0.7, 0.9)
    top_p: tuple[float, ...] = (0.9, 1.0)
    repetition_penalty: tuple[float, ...] = (1.0, 1.1, 1.2)
    """Every combination of the three is tried."""
    max_new_tokens: int = 100
    seed: int = 1337
    dialogues: int = 0
    """Print this many dialogues, the first ones, at the defaults of `miaobi chat`."""
    device: str = "auto"
    json: bool = False
    """Print one line of JSON as well."""


@dataclass(frozen=True)
class Reply:
    """What a model said."""

    text: str
    stopped: bool
    """Whether it ended by itself."""

    @property
    def good(self) -> bool:
        """Stops by itself, does not loop, repeats no 4-gram thrice."""
        return self.stopped and not loops(self.text) and most_frequent(self.text, 4) < 3


def loops(text: str) -> bool:
    """Whether a phrase of two characters or more occurs three times in succession; laughter (哈哈哈) is none."""
    return any(len(set(match[1])) > 1 for match in LOOP.finditer(text))


def most_frequent(text: str, n: int) -> int:
    """Occurrences of the commonest sequence of n characters; overlapping ones count."""
    return max(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values(), default=0)


def distinct(texts: list[str], n: int = 2) -> float:
    """Different n-grams over all n-grams."""
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def utterances(data: PreparedData, count: int) -> list[list[str]]:
    """The first `count` validation dialogues, as their utterances. Raises UserError for data that is no chit-chat."""
    if data.sep_id is None:
        raise UserError(f"{data.path} holds no chit-chat; prepare it with --format=dialogue")
    from miaobi.corpus.tokenizer import Tokenizer

    tokenizer, stream = Tokenizer.load(data.path), data.val
    found = []
    for start, end in itertools.pairwise([*stream.starts[:count].tolist(), int(stream.starts[count])]):
        ids, turns = stream.read(start, end - 1).tolist(), [[]]
        for id_ in ids:
            if id_ == data.sep_id:
                turns.append([])
            else:
                turns[-1].append(id_)
        found.append([tokenizer.decode(turn) for turn in turns])
    return found


def answer(lm: LanguageModel, opening: str, cfg: ChatConfig) -> Reply:
    """The reply to a first message."""
    chat = Chat(lm, cfg)
    prompt = chat.prompt([{"role": "user", "content": opening}])
    ids: list[int] = []
    for token in lm.slots().write(chat.stream(prompt)):
        if token in chat.ends:
            return Reply(lm.tokenizer.decode(ids), True)
        ids.append(token)
    return Reply(lm.tokenizer.decode(ids), False)


def converse(lm: LanguageModel, said: list[str], cfg: ChatConfig) -> list[str]:
    """The dialogue that arises when every second utterance of `said` is put to the model."""
    chat, lines = Chat(lm, cfg), []
    for message in said[:5:2]:
        lines += [message, "".join(chat.reply(message))]
    return lines


def main() -> None:
    """Measure and print."""
    args = parse("chat_quality", Args, __doc__)
    data = PreparedData.open(args.data)
    lm, said = load(args.model, args.device), utterances(data, args.openings)
    grid = list(itertools.product(args.temperature, args.top_p, args.repetition_penalty))
    rows: list[list[Any]] = []
    results = []
    with progress("{task.completed}/{task.total} replies") as bar:
        task = bar.add_task("chat", total=len(grid) * len(said))
        for temperature, top_p, penalty in grid:
            cfg = ChatConfig(temperature=temperature, top_p=top_p, top_k=0, repetition_penalty=penalty,
                             max_new_tokens=args.max_new_tokens)  # fmt: skip
            replies = []
            for number, turns in enumerate(said):  # one seed for all would begin all replies with the same draw
                replies.append(answer(lm, turns[0], dataclasses.replace(cfg, seed=args.seed + number)))
                bar.advance(task)
            texts = [reply.text for reply in replies]
            result = {
                "temperature": temperature, "top_p": top_p, "repetition_penalty": penalty,
                "good": sum(r.good for r in replies) / len(replies),
                "stopped": sum(r.stopped for r in replies) / len(replies),
                "loops": sum(loops(t) for t in texts) / len(texts),
                "distinct_2": distinct(texts), "different_replies": len(set(texts)) / len(texts),
                "characters": sum(map(len, texts)) / len(texts),
            }  # fmt: skip
            results.append(result)
            rows.append([f"{temperature} {top_p} {penalty}",
                         *(f"{result[key]:.1%}" for key in ("good", "stopped", "loops")),
                         *(f"{result[key]:.3f}" for key in ("distinct_2", "different_replies")),
                         result["characters"]])  # fmt: skip
    people = [turns[1] for turns in said if len(turns) > 1]
    rows.append(["people", "", "", f"{sum(map(loops, people)) / len(people):.1%}", f"{distinct(people):.3f}",
                 f"{len(set(people)) / len(people):.3f}", sum(map(len, people)) / len(people)])  # fmt: skip
    dialogues = [
        converse(lm, turns, ChatConfig(seed=args.seed + number)) for number, turns in enumerate(said[: args.dialogues])
    ]
    columns = ["temperature top_p penalty", "good", "stopped", "loops", "distinct-2", "different", "characters"]
    report("chat_quality", columns, rows, {
        "machine": machine(args.device), "settings": dataclasses.asdict(args), "results": results,
        "dialogues": dialogues,
    }, args.json)  # fmt: skip
    for number, lines in enumerate(dialogues, start=1):
        print(f"{number}. " + " / ".join(f"{'甲' if i % 2 == 0 else '乙'}：{line}" for i, line in enumerate(lines)))


if __name__ == "__main__":
    main()
