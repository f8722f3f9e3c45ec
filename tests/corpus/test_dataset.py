"""Batches as a pure function, windows, and shards that are what the manifest says."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaobi.corpus.dataset import IGNORE, batch, derive, fixed_windows, permute, windows_per_epoch
from miaobi.corpus.prepared import PreparedData
from miaobi.errors import UserError


class Numbers:
    """A stream whose token at position i is i."""

    def __init__(self, length: int) -> None:
        self.tokens = np.arange(length)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


def write_prepared(path: Path, train: list[np.ndarray], val: list[np.ndarray], dtype: str = "uint16") -> Path:
    """A prepared directory with the given shards, and a manifest written by hand."""
    path.mkdir(parents=True, exist_ok=True)
    manifest = {"format": "miaobi-prepared", "version": 1, "kind": "text", "dtype": dtype, "vocab_size": 1 << 18,
                "eot_id": None}  # fmt: skip
    for name, shards in (("train", train), ("val", val)):
        rows = []
        for i, shard in enumerate(shards):
            content = np.asarray(shard).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
            file = f"{name}-{i:05d}.bin"
            (path / file).write_bytes(content)
            rows.append({"file": file, "tokens": len(shard), "sha256": hashlib.sha256(content).hexdigest()})
        total = sum(map(len, shards))
        manifest[name] = {"tokens": total, "characters": total, "bytes": total, "documents": 1, "shards": rows}
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return path


@st.composite
def stream_and_block(draw: st.DrawFn) -> tuple[Numbers, int]:
    block = draw(st.integers(1, 12))
    return Numbers(draw(st.integers(block + 1, 120))), block


@given(stream_and_block(), st.integers(1, 9), st.integers(0, 2**31))
def test_every_target_of_an_epoch_is_seen_exactly_once_also_across_the_seam(case, batch_size, seed):
    stream, block = case
    windows = windows_per_epoch(len(stream), block)
    steps = -(-3 * windows // batch_size)  # three epochs; batches straddle their seams
    parts = [batch(stream, block, batch_size, seed, step) for step in range(steps)]
    inputs, targets = (np.concatenate(side) for side in zip(*parts, strict=True))
    assert inputs.shape == targets.shape == (steps * batch_size, block)
    for epoch in range(3):
        rows = slice(epoch * windows, (epoch + 1) * windows)
        scored = targets[rows] != IGNORE
        assert sorted(targets[rows][scored]) == list(range(1, len(stream)))
        assert (inputs[rows][scored] + 1 == targets[rows][scored]).all()


@given(stream_and_block(), st.integers(0, 2**31), st.integers(0, 50))
def test_rows_of_ranks_concatenated_are_the_whole_batch(case, seed, step):
    stream, block = case
    whole = batch(stream, block, 8, seed, step)
    for ranks in (1, 2, 4):
        share = 8 // ranks
        parts = [batch(stream, block, 8, seed, step, slice(r * share, (r + 1) * share)) for r in range(ranks)]
        for ours, theirs in zip(whole, map(np.concatenate, zip(*parts, strict=True)), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_batch_depends_on_seed_and_step_alone():
    stream = Numbers(1000)
    first = batch(stream, 8, 4, seed=1, step=77)
    for step in (3, 200, 0):
        batch(stream, 8, 4, seed=9, step=step)
    again = batch(stream, 8, 4, seed=1, step=77)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], batch(stream, 8, 4, seed=2, step=77)[0])


def test_epochs_have_their_own_order_and_offset():
    stream, windows = Numbers(1002), windows_per_epoch(1002, 10)
    epochs = [batch(stream, 10, windows, seed=5, step=epoch)[0][:, 0] for epoch in range(3)]
    assert not np.array_equal(epochs[0], epochs[1])
    assert len({tuple(sorted(starts)) for starts in epochs}) > 1, "every epoch cuts the text at the same places"
    steps = np.diff(epochs[0])
    assert (steps == 10).mean() < 0.2, "windows come in the order of the text"


def test_a_stream_shorter_than_a_block_is_refused_with_a_way_out():
    with pytest.raises(UserError, match=r"8 tokens, less than one block of 8.*--block_size="):
        batch(Numbers(8), 8, 2, 0, 0)
    batch(Numbers(9), 8, 2, 0, 0)


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1))
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permute_needs_no_table_and_agrees_with_itself_one_at_a_time():
    size = 10**13
    index = np.arange(0, size, size // 1000)
    out = permute(index, size, key=3)
    assert len(set(out.tolist())) == len(index)
    assert ((out >= 0) & (out < size)).all()
    assert [int(permute(index[i : i + 1], size, 3)[0]) for i in range(5)] == out[:5].tolist()


def test_seeds_for_different_purposes_are_unrelated():
    seeds = {derive(seed, what, n) for seed in range(10) for what in ("order", "shift", "dropout") for n in range(10)}
    assert len(seeds) == 300
    assert all(0 <= s < 2**63 for s in seeds)


@given(stream_and_block(), st.integers(1, 40))
def test_fixed_windows_do_not_overlap_and_predict_the_next_token(case, count):
    stream, block = case
    inputs, targets = fixed_windows(stream, block, count)
    scored = targets != IGNORE
    assert len(inputs) == min(count, windows_per_epoch(len(stream), block))
    assert len(set(targets[scored])) == scored.sum()
    assert (inputs[scored] + 1 == targets[scored]).all()
    if count >= windows_per_epoch(len(stream), block):
        assert sorted(targets[scored]) == list(range(1, len(stream)))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_several_shards_read_as_one(tmp_path, dtype):
    tokens = np.random.default_rng(0).integers(0, 65000 if dtype == "uint16" else 200_000, 100)
    one = PreparedData.open(write_prepared(tmp_path / "one", [tokens], [tokens[:20]], dtype))
    cuts = [tokens[:7], tokens[7:7], tokens[7:8], tokens[8:60], tokens[60:], tokens[100:]]
    many = PreparedData.open(write_prepared(tmp_path / "many", cuts, [tokens[:20]], dtype))
    assert len(one.train) == len(many.train) == 100
    for start in range(0, 100, 3):
        for stop in range(start, 101, 4):
            np.testing.assert_array_equal(many.train.read(start, stop), tokens[start:stop])
    for step in range(20):
        np.testing.assert_array_equal(batch(one.train, 9, 4, 1, step), batch(many.train, 9, 4, 1, step))


def test_a_stream_without_tokens_is_empty(tmp_path):
    data = PreparedData.open(write_prepared(tmp_path, [np.arange(10)], []))
    assert len(data.val) == 0
    assert data.val.read(0, 5).tolist() == []


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_prepared(tmp_path / "data", [np.arange(50), np.arange(50, 99)], [np.arange(30)])


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00001.bin", "val-00000.bin"])
def test_truncated_altered_and_missing_shards_are_refused_by_name(shards, name):
    PreparedData.open(shards)
    file = shards / name
    whole = file.read_bytes()

    file.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=rf"{name} is truncated"):
        PreparedData.open(shards)

    file.write_bytes(whole[:10] + bytes([whole[10] ^ 1]) + whole[11:])
    with pytest.raises(UserError, match=rf"{name} was altered"):
        PreparedData.open(shards)

    file.unlink()
    with pytest.raises(UserError, match=rf"{name} is missing"):
        PreparedData.open(shards)


@pytest.mark.parametrize(
    "content",
    [
        '{"format": "miaobi-prepared", "train": {',
        '{"format": "miaobi-prepared"}',
        '{"format": "miaobi-prepared", "train": {"shards": []}, "val": {"shards": []}}',
        "{}",
        "[]",
        '"x"',
        '"\udcd6\udcd0"',
        "",
    ],
)
def test_a_damaged_manifest_is_an_error_for_the_user(shards, content):
    (shards / "manifest.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=r"manifest\.json"):
        PreparedData.open(shards)


def test_the_shard_that_is_read_is_the_shard_that_was_checked(shards):
    (shards.parent / "train-00000.bin").write_bytes(np.full(50, 7, "<u2").tobytes())
    manifest = json.loads((shards / "manifest.json").read_text(encoding="utf-8"))
    manifest["train"]["shards"][0]["file"] = "../train-00000.bin"
    (shards / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert PreparedData.open(shards).train.read(0, 3).tolist() == [0, 1, 2]


def test_a_directory_that_was_never_prepared_says_how_to(tmp_path):
    with pytest.raises(UserError, match="miaobi prepare"):
        PreparedData.open(tmp_path)


def test_the_fingerprint_follows_the_tokens(tmp_path):
    a = PreparedData.open(write_prepared(tmp_path / "a", [np.arange(50)], [np.arange(30)]))
    b = PreparedData.open(write_prepared(tmp_path / "b", [np.arange(50)], [np.arange(30)]))
    c = PreparedData.open(write_prepared(tmp_path / "c", [np.arange(50)], [np.arange(1, 31)]))
    assert a.fingerprint == b.fingerprint != c.fingerprint
