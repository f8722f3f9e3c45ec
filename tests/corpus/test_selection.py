"""--val: the validation part is that file's documents, and training has none of them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from xxhash import xxh3_128

from miaobi.corpus import blocks, workers
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.corpus.prepared import PreparedData
from miaobi.errors import UserError


def write(path: Path, documents: list[str]) -> str:
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return str(path)


def documents(out: Path, split: str) -> list[str]:
    data = PreparedData.open(out)
    stream = data.train if split == "train" else data.val
    parts = np.split(stream.read(0, len(stream)), stream.starts[1:])
    return [data.tokenizer.decode(part[:-1].tolist()) for part in parts]


TRAIN = [f"第{i}场比赛，皇马对曼联，球迷都来了，主教练很高兴，比分是{i}比{i + 1}。" for i in range(60)]
OWN = [f"另外第{i}篇，国家队的训练。" for i in range(5)]


@pytest.fixture(params=[1, 2])
def n_workers(request, monkeypatch) -> int:
    if request.param == 2:
        monkeypatch.setattr(blocks, "BLOCK_BYTES", 700)
        monkeypatch.setattr(workers, "SMALL_INPUT_BYTES", 0)
    return request.param


@pytest.mark.parametrize("dedup", ["none", "exact", "near"])
@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_validation_is_exactly_that_file(tmp_path, n_workers, dedup, tokenizer):
    val = [*OWN, TRAIN[3], "  " + TRAIN[50], OWN[0]]  # repeats and all, white space around it and all
    sources = [write(tmp_path / "a.txt", TRAIN), write(tmp_path / "b.txt", [TRAIN[7], OWN[1], *TRAIN[:2]])]
    result = prepare(
        sources,
        PrepareConfig(out=tmp_path / "out", val=write(tmp_path / "v.txt", val), dedup=dedup, tokenizer=tokenizer,
                      vocab_size=500 if tokenizer == "bpe" else None, workers=n_workers, near_threshold=0.999),
    )  # fmt: skip
    assert documents(tmp_path / "out", "val") == val
    expected = [d for d in [*TRAIN, TRAIN[7], OWN[1], *TRAIN[:2]] if d not in {TRAIN[3], TRAIN[50], OWN[1]}]
    expected = expected if dedup == "none" else list(dict.fromkeys(expected))
    assert documents(tmp_path / "out", "train") == expected
    assert result["also_in_validation"] == 3
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["statistics"]["also_in_validation"] == 3
    assert [source.get("split") for source in manifest["sources"]] == [None, None, "val"]


def test_near_duplicates_of_validation_leave_training(tmp_path):
    long = ["".join(chr(0x4E00 + (i * 131 + j * 17) % 3000) for j in range(300)) for i in range(30)]
    val = write(tmp_path / "v.txt", [long[2].replace(long[2][150], "变", 1)])
    prepare([write(tmp_path / "a.txt", long)], PrepareConfig(out=tmp_path / "out", val=val, dedup="near"))
    assert documents(tmp_path / "out", "train") == [*long[:2], *long[3:]]


def test_a_novel_is_not_cut_where_validation_is_given(tmp_path):
    novel = "\n".join("皇马赢得比赛，" * 20 for _ in range(200))
    prepare(
        [write(tmp_path / "a.txt", [novel])],
        PrepareConfig(out=tmp_path / "out", val=write(tmp_path / "v.txt", [OWN[0]])),
    )
    assert documents(tmp_path / "out", "train") == [novel]


def test_tail(tmp_path, n_workers):
    """Streams know no documents: all of the one, then all of the other."""
    a, v = "\n\n\n".join(TRAIN), "\n\n".join([*OWN, TRAIN[0]]) + "\n"
    (tmp_path / "a.txt").write_text(a, encoding="utf-8")
    (tmp_path / "v.txt").write_text(v, encoding="utf-8")
    cfg = PrepareConfig(out=tmp_path / "out", val=str(tmp_path / "v.txt"), split="tail", workers=n_workers)
    result = prepare([str(tmp_path / "a.txt")], cfg)
    data = PreparedData.open(tmp_path / "out")
    for stream, text in ((data.train, a), (data.val, v)):
        assert data.tokenizer.decode(stream.read(0, len(stream)).tolist()) == text
        assert (stream.characters, stream.bytes) == (len(text), len(text.encode()))
    assert result["also_in_validation"] == 0


@pytest.mark.parametrize("split", ["hash", "tail"])
def test_dialogues(tmp_path, split):
    talks = [f"你好{i}\n吃了吗\n吃了" for i in range(40)]
    cfg = PrepareConfig(
        out=tmp_path / "out", val=write(tmp_path / "v.txt", [talks[5], "再见\n好"]), format="dialogue", split=split
    )
    result = prepare([write(tmp_path / "a.txt", talks)], cfg)
    data = PreparedData.open(tmp_path / "out")
    assert (data.train.documents, data.val.documents, result["also_in_validation"]) == (39, 2, 1)


def test_weights_do_not_touch_validation(tmp_path):
    val = [f"很好的第{i}篇文章" for i in range(30)]
    cfg = PrepareConfig(out=tmp_path / "out", val=write(tmp_path / "v.txt", val), weights=(0.3, 2.0))
    prepare([write(tmp_path / "a.txt", TRAIN), write(tmp_path / "b.txt", OWN)], cfg)
    assert documents(tmp_path / "out", "val") == val
    counts = Counter(documents(tmp_path / "out", "train"))
    assert [counts[d] for d in OWN] == [2] * 5
    assert 5 < sum(d in counts for d in TRAIN) < 35


@pytest.mark.parametrize(("train", "val", "message"), [
    (TRAIN[:4], TRAIN[:4], "no document in the sources, beside"), (TRAIN, [" "], "no document in --val|no text"),
])  # fmt: skip
def test_an_empty_side_is_named(tmp_path, train, val, message):
    cfg = PrepareConfig(out=tmp_path / "out", val=write(tmp_path / "v.txt", val))
    with pytest.raises(UserError, match=message):
        prepare([write(tmp_path / "a.txt", train)], cfg)


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.txt.gz", "a.zip", "a.parquet", "big.txt"])
def test_the_manifest_knows_its_text_by_content(tmp_path, monkeypatch, name):
    import gzip
    import zipfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000 if name.startswith("big") else 1 << 21)
    path = tmp_path / name
    if name.endswith(".csv"):
        path.write_text("text\n" + "\n".join(TRAIN) + "\n", encoding="utf-8")
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TRAIN), encoding="utf-8")
    elif name.endswith(".parquet"):
        pq.write_table(pa.table({"text": TRAIN}), path)
    elif name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.txt", "\n\n".join(TRAIN))
            archive.writestr("y.txt", "\n\n".join(OWN))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress("\n\n".join(TRAIN).encode()))
    else:
        write(path, TRAIN)
    prepare([str(path)], PrepareConfig(out=tmp_path / "out"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    digest = xxh3_128(path.read_bytes()).hexdigest()  # what xxh128sum prints
    assert {source["xxh3_128"] for source in manifest["sources"]} == {digest}
