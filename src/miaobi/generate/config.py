"""How text is written: frozen dataclasses whose attribute docstrings are the help of `sample` and `chat`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miaobi.config import OptionalModel, Where
from miaobi.errors import UserError
from miaobi.kinds import Location, Positional
from miaobi.model.generation import SAMPLING, check_sampling

GREEDY = 1e-5
"""A temperature below this is 0: one token has all of the probability, and logits divided by less overflow."""


@dataclass(frozen=True)
class SamplingConfig(Where):
    """How tokens are drawn, and on what."""

    max_new_tokens: int = 500
    """Tokens written at most."""
    temperature: float = 1.0
    """Below 1 = safer, above 1 = wilder, 0 = always the likeliest token."""
    top_k: int = 0
    """Keep only this many likeliest tokens; 0 = all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this much probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest one."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that already occurred less likely (CTRL, arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that were written before, once (OpenAI's; -2 to 2)."""
    frequency_penalty: float = 0.0
    """Taken from them once for each time that they were written (OpenAI's; -2 to 2)."""
    seed: int | None = None
    """Same seed, same text; None = another text each time."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Precision of the weights; auto = the fastest that loses nothing; int8 = faster still, on a CPU."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        for name in SAMPLING:
            check_sampling(name, getattr(self, name))
        if self.temperature < GREEDY:
            object.__setattr__(self, "temperature", 0.0)
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2.0 <= getattr(self, name) <= 2.0:
                raise UserError(f"{name} is {getattr(self, name)}; give a number from -2 to 2 (0 = none)")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; give a whole number of at most 64 bits")


@dataclass(frozen=True)
class SampleConfig(SamplingConfig):
    """Continuations of a prompt."""

    start: str = "\n"
    """The prompt, or FILE:path for a file that holds it."""
    num_samples: int = 10
    """Continuations, all in one batch."""
    temperature: float = 0.8
    top_k: int = 200
    seed: int = 1337
    """Same seed, same text."""
    stop: tuple[str, ...] = ()
    """End a continuation before any of these strings."""
    stream: bool = False
    """Print the text as it is written, one sample after another."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_samples < 1:
            raise UserError(f"num_samples is {self.num_samples}; it must be at least 1")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))


@dataclass(frozen=True)
class ChatConfig(SamplingConfig):
    """Replies in a conversation."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.9
    repetition_penalty: float = 1.2
    enable_thinking: bool | None = None
    """For templates that ask (Qwen3's): whether the model thinks before it answers. Default: as the template has it."""


@dataclass(frozen=True)
class SampleRequest(SampleConfig, OptionalModel):
    """`miaobi sample`: a model, and how it continues a prompt."""

    def __post_init__(self) -> None:
        OptionalModel.__post_init__(self)
        SampleConfig.__post_init__(self)


@dataclass(frozen=True)
class ChatRequest(ChatConfig, OptionalModel):
    """`miaobi chat`: a model, and how it replies."""

    model: Positional[Location] = ""
    """Run directory, model directory, hub name, or the CONFIG.yaml of a run. --out_dir=RUN says the same. Default: the
    model that comes with miaobi."""

    def __post_init__(self) -> None:
        OptionalModel.__post_init__(self)
        ChatConfig.__post_init__(self)
