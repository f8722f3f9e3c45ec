"""Streams decoded together, each at a place of its own and with settings of its own.

A stream takes a row of the KV caches when it comes and gives it back when it ends, so that none waits for the longest
(continuous batching: Yu et al., Orca, OSDI 2022). What a prompt has in common with a row is copied, not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from miaobi.generate.config import SamplingConfig
from miaobi.generate.graph import GraphStep
from miaobi.generate.sampling import next_token, penalize_repeats
from miaobi.generate.step import Step
from miaobi.model.transformer import KVCache, RowCache, Transformer

PREFILL_TOKENS = 8192  # of several prompts in one forward pass, which bounds its memory
GUESSED = (2, 5, 8)  # tokens at once: with the one before, whole groups of the compiled step


@dataclass(eq=False)
class Stream:
    """A text being written."""

    ids: list[int]
    """Tokens of the prompt, at least one; those written are added."""
    cfg: SamplingConfig
    generator: torch.Generator
    ends: Collection[int] = ()
    """Tokens that end a text; to have ended texts before makes them no less likely."""
    barred: Collection[int] = ()
    """Tokens never drawn."""
    never_empty: bool = False
    """The first token is none of `ends`."""
    left: int = field(init=False)
    """Tokens still to come."""
    trust: int = 1
    """How well the stream can be guessed: which of GUESSED."""

    def __post_init__(self) -> None:
        self.left = self.cfg.max_new_tokens


class Slots:
    """Rows of KV caches, and the streams that have them: stream i of `running` has row i.

    Attributes:
        known: for each row, the tokens whose keys and values are in it from position 0 on, also after its stream's end.
    """

    def __init__(self, model: Transformer, size: int = 1, compiled: Step | GraphStep | None = None) -> None:
        """size: streams at once. compiled: the model's fast step, if it has one."""
        self.model, self.size, self.compiled = model, size, compiled
        self.running: list[Stream] = []
        self.waiting: list[Stream] = []
        self.known: list[list[int]] = [[] for _ in range(size)]
        self.caches: list[KVCache] = []
        self.device = model.wte.weight.device
        self.seen = torch.zeros(size, model.cfg.vocab_size, dtype=torch.bool, device=self.device)
        self.barred = torch.zeros_like(self.seen)

    @property
    def free(self) -> int:
        """Streams that may still be added."""
        return self.size - len(self.running) - len(self.waiting)

    def add(self, stream: Stream) -> None:
        """Give a stream a row, from the next `advance` on. Raises ValueError where none is free."""
        if not self.free:
            raise ValueError(f"all {self.size} slots are taken")
        self.waiting.append(stream)

    @torch.inference_mode()
    def end(self, stream: Stream) -> None:
        """Free the row of a stream, if it has one; the last row moves there, so that those in use lie together."""
        if stream in self.waiting:
            self.waiting.remove(stream)
        if stream not in self.running:
            return
        row, last = self.running.index(stream), len(self.running) - 1
        if row != last:
            self.copy(last, row, len(self.known[last]))
            self.running[row], self.seen[row], self.barred[row] = self.running[last], self.seen[last], self.barred[last]
        self.running.pop()

    @torch.inference_mode()
    def advance(self) -> list[tuple[Stream, int]]:
        """One token further: each stream that runs, and its token; several, where what came next could be guessed.
        A stream that has all its tokens ends.

        Learned positions cannot slide: when the block is full, the last half of it is read again.
        """
        self.admit()
        if not self.running:
            return []
        full = [row for row, _ in enumerate(self.running) if len(self.known[row]) == self.model.cfg.block_size]
        half = max(1, self.model.cfg.block_size // 2)
        # one by one for the compiled step, with which each text is, to the last bit, what it would be alone
        for rows in [[row] for row in full] if isinstance(self.compiled, Step) else [full]:
            self.prefill(rows, [self.running[row].ids[-half:-1] for row in rows])
        if guess := self.guess():
            return self.check(guess)
        given = [stream.ids[-1] for stream in self.running]
        logits = self.step(given, [len(self.known[row]) for row, _ in enumerate(given)])
        for row, token in enumerate(given):
            self.known[row].append(token)
        drawn = list(zip(self.running, self.draw(logits), strict=True))
        for stream, token in drawn:
            stream.ids.append(token)
            stream.left -= 1
            if not stream.left:
                self.end(stream)
        return drawn

    def guess(self) -> list[int]:
        """What may come next, because it came before (prompt lookup, github.com/apoorvumang/prompt-lookup-decoding).

        For one greedy stream and the compiled step alone. Greedy text of a small model repeats itself, drawn text
        does not, and many streams are bound by arithmetic (docs/lab-notes.md).
        """
        if not isinstance(self.compiled, Step) or not self.compiled.ready:
            return []
        if len(self.running) > 1 or self.running[0].cfg.temperature:
            return []
        stream, room = self.running[0], self.model.cfg.block_size - len(self.known[0]) - 1
        most = min(GUESSED[stream.trust], stream.left - 1, room)
        return continued(stream.ids[-self.model.cfg.block_size :], most)

    def check(self, guess: list[int]) -> list[tuple[Stream, int]]:
        """Tokens of the only stream: those of `guess` that it would have written, and one more."""
        stream, found = self.running[0], []
        tokens = [stream.ids[-1], *guess]
        at = len(self.known[0])
        ids = torch.tensor(tokens)[:, None]
        logits = self.compiled(ids, self.caches, [*range(at, at + len(tokens))], one=True)
        for i, token in enumerate(tokens):
            self.known[0].append(token)
            (drawn,) = self.draw(logits[i : i + 1])
            stream.ids.append(drawn)
            stream.left -= 1
            found.append((stream, drawn))
            if drawn != next(iter(guess[i:]), None):
                break
        right = len(found) - 1
        if right == len(guess):
            stream.trust = min(stream.trust + 1, len(GUESSED) - 1)
        elif 2 * right < len(guess):
            stream.trust = max(stream.trust - 1, 0)
        if not stream.left:
            self.end(stream)
        return found

    def admit(self) -> None:
        """Give rows to the streams that wait, and fill these with all of their prompts but the last tokens."""
        if not self.waiting:
            return
        block, first = self.model.cfg.block_size, len(self.running)
        new, self.waiting = self.waiting, []
        self.reserve(max(min(block, len(stream.ids) + stream.left) for stream in new))
        prompts = [stream.ids[-block:][:-1] for stream in new]
        alike: list[int] = []  # of `new`: those that begin like a row, or like one before them
        apart: list[int] = []
        for i, prompt in enumerate(prompts):
            others = [*self.known, *(prompts[j] for j in apart)]
            (alike if any(2 * common(prompt, ids) >= len(prompt) for ids in others) else apart).append(i)
        apart.sort(key=lambda i: len(prompts[i]))
        for i in (*apart, *alike):
            self.open(new[i])
        if len(apart) == 1:  # alone it need not begin at 0
            alike, apart = [*apart, *alike], []
        row = first
        for _, bucket in groupby(apart, key=lambda i: len(prompts[i]).bit_length()):  # less than twice as long
            together = [prompts[i] for i in bucket]
            self.prefill([*range(row, row + len(together))], together)
            row += len(together)
        for i in alike:
            self.prefill([row], [prompts[i]], self.recall(row, prompts[i]))
            row += 1

    def open(self, stream: Stream) -> None:
        """The next row for `stream`."""
        row = len(self.running)
        self.running.append(stream)
        mark(self.seen[row], set(stream.ids).difference(stream.ends))
        mark(self.barred[row], {*stream.barred, *(stream.ends if stream.never_empty else ())})

    def reserve(self, length: int) -> None:
        """Make the caches at least `length` positions long, keeping what is known."""
        old, had = self.caches, self.caches[0].k.shape[2] if self.caches else 0
        if had >= length:
            return
        dtype = None if self.compiled is None else self.compiled.cache_dtype
        self.caches = self.model.make_caches(self.size, length, dtype)
        for new, before in zip(self.caches, old, strict=False):
            new.k[:, :, :had], new.v[:, :, :had] = before.k, before.v

    def recall(self, row: int, prompt: list[int]) -> int:
        """Let `row` begin with what `prompt` has in common with the row most like it; how many tokens that is."""
        like = max(range(self.size), key=lambda other: (common(prompt, self.known[other]), other == row))
        shared = common(prompt, self.known[like])
        if like != row and shared:
            self.copy(like, row, shared)
        self.known[row] = prompt[:shared]
        return shared

    def copy(self, source: int, row: int, count: int) -> None:
        """The first `count` positions of another row into `row`."""
        self.known[row] = []  # until it is whole: Ctrl-C may come in between
        for cache in self.caches:
            cache.k[row, :, :count] = cache.k[source, :, :count]
            cache.v[row, :, :count] = cache.v[source, :, :count]
        self.known[row] = self.known[source][:count]

    def prefill(self, rows: list[int], prompts: list[list[int]], start: int = 0) -> None:
        """Compute keys and values of `prompts` into `rows`, whose first `start` positions are there already.

        Shorter prompts are padded on the right, where nothing looks before it is overwritten.
        """
        for row in rows:
            self.known[row] = self.known[row][:start]
        most = max(map(len, prompts), default=0)
        if most <= start:
            return
        for _, consecutive in groupby(enumerate(rows), key=lambda at: at[1] - at[0]):
            places = [at for at, _ in consecutive]
            at_once = max(1, PREFILL_TOKENS // most)
            for some in (places[i : i + at_once] for i in range(0, len(places), at_once)):
                ids = [prompts[i][start:] + [0] * (most - len(prompts[i])) for i in some]
                of = slice(rows[some[0]], rows[some[-1]] + 1)
                self.model.hidden(torch.tensor(ids, device=self.device),
                                  caches=self.part(lambda k, v, of=of: KVCache(k[of], v[of], start)))  # fmt: skip
        for row, prompt in zip(rows, prompts, strict=True):
            self.known[row] = list(prompt)

    def step(self, tokens: list[int], positions: list[int]) -> Tensor:
        """Logits (n, V) behind `tokens` of the first n rows, which go to `positions`: by the fast step if ready."""
        n, last = len(tokens), max(positions)
        ids = torch.tensor(tokens, device=self.device)[:, None]
        if self.compiled is not None and self.compiled.ready:
            end = self.caches[0].k.shape[2] - 1
            for row in range(n, self.compiled.rows(n, self.size)):
                del self.known[row][end:]
            logits = self.compiled(ids, self.caches, positions)
            if logits is not None:
                return logits
        if min(positions) == last:
            return self.model(ids, caches=self.part(lambda k, v: KVCache(k[:n], v[:n], last)), last_only=True)[:, -1]
        places = torch.tensor(positions, device=self.device)
        mask = torch.arange(last + 1, device=self.device) <= places[:, None]
        caches = self.part(lambda k, v: RowCache(k[:n], v[:n], last, places))
        return self.model(ids, places[:, None], mask[:, None, None], caches, last_only=True)[:, -1]

    def part(self, make: Callable[[Tensor, Tensor], KVCache]) -> list[KVCache]:
        """Views of some rows of every layer's cache."""
        return [make(cache.k, cache.v) for cache in self.caches]

    def draw(self, logits: Tensor) -> list[int]:
        """The next token of each running stream, by its own settings: logits (n, V)."""
        n = len(self.running)
        logits = logits.masked_fill(self.barred[:n], -torch.inf)
        tokens = torch.empty(n, dtype=torch.long, device=self.device)
        groups: dict[SamplingConfig, list[int]] = {}
        for row, stream in enumerate(self.running):
            groups.setdefault(stream.cfg, []).append(row)
        for cfg, rows in groups.items():
            few = rows if len(groups) > 1 else slice(n)
            fair = penalize_repeats(logits[few], self.seen[few], cfg.repetition_penalty)
            tokens[few] = next_token(fair, cfg, [self.running[row].generator for row in rows])
        self.seen[:n].scatter_(1, tokens[:, None], True)
        for row, stream in enumerate(self.running):
            if stream.never_empty:
                stream.never_empty = False
                mark(self.barred[row], stream.barred)
        return tokens.tolist()


def mark(mask: Tensor, ids: Collection[int]) -> None:
    """Make mask (V,) true at `ids` and false elsewhere; an id beyond V has no logit."""
    known = [id_ for id_ in ids if id_ < len(mask)]
    mask.zero_()[torch.tensor(known, dtype=torch.long, device=mask.device)] = True


def continued(ids: list[int], most: int, longest: int = 3) -> list[int]:
    """What followed the last three or two tokens of `ids` when they occurred before, latest first; `most` tokens."""
    if most > 0:
        for n in range(min(longest, len(ids) - 1), 1, -1):
            end = ids[-n:]
            for at in range(len(ids) - n - 1, -1, -1):
                if ids[at : at + n] == end:
                    return ids[at + n : at + n + most]
    return []


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # whole slices compare faster than tokens one by one
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
