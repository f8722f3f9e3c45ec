"""Text out of a model: prompts in, continuations out."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from miaobi.console import log, token_bar, warn
from miaobi.corpus.tokenizer import PAD, SEP, Tokenizer
from miaobi.device import can_compile, cpu_has_bf16, explain_memory, keep_allocations, pick_device, pick_dtype
from miaobi.errors import UserError, number_of
from miaobi.generate.config import SampleConfig
from miaobi.generate.cpu_step import CpuStep, can_step
from miaobi.generate.cuda_step import CudaStep
from miaobi.generate.slots import Slots
from miaobi.generate.step import Step
from miaobi.generate.stream import Stream
from miaobi.model.checkpoint import load_model, model_directory
from miaobi.model.transformer import Transformer

PROMPT_BYTES = 2 << 20
"""Of a file that --start names: a prompt takes 250 times its size in memory while it becomes tokens."""
SLOTS = {"cuda": 256, "cpu": 32}  # streams at once; from there on a step takes longer by as much as it does more


@dataclass
class Completion:
    """One continuation."""

    text: str
    """Prompt and continuation."""
    tokens: int
    """Tokens written."""
    finish_reason: str
    """stop = end of text or a stop string; length = max_new_tokens."""


class Draft:
    """A continuation that is being written."""

    def __init__(
        self, lm: LanguageModel, prompt: str, before: list[int], stop: tuple[str, ...], ends: Collection[int]
    ) -> None:
        """before: ids of the prompt. ends: tokens that end the text."""
        self.lm, self.prompt, self.before, self.stop, self.ends = lm, prompt, before, stop, ends
        self.ids: list[int] = []
        self.end: int | None = None  # where a stop string cuts it
        self.completion = Completion(prompt, 0, "length")

    @property
    def ended(self) -> bool:
        """Whether the text ended before its length did."""
        return self.completion.finish_reason == "stop"

    def take(self, token: int) -> None:
        """Write one more token; nothing once the text has ended."""
        if self.ended:
            return
        self.completion.tokens += 1
        if token in self.ends:
            self.completion.finish_reason = "stop"
            return
        self.ids.append(token)
        if self.stop:
            self.end = first_stop(self.text, self.stop)
        if self.end is not None:
            self.completion.finish_reason = "stop"

    @property
    def text(self) -> str:
        """What was written behind the prompt."""
        return self.lm.tokenizer.decode(self.ids, self.before)

    def finish(self) -> Completion:
        """The whole text."""
        self.completion.text = self.prompt + self.text[: self.end]
        return self.completion


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
        path: Path | None = None,
    ) -> None:
        """end_ids: None = the tokenizer's end-of-text. step: the model's fast step, if it has one. path: the model
        directory that it was read from.
        """
        self.path = path
        self.model = model.eval()
        self.step = step
        self.tokenizer = tokenizer
        eot = () if tokenizer.eot_id is None else (tokenizer.eot_id,)
        self.end_ids = eot if end_ids is None else end_ids
        ours = is_ours(tokenizer)  # a foreign model knows best what it may write
        self.barred = tuple(id_ for id_ in control_ids(tokenizer).values() if ours and id_ not in self.end_ids)

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
        """`num_samples` continuations of `prompt`; overrides are fields of SampleConfig."""
        cfg = replace(cfg or SampleConfig(), **overrides)
        return list(self.complete([prompt] * cfg.num_samples, cfg))

    def complete(
        self,
        prompts: Iterable[str],
        cfg: SampleConfig | None = None,
        wrote: Callable[[int], None] = lambda tokens: None,
        **overrides,
    ) -> Iterator[Completion]:
        """One continuation of each prompt, in their order and as many at a time as go well together; where one ends,
        the next begins. `prompts` are taken when there is room for them. The nth has the seed `seed + n`.

        wrote: called after each step with the number of tokens it wrote.
        """
        cfg = replace(cfg or SampleConfig(), **overrides)

        def begun() -> Iterator[tuple[Stream, Draft]]:
            for number, prompt in enumerate(prompts):
                stream = self.open(prompt, cfg, number)
                before = self.ids_before(prompt, stream.ids)
                yield stream, Draft(self, prompt, before, cfg.stop, self.end_ids)

        return self.written(begun(), wrote)

    def written(
        self, begun: Iterator[tuple[Stream, Draft]], wrote: Callable[[int], None] = lambda tokens: None
    ) -> Iterator[Completion]:
        """The texts of streams and their drafts, as `complete` has it."""
        first = list(islice(begun, SLOTS.get(self.device.type, SLOTS["cpu"])))
        queue, slots = enumerate(chain(first, begun)), self.slots(max(1, len(first)))
        drafts: dict[Stream, tuple[int, Draft]] = {}
        done: dict[int, Completion] = {}
        next_number = 0
        while True:
            for number, (stream, draft) in islice(queue, slots.free):
                drafts[stream] = number, draft
                slots.add(stream)
            if not drafts:
                return
            drawn = slots.advance()
            wrote(len(drawn))
            for stream, token in drawn:
                drafts[stream][1].take(token)
            for stream in [stream for stream, (_, draft) in drafts.items() if draft.ended or not stream.left]:
                slots.end(stream)
                number, draft = drafts.pop(stream)
                done[number] = draft.finish()
            while next_number in done:
                yield done.pop(next_number)
                next_number += 1

    def stream(self, prompt: str, cfg: SampleConfig | None = None, **overrides) -> Iterator[str]:
        """Pieces of one continuation as they are written; together they are what `generate` gives for one sample.

        Text that could still turn out to begin a stop string, or half a character, is held back.
        """
        cfg = replace(cfg or SampleConfig(), **overrides, num_samples=1)
        stream = self.open(prompt, cfg)
        before = self.ids_before(prompt, stream.ids)
        return self.pieces(self.slots().write(stream), self.end_ids, cfg.stop, before)

    def pieces(
        self, tokens: Iterable[int], ends: Collection[int], stop: tuple[str, ...] = (), before: Sequence[int] = ()
    ) -> Iterator[str]:
        """Text of `tokens` as they come, until one of `ends` or a stop string.

        before: ids of the text that it goes on from; a reply in a conversation stands alone.
        """
        ids: list[int] = []
        emitted = 0
        for token in tokens:
            if token in ends:
                break
            ids.append(token)
            text = self.tokenizer.decode_stable(ids, before)
            if (end := first_stop(text, stop)) is not None:
                if end > emitted:
                    yield text[emitted:end]
                return
            ready = len(text) - held_back(text, stop)
            if ready > emitted:
                yield text[emitted:ready]
                emitted = ready
        rest = self.tokenizer.decode(ids, before)[emitted:]
        if rest:
            yield rest

    def tokens(self, prompt: str, cfg: SampleConfig) -> Iterator[int]:
        """Token ids of one continuation, `max_new_tokens` of them."""
        return self.slots().write(self.open(prompt, cfg))

    def slots(self, size: int = 1) -> Slots:
        """Room for `size` streams at once."""
        return Slots(self.model, size, self.step)

    def open(self, prompt: str, cfg: SampleConfig, number: int = 0) -> Stream:
        """The stream that goes on from `prompt`; `number` it among those of one seed."""
        ids = self.tokenizer.encode_prompt(prompt) or [self.start_id()]
        seed = None if cfg.seed is None else cfg.seed + number
        return Stream(ids, cfg, self.generator(seed), self.end_ids, self.barred)

    def ids_before(self, prompt: str, ids: list[int]) -> list[int]:
        """Ids that the text behind a prompt goes on from: the prompt's own, but none where the text begins anew, or
        behind a blank that the ids do not have.
        """
        blank = self.tokenizer.forgets_blanks and prompt[-1:].isspace()
        return list(ids) if prompt and not blank else []

    def generator(self, seed: int | None) -> torch.Generator:
        """The generator of the draws; seeded by the system where there is no seed."""
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return generator

    def start_id(self) -> int:
        """What an empty prompt starts from: the end of the text before it, or a line's where texts have no end."""
        return self.end_ids[-1] if self.end_ids else (self.tokenizer.encode("\n") or [0])[-1]


def control_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Control tokens by name: those that only templates and `prepare` put into a text."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return {token.content: id_ for id_, token in added.items() if token.special}


def is_ours(tokenizer: Tokenizer) -> bool:
    """Whether it is of our own making, with our control tokens."""
    return {SEP, PAD} <= control_ids(tokenizer).keys()


def text_ends(model: Transformer, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a text of a model just read: those its directory names and has; else, of a foreign model, the
    tokenizer's own. One of ours that names none saw none.
    """
    ends, own = tuple(model.end_ids), tokenizer.eot_id
    if not ends and not is_ours(tokenizer) and own is not None and own < model.cfg.vocab_size:
        ends = (own,)
        log(f"the model names no token that ends a text; texts end with {tokenizer.backend.id_to_token(own)}")
    return ends


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the first stop string begins in `text`, or None."""
    positions = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return min(positions, default=None)


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
    where, precision_name = pick_device(device or "auto"), dtype or "auto"
    path = model_directory(name, checkpoint)
    model, tokenizer = load_model(path)
    step: Step | None = None
    if where.type == "cpu" and precision_name != "float16" and can_compile(where) and can_step(model):
        auto = "int8" if model.quantized == "int8" else "bfloat16"  # int4 is widened: the step has no 4 bits
        kind = auto if precision_name == "auto" else precision_name
        step = CpuStep(model, kind)
        precision = torch.bfloat16 if kind == "bfloat16" and cpu_has_bf16() else torch.float32
    else:
        if precision_name == "int8":
            warn("int8 weights need a CPU and a C++ compiler; using --dtype=auto")
            precision_name = "auto"
        precision = pick_dtype(precision_name, where)
    model = model.to(where, precision)
    if where.type == "cuda":
        step = CudaStep(model)
    return LanguageModel(model, tokenizer, text_ends(model, tokenizer), step, path)


def read_prompt(start: str) -> str:
    """`--start`: text as it is, or FILE:path. Raises UserError if the file cannot be read."""
    if not start.startswith("FILE:"):
        return start
    path = Path(start[5:]).expanduser()
    if not path.is_file():
        raise UserError(f"--start={start}: no such file")
    from miaobi.corpus.documents import (
        read_documents,  # with its unpackers a tenth of a second, that a chat need not wait
    )

    length = path.stat().st_size
    text = "".join(read_documents([str(path)], "text", whole=True)) if length <= PROMPT_BYTES else ""  # of any name
    length = max(length, len(text))  # it may have been packed
    if length > PROMPT_BYTES:
        raise UserError(f"--start={start}: {number_of(length, 'byte')} are too many for a prompt (at most "
                        f"{PROMPT_BYTES:,}); the model sees the end, as much as its context holds")  # fmt: skip
    return text


def timed(lm: LanguageModel, prompt: str, cfg: SampleConfig) -> tuple[list[Completion], float]:
    """Continuations of `prompt`, and the tokens per second over all streams."""
    started = time.perf_counter()
    with (
        explain_memory(lm.device, f"too many streams ({cfg.num_samples}); try a smaller --num_samples"),
        token_bar("sample", cfg.num_samples * cfg.max_new_tokens) as wrote,
    ):
        completions = list(lm.complete([prompt] * cfg.num_samples, cfg, wrote))
    return completions, sum(c.tokens for c in completions) / (time.perf_counter() - started)
