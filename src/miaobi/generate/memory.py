"""What a recorded step works in: tensors that stay where they are while streams come and go."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from miaobi.generate.sampling import Drawing, Kind, drawn, token_keys
from miaobi.model.transformer import KVCache, Transformer


@dataclass(eq=False)
class Memory:
    """For each of `size` rows: keys and values, what is written next and where, and how it is drawn."""

    caches: list[KVCache]
    seen: Tensor
    """(size, V) bool: tokens that repetition penalties count."""
    barred: Tensor
    """(size, V) bool: tokens that are never drawn."""
    ids: Tensor
    """(size,): the last token of each row, whose keys and values are not there yet."""
    positions: Tensor
    """(size,): where those go."""
    integers: Tensor
    """(3, size) int64, as `Drawing.numbers` has it."""
    floats: Tensor
    """(4, size) float32, as `Drawing.numbers` has it."""
    drawn: Tensor
    """(size,): what was drawn last; -1 where logits were not finite."""
    keys: Tensor
    """(V,): `token_keys`."""
    expected: tuple | None = None
    """What the next call says, if it goes on from the last one: rows, tokens, positions, drawings."""

    @classmethod
    def make(cls, model: Transformer, caches: list[KVCache]) -> Memory:
        """For the rows of `caches`."""
        size, device = len(caches[0].k), model.wte.weight.device
        masks = torch.zeros(2, size, model.cfg.vocab_size, dtype=torch.bool, device=device)
        numbers = torch.zeros(6, size, dtype=torch.long, device=device)
        floats = torch.ones(4, size, device=device)
        return cls(caches, *masks, numbers[0], numbers[1], numbers[2:5], floats, numbers[5],
                   token_keys(model.cfg.vocab_size, device))  # fmt: skip

    def padded(self, positions: list[int], rows: int) -> list[int]:
        """Positions of `rows` rows; those that nobody has write to the last one."""
        return positions + [self.caches[0].k.shape[2] - 1] * (rows - len(positions))

    def put(self, tokens: list[int], positions: list[int], how: list[Drawing], rows: int) -> None:
        """Say how `rows` rows go on, of which the first are told of."""
        idle = [Drawing(0, 0, 0.0, 0, 1.0, 0.0, 1.0)] * (rows - len(how))
        integers, floats = Drawing.numbers([*how, *idle], len(self.keys))
        self.ids[:rows].copy_(torch.tensor(tokens + [0] * (rows - len(tokens))))
        self.positions[:rows].copy_(torch.tensor(self.padded(positions, rows)))
        self.integers[:, :rows].copy_(integers)
        self.floats[:, :rows].copy_(floats)


def drawn_on(memory: Memory, logits: Tensor, kind: Kind) -> Tensor:
    """Draw the next token of each row by the logits (rows, V), note it as seen, and let the next step go on from it.
    Returns the tokens (rows,), which are in `memory.drawn`.
    """
    rows, last = len(logits), memory.caches[0].k.shape[2] - 1
    integers, seen = memory.integers[:, :rows], memory.seen[:rows]
    allowed = logits.masked_fill(memory.barred[:rows], -torch.inf)
    tokens = drawn(allowed, seen, integers, memory.floats[:, :rows], memory.keys, kind)
    if kind.penalizes:
        seen.scatter_(1, tokens[:, None], True)
    memory.ids[:rows].copy_(tokens)
    memory.positions[:rows].add_(1).clamp_(max=last)
    integers[1].add_(1)
    most = logits.amax(-1)  # what is nan is above everything
    return memory.drawn[:rows].copy_(tokens).masked_fill_(most - most != 0, -1)


def mark(mask: Tensor, ids: Collection[int]) -> None:
    """Make mask (V,) true at `ids` and false elsewhere; an id beyond V has no logit."""
    known = [id_ for id_ in ids if id_ < len(mask)]
    mask.zero_()[torch.tensor(known, dtype=torch.long, device=mask.device)] = True
