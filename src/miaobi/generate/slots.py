"""Streams decoded together, each at its own position and with its own sampling settings.

A stream takes a row of the KV caches when it comes and gives it back when it ends, so that none waits for the longest
(continuous batching: Yu et al., Orca, OSDI 2022). What a prompt has in common with a row is copied, not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from miaobi.errors import not_finite
from miaobi.generate.eager_step import EagerStep
from miaobi.generate.memory import Memory, mark
from miaobi.generate.sampling import Drawing, Kind, drawn, drawn_in_groups, token_keys
from miaobi.generate.step import Step
from miaobi.generate.stream import Stream, score
from miaobi.model.transformer import KVCache, Transformer, keys_and_values

PREFILL_TOKENS = 8192  # of several prompts in one forward pass, which bounds its memory
CHUNK = 48  # tokens of a prompt that an exact step reads at once
ADMITTED = 1024  # tokens of prompts read between two steps, in which those who write wait


class Slots:
    """Rows of KV caches, and the streams that have them: stream i of `running` has row i.

    Attributes:
        known: for each row, the tokens whose keys and values are in it from position 0 on, also after its stream's end.
    """

    def __init__(self, model: Transformer, size: int = 1, step: Step | None = None) -> None:
        """size: streams at once. step: the model's fast step, if it has one."""
        self.model, self.size = model, size
        self.eager, self.fast = EagerStep(model), step
        self.step: Step = self.best_step()
        self.running: list[Stream] = []
        self.waiting: list[Stream] = []
        self.known: list[list[int]] = [[] for _ in range(size)]
        self.caches: list[KVCache] = []
        self.memory: Memory | None = None  # which caches, seen and barred are parts of, where the step draws too
        self.device = model.wte.weight.device
        self.seen = torch.zeros(size, model.cfg.vocab_size, dtype=torch.bool, device=self.device)
        self.barred = torch.zeros_like(self.seen)
        # a card would take 256 launches for the generators of 256 streams; elsewhere texts of a seed stay what they are
        self.by_hash = self.device.type == "cuda" or (step is not None and step.can_draw)

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

    def write(self, stream: Stream) -> Iterator[int]:
        """Tokens of one stream alone, as they are written; closed or interrupted in the middle, it leaves the slots as
        they should be.
        """
        self.add(stream)
        try:
            while stream.left:
                for _, token in self.advance():
                    yield token
        finally:
            self.end(stream)

    @torch.inference_mode()
    def advance(self) -> list[tuple[Stream, int]]:
        """One step: each stream that runs, and its token; several tokens, where what came next could be guessed.
        A stream that has all its tokens ends.

        Learned positions cannot slide: when the block is full, the last half of it is read again.
        """
        self.admit()
        if not self.running:
            return []
        full = [row for row, _ in enumerate(self.running) if len(self.known[row]) == self.model.cfg.block_size]
        half = max(1, self.model.cfg.block_size // 2)
        self.prefill(full, [self.running[row].ids[-half:-1] for row in full])
        if proposed := self.propose():
            return self.verify(proposed)
        tokens = [stream.ids[-1] for stream in self.running]
        positions = [len(self.known[row]) for row, _ in enumerate(tokens)]
        by_step = self.step.can_draw and self.memory is not None and all(stream.is_plain for stream in self.running)
        self.forget_behind(len(tokens))
        if by_step:
            ids = self.step.draw(self.memory, tokens, positions, [stream.drawing() for stream in self.running])
        else:
            logits = self.logits(tokens, positions)
        for row, token in enumerate(tokens):
            self.known[row].append(token)
        written = list(zip(self.running, self.taken(ids if by_step else self.draw(logits)), strict=True))
        for stream, token in written:
            stream.ids.append(token)
            stream.left -= 1
            if not stream.left:
                self.end(stream)
        return written

    def propose(self) -> list[int]:
        """What the only stream may write next, where a step can verify that: greedy text alone is worth it."""
        if not self.step.can_verify or len(self.running) > 1 or self.running[0].cfg.temperature:
            return []
        stream, block = self.running[0], self.model.cfg.block_size
        return stream.lookup.propose(stream.ids[-block:], min(stream.left, block - len(self.known[0])) - 1)

    def verify(self, proposed: list[int]) -> list[tuple[Stream, int]]:
        """Tokens of the only stream: those of `proposed` that it would have written, and one more."""
        stream, written = self.running[0], []
        tokens = [stream.ids[-1], *proposed]
        logits = self.step.verify(torch.tensor(tokens, device=self.device)[:, None], self.caches, len(self.known[0]))
        for i, token in enumerate(tokens):
            self.known[0].append(token)
            (following,) = self.taken(self.draw(logits[i : i + 1]))
            stream.ids.append(following)
            stream.left -= 1
            written.append((stream, following))
            if following != next(iter(proposed[i:]), None):
                break
        stream.lookup.learn(len(proposed), len(written) - 1)
        if not stream.left:
            self.end(stream)
        return written

    def best_step(self) -> Step:
        """The fast step where it is ready."""
        return self.fast if self.fast is not None and self.fast.ready else self.eager

    def admit(self) -> None:
        """Give rows to the streams that wait, and fill these with all of their prompts but the last tokens."""
        if not self.waiting:
            return
        if not self.running and self.step is not (best := self.best_step()):  # never in the middle of a text: another
            self.step, self.known = best, [[] for _ in self.known]  # step rounds differently
        block, new = self.model.cfg.block_size, self.take_waiting()
        self.reserve(max(min(block, len(stream.ids) + stream.left) for stream in new))
        heard, others = [one for one in new if one.scores_prompt], [one for one in new if not one.scores_prompt]
        for stream in heard:
            self.open(stream)
            self.score_prompt(len(self.running) - 1, stream)
        if others:
            self.admit_all(others, [stream.ids[-block:][:-1] for stream in others])

    def take_waiting(self) -> list[Stream]:
        """The first streams that wait, as many as have `ADMITTED` tokens together; one at least."""
        tokens, taken = 0, 0
        while taken < len(self.waiting) and (not taken or tokens < ADMITTED):
            tokens += min(self.model.cfg.block_size, len(self.waiting[taken].ids))
            taken += 1
        new, self.waiting = self.waiting[:taken], self.waiting[taken:]
        return new

    def admit_all(self, new: list[Stream], prompts: list[list[int]]) -> None:
        """Rows for streams, each with its prompt, of which what another row has is not read again."""
        first = len(self.running)
        alike: list[int] = []  # of `new`: those that begin like a row, or like one before them
        apart: list[int] = []
        for i, prompt in enumerate(prompts):
            others = [*self.known, *(prompts[j] for j in apart)]
            (alike if any(2 * common(prompt, ids) >= len(prompt) for ids in others) else apart).append(i)
        apart.sort(key=lambda i: len(prompts[i]))
        for i in (*apart, *alike):
            self.open(new[i])
        if len(apart) == 1 or self.step.is_exact:  # read one by one they need not begin at 0
            alike, apart = [*apart, *alike], []
        row = first
        for _, bucket in groupby(apart, key=lambda i: len(prompts[i]).bit_length()):  # less than twice as long
            together = [prompts[i] for i in bucket]
            self.prefill([*range(row, row + len(together))], together)
            row += len(together)
        for i in alike:
            new[i].recalled = self.recall(row, prompts[i])
            self.prefill([row], [prompts[i]], new[i].recalled)
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
        if self.fast is not None and self.fast.can_draw:
            self.memory = self.fast.lend(self, self.size, length)
            before, self.caches = (self.seen, self.barred), self.memory.caches
            self.seen, self.barred = self.memory.seen, self.memory.barred
            for now, then in zip((self.seen, self.barred), before, strict=True):
                now[: self.size] = then[: self.size]
        else:
            dtype = None if self.fast is None else self.fast.cache_dtype  # so that the fast step may take over later
            self.caches = self.model.make_caches(self.size, length, dtype)
        if old:
            rows = slice(self.size)
            keys_and_values(self.caches)[:, :, rows, :, :had] = keys_and_values(old)[:, :, rows]

    def recall(self, row: int, prompt: list[int]) -> int:
        """Let `row` begin with what `prompt` has in common with the row most like it; how many tokens that is."""
        nearest = max(range(self.size), key=lambda other: (common(prompt, self.known[other]), other == row))
        shared = common(prompt, self.known[nearest])
        if nearest != row and shared:
            self.copy(nearest, row, shared)
        self.known[row] = prompt[:shared]
        return shared

    def copy(self, source: int, row: int, count: int) -> None:
        """The first `count` positions of another row into `row`."""
        self.known[row] = []  # until it is whole: Ctrl-C may come in between
        both = keys_and_values(self.caches)
        both[:, :, row, :, :count] = both[:, :, source, :, :count]
        self.known[row] = self.known[source][:count]

    def prefill(self, rows: list[int], prompts: list[list[int]], start: int = 0) -> None:
        """Compute keys and values of `prompts` into `rows`, whose first `start` positions are there already.

        An exact step reads each by itself, so that a text is, to the last bit, what it would be alone. For the others
        shorter prompts are padded on the right, where nothing looks before it is overwritten.
        """
        for row in rows:
            self.known[row] = self.known[row][:start]
        longest = max(map(len, prompts), default=0)
        if longest <= start:
            return
        if self.step.is_exact:
            for row, prompt in zip(rows, prompts, strict=True):
                for at in range(start, len(prompt), CHUNK):
                    self.read(row, prompt[at : at + CHUNK])
            return
        for _, consecutive in groupby(enumerate(rows), key=lambda at: at[1] - at[0]):
            indices = [at for at, _ in consecutive]
            batch_size = max(1, PREFILL_TOKENS // longest)
            for batch in (indices[i : i + batch_size] for i in range(0, len(indices), batch_size)):
                ids = [prompts[i][start:] + [0] * (longest - len(prompts[i])) for i in batch]
                of = slice(rows[batch[0]], rows[batch[-1]] + 1)
                self.model.hidden(torch.tensor(ids, device=self.device),
                                  caches=self.part(lambda k, v, of=of: KVCache(k[of], v[of], start)))  # fmt: skip
        for row, prompt in zip(rows, prompts, strict=True):
            self.known[row] = list(prompt)

    def read(self, row: int, tokens: list[int], scored: bool = False) -> Tensor:
        """`tokens` into `row`, behind what is there; logits (T, V) where `scored`. For steps that `verify`."""
        ids, start = torch.tensor(tokens, device=self.device)[:, None], len(self.known[row])
        logits = self.step.verify(ids, self.caches, start, row, 0 if scored else len(tokens))
        self.known[row] = self.known[row] + tokens
        return logits

    def score_prompt(self, row: int, stream: Stream) -> None:
        """Read a prompt from its beginning and score its tokens."""
        ids, alternatives = stream.ids, stream.alternatives or 0
        self.known[row] = []
        for at in range(0, len(ids) - 1, CHUNK):
            some = ids[at : min(at + CHUNK, len(ids) - 1)]
            if self.step.can_verify:
                logits = self.read(row, some, scored=True)
            else:
                caches = self.part(lambda k, v, at=at: KVCache(k[row : row + 1], v[row : row + 1], at))
                (logits,) = self.model(torch.tensor([some], device=self.device), caches=caches)
                self.known[row] = self.known[row] + some
            following = torch.tensor(ids[at + 1 : at + 1 + len(some)], device=self.device)
            stream.prompt_scores += score(logits, following, alternatives)

    def logits(self, tokens: list[int], positions: list[int]) -> Tensor:
        """Logits (n, V) behind `tokens` of the first n rows, which go to `positions`."""
        return self.step(torch.tensor(tokens, device=self.device)[:, None], self.caches, positions)

    def forget_behind(self, n: int) -> None:
        """What a step of n rows writes over in others."""
        end = self.caches[0].k.shape[2] - 1
        for row in range(n, self.step.rows(n, self.size)):
            del self.known[row][end:]

    def part(self, make: Callable[[Tensor, Tensor], KVCache]) -> list[KVCache]:
        """Views of some rows of every layer's cache."""
        return [make(cache.k, cache.v) for cache in self.caches]

    def draw(self, logits: Tensor) -> list[int]:
        """The next token of each running stream, by its own settings: logits (n, V). -1 where these are not finite."""
        n = len(self.running)
        own = logits
        logits = logits.masked_fill(self.barred[:n], -torch.inf)
        for row, stream in enumerate(self.running):
            if stream.has_bias:
                stream.bias(logits[row])
        if self.by_hash:
            how, vocab_size = [stream.drawing() for stream in self.running], logits.shape[-1]
            integers, floats = (part.to(self.device) for part in Drawing.numbers(how, vocab_size))
            keys, kind = token_keys(vocab_size, self.device), Kind.of(how, vocab_size)
            tokens = drawn(logits, self.seen[:n], integers, floats, keys, kind)
        else:
            tokens = drawn_in_groups(logits, self.seen[:n], [(stream.cfg, stream.generator) for stream in self.running])
        self.tell(own, tokens)
        self.seen[:n].scatter_(1, tokens[:, None], True)
        return torch.where(own.amax(-1).isfinite(), tokens, -1).tolist()  # what is nan is above everything

    def taken(self, ids: list[int]) -> list[int]:
        """The tokens drawn for the streams that run; raises UserError where one is -1."""
        if -1 in ids:
            raise not_finite("the logits")
        for row, stream in enumerate(self.running):
            if stream.never_empty:
                stream.never_empty = False
                mark(self.barred[row], stream.barred)
        return ids

    def tell(self, logits: Tensor, tokens: Tensor) -> None:
        """Score the tokens (n,) of the streams that ask for it, by the logits (n, V) of the model itself."""
        asked = [row for row, stream in enumerate(self.running) if stream.alternatives is not None]
        if asked:
            most = max(self.running[row].alternatives for row in asked)
            for row, found in zip(asked, score(logits[asked], tokens[asked], most), strict=True):
                stream = self.running[row]
                stream.scores.append(replace(found, top=found.top[: stream.alternatives]))


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # whole slices compare faster than tokens one by one
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
