"""Prepared data that is damaged in any way is an error for the user; nanoGPT's own data is read as it is."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miaobi.corpus import checked
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.dataset import TextWindows
from miaobi.corpus.packing import PackedDialogues
from miaobi.corpus.prepare import prepare
from miaobi.corpus.prepared import PreparedData, is_prepared
from miaobi.errors import UserError

TEXT = "\n\n".join(f"第{i}场，皇马赢了曼联" for i in range(100))
TALKS = "\n\n".join(f"你好{i}\n吃了吗\n吃了" for i in range(100))
SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture], "max_examples": 60}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    home = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture(params=["text", "dialogue"])
def data(tmp_path, request) -> Path:
    (tmp_path / "a.txt").write_text(TEXT if request.param == "text" else TALKS, encoding="utf-8")
    prepare([str(tmp_path / "a.txt")], PrepareConfig(out=tmp_path / "out", format=request.param))
    return tmp_path / "out"


def use(directory: Path) -> None:
    """Everything that training asks of prepared data."""
    found = PreparedData.open(directory)
    for stream in (found.train, found.val):
        found.tokenizer.decode(stream.read(0, len(stream)).tolist())
        blocks = (PackedDialogues if found.is_dialogue else TextWindows)(stream, 8)
        blocks.batch(4, 0, 0)
    _ = found.fingerprint, found.end_ids, found.sep_id, found.vocab_size


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.just([]), st.just({}),
    st.just([1]), st.just({"file": 3}), st.just(10**400), st.just("../../x"), st.just("a\0b"), st.just(1 << 63),
)  # fmt: skip


@settings(**SLOW)
@given(draw=st.data())
def test_a_manifest_with_any_value_anywhere(data, draw):
    file = data / "manifest.json"
    before = file.read_text(encoding="utf-8")
    value = json.loads(before)
    places, waiting = [], [value]
    while waiting:
        node = waiting.pop()
        keys = node.keys() if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        waiting += [node[key] for key in keys if isinstance(node[key], (dict, list))]
    node, key = draw.draw(st.sampled_from(places))
    if draw.draw(st.booleans()) and isinstance(node, dict):
        del node[key]
    else:
        node[key] = draw.draw(VALUES)
    try:
        file.write_text(json.dumps(value), encoding="utf-8")
        use(data)
    except UserError:
        pass
    finally:
        file.write_text(before, encoding="utf-8")


def test_a_manifest_of_very_many_files_is_read(data):
    file = data / "manifest.json"
    many = {"left_out": [{"path": "x" * 1000, "why": "empty"}] * 40_000}
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | many), encoding="utf-8")
    assert len(PreparedData.open(data).train)


@pytest.mark.parametrize("rows", [2**20 + 1, 2**24, 2**32])
def test_a_manifest_asks_for_no_embedding_that_nothing_holds(data, rows):
    file = data / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"vocab_size": rows}), encoding="utf-8")
    with pytest.raises(UserError, match="vocab_size"):
        PreparedData.open(data)
    with pytest.raises(UserError, match="vocab_size is"):
        PrepareConfig(out=data, vocab_size=rows)


@settings(**SLOW)
@given(content=st.one_of(st.binary(max_size=60), st.sampled_from([
    b"[" * 100_000, b'{"format":' * 20_000, b"9" * 6000, b'{"dtype": ' + b"9" * 6000 + b"}",
    b"\xff\xfe", b'"\\ud800"', b"NaN",
])))  # fmt: skip
def test_a_manifest_of_any_bytes(data, content):
    file = data / "manifest.json"
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        with pytest.raises(UserError, match=r"manifest\.json|no manifest"):
            PreparedData.open(data)
        assert not is_prepared(data) or b"miaobi-prepared" in content or (data / "train.bin").is_file()
    finally:
        file.write_bytes(before)


@settings(**SLOW)
@given(name=st.sampled_from(["train.bin", "val.bin", "train.idx", "val.idx", "train.turns"]), draw=st.data())
def test_files_of_any_bytes_whose_manifest_agrees(data, name, draw):
    """Whoever altered a file may have altered its size and hash in the manifest as well."""
    if not (data / name).exists():
        return
    manifest, before = (data / "manifest.json").read_bytes(), (data / name).read_bytes()
    content = draw.draw(st.one_of(st.binary(max_size=64), st.binary(min_size=len(before), max_size=len(before))))
    value = json.loads(manifest)
    for split in ("train", "val"):
        for entry in value[split]["shards"] + value[split]["beside"]:
            if entry["file"] == name:
                entry["sha256"] = hashlib.sha256(content).hexdigest()
                if "bytes" in entry:
                    entry["bytes"] = len(content)
                else:
                    entry["tokens"] = value[split]["tokens"] = len(content) // 2
    (data / "manifest.json").write_text(json.dumps(value), encoding="utf-8")
    (data / name).write_bytes(content)
    try:
        use(data)
    except UserError:
        pass
    finally:
        (data / "manifest.json").write_bytes(manifest)
        (data / name).write_bytes(before)


@pytest.mark.parametrize("name", ["train", "val"])
@pytest.mark.parametrize("beyond", [0, 1, 60_000])
def test_tokens_that_the_vocabulary_lacks_are_refused(data, name, beyond):
    """However the manifest vouches for them: they would be read behind the end of the embedding."""
    manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
    ids = np.fromfile(data / f"{name}.bin", "<u2")
    ids[len(ids) // 2] = min(manifest["vocab_size"] + beyond, 65_535)
    ids.tofile(data / f"{name}.bin")
    manifest[name]["shards"][0]["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    (data / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name}\.bin has token {ids.max()}, but manifest\.json says"):
        use(data)


@pytest.mark.parametrize("shard", ["train.bin", "train.scored"])
@pytest.mark.parametrize("length", [0, 10])
def test_a_shard_that_is_cut_short_while_it_is_read(tmp_path, shard, length):
    """A mapped file would end the process with SIGBUS."""
    lines = "".join(
        json.dumps({"messages": [{"role": "user", "content": f"问{i}"}, {"role": "assistant", "content": "答" * 9}]})
        + "\n" for i in range(200)
    )  # fmt: skip
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    prepare([str(tmp_path / "a.jsonl")], PrepareConfig(out=tmp_path / "out", format="dialogue"))
    stream = PreparedData.open(tmp_path / "out").train
    first, scored = stream.read(0, 50), stream.read_scored(0, 50)
    assert (stream.read(0, 50) == first).all()
    assert (stream.read_scored(0, 50) == scored).all()
    os.truncate(tmp_path / "out" / shard, length)
    with pytest.raises(UserError, match=rf"{shard} was cut short while it was in use"):
        stream.read(0, 50) if shard == "train.bin" else stream.read_scored(0, 50)


def test_a_shard_that_is_replaced_while_it_is_read_stays_what_it_was(data):
    stream = PreparedData.open(data).train
    before = stream.read(0, len(stream))
    (data / "new").write_bytes(b"\1\0" * len(stream))
    os.replace(data / "new", data / "train.bin")
    assert (stream.read(0, len(stream)) == before).all()


# Hashes that are remembered


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    names, real = [], checked.sha256
    monkeypatch.setattr(checked, "sha256", lambda file: names.append(file.name) or real(file))
    monkeypatch.setattr(checked, "JUST_NOW", 0)
    return names


def test_shards_are_hashed_once(data, hashed):
    PreparedData.open(data)
    once = list(hashed)
    assert {"train.bin", "val.bin", "train.idx"} <= set(once)
    PreparedData.open(data)
    PreparedData.open(f"{data}/../out")
    assert hashed == once


@pytest.mark.parametrize("way", ["write", "same size and time", "replace", "link"])
def test_a_shard_that_was_touched_is_hashed_again(data, hashed, way):
    PreparedData.open(data)
    file = data / "train.bin"
    content, times = bytearray(file.read_bytes()), file.stat()
    content[5] ^= 1
    time.sleep(0.02)
    if way in ("write", "same size and time"):
        file.write_bytes(content)
    else:
        (data.parent / "new").write_bytes(content)
        if way == "replace":
            os.replace(data.parent / "new", file)
        else:
            file.unlink()
            file.symlink_to(data.parent / "new")
    if way != "write":
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=r"train\.bin was altered"):
        PreparedData.open(data)


def test_what_was_written_just_now_is_not_trusted(data, hashed, monkeypatch):
    monkeypatch.setattr(checked, "JUST_NOW", 3600)
    PreparedData.open(data)
    once = len(hashed)
    PreparedData.open(data)
    assert len(hashed) == 2 * once


@pytest.mark.parametrize("content", [b"", b"[]", b'{"train.bin": [[1], 2]}', b"[" * 9999, b"\xff"])
def test_a_damaged_memory_is_forgotten(data, own_cache, hashed, content):
    PreparedData.open(data)
    (file,) = (own_cache / "miaobi" / "checked").iterdir()
    file.write_bytes(content)
    PreparedData.open(data)


@pytest.mark.skipif(os.name != "posix", reason="owners and modes")
@pytest.mark.parametrize("fault", ["mode", "file", "link"])
def test_a_cache_that_others_may_write_is_not_believed(data, own_cache, hashed, fault):
    PreparedData.open(data)
    (own_cache / "miaobi").mkdir(exist_ok=True)
    place = own_cache / "miaobi" / "checked"
    if fault == "mode":
        place.chmod(0o777)
    else:
        place.rename(own_cache / "else")
        if fault == "file":
            place.write_text("x", encoding="utf-8")
        else:
            place.symlink_to(own_cache / "else")
    once = len(hashed)
    PreparedData.open(data)
    assert len(hashed) == 2 * once


def test_of_processes_at_once_one_hashes(tmp_path, own_cache):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    prepare([str(tmp_path / "a.txt")], PrepareConfig(out=tmp_path / "out"))
    time.sleep(0.1)
    code = (
        "import sys, time\n"
        "from miaobi.corpus import checked, prepared\n"
        "real = checked.sha256\n"
        "def slow(file):\n"
        "    time.sleep(0.2)\n"
        "    print(file.name)\n"
        "    return real(file)\n"
        "checked.sha256 = slow\n"
        "prepared.PreparedData.open(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = sorted(name for rank in ranks for name in rank.communicate()[0].split())
    assert said == ["train.bin", "train.idx", "val.bin", "val.idx"]


# nanoGPT's own


def nanogpt(directory: Path, text: str, meta: object = True) -> dict:
    """What nanoGPT's data/shakespeare_char/prepare.py does."""
    directory.mkdir(parents=True)
    chars = sorted(set(text))
    stoi = {c: i for i, c in enumerate(chars)}
    n = int(len(text) * 0.9)
    for name, part in (("train", text[:n]), ("val", text[n:])):
        np.array([stoi[c] for c in part], np.uint16).tofile(directory / f"{name}.bin")
    table = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    if meta:
        (directory / "meta.pkl").write_bytes(pickle.dumps(table if meta is True else meta))
    return table


def test_nanogpts_data_is_read_as_it_is(tmp_path):
    text = TEXT + "😀"
    table = nanogpt(tmp_path / "TH", text)
    assert is_prepared(tmp_path / "TH")
    data = PreparedData.open(tmp_path / "TH")
    n = int(len(text) * 0.9)
    assert data.tokenizer.decode(data.train.read(0, len(data.train)).tolist()) == text[:n]
    assert data.tokenizer.decode(data.val.read(0, len(data.val)).tolist()) == text[n:]
    assert [data.tokenizer.encode(c) for c in "皇马"] == [[table["stoi"][c]] for c in "皇马"]
    assert data.tokenizer.decode(data.tokenizer.encode("龘未见")) == "龘未见"
    assert data.vocab_size == data.tokenizer.vocab_size == len(table["itos"]) + 256
    assert (data.train.characters, data.train.bytes) == (n, len(text[:n].encode()))
    assert (data.val.characters, data.val.bytes) == (len(text) - n, len(text[n:].encode()))
    assert (data.eot_id, data.end_ids, data.is_dialogue, data.train.starts.tolist()) == (None, (), False, [0])
    TextWindows(data.train, 8).batch(4, 0, 0)
    assert data.fingerprint == PreparedData.open(tmp_path / "TH").fingerprint


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_tokens_of_more_than_two_bytes_are_not_read_with_zeros_between_them(tmp_path, dtype):
    """Of a fork with a large vocabulary: id 0 is a character too."""
    nanogpt(tmp_path / "TH", TEXT)
    file = tmp_path / "TH" / "train.bin"
    np.fromfile(file, np.uint16).astype(dtype).tofile(file)
    with pytest.raises(UserError, match=r"train\.bin: every second number of two bytes is 0"):
        PreparedData.open(tmp_path / "TH")


@pytest.mark.parametrize("left_out", ["stoi", "vocab_size"])
def test_a_meta_pkl_needs_no_more_than_its_characters(tmp_path, left_out):
    table = nanogpt(tmp_path / "TH", TEXT)
    del table[left_out]
    (tmp_path / "TH" / "meta.pkl").write_bytes(pickle.dumps(table))
    assert PreparedData.open(tmp_path / "TH").tokenizer.encode(TEXT[:9]) == [
        {c: i for i, c in table["itos"].items()}[c] for c in TEXT[:9]
    ]


def test_tokens_without_a_vocabulary_say_what_to_do(tmp_path):
    nanogpt(tmp_path / "owt", TEXT, meta=None)
    with pytest.raises(UserError, match=r"no meta\.pkl: tokens of GPT-2's BPE.*miaobi prepare input\.txt --out=DIR"):
        PreparedData.open(tmp_path / "owt")


class Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("meta", [Evil(), {"itos": Evil()}, {"itos": {0: "好"}}, {"itos": {0: 1}}, [], {"itos": {}}])
def test_a_meta_pkl_that_is_none(tmp_path, monkeypatch, meta):
    monkeypatch.chdir(tmp_path)
    nanogpt(tmp_path / "TH", TEXT, meta)
    with pytest.raises(UserError, match=r"meta\.pkl"):
        PreparedData.open(tmp_path / "TH")
    assert not (tmp_path / "executed").exists()


@settings(**SLOW)
@given(content=st.binary(max_size=200))
def test_a_meta_pkl_and_shards_of_any_bytes(tmp_path, content):
    directory = tmp_path / "TH"
    if not directory.exists():
        nanogpt(directory, TEXT)
    for name in ("meta.pkl", "train.bin"):
        before = (directory / name).read_bytes()
        (directory / name).write_bytes(content)
        try:
            data = PreparedData.open(directory)
            data.tokenizer.decode(data.train.read(0, len(data.train)).tolist())
        except UserError as error:
            assert name in str(error)  # noqa: PT017 - either is right
        finally:
            (directory / name).write_bytes(before)


def test_our_own_manifest_wins(tmp_path):
    (tmp_path / "TH").mkdir()
    (tmp_path / "TH" / "input.txt").write_text(TEXT, encoding="utf-8")
    prepare([str(tmp_path / "TH" / "input.txt")], PrepareConfig(out=tmp_path / "TH"))
    assert PreparedData.open(tmp_path / "TH").eot_id == 0
