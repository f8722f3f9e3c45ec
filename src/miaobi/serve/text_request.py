"""From a request to a job for the worker: settings, streams, limits."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from miaobi.console import log
from miaobi.errors import UserError, brief
from miaobi.generate.config import SamplingConfig
from miaobi.generate.stream import Stream
from miaobi.serve.config import Serve
from miaobi.serve.errors import APIError, refused
from miaobi.serve.schemas import MOST, ResponseRequest, Sampling
from miaobi.serve.served import Prompt, ServedModel
from miaobi.serve.text import Writer
from miaobi.serve.worker import Choice, Job

SAMPLING_FIELDS = ("temperature", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
                   "seed")  # fmt: skip


@dataclass
class TextRequest:
    """What a client wants written: one request of any endpoint, with the model that is to do it."""

    model: ServedModel
    prompts: list[Prompt]
    cfg: SamplingConfig
    """Its seed is that of the first text of each prompt."""
    kind: str
    """cmpl, chatcmpl or resp: how its id begins."""
    n: int = 1
    """Texts of each prompt."""
    stop: tuple[str, ...] = ()
    logit_bias: dict[int, float] = field(default_factory=dict)
    alternatives: int | None = None
    """Log-probabilities of this many alternatives of each token; None = none."""
    is_reply: bool = False
    """A turn of a conversation: it stands alone, and is not empty."""
    scores_prompt: bool = False
    writes: bool = True
    """False: the prompt is scored, and nothing written."""

    def __post_init__(self) -> None:
        self.id, self.created = f"{self.kind}-{uuid.uuid4().hex}", int(time.time())

    @property
    def head(self) -> dict[str, Any]:
        """Fields that every answer begins with."""
        return {"id": self.id, "created": self.created, "model": self.model.name,
                "system_fingerprint": self.model.fingerprint}  # fmt: skip

    def job(self, server: Serve, is_streamed: bool) -> Job:
        """What the worker is given: choice n * i + k is text k of prompt i."""
        choices = [
            self.choice(i * self.n + k, prompt, k) for i, prompt in enumerate(self.prompts) for k in range(self.n)
        ]
        if len(choices) > MOST:
            raise refused(f"{len(choices)} texts are asked for, and {MOST} can be at a time; send several requests",
                          "n")  # fmt: skip
        return Job(choices, server.timeout, is_streamed)

    def choice(self, index: int, prompt: Prompt, number: int) -> Choice:
        """Text `number` of a prompt."""
        lm, chat = self.model.lm, self.model.chat
        ends = chat.ends if self.is_reply else lm.end_ids
        barred = chat.unknown if self.is_reply else lm.barred

        def make() -> Stream:
            generator = torch.Generator(lm.device)
            if self.cfg.seed is None:
                generator.seed()
            else:
                generator.manual_seed(self.cfg.seed + number)
            return Stream(list(prompt.ids), self.cfg, generator, ends, barred, self.is_reply, self.logit_bias,
                          self.alternatives, self.scores_prompt and number == 0)  # fmt: skip

        return Choice(index, make, Writer(lm, ends, prompt.before, self.stop), not self.writes)

    def usage(self, job: Job) -> dict[str, Any]:
        """Tokens, in OpenAI's words."""
        read, wrote = sum(len(prompt.ids) for prompt in self.prompts), job.tokens
        return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote,
                "prompt_tokens_details": {"cached_tokens": min(job.recalled, read)}}  # fmt: skip


def sampling_settings(request: Sampling | ResponseRequest, defaults: SamplingConfig, tokens: int) -> SamplingConfig:
    """How a request is to be sampled: its own values over `defaults`. Raises APIError."""
    values = {name: value for name in SAMPLING_FIELDS if (value := getattr(request, name, None)) is not None}
    if values.get("top_k") == -1:  # vLLM's word for all
        values["top_k"] = 0
    if request.top_p is not None:
        values["top_p"] = max(request.top_p, 1e-6)  # the likeliest always stays
    if values.get("min_p") == 1:
        values["min_p"] = 1 - 1e-6
    try:
        return replace(defaults, max_new_tokens=tokens, **values)
    except UserError as e:
        raise refused(str(e), None) from e


def logit_bias(request: Sampling, vocab_size: int) -> dict[int, float]:
    """Its logit_bias by id. Raises APIError for ids that there are not."""
    found = {int(id_): value for id_, value in (request.logit_bias or {}).items()}
    if wrong := [id_ for id_ in found if id_ >= vocab_size]:
        raise refused(f"logit_bias names the token {wrong[0]}; this model's go to {vocab_size - 1}", "logit_bias")
    return found


def allowed_tokens(wanted: int | None, default: int, server: Serve, param: str) -> int:
    """Tokens to write at most. Raises APIError for more than the server allows."""
    if wanted is not None and wanted > server.max_tokens:
        raise refused(f"{param} is too large: {wanted}. This server writes {server.max_tokens} tokens at most "
                      "(miaobi serve --max_tokens)", param)  # fmt: skip
    return min(default, server.max_tokens) if wanted is None else wanted


def check_length(prompts: Sequence[Prompt], block: int, param: str) -> None:
    """Raises APIError for a prompt that the model cannot see whole."""
    if (longest := max(len(prompt.ids) for prompt in prompts)) > block:
        raise APIError(400, f"This model's maximum context length is {block} tokens. However, your {param} has "
                       f"{longest} tokens. Please reduce its length.", "context_length_exceeded", param)  # fmt: skip


def model_of(model: ServedModel | None, name: str | None) -> ServedModel:
    """The model that a request names. Raises APIError where there is none of that name."""
    if model is None or (name is not None and name != model.name):
        there = f"; there is {model.name!r}" if model is not None else ": no language model is served here"
        raise APIError(404, f"The model {brief(name)} does not exist{there}", "model_not_found", "model")
    return model


def log_prompt(server: Serve, what: Any) -> None:
    """Write a prompt into the log, where --log_prompts says so."""
    if server.log_prompts:
        log(brief(what) if not isinstance(what, str) else what[:1000])
