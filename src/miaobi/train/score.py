"""`miaobi eval`: loss, perplexity and bits per character of a model on a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from miaobi.corpus.dialogue import as_lines, encode_lines, encode_roles
from miaobi.corpus.documents import read_documents
from miaobi.corpus.packing import PackedDialogues
from miaobi.corpus.prepared import PreparedData, TokenStream, is_prepared
from miaobi.corpus.store import Encoded
from miaobi.corpus.template import SEP_TEMPLATE
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.device import explain_memory, keep_allocations, pick_device, pick_dtype
from miaobi.errors import UserError
from miaobi.model.checkpoint import ends_documents, load_model
from miaobi.model.transformer import Transformer
from miaobi.train.config import EvalConfig
from miaobi.train.evaluate import evaluate, score_batches, text_size

Read = Callable[..., Iterator[str]]
"""`read_documents` of the sources: read(format), read(format, whole=True)."""


def score(cfg: EvalConfig) -> dict:
    """Score a prepared directory's split, or raw text, every character once; dialogues one by one.

    Returns what `evaluate` returns. Raises UserError for a model and data that do not match.
    """
    keep_allocations()
    where, sources = pick_device(cfg.device), list(cfg.data)
    model, tokenizer = load_model(cfg.model, cfg.checkpoint)
    prepared = len(sources) == 1 and is_prepared(sources[0])
    size, steps = cfg.batch_size, stride_tokens(cfg.stride, model.cfg.block_size)
    precision = pick_dtype(cfg.dtype, where)
    read = partial(read_documents, sources, field=cfg.field, skip_bad=cfg.skip_bad)
    stream = dialogues(sources, cfg.split, cfg.format, tokenizer, prepared, read)
    with explain_memory(where, f"try a smaller --batch_size than {size}"):
        if stream is not None:
            return score_dialogues(model.to(where), tokenizer, stream, size, precision, sources)
        if prepared:
            tokens, characters, text_bytes = prepared_tokens(sources[0], cfg.split, tokenizer)
        else:
            ends = ends_documents(cfg.model, cfg.checkpoint) and tokenizer.eot_id is not None
            tokens, characters, text_bytes = raw_tokens(read(cfg.format, whole=not ends), tokenizer, ends)
        if len(tokens) < 2 or not characters:
            raise nothing_in(sources)
        given = begin_ids(tokenizer)
        return evaluate(model.to(where), tokens, characters, text_bytes, steps, precision, size, given)


def begin_ids(tokenizer: Tokenizer) -> list[int]:
    """Tokens that a foreign tokenizer puts before every text, which are not scored: `<s>`, `[CLS]`."""
    return [id_ for id_ in tokenizer.begin_ids if id_ != tokenizer.eot_id]


def score_dialogues(
    model: Transformer, tokenizer: Tokenizer, stream: TokenStream | MemoryStream, batch_size: int, dtype: torch.dtype,
    sources: list[str],
) -> dict:  # fmt: skip
    """Score dialogues one by one; returns what `score_batches` returns. Raises UserError if nothing is scored."""
    blocks = PackedDialogues(stream, model.cfg.block_size)
    batches = (blocks.take(range(len(blocks))[i : i + batch_size]) for i in range(0, len(blocks), batch_size))
    characters, text_bytes = reply_text(stream, blocks, tokenizer)
    if not characters:
        raise nothing_in(sources)
    return score_batches(model, batches, len(stream), characters, text_bytes, dtype)


def nothing_in(sources: list[str]) -> UserError:
    """The error for sources without text, or with dialogues of which only the unscored first character is there."""
    return UserError(f"nothing to score in {' '.join(sources)}")


@dataclass
class MemoryStream:
    """Encoded dialogues with the interface of `prepared.TokenStream`."""

    parts: Encoded

    def __len__(self) -> int:
        return len(self.parts.ids)

    @property
    def starts(self) -> np.ndarray:
        """(dialogues,) int64."""
        return self.parts.starts

    @property
    def turns(self) -> np.ndarray:
        """(turns,) int64."""
        return self.parts.turns

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as int64."""
        return self.parts.ids[start:stop].astype(np.int64)

    def read_scored(self, start: int, stop: int) -> np.ndarray:
        """Whether the tokens [start, stop) are scored."""
        return np.ones(stop - start, bool) if self.parts.scored is None else self.parts.scored[start:stop]


def dialogues(
    sources: list[str], split: str, format: str, tokenizer: Tokenizer, prepared: bool, read: Read
) -> TokenStream | MemoryStream | None:
    """The dialogues to score, or None for plain text. With roles, the assistant's turns are scored."""
    if prepared:
        data = open_prepared(sources[0], tokenizer)
        return part_of(data, split) if data.is_dialogue else None
    template = tokenizer.config.get("chat_template")
    if (format == "auto" and template != SEP_TEMPLATE) or format not in ("auto", "dialogue"):
        return None
    documents = list(read("dialogue"))
    if not documents:
        raise nothing_in(sources)
    if template == SEP_TEMPLATE:
        return MemoryStream(encode_lines(tokenizer, [as_lines(document) for document in documents]))
    return MemoryStream(encode_roles(tokenizer, documents, replies_only=True))


def reply_text(stream: TokenStream | MemoryStream, blocks: PackedDialogues, tokenizer: Tokenizer) -> tuple[int, int]:
    """Characters and UTF-8 bytes of the scored text: the first token of every piece is context only."""
    n = len(stream)
    edges = np.zeros(n + 1, np.int64)
    np.add.at(edges, blocks.starts + 1, 1)
    np.add.at(edges, blocks.starts + blocks.lengths, -1)
    scored = (np.cumsum(edges)[:n] > 0) & stream.read_scored(0, n).astype(bool)
    return text_size(stream.read(0, n), scored, tokenizer)


def stride_tokens(stride: str, block_size: int) -> int:
    """`--stride` in tokens."""
    named = {"half": max(1, block_size // 2), "block": block_size}
    if stride in named:
        return named[stride]
    if not stride.isdigit() or not 1 <= int(stride) <= block_size:
        raise UserError(f"stride is {stride!r}; give half, block, or a number from 1 to {block_size}")
    return int(stride)


def open_prepared(source: str, tokenizer: Tokenizer) -> PreparedData:
    """Prepared data with the model's own tokenizer. Raises UserError for another."""
    data = PreparedData.open(source)
    if data.tokenizer.backend.to_str() != tokenizer.backend.to_str():
        raise UserError(f"{source} was prepared with another tokenizer than the model's; give the raw text instead, "
                        "or prepare it with --tokenizer=MODEL")  # fmt: skip
    return data


def part_of(data: PreparedData, split: str) -> TokenStream:
    """A split of prepared data. Raises UserError if it is empty."""
    stream = data.val if split == "val" else data.train
    if not len(stream):
        raise UserError(f"the {split} part of {data.path} is empty")
    return stream


def prepared_tokens(source: str, split: str, tokenizer: Tokenizer) -> tuple[np.ndarray, int, int]:
    """Tokens of a split, after one token of context, and its length in characters and bytes."""
    data = open_prepared(source, tokenizer)
    stream = part_of(data, split)
    before = data.eot_id
    if before is None and split == "val" and len(data.train):
        before = int(data.train.read(len(data.train) - 1, len(data.train))[0])  # one stream, cut in two
    context = [tokenizer.eot_id or 0 if before is None else before]
    return np.concatenate((context, stream.read(0, len(stream)))), stream.characters, stream.bytes


def raw_tokens(texts: Iterable[str], tokenizer: Tokenizer, documents: bool) -> tuple[np.ndarray, int, int]:
    """Tokens of raw text, after one token of context, and its length in characters and bytes.

    documents: whether each text is a document that ends; else they are pieces of one stream.
    """
    begin, end = tokenizer.begin_ids, [tokenizer.eot_id] if documents else []
    parts, characters, text_bytes = [np.array(begin or [tokenizer.eot_id or 0])], 0, 0
    for text in texts:
        head = begin if characters else []  # the first one's is there
        parts += [np.array(head, np.int64), tokenizer.encode_array(text), np.array(end, np.int64)]
        characters += len(text)
        text_bytes += len(text.encode("utf-8"))
    return np.concatenate(parts).astype(np.int64), characters, text_bytes
