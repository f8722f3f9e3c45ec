"""What the decoding steps have in common: eager_step, cpu_step, cuda_step."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from miaobi.generate.memory import Memory
from miaobi.generate.sampling import Drawing
from miaobi.model.transformer import KVCache


class Step(Protocol):
    """What computes the next logits: eager_step, cpu_step or cuda_step."""

    ready: bool
    """Whether it can be called; it may become so later, while its library is being built."""
    can_verify: bool
    """Whether it has `verify`."""
    is_exact: bool
    """Whether each row's logits are, to the last bit, what they would be without the other rows."""
    can_draw: bool
    """Whether it draws too: `draw`, and `lend` for the memory that it works in (cuda_step)."""
    cache_dtype: torch.dtype | None
    """Precision of the KV caches; None = that of the model's products."""

    def rows(self, n: int, size: int) -> int:
        """How many of `size` rows a step of n rows writes to; those beyond n get something at the last position."""

    def __call__(self, tokens: Tensor, caches: list[KVCache], positions: list[int]) -> Tensor:
        """One token further in the first n rows of the caches: tokens (n, 1) go to `positions`.

        Returns logits (n, V), which the next call may overwrite.
        """

    def verify(self, tokens: Tensor, caches: list[KVCache], start: int, row: int = 0, unscored: int = 0) -> Tensor:
        """Several tokens (T, 1) of a row at once, from position `start` on. Returns the logits (T - unscored, V) that
        T calls would give, bit for bit, but for the first `unscored`.
        """

    def lend(self, owner: object, size: int, length: int) -> Memory:
        """What `size` streams of `length` positions are written in, caches among it, until `owner` is gone."""

    def draw(self, memory: Memory, tokens: list[int], positions: list[int], how: list[Drawing]) -> list[int]:
        """As a call with the caches of `memory`, and then one token for each row; -1 where logits are not finite."""
