"""More rows for the vocabulary of a model: what tokens that its tokenizer gets later need."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from miaobi.corpus.tokenizer import Tokenizer
from miaobi.model.transformer import VOCAB_MULTIPLE, Transformer


def added_tokens(tokenizer: Tokenizer, theirs: Tokenizer) -> int:
    """How many control tokens `tokenizer` has behind those of another one, which it equals otherwise; else 0."""
    names = tokenizer.backend.get_added_tokens_decoder()
    more = [names[id_].content for id_ in sorted(names) if id_ >= theirs.vocab_size]
    same = bool(more) and theirs.with_added(more).backend.to_str() == tokenizer.backend.to_str()
    return len(more) if same else 0


@torch.no_grad()
def add_rows(model: Transformer, n: int, first: int | None = None) -> None:
    """Give the model `n` rows for new tokens, in place: each is the mean of the rows in use (Hewitt 2021), which keeps
    the probabilities of all other tokens nearly as they were.

    first: id of the first new token; rows from there to the end of the vocabulary are spare and are taken before any
        is added. Default: behind the last row.
    """
    known = model.cfg.vocab_size if first is None else first
    vocab_size = max(model.cfg.vocab_size, known + n)
    rows = math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    for table in (model.wte, model.lm_head):
        if table is None:  # tied
            continue
        weight = table.weight.new_zeros(rows, model.cfg.n_embd)
        old_rows = min(rows, len(table.weight))
        weight[:old_rows] = table.weight[:old_rows]
        weight[known : known + n] = table.weight[:known].mean(0)
        table.weight = nn.Parameter(weight)
    model.wte.num_embeddings = rows
    if model.lm_head is not None:
        model.lm_head.out_features = rows
    model.cfg = dataclasses.replace(model.cfg, vocab_size=vocab_size)
