"""How well a model predicts text: nats, perplexity, bits per character and per byte."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

import numpy as np
import torch

from miaobi.console import console, progress
from miaobi.corpus.dataset import IGNORE, TokenStream, fixed_windows
from miaobi.errors import UserError
from miaobi.model.loss import linear_cross_entropy
from miaobi.model.transformer import Transformer


@torch.no_grad()
def nats(model: Transformer, inputs: np.ndarray, targets: np.ndarray, dtype: torch.dtype) -> float:
    """Sum of -log p over targets that are not IGNORE; inputs and targets: int64 (B, T)."""
    device = model.wte.weight.device
    x, y = (torch.from_numpy(a).to(device) for a in (inputs, targets))
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return linear_cross_entropy(model.hidden(x), model.head_weight, y).item()


def eager(model: Transformer) -> AbstractContextManager:
    """Run compiled blocks uncompiled: another graph would cost more to compile than an evaluation saves."""
    if model.blocks[0]._compiled_call_impl is None:
        return nullcontext()  # set_stance imports all of dynamo
    return torch.compiler.set_stance("force_eager")


def validation_loss(
    model: Transformer, stream: TokenStream, windows: int, batch_size: int, dtype: torch.dtype
) -> float:
    """Nats per token over `windows` fixed windows of the stream; the model's mode is restored.

    Raises UserError for a stream without a target.
    """
    if len(stream) < 2:
        raise UserError("the validation part of the data is empty; prepare it with a larger --val_fraction")
    inputs, targets = fixed_windows(stream, model.cfg.block_size, windows)
    was_training = model.training
    model.eval()
    with eager(model):
        total = sum(
            nats(model, inputs[i : i + batch_size], targets[i : i + batch_size], dtype)
            for i in range(0, len(inputs), batch_size)
        )
    model.train(was_training)
    return total / max(1, int((targets != IGNORE).sum()))


def sliding(tokens: np.ndarray, block_size: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows that score every token after the first exactly once.

    All but the first window re-read block_size - stride tokens as context, unscored.
    Yields inputs and targets, int64 (block_size,), the last one filled up with IGNOREd targets.
    """
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
) -> dict:
    """Score a token sequence whose first token is given as context.

    tokens: (N,). characters, text_bytes: length of the text that tokens[1:] encode, in code points and UTF-8 bytes.
    Returns loss (nats per token), perplexity, bits_per_char, bits_per_byte, tokens, characters, seconds.
    """
    started = time.perf_counter()
    model.eval()
    windows = sliding(tokens, model.cfg.block_size, stride)
    total, scored = 0.0, 0
    with progress("{task.completed:,.0f} tokens") as bar:
        task = bar.add_task("eval", total=len(tokens) - 1, visible=console.is_terminal)
        while group := list(islice(windows, batch_size)):
            inputs, targets = (np.stack(side) for side in zip(*group, strict=True))
            total += nats(model, inputs, targets, dtype)
            scored += int((targets != IGNORE).sum())
            bar.update(task, completed=scored)
    return {
        "loss": total / scored,
        "perplexity": math.exp(min(total / scored, 700.0)),
        "bits_per_char": total / math.log(2) / characters,
        "bits_per_byte": total / math.log(2) / text_bytes,
        "tokens": scored,
        "characters": characters,
        "seconds": time.perf_counter() - started,
    }
