"""More rows for the vocabulary of a model: what tokens that its tokenizer gets later need."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from miaobi.model.transformer import VOCAB_MULTIPLE, Transformer


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
        kept = min(rows, len(table.weight))
        weight[:kept] = table.weight[:kept]
        weight[known : known + n] = table.weight[:known].mean(0)
        table.weight = nn.Parameter(weight)
    model.wte.num_embeddings = rows
    if model.lm_head is not None:
        model.lm_head.out_features = rows
    model.cfg = dataclasses.replace(model.cfg, vocab_size=vocab_size)
