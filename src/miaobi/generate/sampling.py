"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Sequence

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
