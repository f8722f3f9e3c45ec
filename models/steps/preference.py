"""Prefer a chat model's own good replies to its bad ones: DPO with pairs that the model and a rule make.

    python -m models.steps.preference MODEL --data DIR --out OUT

The user's side of --talks dialogues of the training part of DIR (made by `miaobi prepare --format=dialogue`) is put to
MODEL, which draws --draws replies at each of five turns, cold and hot in turn. Where some are good (they stop, do not
loop, repeat no 4-gram thrice, also not with the replies before) and others are not, one of each makes a pair; the talk
goes on with a good one. On the pairs MODEL is tuned by DPO (Rafailov et al. 2023, arXiv:2305.18290), with the
likelihood of the good replies added (Pang et al. 2024, arXiv:2404.19733), without which both kinds may become unlikely.
Of a few settings of the sampling the one with the best talks, on training dialogues that made no pair, goes into OUT's
generation_config.json. Before and after are measured on the validation part, as `python -m benchmarks.chat_quality`
does it: sampled as `miaobi chat` would, and always the likeliest token without a penalty, where loops show first.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.chat_quality import TURNS, measure, user_sides, utterances
from benchmarks.common import machine, parse, report
from torch import Tensor

from miaobi.console import log
from miaobi.corpus.dialogue import end_of_turn
from miaobi.corpus.prepared import PreparedData
from miaobi.corpus.template import Messages
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.files import json_of, write_text, written_whole
from miaobi.generate import measures
from miaobi.generate.chat import Chat, model_settings, replies
from miaobi.generate.config import ChatConfig
from miaobi.generate.engine import Completion, LanguageModel, load
from miaobi.kinds import Location, Positional
from miaobi.model.checkpoint import load_model, save_model
from miaobi.model.transformer import Transformer

SAMPLING = [(0.8, 0.9, 1.2), (0.7, 0.9, 1.2), (0.7, 0.9, 1.3), (0.5, 0.9, 1.2), (0.5, 0.9, 1.3)]
"""Temperature, top_p and repetition penalty that are tried; the first are those of `miaobi chat`."""
NAMES = ("temperature", "top_p", "repetition_penalty")
SHARES = {
    "good": "good", "good_talks": "good talks", "good_replies_of_talks": "replies of talks", "stop_rate": "stops",
    "loops": "loops", "repetition": "4-gram thrice",
}  # fmt: skip
"""Shares that are measured of replies and conversations -> column heading."""
RESULT = "preference.json"
"""File in the directory of the tuned model, with what `main` returns."""


@dataclass(frozen=True)
class Args:
    """Command line."""

    model: Positional[Location]
    """Run or model directory of a chit-chat model."""
    data: Path
    """Prepared dialogues: pairs come from the training part, figures from the validation part."""
    out: Path
    """Directory for the tuned model."""
    talks: int = 200
    """Dialogues of the training part for which pairs are made."""
    draws: int = 4
    """Replies drawn at each turn, and at each temperature."""
    temperature: tuple[float, ...] = (0.3, 1.0)
    """Temperatures of these draws, without penalty: low ones loop, high ones rarely do."""
    max_new_tokens: int = 100
    epochs: int = 1
    """Passes over the pairs."""
    batch_size: int = 8
    """Pairs per step."""
    learning_rate: float = 5e-5
    beta: float = 0.1
    """DPO: how closely to stay to the original model; smaller = less closely."""
    likelihood: float = 0.2
    """Weight of the good replies' negative log-likelihood per token in the loss."""
    openings: int = 200
    """Measured before and after: single replies,"""
    measured_talks: int = 100
    """and talks of five turns."""
    seed: int = 1337
    json: bool = False
    """Print one line of JSON as well."""


@dataclass(frozen=True)
class Pair:
    """Token ids of a conversation, and of two replies to it, the end of a turn included."""

    prompt: list[int]
    good: list[int]
    bad: list[int]


def pairs(lm: LanguageModel, sides: list[list[str]], args: Args) -> Iterator[Pair]:
    """The pairs of the conversations, turn by turn. args.seed seeds the draws."""
    cfg = ChatConfig(max_new_tokens=args.max_new_tokens, top_p=1.0, repetition_penalty=1.0, seed=args.seed)
    chat, end, draws = Chat(lm, cfg), end_of_reply(lm.tokenizer), args.draws
    talks: list[Messages] = [[] for _ in sides]
    choose = random.Random(args.seed)
    for turn in range(TURNS):
        for messages, side in zip(talks, sides, strict=True):
            messages.append({"role": "user", "content": side[turn]})
        seeded = dataclasses.replace(cfg, seed=args.seed + turn * len(sides) * draws)
        drawn = [
            list(replies(lm, (messages for messages in talks for _ in range(draws)),
                         dataclasses.replace(seeded, temperature=temperature)))
            for temperature in args.temperature
        ]  # fmt: skip
        for i, messages in enumerate(talks):
            said = [m["content"] for m in messages if m["role"] == "assistant"]
            own = [reply for some in drawn for reply in some[i * draws : (i + 1) * draws]]
            good = [reply for reply in own if is_good_after(said, reply)]
            bad = [reply for reply in own if not is_good_after(said, reply)]
            if good and bad:
                chat.restart(None)
                prompt = chat.prompt(messages)
                yield Pair(prompt, *(ids_of(choose.choice(some), lm.tokenizer, end) for some in (good, bad)))
            messages.append({"role": "assistant", "content": choose.choice(good or own).text})


def is_good_after(said: list[str], reply: Completion) -> bool:
    """Whether a reply is good, and repeats no 4-gram thrice together with the replies before it."""
    return measures.is_good(reply) and not measures.repeats("\n".join([*said, reply.text]))


def end_of_reply(tokenizer: Tokenizer) -> int:
    """The token that ends a reply within a conversation. Raises UserError if the template has none."""
    end = tokenizer.sep_id if tokenizer.sep_id is not None else end_of_turn(tokenizer)
    if end is None:
        raise UserError("the chat template has no token that ends a reply; tune another model")
    return end


def ids_of(reply: Completion, tokenizer: Tokenizer, end: int) -> list[int]:
    """Token ids of a reply, with its end token if it has ended."""
    return [*tokenizer.encode(reply.text), *([end] if reply.finish_reason == "stop" else [])]


def log_likelihoods(model: Transformer, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """(rows,): log-probability of each reply after its prompt; of those longer than a block, the end."""
    block = model.cfg.block_size
    ids = [[*prompt, *reply][-block - 1 :] for prompt, reply in rows]
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    scored = torch.zeros(len(rows), longest - 1, dtype=torch.bool)
    for i, (row, (_, reply)) in enumerate(zip(ids, rows, strict=True)):
        scored[i, max(0, len(row) - 1 - len(reply)) : len(row) - 1] = True
    log_p = model(tokens[:, :-1]).float().log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return (log_p * scored).sum(1)


def tune(model: Transformer, found: list[Pair], args: Args) -> None:
    """DPO in place; logs the share of pairs whose good reply gained on the bad one."""
    torch.manual_seed(args.seed)
    model.eval()  # no dropout: the model is compared with itself
    rows = [((pair.prompt, pair.good), (pair.prompt, pair.bad)) for pair in found]
    steps = [range(at, min(at + args.batch_size, len(rows))) for at in range(0, len(rows), args.batch_size)]
    with torch.no_grad():
        before = [likelihoods(model, [rows[i] for i in step]) for step in steps]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    order, draw = list(range(len(steps))), random.Random(args.seed)
    for epoch in range(args.epochs):
        draw.shuffle(order)
        total, won = 0.0, 0
        for at, number in enumerate(order):
            done = (epoch * len(order) + at) / (args.epochs * len(order))
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - done)
            batch = [rows[i] for i in steps[number]]
            now = likelihoods(model, batch)
            margin = args.beta * ((now - before[number])[0] - (now - before[number])[1])
            lengths = torch.tensor([len(good) for (_, good), _ in batch])
            loss = (args.likelihood * -now[0] / lengths - F.logsigmoid(margin)).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total, won = total + float(loss.detach()) * len(batch), won + int((margin > 0).sum())
        log(f"pass {epoch + 1}: loss {total / len(rows):.4f}, the good reply gained in {won / len(rows):.0%} of pairs")


def likelihoods(model: Transformer, batch: list[tuple]) -> Tensor:
    """(2, pairs): log-probabilities of the good and of the bad replies."""
    both = [good for good, _ in batch] + [bad for _, bad in batch]
    return log_likelihoods(model, both).view(2, len(batch))


def best_sampling(lm: LanguageModel, said: list[list[str]], cfg: ChatConfig) -> dict[str, float]:
    """Those of SAMPLING with the largest share of good replies or of good talks, whichever is smaller; of equals the
    more varied.
    """
    found = []
    for values in SAMPLING:
        settings = dict(zip(NAMES, values, strict=True))
        figures, _ = measure(lm, said, dataclasses.replace(cfg, **settings), len(said) // 2, len(said) // 6)
        found.append((min(figures["good"], figures["good_talks"]), figures["distinct_2"], settings))
        log(f"{settings}: good {figures['good']:.1%}, talks {figures['good_talks']:.1%}, "
            f"distinct-2 {figures['distinct_2']:.3f}")  # fmt: skip
    return max(found, key=lambda row: row[:2])[2]


def main(args: Args) -> dict:
    """Make pairs, tune, choose how to sample, save; the figures before and after."""
    data = PreparedData.open(args.data)
    learned, held_out = utterances(data, data.train), utterances(data, data.val)
    draw = random.Random(args.seed)
    draw.shuffle(learned)
    sides = user_sides(learned, args.talks)
    rest = learned[-6 * max(1, args.measured_talks) :]
    cfg = ChatConfig(max_new_tokens=args.max_new_tokens, seed=args.seed)
    lm = load(args.model, "cpu", "float32")
    own = model_settings(cfg, lm.model.generation, ("max_new_tokens", "seed"))
    greedy = dataclasses.replace(own, temperature=0.0, top_p=1.0, repetition_penalty=1.0)

    def measured(lm: LanguageModel, how: ChatConfig) -> dict[str, float]:
        return measure(lm, held_out, how, args.openings, args.measured_talks)[0]

    figures = {"before": measured(lm, own), "before, greedy": measured(lm, greedy)}
    found = list(pairs(lm, sides, args))
    log(f"{len(found)} pairs of {len(sides) * TURNS} turns")
    if len(found) < args.batch_size:
        raise UserError(f"only {len(found)} of {len(sides) * TURNS} turns had both a good and a bad reply: too few to "
                        "learn from. Give more --talks or --draws, or be content: its replies are good")  # fmt: skip
    model, tokenizer = load_model(args.model)
    tune(model, found, args)
    end_ids = lm.end_ids
    save(args.out, model, tokenizer, end_ids)
    chosen = best_sampling(load(args.out, "cpu", "float32"), rest, cfg)
    model.generation = (model.generation or {}) | chosen
    save(args.out, model, tokenizer, end_ids)
    lm = load(args.out, "cpu", "float32")
    figures |= {"after": measured(lm, own), "after, greedy": measured(lm, greedy)}
    figures["after, as it says"] = measured(lm, dataclasses.replace(own, **chosen))
    result = {"pairs": len(found), "sampling": chosen, "figures": figures}
    write_text(args.out / RESULT, json_of(result))
    return result


def save(out: Path, model: Transformer, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> None:
    """Write the model directory, whole or not at all."""
    with written_whole(out) as directory:
        save_model(directory, model, tokenizer, end_ids)


def table(figures: dict[str, dict[str, float]]) -> tuple[list[str], list[list[Any]]]:
    """Headings and rows of a table of what was measured."""
    rows = [[name, *(f"{row[key]:.1%}" for key in SHARES), f"{row['distinct_2']:.3f}", row["characters"]]
            for name, row in figures.items()]  # fmt: skip
    return ["", *SHARES.values(), "distinct-2", "characters"], rows


if __name__ == "__main__":
    given = parse("preference", Args, __doc__)
    result = main(given)
    columns, rows = table(result["figures"])
    report("preference", columns, rows, result | {"machine": machine("cpu"), "settings": dataclasses.asdict(given)},
           given.json)  # fmt: skip
