"""Blocks of dialogues: every target once an epoch, nothing across dialogues, and hardly a token wasted."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from miaobi.corpus.dataset import IGNORE, Batch
from miaobi.corpus.packing import PackedDialogues, pack_lengths
from miaobi.errors import UserError

SEP = 10**6


class Talks:
    """Dialogues given as lengths of their turns; the token at position i is i."""

    def __init__(self, dialogues: list[list[int]], scored: np.ndarray | None = None) -> None:
        edges = np.cumsum([0, *(turn for dialogue in dialogues for turn in dialogue)])
        self.turns = edges[:-1]
        self.starts = edges[np.cumsum([0, *map(len, dialogues)])][:-1]
        self.length, self.scored = int(edges[-1]), scored

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.arange(self.length)[start:stop]

    def read_scored(self, start: int, stop: int) -> np.ndarray:
        return np.ones(stop - start, bool) if self.scored is None else self.scored[start:stop]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Talks, int]:
    turn = st.integers(1, 9)
    dialogues = draw(st.lists(st.lists(turn, min_size=1, max_size=6), min_size=1, max_size=25))
    dialogues.append([3, 2])  # at least one has targets
    stream = Talks(dialogues)
    if draw(st.booleans()):
        stream.scored = np.array(draw(st.lists(st.booleans(), min_size=len(stream), max_size=len(stream))))
        stream.scored[-3:] = True
    return stream, draw(st.integers(2, 24))


def epochs(blocks: PackedDialogues, count: int, batch_size: int, seed: int) -> list[Batch]:
    """The rows of each epoch, taken out of batches that do not end where an epoch does."""
    steps = -(-count * len(blocks) // batch_size)
    parts = [blocks.batch(batch_size, seed, step) for step in range(steps)]
    whole = Batch(*(np.concatenate(side) for side in zip(*parts, strict=True)))
    assert all(side.shape == (steps * batch_size, blocks.block_size) for side in whole)
    return [Batch(*(s[e * len(blocks) : (e + 1) * len(blocks)] for s in whole)) for e in range(count)]


# --- whole dialogues ---------------------------------------------------------------------------------------------


@given(cases(), st.integers(1, 7), st.integers(0, 2**31))
def test_every_target_is_seen_once_in_every_epoch_and_by_its_own_dialogue(case, batch_size, seed):
    stream, T = case
    blocks = PackedDialogues(stream, T)
    firsts = set(blocks.starts.tolist())
    covered = {i for s, n in zip(blocks.starts, blocks.lengths, strict=True) for i in range(s, s + n)}
    learned = stream.read_scored(0, len(stream))
    expected = sorted(i for i in range(len(stream)) if learned[i] and any(
        s < i < s + n for s, n in zip(blocks.starts, blocks.lengths, strict=True)))  # fmt: skip
    for rows in epochs(blocks, 3, batch_size, seed):
        scored = rows.targets != IGNORE
        assert sorted(rows.targets[scored]) == expected
        assert (rows.inputs[scored] + 1 == rows.targets[scored]).all()
        for inputs, targets, positions, documents in zip(*rows, strict=True):
            used = documents >= 0
            assert (targets[~used] == IGNORE).all()
            assert used.tolist() == sorted(used.tolist(), reverse=True)  # what stays empty lies at the end
            for number in range(documents.max() + 1):
                mine = documents == number
                assert (positions[mine] == np.arange(mine.sum())).all()
                assert (np.diff(inputs[mine]) == 1).all()
                assert inputs[mine][0] in firsts
                assert {*inputs[mine]} <= covered


@given(cases())
def test_dialogues_are_cut_between_turns_only_where_they_must_be(case):
    stream, T = case
    stream.scored = None
    blocks = PackedDialogues(stream, T)
    turns, found = {*stream.turns.tolist()}, list(zip(blocks.starts.tolist(), blocks.lengths.tolist(), strict=True))
    bounds = [*stream.starts.tolist(), len(stream)]
    long = long_turns = 0
    for low, high in pairwise(bounds):
        pieces = [(s, s + n) for s, n in found if low <= s < high]
        long += high - low > T + 1
        edges = [t for t in sorted(turns) if low <= t < high] + [high]
        long_turns += sum(b - a > T + 1 for a, b in pairwise(edges))
        if high - low <= T + 1:
            assert pieces == ([(low, high)] if high - low > 1 else [])
            continue
        assert all(stop <= high and 2 <= stop - start <= T + 1 for start, stop in pieces)
        # A turn that is too long is cut anywhere; its beginning stays with what is before it.
        inside = [e for a, b in pairwise(edges) if b - a > T + 1 for e in range(a - 1, b)]
        seen = set()
        for start, stop in pieces:
            assert start in turns or start in inside
            assert stop in turns or stop == high or stop in inside
            seen |= set(range(start, stop))
            if stop != high and start in turns:  # as many whole turns as fit
                following = next((e for e in edges if e > stop), high)
                assert following - start > T + 1 or stop in inside
        lost = set(range(low, high)) - seen
        assert all(i in turns and (i + 1 in turns or i + 1 == high) for i in lost), "only turns of one token are lost"
    assert (blocks.cut_dialogues, blocks.cut_turns) == (long, long_turns)


def test_a_cut_by_hand():
    blocks = PackedDialogues(Talks([[4, 4, 4], [25, 3], [2], [4, 12, 4]]), 9)  # room for 10 tokens
    assert list(zip(blocks.starts.tolist(), blocks.lengths.tolist(), strict=True)) == [
        (0, 8), (8, 4), (12, 10), (21, 10), (30, 10), (40, 2), (42, 10), (51, 7), (58, 4),
    ]  # fmt: skip
    assert (blocks.cut_dialogues, blocks.cut_turns) == (3, 2)


@given(cases(), st.integers(0, 2**31), st.integers(0, 30), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_batch_is_a_function_of_seed_and_step_however_ranks_share_it(case, seed, step, history):
    stream, T = case
    blocks = PackedDialogues(stream, T, history, SEP)
    whole = blocks.batch(8, seed, step)
    fresh = PackedDialogues(stream, T, history, SEP)
    fresh.batch(8, seed + 1, step + 1)
    for ranks in (1, 2, 4):
        share = 8 // ranks
        parts = [fresh.batch(8, seed, step, slice(r * share, (r + 1) * share)) for r in range(ranks)]
        for ours, theirs in zip(whole, map(np.concatenate, zip(*parts, strict=True)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def shapes(blocks: PackedDialogues, rows: Batch) -> list[tuple[int, ...]]:
    """Lengths of the dialogues in each block; a block keeps them from epoch to epoch, whoever they are."""
    length = dict(zip(blocks.starts.tolist(), blocks.lengths.tolist(), strict=True))
    found = []
    for inputs, documents in zip(rows.inputs.tolist(), rows.documents, strict=True):
        shape, at = [], 0
        while at < len(inputs) and documents[at] >= 0:
            shape.append(length[inputs[at]])
            at += shape[-1] - 1 + int(at + shape[-1] - 1 < len(inputs) and inputs[at + shape[-1] - 1] == SEP)
        found.append(tuple(shape))
    return found


def uneven(count: int) -> Talks:
    draw = np.random.default_rng(3)
    return Talks([[int(n)] for n in draw.integers(5, 60, count)])


def test_epochs_differ_in_order_and_company():
    blocks = PackedDialogues(uneven(300), 128)
    first, second = epochs(blocks, 2, 5, 7)
    companies = [{frozenset(row.tolist()) for row in rows.inputs} for rows in (first, second)]
    assert len(companies[0] & companies[1]) < len(blocks) / 4
    assert sorted(shapes(blocks, first)) == sorted(shapes(blocks, second))
    assert shapes(blocks, first) != shapes(blocks, second)
    assert shapes(blocks, first) != shapes(blocks, epochs(blocks, 1, 5, 8)[0])


@given(cases())
def test_fixed_blocks_are_always_the_same_and_all_of_them_hold_everything(case):
    stream, T = case
    blocks = PackedDialogues(stream, T)
    everything = blocks.fixed(10**6)
    blocks.batch(4, 3, 2)
    again = PackedDialogues(stream, T, 1.0, SEP)
    for ours, theirs in zip(everything, again.fixed(10**6), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(everything.inputs) == len(blocks)
    expected = epochs(blocks, 1, 1, 0)[0].targets
    assert Counter(everything.targets.ravel().tolist()) == Counter(expected.ravel().tolist())
    rows = {tuple(row) for row in everything.inputs.tolist()}
    assert all(tuple(row) in rows for row in blocks.fixed(3).inputs.tolist())
    assert len(blocks.fixed(3).inputs) == min(3, len(blocks))


# --- one conversation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sep", [SEP, None])
@given(case=cases(), seed=st.integers(0, 2**31))
def test_with_history_dialogues_follow_each_other_as_one(sep, case, seed):
    stream, T = case
    blocks = PackedDialogues(stream, T, 1.0, sep)
    ends = {s: s + n - 1 for s, n in zip(blocks.starts.tolist(), blocks.lengths.tolist(), strict=True)}
    for rows in epochs(blocks, 2, 3, seed):
        times = Counter(rows.targets[rows.targets != IGNORE].tolist())
        assert max(times.values(), default=1) == 1
        for inputs, targets, positions, documents in zip(*rows, strict=True):
            used = int((documents == 0).sum())
            assert {*documents[:used]} == {0}
            assert {*documents[used:]} <= {-1}
            assert (positions[:used] == np.arange(used)).all()
            at = 0
            while at < used:  # piece by piece
                last = ends[int(inputs[at])]
                n = min(last - int(inputs[at]), T - at)
                assert (inputs[at : at + n] == np.arange(inputs[at], inputs[at] + n)).all()
                scored = stream.read_scored(0, len(stream))[inputs[at : at + n] + 1]
                assert (targets[at : at + n] == np.where(scored, inputs[at : at + n] + 1, IGNORE)).all()
                at += n
                if at < used:  # the token that ends the dialogue, or what stands in for it; what follows is no target
                    assert inputs[at] == (last if sep is None else sep)
                    assert targets[at] == IGNORE
                    at += 1


def test_about_the_asked_share_of_blocks_has_history_and_not_always_the_same():
    blocks = PackedDialogues(uneven(600), 128, 0.25, SEP)
    joined = []
    for rows in epochs(blocks, 2, 8, 1):
        has = [SEP in row for row in rows.inputs]
        assert 0.15 < np.mean(has) < 0.35
        joined.append(sorted(shape for shape, one in zip(shapes(blocks, rows), has, strict=True) if one))
    assert joined[0] != joined[1]


# --- packing -----------------------------------------------------------------------------------------------------


def best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """One by one, longest first, into the fullest block with room."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@example((10, [7, 6, 3, 2, 2]))  # into the emptiest block instead, they need three
@given(st.integers(1, 40).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), min_size=1))))
def test_packing_is_best_fit_decreasing(case):
    capacity, lengths = case
    sizes, begins = pack_lengths(np.array(lengths), capacity)
    assert sorted(sizes) == sorted(lengths)
    assert (begins[0], begins[-1]) == (0, len(sizes))
    packs = [sizes[a:b] for a, b in pairwise(begins)]
    assert all(0 < pack.sum() <= capacity for pack in packs)
    assert len(packs) == best_fit_decreasing(lengths, capacity)


def test_hardly_a_token_is_wasted():
    draw = np.random.default_rng(0)  # lengths as of the chit-chat corpora: median 30, a long tail
    lengths = np.clip(draw.lognormal(3.4, 0.7, 20_000), 4, 2000).astype(int)
    blocks = PackedDialogues(Talks([[length // 2, length - length // 2] for length in lengths]), 256)
    rows = blocks.fixed(200)
    assert blocks.useful >= 0.99
    assert (rows.documents >= 0).mean() == pytest.approx(blocks.useful, abs=0.02)
    alone = -(-(lengths - 1) // 256)
    assert (lengths - 1).sum() / (alone.sum() * 256) < 0.25  # a block for each


# --- nothing to learn --------------------------------------------------------------------------------------------


def test_without_targets_there_is_nothing_to_train_on():
    with pytest.raises(UserError, match="no dialogue of two tokens or more"):
        PackedDialogues(Talks([[1], [1]]), 8)
    marked = Talks([[3, 3], [2, 4]], np.zeros(12, bool))
    marked.scored[[0, 6]] = True  # a dialogue's first token is given, not learned
    with pytest.raises(UserError, match="no turn of the assistant is in the data"):
        PackedDialogues(marked, 8)
    marked.scored[9] = True
    blocks = PackedDialogues(marked, 8)
    assert blocks.starts.tolist() == [6], "a dialogue without targets takes no room"
    assert (blocks.batch(3, 0, 0).targets != IGNORE).sum(1).tolist() == [1, 1, 1]
