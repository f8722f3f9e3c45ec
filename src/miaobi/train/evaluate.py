"""How well a model predicts text: nats, perplexity, bits per character and per byte."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from miaobi.console import console, log, progress, warn
from miaobi.corpus.dataset import IGNORE, Batch
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import not_finite
from miaobi.model.loss import linear_cross_entropy
from miaobi.model.transformer import Transformer, document_block_mask, document_mask
from miaobi.train.layout import Objective, is_compiled, is_sharded, no_recompilation

if TYPE_CHECKING:
    from miaobi.train.setup import Plan

WORTH = 0.05
"""Windows that are evaluated for each one trained on, from which on a GPU compiles the evaluation too: a forward pass
takes a third of both, and its graph a third of the compiler's time, so that it pays about as training's did."""


def to_device(
    batch: Batch, rows: slice, device: torch.device, flex: bool = False, dtype: torch.dtype | None = None
) -> tuple:
    """Copy rows of a batch to the device, without waiting: inputs, targets, position_ids, attention mask.

    flex: mask for the compiled FlexAttention instead of scaled_dot_product_attention. dtype: of the products, which a
    GPU wants a mask in; None = boolean.
    """

    def copied(a: np.ndarray | None) -> Tensor | None:
        if a is None:
            return None
        t = torch.from_numpy(np.ascontiguousarray(a[rows]))
        return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)

    inputs, targets, positions, documents = map(copied, batch)
    if documents is None:
        return inputs, targets, positions, None
    if flex:
        return inputs, targets, positions, document_block_mask(documents)
    return inputs, targets, positions, document_mask(documents, dtype if device.type == "cuda" else None)


@torch.no_grad()
def nats(
    model: Transformer, batch: Batch, dtype: torch.dtype, rows: slice = slice(None), compiled: Objective | None = None
) -> Tensor:
    """Sum of -log p over targets that are not IGNORE: float32, on the model's device, without waiting for it.

    compiled: the model's objective, to be computed as training compiled it.
    """
    device = model.wte.weight.device
    inputs, targets, positions, mask = to_device(batch, rows, device, dtype=dtype)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        if compiled is not None:
            return compiled(inputs, targets, positions, mask)
        return linear_cross_entropy(model.hidden(inputs, positions, mask), model.head_weight, targets)


def eager(model: Transformer) -> AbstractContextManager:
    """Run compiled blocks eagerly: on a CPU, compiling another graph would take longer than an evaluation saves."""
    if model.blocks[0]._compiled_call_impl is None:
        return nullcontext()  # set_stance imports all of dynamo
    return torch.compiler.set_stance("force_eager")


@contextmanager
def evaluating(model: Transformer, compiled: Objective | None = None) -> Iterator[None]:
    """Within the body: no dropout, eager or with what is compiled already; the model's mode is restored afterwards."""
    was_training = model.training
    model.eval()
    with eager(model) if compiled is None else no_recompilation(compiled):
        yield
    model.train(was_training)


class ForwardGraph:
    """What training compiled, compiled for evaluation too: a graph without gradients and dropout, of one shape.

    Attributes: ready, whether it is there; None = not tried yet.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective, self.ready = objective, None

    @classmethod
    def of(cls, plan: Plan, objective: Objective) -> ForwardGraph | None:
        """That of a run; None on CPUs, where the run does not compile, and where it evaluates little. By its settings,
        not by the clock: a run that goes on evaluates as it began.
        """
        cfg = plan.cfg.train
        windows = [windows for windows in (plan.val_windows, plan.train_windows) if windows is not None]
        pays = sum(len(each.inputs) for each in windows) >= WORTH * cfg.global_batch * cfg.eval_interval
        return cls(objective) if pays and plan.device.type == "cuda" and is_compiled(objective) else None

    def compiled(self, once: Callable[[Objective], object]) -> Objective | None:
        """The objective, once its graph is made by `once` with the first batch; None where the compiler fails."""
        if self.ready is None:
            self.ready = True
            started, was_training = time.perf_counter(), self.objective.training
            self.objective.eval()
            try:
                once(self.objective)
                log(f"compiled the evaluation in {time.perf_counter() - started:.0f} s")
            except torch.OutOfMemoryError:
                raise
            except Exception as e:  # as in `layout.compile_as`
                warn(f"torch.compile fails for the evaluation ({type(e).__name__}), which goes on without")
                self.ready = False
            self.objective.train(was_training)
        return self.objective if self.ready else None


def validation_nats(
    model: Transformer, windows: Batch, batch_size: int, dtype: torch.dtype, graph: ForwardGraph | None = None
) -> float:
    """Sum of nats over the scored tokens of the windows; the model's mode is restored."""
    starts, compiled = range(0, len(windows.inputs), batch_size), None
    if graph is not None and len(starts):
        compiled = graph.compiled(lambda objective: nats(model, windows, dtype, slice(batch_size), objective))
    with evaluating(model, compiled):
        found = [nats(model, windows, dtype, slice(i, i + batch_size), compiled) for i in starts]
        return sum(torch.stack(found).tolist()) if found else 0.0  # the only wait for the device


def given_and_scored(windows: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of windows in order, (n,), and whether each is scored, (n,) bool: the first of a piece is only
    context.
    """
    inputs, targets, positions, documents = windows
    used = np.ones(inputs.shape, bool) if documents is None else documents >= 0
    first = used & ((np.arange(inputs.shape[1]) if positions is None else positions) == 0)
    scored = targets != IGNORE
    following = np.where(scored, targets, np.roll(inputs, -1, axis=1))
    counted = np.stack((first, used), -1)
    return np.stack((inputs, following), -1)[counted], np.stack((np.zeros_like(scored), scored), -1)[counted]


def text_size(ids: np.ndarray, scored: np.ndarray, tokenizer: Tokenizer) -> tuple[int, int]:
    """Characters and UTF-8 bytes of the scored tokens, (n,) bool, among the tokens of dialogues, (n,).

    `<sep>` counts as a newline, other control tokens as nothing. A character with some scored bytes counts once.
    """
    is_control = np.isin(ids, list(tokenizer.backend.get_added_tokens_decoder()))
    turns = int((scored & (ids == tokenizer.sep_id)).sum()) if tokenizer.sep_id is not None else 0
    is_text = scored & ~is_control
    spelled = tokenizer.bytes_of(ids)
    if spelled is None:
        text = tokenizer.decode(ids[is_text])
        return len(text) + turns, len(text.encode()) + turns
    lengths = np.array([0 if control else len(s) for s, control in zip(spelled, is_control, strict=True)], np.int64)
    data = np.frombuffer(b"".join(s for s, length in zip(spelled, lengths, strict=True) if length), np.uint8)
    character = np.cumsum(data & 0xC0 != 0x80)  # which one a byte belongs to: all but the first of one are 10xxxxxx
    scored_bytes = np.repeat(is_text, lengths)
    return len(np.unique(character[scored_bytes])) + turns, int(scored_bytes.sum()) + turns


def mean_loss(plan: Plan, windows: Batch, graph: ForwardGraph | None = None) -> float:
    """Nats per scored token, without dropout, over windows that are divided among the ranks."""
    nats = validation_nats(plan.model, plan.world.share(windows), plan.micro, plan.dtype, graph)
    if is_sharded(plan.model):
        plan.model.reshard()  # the forward pass leaves the outermost weights gathered
    total = plan.world.sum(torch.tensor(nats, dtype=torch.float64))
    return float(total) / max(1, int((windows.targets != IGNORE).sum()))


def bits_per_char(plan: Plan, nats_per_token: float) -> float:
    """All nats of the validation text, separators included, per character.

    Of dialogues: the scored text of the windows, counted as `miaobi eval` does.
    """
    data = plan.data
    tokens, characters = len(data.val), data.val.characters
    if data.is_dialogue:
        ids, scored = given_and_scored(plan.val_windows)
        tokens, (characters, _) = int(scored.sum()), text_size(ids, scored, plan.tokenizer)
    return nats_per_token * tokens / max(1, characters) / math.log(2)


def sliding(tokens: np.ndarray, block_size: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows that score every token after the first exactly once.

    All but the first window re-read block_size - stride tokens as context, unscored.
    Yields inputs and targets, int64 (block_size,); shorter ones for a text that is shorter: a context of 131,072 tokens
    costs minutes.
    """
    block_size = min(block_size, len(tokens) - 1)
    scored = 1  # tokens[0] is context only
    while scored < len(tokens):
        step = block_size if scored == 1 else stride
        end = min(scored + step, len(tokens))
        start = max(0, end - 1 - block_size)
        inputs = np.zeros(block_size, np.int64)
        targets = np.full(block_size, IGNORE, np.int64)
        piece = tokens[start:end]
        inputs[: len(piece) - 1] = piece[:-1]
        targets[: len(piece) - 1] = piece[1:]
        targets[: scored - 1 - start] = IGNORE
        yield inputs, targets
        scored = end


def evaluate(
    model: Transformer,
    tokens: np.ndarray,
    characters: int,
    text_bytes: int,
    stride: int,
    dtype: torch.dtype,
    batch_size: int = 16,
    given: Collection[int] = (),
) -> dict:
    """Score a token sequence whose first token is context only.

    given: tokens that are never scored, such as those that begin a text. tokens: (N,). characters, text_bytes: length
    of the text that tokens[1:] encode, in code points and UTF-8 bytes. Returns what `score_batches` returns.
    """
    windows = sliding(tokens, model.cfg.block_size, stride)
    groups = iter(lambda: list(islice(windows, batch_size)), [])
    batches = (Batch(*(np.stack(side) for side in zip(*group, strict=True))) for group in groups)
    if given:
        batches = (batch._replace(targets=np.where(np.isin(batch.targets, [*given]), IGNORE, batch.targets))
                   for batch in batches)  # fmt: skip
    return score_batches(model, batches, len(tokens) - 1, characters, text_bytes, dtype)


def score_batches(
    model: Transformer,
    batches: Iterable[Batch],
    total_tokens: int,
    characters: int,
    text_bytes: int,
    dtype: torch.dtype,
) -> dict:
    """Score batches that hold every token once.

    Returns loss (nats per token), perplexity, bits_per_char, bits_per_byte, tokens, characters, seconds. Raises
    UserError for a loss that is not finite.
    """
    started = time.perf_counter()
    model.eval()
    total, scored = 0.0, 0
    with progress("{task.completed:,.0f} tokens") as bar:
        task = bar.add_task("eval", total=total_tokens, visible=console.is_terminal)
        for batch in batches:
            total += nats(model, batch, dtype).item()
            scored += int((batch.targets != IGNORE).sum())
            bar.update(task, completed=scored)
    if not math.isfinite(total):
        raise not_finite("the losses")
    return {
        "loss": total / scored,
        "perplexity": math.exp(min(total / scored, 700.0)),
        "bits_per_char": total / math.log(2) / characters,
        "bits_per_byte": total / math.log(2) / text_bytes,
        "tokens": scored,
        "characters": characters,
        "seconds": time.perf_counter() - started,
    }
