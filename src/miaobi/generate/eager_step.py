"""One decoding step by the model's own forward: works on every device, at the speed of PyTorch's calls."""

from __future__ import annotations

import torch
from torch import Tensor

from miaobi.model.transformer import KVCache, RowCache, Transformer


class EagerStep:
    """A `Step` (see step.py) that needs nothing but the model."""

    ready = True
    can_verify = False
    can_draw = False
    is_exact = False
    cache_dtype = None

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def rows(self, n: int, size: int) -> int:
        """How many of `size` rows a step of n writes to: just those."""
        return n

    def __call__(self, tokens: Tensor, caches: list[KVCache], positions: list[int]) -> Tensor:
        """One token further: tokens (n, 1) go to `positions` of the first n rows. Returns logits (n, V)."""
        n, last = len(tokens), max(positions)
        if min(positions) == last:
            part = [KVCache(cache.k[:n], cache.v[:n], last) for cache in caches]
            return self.model(tokens, caches=part, last_only=True)[:, -1]
        position_ids = torch.tensor(positions, device=tokens.device)
        mask = torch.arange(last + 1, device=tokens.device) <= position_ids[:, None]
        part = [RowCache(cache.k[:n], cache.v[:n], last, position_ids) for cache in caches]
        return self.model(tokens, position_ids[:, None], mask[:, None, None], part, last_only=True)[:, -1]
