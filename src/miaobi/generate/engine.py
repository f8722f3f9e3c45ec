"""Text out of a model: one prefill, then one token at a time with a KV cache."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from miaobi.config import ChatConfig, SampleConfig, SamplingConfig
from miaobi.console import warn
from miaobi.corpus.tokenizer import PAD, SEP, Tokenizer
from miaobi.device import can_compile, cpu_has_bf16, explain_memory, keep_allocations, pick_device, pick_dtype
from miaobi.errors import UserError
from miaobi.generate.sampling import next_token, penalize_repeats
from miaobi.generate.step import Step, can_step, library
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


@dataclass
class Memory:
    """What one stream's caches hold, so that a prompt that begins alike need not be read again."""

    ids: list[int] = field(default_factory=list)
    """Tokens whose keys and values are in the caches, from position 0 on."""
    caches: list[KVCache] = field(default_factory=list)

    def recall(
        self, model: Transformer, prompt_ids: list[int], streams: int, room: int, dtype: torch.dtype | None = None
    ) -> int:
        """Make the caches as long as `room`, keeping what `prompt_ids` begins with; how many tokens that is.

        dtype: of the caches; None = the model's.

        The last token of the prompt is never kept: its logits are what comes next.
        """
        shared = 0
        while shared < min(len(self.ids), len(prompt_ids) - 1) and self.ids[shared] == prompt_ids[shared]:
            shared += 1
        if not self.caches or self.caches[0].k.shape[2] < room:
            old, self.caches = self.caches, model.make_caches(streams, room, dtype)
            for new, known in zip(self.caches, old, strict=False):
                new.k[:, :, :shared], new.v[:, :, :shared] = known.k[:, :, :shared], known.v[:, :, :shared]
        self.ids = prompt_ids[:shared]
        return shared


class LanguageModel:
    """A model with its tokenizer, ready to score and to write.

    Attributes:
        end_ids: tokens that end a text or a turn.
        barred: control tokens that are never drawn, because the model was not trained on them.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        end_ids: tuple[int, ...] | None = None,
        step: Step | None = None,
    ) -> None:
        """end_ids: None = the tokenizer's end-of-text. step: the model's compiled step, if it has one."""
        self.model = model.eval()
        self.step = step
        self.tokenizer = tokenizer
        eot = () if tokenizer.eot_id is None else (tokenizer.eot_id,)
        self.end_ids = eot if end_ids is None else end_ids
        control = control_ids(tokenizer)
        ours = {SEP, PAD} <= control.keys()  # a foreign model knows best what it may write
        self.barred = tuple(id_ for id_ in control.values() if ours and id_ not in self.end_ids)

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
                if token in self.end_ids:
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
        return self.pieces((token for (token,) in self.tokens(prompt, cfg)), self.end_ids, cfg.stop)

    def pieces(self, tokens: Iterable[int], ends: Collection[int], stop: tuple[str, ...] = ()) -> Iterator[str]:
        """Text of `tokens` as they come, until one of `ends` or a stop string."""
        ids: list[int] = []
        given = 0
        for token in tokens:
            if token in ends:
                break
            ids.append(token)
            text = self.tokenizer.decode_stable(ids)
            if (end := first_stop(text, stop)) is not None:
                if end > given:
                    yield text[given:end]
                return
            ready = len(text) - held_back(text, stop)
            if ready > given:
                yield text[given:ready]
                given = ready
        rest = self.tokenizer.decode(ids)[given:]
        if rest:
            yield rest

    def tokens(self, prompt: str, cfg: SampleConfig) -> Iterator[list[int]]:
        """Token ids of all samples, one list per step, `max_new_tokens` times."""
        prompt_ids = self.tokenizer.encode(prompt) or [self.start_id()]
        return self.tokens_after(prompt_ids, cfg, self.generator(cfg.seed), cfg.num_samples, self.end_ids, self.barred)

    @torch.inference_mode()
    def tokens_after(
        self,
        prompt_ids: list[int],
        cfg: SamplingConfig,
        generator: torch.Generator,
        streams: int = 1,
        ends: Collection[int] = (),
        barred: Collection[int] = (),
        never_empty: bool = False,
        memory: Memory | None = None,
    ) -> Iterator[list[int]]:
        """Token ids that follow `prompt_ids`, one list of `streams` per step, `max_new_tokens` times.

        Learned positions cannot slide: when the block is full, the last half of it is prefilled again.

        ends: ids that end a text; to have ended texts before makes them no less likely. barred: ids never drawn.
        never_empty: the first token is none of `ends`. memory: of one stream, carried from call to call.
        """
        S = self.model.cfg.block_size
        memory = memory or Memory()
        history = torch.tensor([prompt_ids] * streams, device=self.device)  # (B, T)
        end_ids, barred_ids = self.index(ends), self.index(barred)
        seen = torch.zeros(streams, self.model.cfg.vocab_size, dtype=torch.bool, device=self.device)
        seen.scatter_(1, history, True).index_fill_(1, end_ids, False)
        window = prompt_ids[-S:]
        cache_dtype = None if self.step is None else self.step.cache_dtype
        room = min(S, len(prompt_ids) + cfg.max_new_tokens)
        shared = memory.recall(self.model, window, streams, room, cache_dtype)
        caches = memory.caches
        logits = self.prefill(history[:1, -S:][:, shared:], caches, shared)
        memory.ids = list(window)
        if never_empty:
            logits = logits.index_fill(1, end_ids, -torch.inf)
        for left in range(cfg.max_new_tokens - 1, -1, -1):
            if barred:
                logits = logits.index_fill(1, barred_ids, -torch.inf)
            token = next_token(penalize_repeats(logits, seen, cfg.repetition_penalty), cfg, generator)  # (B,)
            drawn = token.tolist()
            yield drawn
            if not left:
                return
            history = torch.cat((history, token[:, None]), dim=1)
            seen.scatter_(1, token[:, None], True)
            if caches[0].length < S:
                logits = self.advance(token[:, None], caches)
                memory.ids.append(drawn[0])
            else:
                memory.ids = []  # until the caches are whole again: Ctrl-C may come in between
                logits = self.prefill(history[:, -max(1, S // 2) :], caches)
                memory.ids = history[0, -max(1, S // 2) :].tolist()

    def generator(self, seed: int | None) -> torch.Generator:
        """Randomness for drawing; from nowhere where there is no seed."""
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return generator

    def index(self, ids: Collection[int]) -> Tensor:
        """ids that have a logit, as a tensor for indexing."""
        known = [id_ for id_ in ids if id_ < self.model.cfg.vocab_size]
        return torch.tensor(known, dtype=torch.long, device=self.device)

    def prefill(self, ids: Tensor, caches: list[KVCache], start: int = 0) -> Tensor:
        """Fill the caches with ids (B, T) from position `start`, or from 0 with (1, T) that all streams share.

        Returns the last logits (B, V).
        """
        streams = caches[0].k.shape[0]
        if ids.shape[0] == streams:
            for cache in caches:
                cache.length = start
            return self.model(ids, caches=caches, last_only=True)[:, -1]
        one = [KVCache(cache.k[:1], cache.v[:1]) for cache in caches]
        logits = self.model(ids, caches=one, last_only=True)[:, -1]
        for cache, first in zip(caches, one, strict=True):
            cache.k[1:, :, : first.length] = first.k[:, :, : first.length]
            cache.v[1:, :, : first.length] = first.v[:, :, : first.length]
            cache.length = first.length
        return logits.expand(streams, -1)

    def advance(self, tokens: Tensor, caches: list[KVCache]) -> Tensor:
        """Logits (B, V) behind tokens (B, 1): by the compiled step once it is there."""
        if self.step is not None and library() is not None:
            return self.step(tokens, caches)
        return self.model(tokens, caches=caches, last_only=True)[:, -1]

    def start_id(self) -> int:
        """What an empty prompt starts from: the end of the text before it, or a line's where texts have no end."""
        return self.end_ids[-1] if self.end_ids else (self.tokenizer.encode("\n") or [0])[-1]


def control_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Control tokens by name: those that only templates and `prepare` put into a text."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return {token.content: id_ for id_, token in added.items() if token.special}


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
    where, wish = pick_device(device or "auto"), dtype or "auto"
    model, tokenizer = load_model(name, checkpoint)
    step = None
    if where.type == "cpu" and wish != "float16" and can_compile(where) and can_step(model):
        kind = "bfloat16" if wish == "auto" else wish
        step = Step(model, kind)
        precision = torch.bfloat16 if kind == "bfloat16" and cpu_has_bf16() else torch.float32
    else:
        if wish == "int8":
            warn("int8 weights need a CPU and a C++ compiler; using --dtype=auto")
            wish = "auto"
        precision = pick_dtype(wish, where)
    return LanguageModel(model.to(where, precision), tokenizer, model.end_ids, step)


def read_prompt(start: str) -> str:
    """`--start`: text as it is, or FILE:path. Raises UserError if the file cannot be read."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start[5:])
    if not path.is_file():
        raise UserError(f"--start={start}: no such file")
    from miaobi.corpus.read import read_documents  # with its unpackers a tenth of a second, that a chat need not wait

    return "".join(read_documents([str(path)], whole=True))


def preview(
    model: Transformer, tokenizer: Tokenizer, prompt: str, tokens: int, end_ids: tuple[int, ...], is_dialogue: bool
) -> str:
    """A short continuation, or `>>>` and a message with its reply, always drawn the same way, for the log of a run."""
    lm, cfg = LanguageModel(model, tokenizer, end_ids), SampleConfig(num_samples=1, max_new_tokens=tokens)
    if not is_dialogue:
        return lm.generate(prompt, cfg)[0].text
    from miaobi.generate.chat import Chat  # which stands on this module

    chat = Chat(lm, ChatConfig(max_new_tokens=tokens, seed=cfg.seed))
    asked = chat.template.encode([{"role": "user", "content": prompt}], add_generation_prompt=True)
    # Not chat.reply: it refuses a template that fills a small block, and a sample is no reason to end a run.
    drawn = lm.tokens_after(asked, chat.cfg, lm.generator(cfg.seed), ends=chat.ends, barred=chat.unknown,
                            never_empty=True)  # fmt: skip
    return f">>>{prompt}\n" + "".join(lm.pieces((token for (token,) in drawn), chat.ends))


def timed(lm: LanguageModel, prompt: str, cfg: SampleConfig) -> tuple[list[Completion], float]:
    """Continuations of `prompt`, and the tokens per second over all streams."""
    started = time.perf_counter()
    with explain_memory(lm.device, f"{cfg.num_samples} streams were too many; try a smaller --num_samples"):
        completions = lm.generate(prompt, cfg)
    return completions, sum(c.tokens for c in completions) / (time.perf_counter() - started)
