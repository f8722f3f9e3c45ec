"""Text out of a model: one prefill, then one token at a time with a KV cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from miaobi.config import SampleConfig
from miaobi.corpus.read import read_documents
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.device import explain_memory, keep_allocations, pick_device, pick_dtype
from miaobi.errors import UserError
from miaobi.generate.sampling import next_token, penalize_repeats
from miaobi.model.checkpoint import load_model
from miaobi.model.transformer import KVCache, Transformer


@dataclass
class Completion:
    """One continuation."""

    text: str
    """Prompt and continuation."""
    tokens: int
    """Tokens written."""
    finish_reason: str
    """stop = end of text or a stop string; length = max_new_tokens."""


class LanguageModel:
    """A model with its tokenizer, ready to score and to write."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.wte.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.model.wte.weight.dtype

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Next-token logits: ids (B, T) int64 -> (B, T, V) float32."""
        return self.model(ids.to(self.device)).float()

    def generate(self, prompt: str, cfg: SampleConfig | None = None, **overrides) -> list[Completion]:
        """`num_samples` continuations of `prompt` in one batch; overrides are fields of SampleConfig."""
        cfg = replace(cfg or SampleConfig(), **overrides)
        done = [Completion(prompt, 0, "length") for _ in range(cfg.num_samples)]
        written: list[list[int]] = [[] for _ in done]
        running = [True] * len(done)
        ends: list[int | None] = [None] * len(done)  # where a stop string cuts the continuation
        for tokens in self.tokens(prompt, cfg):
            for i, token in enumerate(tokens):
                if not running[i]:
                    continue
                done[i].tokens += 1
                if token == self.tokenizer.eot_id:
                    running[i], done[i].finish_reason = False, "stop"
                    continue
                written[i].append(token)
                if cfg.stop:
                    ends[i] = first_stop(self.tokenizer.decode(written[i]), cfg.stop)
                    if ends[i] is not None:
                        running[i], done[i].finish_reason = False, "stop"
            if not any(running):
                break
        for i, completion in enumerate(done):
            completion.text = prompt + self.tokenizer.decode(written[i])[: ends[i]]
        return done

    def stream(self, prompt: str, cfg: SampleConfig | None = None, **overrides) -> Iterator[str]:
        """Pieces of one continuation as they are written; together they are what `generate` gives for one sample.

        Text that could still turn out to begin a stop string, or half a character, is held back.
        """
        cfg = replace(cfg or SampleConfig(), **overrides, num_samples=1)
        ids: list[int] = []
        given = 0
        for (token,) in self.tokens(prompt, cfg):
            if token == self.tokenizer.eot_id:
                break
            ids.append(token)
            text = self.tokenizer.decode_stable(ids)
            if (end := first_stop(text, cfg.stop)) is not None:
                if end > given:
                    yield text[given:end]
                return
            ready = len(text) - held_back(text, cfg.stop)
            if ready > given:
                yield text[given:ready]
                given = ready
        rest = self.tokenizer.decode(ids)[given:]
        if rest:
            yield rest

    @torch.inference_mode()
    def tokens(self, prompt: str, cfg: SampleConfig) -> Iterator[list[int]]:
        """Token ids of all samples, one list per step, `max_new_tokens` times.

        Learned positions cannot slide: when the block is full, the last half of it is prefilled again.
        """
        S = self.model.cfg.block_size
        prompt_ids = self.tokenizer.encode(prompt) or [self.start_id()]
        generator = torch.Generator(self.device).manual_seed(cfg.seed)
        history = torch.tensor([prompt_ids] * cfg.num_samples, device=self.device)  # (B, T)
        seen = torch.zeros(cfg.num_samples, self.model.cfg.vocab_size, dtype=torch.bool, device=self.device)
        seen.scatter_(1, history, True)
        caches = self.model.make_caches(cfg.num_samples, min(S, len(prompt_ids) + cfg.max_new_tokens))
        logits = self.prefill(history[:1, -S:], caches)
        for left in range(cfg.max_new_tokens - 1, -1, -1):
            token = next_token(penalize_repeats(logits, seen, cfg.repetition_penalty), cfg, generator)  # (B,)
            yield token.tolist()
            if not left:
                return
            history = torch.cat((history, token[:, None]), dim=1)
            seen.scatter_(1, token[:, None], True)
            if caches[0].length < S:
                logits = self.model(token[:, None], caches=caches, last_only=True)[:, -1]
            else:
                logits = self.prefill(history[:, -max(1, S // 2) :], caches)

    def prefill(self, ids: Tensor, caches: list[KVCache]) -> Tensor:
        """Fill the caches from position 0 with ids (B, T), or (1, T) shared by all streams; last logits (B, V)."""
        streams = caches[0].k.shape[0]
        if ids.shape[0] == streams:
            for cache in caches:
                cache.length = 0
            return self.model(ids, caches=caches, last_only=True)[:, -1]
        one = [KVCache(cache.k[:1], cache.v[:1]) for cache in caches]
        logits = self.model(ids, caches=one, last_only=True)[:, -1]
        for cache, first in zip(caches, one, strict=True):
            cache.k[1:, :, : first.length] = first.k[:, :, : first.length]
            cache.v[1:, :, : first.length] = first.v[:, :, : first.length]
            cache.length = first.length
        return logits.expand(streams, -1)

    def start_id(self) -> int:
        """What an empty prompt starts from: the end of the text before it."""
        return self.tokenizer.eot_id if self.tokenizer.eot_id is not None else 0


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the first stop string begins in `text`, or None."""
    found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return min(found, default=None)


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """Characters at the end of `text` that could begin a stop string."""
    return max(
        (n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0
    )


def load(
    name: str | Path, device: str | None = None, dtype: str | None = None, checkpoint: str = "best"
) -> LanguageModel:
    """Load a MODEL: a run directory or a Hugging Face model directory.

    device, dtype: as in `miaobi sample`; None = auto. Raises UserError if there is no whole model.
    """
    keep_allocations()
    where = pick_device(device or "auto")
    precision = pick_dtype(dtype or "auto", where)
    model, tokenizer = load_model(name, checkpoint)
    return LanguageModel(model.to(where, precision), tokenizer)


def read_prompt(start: str) -> str:
    """`--start`: text as it is, or FILE:path. Raises UserError if the file cannot be read."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start[5:])
    if not path.is_file():
        raise UserError(f"--start={start}: no such file")
    return "".join(read_documents([str(path)], whole=True))


def preview(model: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int) -> str:
    """A short continuation, always drawn the same way, for the log of a training run."""
    cfg = SampleConfig(num_samples=1, max_new_tokens=tokens)
    return LanguageModel(model, tokenizer).generate(prompt, cfg)[0].text


def timed(lm: LanguageModel, prompt: str, cfg: SampleConfig) -> tuple[list[Completion], float]:
    """Continuations of `prompt`, and the tokens per second over all streams."""
    started = time.perf_counter()
    with explain_memory(lm.device, f"{cfg.num_samples} streams were too many; try a smaller --num_samples"):
        completions = lm.generate(prompt, cfg)
    return completions, sum(c.tokens for c in completions) / (time.perf_counter() - started)
