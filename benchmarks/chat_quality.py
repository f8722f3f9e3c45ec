"""How well a model answers: openings it was not trained on, one reply each; and talks of five turns.

    python -m benchmarks.chat_quality MODEL --data DIR

The openings are the first utterances of the first dialogues of the validation part of DIR (made by `miaobi prepare
--format=dialogue`), which `train` never shows the model. A reply is good when it stops by itself, does not loop and
repeats no 4-gram thrice. In a talk the user's side is that of a validation dialogue with so many turns, followed by
those of later ones where it ends before; a talk is good when all its replies are, and no 4-gram comes thrice in them
together. distinct-2 (Li et al. 2016) is the number of different character pairs in all replies over that of all pairs.
Sampled as `miaobi chat` samples the model, unless settings are given; every combination of several is tried.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine, parse, report
from miaobi.corpus.prepared import PreparedData, TokenStream
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.generate import measures
from miaobi.generate.chat import model_settings, replies
from miaobi.generate.config import ChatConfig
from miaobi.generate.engine import Completion, LanguageModel, load
from miaobi.kinds import Location, Positional

TURNS = 5


@dataclass(frozen=True)
class Args:
    """Command line."""

    model: Positional[Location]
    """Run or model directory."""
    data: Path
    """Prepared dialogues; their validation part gives the openings."""
    openings: int = 200
    """Single replies."""
    talks: int = 100
    """Talks of five turns."""
    temperature: tuple[float, ...] = ()
    top_p: tuple[float, ...] = ()
    repetition_penalty: tuple[float, ...] = ()
    """Every combination of the three is tried; none given = as the model's generation_config.json or `miaobi chat`."""
    max_new_tokens: int = 100
    seed: int = 1337
    dialogues: int = 0
    """Print this many of the talks."""
    device: str = "auto"
    json: bool = False
    """Print one line of JSON as well."""


def utterances(data: PreparedData, part: TokenStream) -> list[list[str]]:
    """The dialogues of data.val or data.train, as their utterances. Raises UserError for data that is no chit-chat."""
    if data.sep_id is None:
        raise UserError(f"{data.path} holds no chit-chat; prepare it with --format=dialogue")
    tokenizer, found = Tokenizer.load(data.path), []
    for start, end in itertools.pairwise([*part.starts.tolist(), len(part)]):
        turns: list[list[int]] = [[]]
        for id_ in part.read(start, end - 1).tolist():
            if id_ == data.sep_id:
                turns.append([])
            else:
                turns[-1].append(id_)
        found.append([tokenizer.decode(turn) for turn in turns])
    return found


def user_sides(said: list[list[str]], count: int) -> list[list[str]]:
    """TURNS messages of a user for each of `count` talks: every second utterance of a dialogue, and of those after it
    where that has fewer. Raises UserError where there are too few dialogues.
    """
    sides: list[list[str]] = []
    messages: list[str] = []
    for turns in said:
        messages += turns[::2]
        if len(messages) >= TURNS:
            sides.append(messages[:TURNS])
            messages = []
        if len(sides) == count:
            return sides
    raise UserError(f"the dialogues are enough for {len(sides)} talks of {TURNS} turns, not {count}; prepare more, or "
                    "with a larger --val_fraction")  # fmt: skip


def converse(lm: LanguageModel, sides: list[list[str]], cfg: ChatConfig) -> list[list[Completion]]:
    """The replies of each talk, all talks at once, turn by turn."""
    talks = [[] for _ in sides]
    answers: list[list[Completion]] = [[] for _ in sides]
    for turn in range(TURNS):
        for messages, side in zip(talks, sides, strict=True):
            messages.append({"role": "user", "content": side[turn]})
        drawn = replies(lm, talks, dataclasses.replace(cfg, seed=cfg.seed + turn * len(sides)))
        for i, reply in enumerate(drawn):
            answers[i].append(reply)
        for messages, own in zip(talks, answers, strict=True):
            messages.append({"role": "assistant", "content": own[-1].text})
    return answers


def is_good_talk(talk: list[Completion]) -> bool:
    """Whether all replies are good and no 4-gram comes thrice in them together."""
    return all(map(measures.is_good, talk)) and not measures.repeats("\n".join(reply.text for reply in talk))


def judged(singles: list[Completion], talks: list[list[Completion]]) -> dict[str, float]:
    """Figures of the replies and talks."""
    texts = [reply.text for reply in singles]
    found = measures.figures(texts, [reply.finish_reason == "stop" for reply in singles])
    return {
        "good": sum(map(measures.is_good, singles)) / max(1, len(singles)),
        "good_talks": sum(map(is_good_talk, talks)) / max(1, len(talks)),
        "good_replies_of_talks": sum(measures.is_good(r) for talk in talks for r in talk) / max(1, TURNS * len(talks)),
        **{key: found[key] for key in ("stop_rate", "repetition", "distinct_2", "characters")},
        "loops": sum(map(measures.loops, texts)) / max(1, len(texts)),
        "different_replies": len(set(texts)) / max(1, len(texts)),
    }  # fmt: skip


def measure(lm: LanguageModel, said: list[list[str]], cfg: ChatConfig, openings: int, talks: int) -> tuple[dict, list]:
    """The figures, and the replies of the talks. cfg.seed seeds it all."""
    singles = list(replies(lm, ([{"role": "user", "content": turns[0]}] for turns in said[:openings]), cfg))
    answers = converse(lm, user_sides(said, talks), cfg)
    return judged(singles, answers), answers


def main() -> None:
    """Measure and print."""
    args = parse("chat_quality", Args, __doc__)
    data = PreparedData.open(args.data)
    lm, said = load(args.model, args.device), utterances(data, data.val)
    swept = {name: getattr(args, name) for name in ("temperature", "top_p", "repetition_penalty")}
    given = {name: values for name, values in swept.items() if values}
    own = model_settings(ChatConfig(max_new_tokens=args.max_new_tokens, seed=args.seed), lm.model.generation, given)
    rows: list[list[Any]] = []
    results = []
    for values in itertools.product(*given.values()):
        cfg = dataclasses.replace(own, **dict(zip(given, values, strict=True)))
        result, answers = measure(lm, said, cfg, args.openings, args.talks)
        settings = {name: getattr(cfg, name) for name in swept}
        results.append(settings | result)
        shares = ("good", "good_talks", "stop_rate", "loops", "repetition")
        numbers = (f"{result[key]:.3f}" for key in ("distinct_2", "different_replies"))
        rows.append([" ".join(map(str, settings.values())), *(f"{result[key]:.1%}" for key in shares), *numbers,
                     result["characters"]])  # fmt: skip
    people = [turns[1] for turns in said[: args.openings] if len(turns) > 1]
    found = measures.figures(people, [True] * len(people))
    rows.append(["people", "", "", "", f"{sum(map(measures.loops, people)) / max(1, len(people)):.1%}",
                 f"{found['repetition']:.1%}", f"{found['distinct_2']:.3f}",
                 f"{len(set(people)) / max(1, len(people)):.3f}", found["characters"]])  # fmt: skip
    shown = [
        [line for pair in zip(side, (r.text for r in talk), strict=True) for line in pair]
        for side, talk in zip(user_sides(said, args.talks)[: args.dialogues], answers, strict=False)
    ]
    columns = ["temperature top_p penalty", "good", "good talks", "stops", "loops", "4-gram thrice", "distinct-2",
               "different", "characters"]  # fmt: skip
    report("chat_quality", columns, rows, {
        "machine": machine(args.device), "settings": dataclasses.asdict(args), "results": results, "dialogues": shown,
    }, args.json)  # fmt: skip
    for number, lines in enumerate(shown, start=1):
        print(f"{number}. " + " / ".join(f"{'甲' if i % 2 == 0 else '乙'}：{line}" for i, line in enumerate(lines)))


if __name__ == "__main__":
    main()
