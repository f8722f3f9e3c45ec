"""Blocks of whole dialogues: none attends to another, and positions begin at 0 in each.

Which dialogues share a block is decided by their lengths alone, longest first into the fullest block that still has
room (best-fit decreasing on the histogram of lengths; Krell et al., arXiv:2107.02027): with the chit-chat corpora here
less than 1% of a block stays empty, against 77 to 86% when every dialogue is padded to a block of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from miaobi.corpus.dataset import IGNORE, Batch, derive, permute
from miaobi.corpus.prepared import TokenStream
from miaobi.errors import UserError


class PackedDialogues:
    """The dialogues of one split, as blocks.

    A dialogue longer than a block is cut in front of a turn, so that every piece is of whole turns; only a single turn
    that is longer is cut inside. Pieces in which nothing is learned are left out.

    Attributes:
        starts, lengths: (pieces,) int64, in tokens.
        cut_dialogues, cut_turns: how many were too long.
    """

    def __init__(self, stream: TokenStream, block_size: int, history: float = 0.0, sep: int | None = None) -> None:
        """
        Args:
            stream: dialogues one after the other, with `turns`.
            block_size: tokens that a block feeds.
            history: share of the blocks in which the dialogues follow each other as one conversation; late positions
                would hardly be trained otherwise.
            sep: in such a block this id stands in for the token that ends a dialogue; None leaves that one.

        Raises:
            UserError: no dialogue has two tokens, or none of them is learned.
        """
        self.stream, self.block_size, self.history, self.sep = stream, block_size, history, sep
        self.cut_dialogues = self.cut_turns = 0
        self.starts, self.lengths = self._pieces()
        if not len(self.starts):
            raise UserError("there is no dialogue of two tokens or more in the data; give more text")
        # A piece of n tokens feeds n - 1: its last token is only a target.
        self._slot_sizes, self._packs = pack_lengths(self.lengths - 1, block_size)

    def __len__(self) -> int:
        """Blocks in an epoch."""
        return len(self._packs) - 1

    @property
    def useful(self) -> float:
        """Share of the blocks' tokens that belong to a dialogue."""
        return float((self.lengths - 1).sum() / (len(self) * self.block_size))

    def batch(self, batch_size: int, seed: int, step: int, rows: slice = slice(None)) -> Batch:
        """The blocks of `step`, or the given rows of them: a pure function of (seed, step)."""
        blocks = []
        for n in range(step * batch_size, (step + 1) * batch_size)[rows]:
            epoch, i = divmod(n, len(self))
            pack = int(permute(np.array([i]), len(self), derive(seed, "order", epoch))[0])
            joined = derive(seed, "history", epoch, pack) < self.history * 2.0**63
            blocks.append(self._block(pack, self._deal(seed, epoch), joined))
        return Batch(*(np.stack(part) for part in zip(*blocks, strict=True)))

    def documents(self, batch_size: int, seed: int, step: int) -> np.ndarray:
        """Numbers of the dialogues, counted from 0, that are in the blocks of `step`: int64, ascending."""
        pieces = []
        for n in range(step * batch_size, (step + 1) * batch_size):
            epoch, i = divmod(n, len(self))
            pack = int(permute(np.array([i]), len(self), derive(seed, "order", epoch))[0])
            pieces.append(self._deal(seed, epoch)[self._packs[pack] : self._packs[pack + 1]])
        starts = self.starts[np.concatenate(pieces)]
        return np.unique(np.searchsorted(self.stream.starts, starts, side="right") - 1)

    def fixed(self, count: int) -> Batch:
        """`count` blocks, always the same ones, spread evenly; fewer where there are not so many."""
        return self.take(np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(np.int64)))

    def take(self, chosen: Sequence[int]) -> Batch:
        """Some blocks by number, in an order that never changes."""
        blocks = [self._block(int(pack), self._deal(0, 0), False) for pack in chosen]
        return Batch(*(np.stack(part) for part in zip(*blocks, strict=True)))

    @lru_cache(maxsize=2)  # noqa: B019 - two epochs meet in one batch; the object lives as long as its run
    def _deal(self, seed: int, epoch: int) -> np.ndarray:
        """(pieces,) int64: which piece lies in which slot of this epoch."""
        chance = np.random.default_rng(derive(seed, "deal", epoch)).random(len(self.lengths))
        dealt = np.empty(len(self.lengths), np.int64)
        dealt[np.argsort(self._slot_sizes, kind="stable")] = np.lexsort((chance, self.lengths))
        return dealt

    def _block(self, pack: int, dealt: np.ndarray, joined: bool) -> tuple[np.ndarray, ...]:
        T = self.block_size
        inputs, targets = np.zeros(T, np.int64), np.full(T, IGNORE, np.int64)
        positions, documents = np.zeros(T, np.int64), np.full(T, -1, np.int64)
        at, last = 0, None
        for number, piece in enumerate(dealt[self._packs[pack] : self._packs[pack + 1]]):
            start, length = int(self.starts[piece]), int(self.lengths[piece])
            tokens = self.stream.read(start, start + length)
            goal = np.where(self.stream.read_scored(start, start + length), tokens, IGNORE)
            if joined and number:  # the turn before ends; a new topic, which nobody foresees, begins
                inputs[at], positions[at], documents[at] = last if self.sep is None else self.sep, at, 0
                at += 1
            n = min(length - 1, T - at)
            span = slice(at, at + n)
            inputs[span], targets[span] = tokens[:n], goal[1 : n + 1]
            positions[span] = np.arange(at, at + n) if joined else np.arange(n)
            documents[span] = 0 if joined else number
            at, last = at + n, tokens[-1]
            if at == T:
                break
        return inputs, targets, positions, documents

    def _pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths; dialogues that do not fit are cut."""
        room = self.block_size + 1
        starts = self.stream.starts
        ends = np.append(starts[1:], len(self.stream))
        long = np.flatnonzero(ends - starts > room)
        pieces = [np.stack((starts, ends), 1)[ends - starts <= room]]
        self.cut_dialogues = len(long)
        for i in long:
            turns = self.stream.turns
            low, high = np.searchsorted(turns, (starts[i], ends[i]))
            pieces.append(self._cut(np.append(turns[low:high], ends[i])))
        joined = np.concatenate(pieces)
        joined = joined[joined[:, 1] - joined[:, 0] >= 2]
        joined = joined[np.argsort(joined[:, 0], kind="stable")]
        if len(joined):
            learned = np.append(self.stream.read_scored(0, len(self.stream)), False)
            targets = np.stack((joined[:, 0] + 1, joined[:, 1]), 1)  # a piece's first token is no target
            joined = joined[np.logical_or.reduceat(learned, targets.ravel())[::2]]
            if not len(joined):
                raise UserError(
                    "no turn of the assistant is in the data, and only those are learned; prepare it with --loss=all, "
                    "or give dialogues with replies"
                )
        return joined[:, 0].copy(), joined[:, 1] - joined[:, 0]

    def _cut(self, edges: np.ndarray) -> np.ndarray:
        """Pieces (n, 2) of a dialogue whose turns lie between `edges`, each as many whole turns as fit."""
        room, pieces, start = self.block_size + 1, [], int(edges[0])
        for before, edge in pairwise(edges):
            if edge - start > room and before > start and edge - before <= room:
                pieces.append((start, int(before)))
                start = int(before)
            if edge - start > room:  # one turn alone is too long; its beginning stays with what it answers
                self.cut_turns += 1
                while edge - start > room:
                    pieces.append((start, start + room))
                    start += self.block_size
        pieces.append((start, int(edges[-1])))
        return np.array(pieces, np.int64)


def pack_lengths(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing on the histogram of `lengths`, each between 1 and `capacity`.

    Returns slot sizes (len(lengths),) and, into them, where each block begins (blocks + 1,).
    """
    counts = np.bincount(lengths, minlength=capacity + 1)
    open_packs: dict[int, list[tuple[tuple[int, ...], int]]] = {}  # room left -> [(sizes, how many such blocks)]
    done: list[tuple[tuple[int, ...], int]] = []
    for size in range(capacity, 0, -1):
        left = int(counts[size])
        while left:
            room = min((r for r in open_packs if r >= size), default=capacity)
            if room not in open_packs:
                per_block = min(capacity // size, left)  # blocks of this size alone
                sizes, number = (size,) * per_block, left // per_block
            else:
                held, available = open_packs[room].pop()
                if not open_packs[room]:
                    del open_packs[room]
                per_block = min(room // size, left)
                number = min(available, left // per_block)
                sizes = held + (size,) * per_block
                if available > number:
                    open_packs.setdefault(room, []).append((held, available - number))
            left -= number * per_block
            rest = capacity - sum(sizes)
            if rest:
                open_packs.setdefault(rest, []).append((sizes, number))
            else:
                done.append((sizes, number))
    done += [entry for entries in open_packs.values() for entry in entries]
    slots = [np.tile(sizes, number) for sizes, number in done]
    widths = [np.full(number, len(sizes)) for sizes, number in done]
    return np.concatenate(slots), np.concatenate(([0], np.cumsum(np.concatenate(widths))))
