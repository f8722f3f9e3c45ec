"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from miaobi.generate.config import SamplingConfig


def drawing(cfg: SamplingConfig) -> tuple:
    """What of the settings `next_token` and `penalize_repeats` look at: streams that agree on it are drawn together."""
    return cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty


def penalize_repeats(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that already occurred less likely (CTRL, arXiv:1909.05858).

    Positive logits are divided by the penalty, negative ones multiplied: both move down.
    logits: (B, V). seen: (B, V) bool. Returns (B, V).
    """
    if penalty == 1.0:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: Tensor, cfg: SamplingConfig) -> Tensor:
    """Temperature, then top-k, top-p (nucleus, arXiv:1904.09751) and min-p (arXiv:2407.01082): -inf where cut.

    logits: (B, V) float32. Returns (B, V). The likeliest token always stays.
    """
    logits = logits / cfg.temperature
    if 0 < cfg.top_k < logits.shape[-1]:
        kth = logits.topk(cfg.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if cfg.top_p < 1.0:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        cut = p.cumsum(-1) - p >= cfg.top_p  # probability before this token already suffices
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, index, cut), -torch.inf)
    if cfg.min_p > 0.0:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < cfg.min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits


def next_token(logits: Tensor, cfg: SamplingConfig, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row: the likeliest at temperature 0, else drawn.

    Draws by the exponential race argmax(p / e), e ~ Exp(1): the distribution of multinomial, without its host sync.
    logits: (B, V). generators: one for each row, so that what is drawn there does not depend on the others.
    Returns (B,) int64.
    """
    logits = logits.float()
    if cfg.temperature == 0:
        return logits.argmax(-1)
    likeliest = None
    if 0 < cfg.top_k < logits.shape[-1]:  # the race is run by these alone: over all V it cost more than a small model
        logits, likeliest = logits.topk(cfg.top_k)
    p = filter_logits(logits, cfg).softmax(-1)
    race = torch.empty_like(p)
    for row, generator in zip(race, generators, strict=True):
        row.exponential_(generator=generator)
    drawn = (p / race).argmax(-1)
    return drawn if likeliest is None else likeliest.gather(1, drawn[:, None]).squeeze(1)


def drawn_in_groups(logits: Tensor, seen: Tensor, how: Sequence[tuple[SamplingConfig, torch.Generator]]) -> Tensor:
    """One token for each row of logits and seen, (B, V), by its settings and its generator: (B,). Rows whose settings
    agree are drawn together.
    """
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    groups: dict[tuple, list[int]] = {}
    for row, (cfg, _) in enumerate(how):
        groups.setdefault(drawing(cfg), []).append(row)
    for rows in groups.values():
        members, cfg = rows if len(groups) > 1 else slice(len(logits)), how[rows[0]][0]
        penalized = penalize_repeats(logits[members], seen[members], cfg.repetition_penalty)
        tokens[members] = next_token(penalized, cfg, [how[row][1] for row in rows])
    return tokens


class Drawing(NamedTuple):
    """What decides how a row's next token is drawn, beside its logits and the tokens it has seen."""

    seed: int
    count: int
    """Tokens before it."""
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float

    @staticmethod
    def numbers(rows: Sequence[Drawing], vocab_size: int) -> tuple[Tensor, Tensor]:
        """Those of B rows, on the CPU: int64 (3, B), of which the last is the rank of the last token that top_k keeps,
        and float32 (4, B). What is switched off is what cuts nothing.
        """
        integers = [(row.seed, row.count, min(row.top_k or vocab_size, vocab_size) - 1 if row.temperature else 0)
                 for row in rows]  # fmt: skip
        floats = [(row.temperature, row.top_p if row.top_p < 1.0 else 2.0, row.min_p, row.repetition_penalty)
                  for row in rows]  # fmt: skip
        return torch.tensor(integers).T.contiguous(), torch.tensor(floats, dtype=torch.float32).T.contiguous()


TIES = 32
"""Tokens as likely as the last that top_k keeps, which then all stay: of bf16 logits many are alike, and which of them
comes first may depend on the rows beside."""


class Kind(NamedTuple):
    """What drawing some rows takes; what none of them asks for is left out."""

    most: int
    """Likeliest tokens of a row that are looked at; 1 where all rows take the likeliest."""
    cuts: bool
    """By top_p or min_p."""
    penalizes: bool
    differs: bool = False
    """Some rows take the likeliest, others do not."""

    @classmethod
    def of(cls, rows: Sequence[Drawing], vocab_size: int) -> Kind:
        """That of rows that are drawn together: a power of two of tokens, so that few kinds serve all."""
        drawing = [row for row in rows if row.temperature]
        most = max((row.top_k or vocab_size for row in drawing), default=1)
        return cls(min(vocab_size, 1 << (most + TIES - 1).bit_length()) if drawing else 1,
                   any(row.top_p < 1.0 or row.min_p > 0.0 for row in drawing),
                   any(row.repetition_penalty != 1.0 for row in rows), 0 < len(drawing) < len(rows))  # fmt: skip


def drawn(logits: Tensor, seen: Tensor, integers: Tensor, floats: Tensor, keys: Tensor, kind: Kind) -> Tensor:
    """One token per row, by its own settings, as `penalize_repeats`, `filter_logits` and `next_token` have it: no host
    takes part in it, so that it can be recorded, and any number of rows takes as many launches as one.

    logits, seen: (B, V). integers, floats: `Drawing.numbers`. keys: `token_keys`. kind: `Kind.of`, or more than that.
    Returns (B,) int64.
    """
    seeds, counts, last = integers
    temperature, top_p, min_p, penalty = floats.unsqueeze(-1)  # (B, 1) each
    logits = logits.float()
    if kind.penalizes:
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if kind.most == 1:
        return logits.argmax(-1)
    ordered, index = logits.topk(kind.most)
    heat = temperature.masked_fill(temperature == 0, 1.0) if kind.differs else temperature
    p = (ordered / heat).masked_fill_(ordered < ordered.gather(1, last[:, None]), -torch.inf).softmax(-1)
    if kind.cuts:
        p = p.masked_fill((p.cumsum(-1) - p >= top_p) | (p < min_p * p[:, :1]), 0.0)
    race = uniform(seeds, counts, keys[index]).log_() / p  # the largest of p / -log(u), whose negative inverse it is
    won = index.gather(1, race.argmax(-1, keepdim=True)).squeeze(1)
    return torch.where(temperature.squeeze(1) == 0, logits.argmax(-1), won) if kind.differs else won


GOLDEN = -0x61C8864680B583EB
FIRST, SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""Of SplitMix64 (Steele et al., OOPSLA 2014), as are the shifts of `token_keys`."""


def token_keys(vocab_size: int, device: torch.device) -> Tensor:
    """A random number for each token, (V,) int64: always the same ones."""
    x = GOLDEN * torch.arange(1, vocab_size + 1, device=device)
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * FIRST
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * SECOND
    return x ^ (x >> 31 & (1 << 33) - 1)


def uniform(seeds: Tensor, counts: Tensor, keys: Tensor) -> Tensor:
    """Variates between 0 and 1, neither included, that are functions of (seed, count, token): of no state, and so of
    no order or company.

    seeds, counts: (B,) int64. keys: (B, V) of the tokens. Returns float32 (B, V).
    """
    x = (torch.add(seeds, counts, alpha=GOLDEN)[:, None] ^ keys) * FIRST
    x = (x ^ (x >> 32)) * SECOND
    return ((x >> 40 & (1 << 23) - 1) + 0.5) * 2.0**-23
