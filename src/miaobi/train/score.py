"""`miaobi eval`: a model and a text, in any of their forms, into figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from miaobi.corpus.dataset import PreparedData
from miaobi.corpus.read import read_documents
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.device import explain_memory, keep_allocations, pick_device, pick_dtype
from miaobi.errors import UserError
from miaobi.model.checkpoint import ends_documents, load_model
from miaobi.train.evaluate import evaluate


def score(
    name: str, sources: list[str], checkpoint: str, split: str, stride: str, batch_size: int, device: str, dtype: str
) -> dict:
    """Score a prepared directory's split, or raw text, every character once.

    Returns what `evaluate` returns. Raises UserError for a model and data that do not belong together.
    """
    keep_allocations()
    where = pick_device(device)
    model, tokenizer = load_model(name, checkpoint)
    prepared = len(sources) == 1 and (Path(sources[0]) / "manifest.json").is_file()
    if prepared:
        tokens, characters, text_bytes = prepared_tokens(sources[0], split, tokenizer)
    else:
        tokens, characters, text_bytes = raw_tokens(sources, tokenizer, ends_documents(name, checkpoint))
    if len(tokens) < 2:
        raise UserError(f"nothing to score in {' '.join(sources)}")
    steps = stride_tokens(stride, model.cfg.block_size)
    with explain_memory(where, f"try a smaller --batch_size than {batch_size}"):
        return evaluate(model.to(where), tokens, characters, text_bytes, steps, pick_dtype(dtype, where), batch_size)


def stride_tokens(stride: str, block_size: int) -> int:
    """`--stride` in tokens."""
    named = {"half": max(1, block_size // 2), "block": block_size}
    if stride in named:
        return named[stride]
    if not stride.isdigit() or not 1 <= int(stride) <= block_size:
        raise UserError(f"stride is {stride!r}; give half, block, or a number from 1 to {block_size}")
    return int(stride)


def prepared_tokens(source: str, split: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int, int]:
    """Tokens of a split, with one token of context in front, and its length in characters and bytes."""
    data = PreparedData.open(source)
    if Tokenizer.load(data.path).backend.to_str() != tokenizer.backend.to_str():
        raise UserError(f"{source} was prepared with another tokenizer than the model's; give the raw text instead, "
                        "or prepare it with --tokenizer=MODEL")  # fmt: skip
    stream = data.val if split == "val" else data.train
    if not len(stream):
        raise UserError(f"the {split} part of {source} is empty")
    before = data.eot_id
    if before is None and split == "val" and len(data.train):
        before = int(data.train.read(len(data.train) - 1, len(data.train))[0])  # one stream, cut in two
    context = [tokenizer.eot_id if before is None else before]
    return np.concatenate((context, stream.read(0, len(stream)))), stream.characters, stream.bytes


def raw_tokens(sources: list[str], tokenizer: Tokenizer, documents: bool) -> tuple[np.ndarray, int, int]:
    """Tokens of raw text as its documents, or as one stream for a model that knows no end of text."""
    end = [tokenizer.eot_id] if documents else []
    parts, characters, text_bytes = [np.array([tokenizer.eot_id or 0])], 0, 0
    for text in read_documents(sources, whole=not documents):
        parts += [tokenizer.encode_array(text), np.array(end, np.int64)]
        characters += len(text)
        text_bytes += len(text.encode("utf-8"))
    return np.concatenate(parts).astype(np.int64), characters, text_bytes
