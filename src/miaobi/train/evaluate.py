"""How well a model predicts text: nats, perplexity, bits per character and per byte."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from miaobi.console import console, progress
from miaobi.corpus.dataset import IGNORE, Batch
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import not_finite
from miaobi.model.loss import linear_cross_entropy
from miaobi.model.transformer import Transformer, document_block_mask, document_mask
from miaobi.train.layout import is_sharded

if TYPE_CHECKING:
    from miaobi.train.setup import Plan


def to_device(batch: Batch, rows: slice, device: torch.device, flex: bool = False) -> tuple:
    """Copy rows of a batch to the device, without waiting: inputs, targets, position_ids, attention mask.

    flex: mask for the compiled FlexAttention instead of scaled_dot_product_attention.
    """

    def copied(a: np.ndarray | None) -> Tensor | None:
        if a is None:
            return None
        t = torch.from_numpy(np.ascontiguousarray(a[rows]))
        return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)

    inputs, targets, positions, documents = map(copied, batch)
    if documents is None:
        return inputs, targets, positions, None
    return inputs, targets, positions, document_block_mask(documents) if flex else document_mask(documents)


@torch.no_grad()
def nats(model: Transformer, batch: Batch, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
    """Sum of -log p over targets that are not IGNORE: float32, on the model's device, without waiting for it."""
    device = model.wte.weight.device
    inputs, targets, positions, mask = to_device(batch, rows, device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return linear_cross_entropy(model.hidden(inputs, positions, mask), model.head_weight, targets)


def eager(model: Transformer) -> AbstractContextManager:
    """Run compiled blocks eagerly: compiling another graph would take longer than an evaluation saves."""
    if model.blocks[0]._compiled_call_impl is None:
        return nullcontext()  # set_stance imports all of dynamo
    return torch.compiler.set_stance("force_eager")


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Within the body: no dropout, no compilation; the model's mode is restored afterwards."""
    was_training = model.training
    model.eval()
    with eager(model):
        yield
    model.train(was_training)


def validation_nats(model: Transformer, windows: Batch, batch_size: int, dtype: torch.dtype) -> float:
    """Sum of nats over the scored tokens of the windows; the model's mode is restored."""
    with evaluating(model):
        starts = range(0, len(windows.inputs), batch_size)
        found = [nats(model, windows, dtype, slice(i, i + batch_size)) for i in starts]
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


def mean_loss(plan: Plan, windows: Batch) -> float:
    """Nats per scored token, without dropout, over windows that are divided among the ranks."""
    nats = validation_nats(plan.model, plan.world.share(windows), plan.micro, plan.dtype)
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
