"""A text being written, as `slots` advances it: tokens, the sampling settings, and what is reported about them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from miaobi.errors import not_finite
from miaobi.generate.config import SamplingConfig
from miaobi.generate.sampling import Drawing
from miaobi.generate.speculate import PromptLookup


@dataclass(frozen=True)
class Score:
    """What the model thought of a token: its own distribution, before temperature, penalties and bars."""

    logprob: float
    """Natural logarithm of the token's probability."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with theirs, likeliest first."""


@dataclass(eq=False)
class Stream:
    """A text being written."""

    ids: list[int]
    """Tokens of the prompt, at least one; those written are added."""
    cfg: SamplingConfig
    generator: torch.Generator
    ends: Collection[int] = ()
    """Tokens that end a text; to have ended texts before makes them no less likely."""
    barred: Collection[int] = ()
    """Tokens never drawn."""
    never_empty: bool = False
    """The first token is none of `ends`."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    alternatives: int | None = None
    """Score each token, and this many of the likeliest; None = do not."""
    scores_prompt: bool = False
    """Score the prompt's tokens too, all but the first; it may be no longer than the block."""
    left: int = field(init=False)
    """Tokens still to come."""
    prompt: int = field(init=False)
    """Tokens of the prompt."""
    recalled: int = field(init=False, default=0)
    """Of these, how many were known from another stream."""
    scores: list[Score] = field(init=False, default_factory=list)
    """Of the tokens written, where `alternatives` asks for them."""
    prompt_scores: list[Score] = field(init=False, default_factory=list)
    own_seed: int | None = None
    """See `drawing`."""
    lookup: PromptLookup = field(init=False, default_factory=PromptLookup)
    """What may come next, where several tokens at once can be verified."""

    def __post_init__(self) -> None:
        self.left, self.prompt = self.cfg.max_new_tokens, len(self.ids)

    def drawing(self) -> Drawing:
        """How the next token is drawn where that depends on numbers alone; the first call draws the stream's seed."""
        if self.own_seed is None:
            self.own_seed = torch.randint(1 << 62, (), generator=self.generator, device=self.generator.device).item()
        cfg = self.cfg
        return Drawing(self.own_seed, len(self.ids), cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p,
                       cfg.repetition_penalty)  # fmt: skip

    @property
    def is_plain(self) -> bool:
        """Whether nothing but `drawing` decides its next token, and nothing else is asked about that."""
        return not self.has_bias and self.alternatives is None

    @property
    def has_bias(self) -> bool:
        """Whether `bias` changes anything."""
        return bool(self.logit_bias or self.cfg.presence_penalty or self.cfg.frequency_penalty)

    def bias(self, logits: Tensor) -> None:
        """Add to logits (V,) in place what `logit_bias` says, and OpenAI's penalties of tokens already written: once
        for presence, once for each time for frequency. Those of the prompt do not count, as in vLLM.
        """
        change = dict(self.logit_bias)
        if self.cfg.presence_penalty or self.cfg.frequency_penalty:
            for id_, times in Counter(self.ids[self.prompt :]).items():
                penalty = self.cfg.presence_penalty + times * self.cfg.frequency_penalty
                change[id_] = change.get(id_, 0.0) - penalty
        if change:
            places = torch.tensor(list(change), device=logits.device)
            logits[places] += torch.tensor(list(change.values()), dtype=logits.dtype, device=logits.device)


def score(logits: Tensor, tokens: Tensor, alternatives: int) -> list[Score]:
    """Scores of tokens (n,) by the logits (n, V) that they were drawn from. Raises UserError where these are nan."""
    logprobs = logits.float().log_softmax(-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
    if any(map(math.isnan, own)):
        raise not_finite("the logits")
    if not alternatives:
        return [Score(value) for value in own]
    values, ids = logprobs.topk(min(alternatives, logprobs.shape[-1]))
    return [Score(value, tuple(zip(some, chances, strict=True)))
            for value, some, chances in zip(own, ids.tolist(), values.tolist(), strict=True)]  # fmt: skip
