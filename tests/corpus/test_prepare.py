"""The prepared directory against naive versions, whatever the number of workers and blocks; bad input and bad luck."""

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from xxhash import xxh3_128

from miaobi.corpus import blocks, characters, encode, store, workers
from miaobi.corpus import documents as documents_module
from miaobi.corpus import prepare as prepare_module
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

WORDS = "皇马 曼联 国家队 主教练 球迷 赢得 输掉 期待 比赛 联赛 冠军 转会 训练 ， 。 ！ 1 2 Goal 😀".split()  # noqa: SIM905


def articles(n: int, seed: int = 0, length: int = 40) -> list[str]:
    draw = random.Random(seed)
    return [f"{seed}-{i} " + "".join(draw.choices(WORDS, k=length)) + "\n" + draw.choice(WORDS) for i in range(n)]


def write(path: Path, documents: list[str]) -> str:
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return str(path)


def run(source: object, out: Path, **settings: object) -> dict:
    sources = source if isinstance(source, list) else [str(source)]
    return prepare(sources, PrepareConfig(out=out, **settings))


def manifest(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def tokens(out: Path, split: str) -> np.ndarray:
    data = manifest(out)
    shards = [
        np.fromfile(out / shard["file"], "<u2" if data["dtype"] == "uint16" else "<u4")
        for shard in data[split]["shards"]
    ]
    return np.concatenate(shards)


def documents(out: Path, split: str) -> list[str]:
    """Decoded through the index, without the id that ends each document."""
    ids, starts = tokens(out, split), np.fromfile(out / f"{split}.idx", "<u8").astype(int)
    assert starts[0] == 0
    tokenizer, end = Tokenizer.load(out), manifest(out)["eot_id"]
    found = []
    for part in np.split(ids, starts[1:]):
        assert part[-1] == end
        found.append(tokenizer.decode(part[:-1]))
    return found


def contents(out: Path) -> dict[str, bytes]:
    """All files."""
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks and real worker processes although the text is small."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(workers, "SMALL_INPUT_BYTES", 0)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_hash_split(tmp_path, tokenizer):
    texts = articles(400)
    source = write(tmp_path / "a.txt", texts)
    out = tmp_path / "out"
    result = run(source, out, tokenizer=tokenizer, vocab_size=400 if tokenizer == "bpe" else None)
    raw = Path(source).read_text(encoding="utf-8")
    train, val = documents(out, "train"), documents(out, "val")
    assert sorted(train + val) == sorted(texts)
    assert [t for t in texts if t in set(train)] == train  # the order of the source
    assert 20 <= len(val) <= 70
    data = manifest(out)
    assert data["format"] == "miaobi-prepared"
    assert (data["version"], data["kind"], data["dtype"], data["eot_id"]) == (1, "text", "uint16", 0)
    for split, kept in (("train", train), ("val", val)):
        described = data[split]
        assert described["documents"] == len(kept)
        assert described["characters"] == sum(map(len, kept))
        assert described["bytes"] == sum(len(text.encode()) for text in kept)
        assert described["tokens"] == len(tokens(out, split)) == result[f"{split}_tokens"]
        assert described["shards"] == [
            {
                "file": f"{split}.bin",
                "tokens": described["tokens"],
                "sha256": hashlib.sha256((out / f"{split}.bin").read_bytes()).hexdigest(),
            }
        ]
    assert (result["characters"], result["distinct_characters"]) == (len(raw), len(set(raw)))
    assert result["documents"] == 400
    assert result["encodings"] == {"utf-8": 1}
    assert data["vocab_size"] == result["vocab_size"] == Tokenizer.load(out).vocab_size
    read = {"encoding": "utf-8", "documents": 400, "characters": len(raw), "skipped": 0, "removed": 0}
    hashed = {"bytes": len(raw.encode()), "xxh3_128": xxh3_128(raw.encode()).hexdigest()}
    assert data["sources"] == [{"path": source, "format": "text", **hashed, **read}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gb18030"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_of_many_blocks_is_known_by_all_its_bytes(tmp_path, small_blocks, encoding, workers):
    """Byte order marks included, whoever reads it; twice named, and cut again for a small validation part, too."""
    path = tmp_path / "novel.txt"
    path.write_bytes("\n".join(articles(300)).encode(encoding))
    prepare([str(path), str(path)], PrepareConfig(out=tmp_path / "out", workers=workers))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert [source["xxh3_128"] for source in manifest["sources"]] == [xxh3_128(path.read_bytes()).hexdigest()] * 2


def test_char_vocabulary_is_by_frequency_of_kept_text(tmp_path, small_blocks):
    texts = articles(300)
    repeated = ["龘" * 500 + "好"] * 40  # counts once
    run(write(tmp_path / "a.txt", [*texts, *repeated]), tmp_path / "out", workers=2)
    counts = Counter("".join([*texts, repeated[0]]))
    expected = sorted(counts, key=lambda c: (-counts[c], c))
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert [tokenizer.backend.id_to_token(261 + i) for i in range(len(expected))] == expected


def test_bpe_is_learned_from_what_is_taken(tmp_path, monkeypatch, capsys):
    """What weights leave out is not counted when lines are chosen."""
    monkeypatch.setattr(encode, "BPE_SAMPLE_CHARACTERS", 5000)
    sources = [write(tmp_path / "a.txt", articles(100)), write(tmp_path / "b.txt", articles(2000, seed=1))]
    kept = sum(map(len, articles(100)))
    run(sources, tmp_path / "out", tokenizer="bpe", vocab_size=400, weights=(1.0, 0.0001), workers=1)
    assert f"1 line in {-(-kept // 5000)}" in capsys.readouterr().err
    assert Tokenizer.load(tmp_path / "out").vocab_size > 320


def test_tail_split_is_nanogpts(tmp_path, small_blocks):
    raw = "开头\n\n\n" + "\n\n".join(articles(100)) + "\r\n \n结尾"
    (tmp_path / "a.txt").write_bytes(raw.encode("gb18030"))
    for fraction in (0.1, 0.25):
        result = run(tmp_path / "a.txt", tmp_path / "out", split="tail", val_fraction=fraction, workers=2)
        data = raw.replace("\r\n", "\n")
        cut = int(len(data) * (1 - fraction))
        tokenizer = Tokenizer.load(tmp_path / "out")
        assert tokenizer.decode(tokens(tmp_path / "out", "train")) == data[:cut]
        assert tokenizer.decode(tokens(tmp_path / "out", "val")) == data[cut:]
        described = manifest(tmp_path / "out")
        assert described["eot_id"] is None
        for split, text in (("train", data[:cut]), ("val", data[cut:])):
            assert described[split]["characters"] == described[split]["tokens"] == len(text)
            assert described[split]["bytes"] == len(text.encode())
            assert described[split]["documents"] == 1
            assert np.fromfile(tmp_path / "out" / f"{split}.idx", "<u8").tolist() == [0]
        assert result["characters"] == len(data)
        assert result["distinct_characters"] == len(set(data))


@pytest.mark.parametrize(
    "settings",
    [{}, {"split": "tail"}, {"dedup": "near"}, {"tokenizer": "bpe", "vocab_size": 400}, {"format": "dialogue"},
     {"normalize": "nfkc", "simplify": True, "dedup": "none"}, {"tokenizer": "bpe", "vocab_size": 400,
     "split": "tail"}],
)  # fmt: skip
def test_workers_and_blocks_change_nothing(tmp_path, monkeypatch, settings):
    texts = articles(200)
    sources = [write(tmp_path / "a.txt", texts), write(tmp_path / "b.txt", texts[50:60] + articles(50, seed=2))]
    run(sources, tmp_path / "one", workers=1, **settings)
    monkeypatch.setattr(workers, "SMALL_INPUT_BYTES", 0)
    run(sources, tmp_path / "two", workers=2, **settings)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(documents_module, "MAX_BLOCKS_PER_TASK", 3)
    run(sources, tmp_path / "blocks", workers=2, **settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "blocks")


def test_split_is_stable_when_files_are_added(tmp_path):
    first, second = articles(300), articles(300, seed=5)
    run(write(tmp_path / "b.txt", first), tmp_path / "one")
    run([write(tmp_path / "a.txt", second), str(tmp_path / "b.txt")], tmp_path / "two")
    for split in ("train", "val"):
        assert [d for d in documents(tmp_path / "two", split) if d in set(first)] == documents(tmp_path / "one", split)


def test_duplicates(tmp_path):
    texts = articles(100)
    close = [text.replace("冠军", "亚军", 1) if i < 10 else text for i, text in enumerate(texts)]
    changed = sum(a != b for a, b in zip(texts, close, strict=True))
    source = write(tmp_path / "a.txt", texts + ["  " + text for text in texts[20:30]] + close[:10])
    kept = {}
    for dedup in ("none", "exact", "near"):
        result = run(source, tmp_path / dedup, dedup=dedup, near_threshold=0.7)
        kept[dedup] = result["documents"]
        assert result["documents"] + result["duplicates_removed"] == 120
        assert result["characters"] == len(Path(source).read_text(encoding="utf-8"))
    removed = manifest(tmp_path / "near")["statistics"]["duplicates_removed"]
    assert kept["none"] == 120
    assert kept["exact"] == 100 + changed
    assert removed["exact"] == 20 - changed
    assert removed["near"] >= 0.7 * changed


def test_dialogue(tmp_path):
    dialogues = [f"你好{i}\n你好，吃了吗<sep>？\n吃了" for i in range(100)]
    run(write(tmp_path / "a.txt", dialogues), tmp_path / "out", format="dialogue")
    tokenizer, data = Tokenizer.load(tmp_path / "out"), manifest(tmp_path / "out")
    assert (data["kind"], data["eot_id"]) == ("dialogue", tokenizer.pad_id)
    found = []
    for split in ("train", "val"):
        ids, starts = tokens(tmp_path / "out", split), np.fromfile(tmp_path / "out" / f"{split}.idx", "<u8").astype(int)
        for part in np.split(ids, starts[1:]):
            assert part[-1] == tokenizer.pad_id
            seams = np.flatnonzero(part == tokenizer.sep_id)
            lines = np.split(part[:-1], seams)
            found.append("\n".join(tokenizer.decode(line[n > 0 :]) for n, line in enumerate(lines)))
    assert sorted(found) == sorted(dialogues)


def test_the_tail_of_dialogues_is_whole_dialogues_repeats_and_all(tmp_path):
    dialogues = [f"你好{i % 30}\n好" for i in range(100)]  # small-gpt's cut drops nothing
    run(write(tmp_path / "a.txt", dialogues), tmp_path / "out", format="dialogue", split="tail", val_fraction=0.2)
    data = manifest(tmp_path / "out")
    assert (data["train"]["documents"], data["val"]["documents"]) == (80, 20)
    tokenizer = Tokenizer.load(tmp_path / "out")
    val = tokenizer.decode(tokens(tmp_path / "out", "val"))
    assert val == "".join(d.replace("\n", "<sep>") + "<pad>" for d in dialogues[80:])


def test_novel_in_one_document_is_cut(tmp_path, capsys):
    paragraphs = ["".join(random.Random(i).choices(WORDS, k=60)) for i in range(3000)]
    (tmp_path / "novel.txt").write_text("\n".join(paragraphs), encoding="utf-8")
    result = run(tmp_path / "novel.txt", tmp_path / "out")
    assert "pieces of about 4,000 characters" in capsys.readouterr().err
    found = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")
    assert sorted("\n".join(found).split("\n")) == sorted(paragraphs)
    assert result["val_tokens"] > 0
    assert result["characters"] == len("\n".join(paragraphs))


def test_vocab_size_leaves_spare_rows_or_uses_bytes(tmp_path):
    source = write(tmp_path / "a.txt", articles(100))
    run(source, tmp_path / "large", vocab_size=1000)
    assert manifest(tmp_path / "large")["vocab_size"] == 1000
    assert Tokenizer.load(tmp_path / "large").vocab_size < 1000
    run(source, tmp_path / "small", vocab_size=265)
    assert manifest(tmp_path / "small")["vocab_size"] == 265 == Tokenizer.load(tmp_path / "small").vocab_size
    assert documents(tmp_path / "small", "val") == documents(tmp_path / "large", "val")
    run(source, tmp_path / "wide", vocab_size=70_000)
    assert manifest(tmp_path / "wide")["dtype"] == "uint32"
    assert documents(tmp_path / "wide", "val") == documents(tmp_path / "large", "val")
    with pytest.raises(UserError, match="leaves no room"):
        run(source, tmp_path / "x", vocab_size=200)


def test_reused_tokenizer(tmp_path):
    run(write(tmp_path / "a.txt", articles(100)), tmp_path / "one")
    texts = [text + "囍" for text in articles(50, seed=9)]
    run(write(tmp_path / "b.txt", texts), tmp_path / "two", tokenizer=str(tmp_path / "one"))
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == (tmp_path / "one" / "tokenizer.json").read_bytes()
    assert sorted(documents(tmp_path / "two", "train") + documents(tmp_path / "two", "val")) == sorted(texts)


def test_shards(tmp_path, monkeypatch):
    source = write(tmp_path / "a.txt", articles(100))
    run(source, tmp_path / "one")
    monkeypatch.setattr(store, "SHARD_BYTES", 1000)
    run(source, tmp_path / "many")
    shards = manifest(tmp_path / "many")["train"]["shards"]
    assert [shard["file"] for shard in shards] == [f"train-{i + 1:05d}.bin" for i in range(len(shards))]
    assert len(shards) > 3
    assert {shard["tokens"] for shard in shards[:-1]} == {500}
    for shard in shards:
        assert hashlib.sha256((tmp_path / "many" / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    assert (tokens(tmp_path / "many", "train") == tokens(tmp_path / "one", "train")).all()
    assert documents(tmp_path / "many", "train") == documents(tmp_path / "one", "train")


def test_nanogpt_layout_keeps_the_text(tmp_path):
    home = tmp_path / "TH"
    home.mkdir()
    source = write(home / "input.txt", articles(100))
    (home / "prepare.py").write_text("pass", encoding="utf-8")
    for _ in range(2):
        run(source, home)
        assert {"input.txt", "prepare.py", "train.bin", "manifest.json"} <= {path.name for path in home.iterdir()}
    assert sorted(documents(home, "train") + documents(home, "val")) == sorted(articles(100))
    run(home, tmp_path / "again")  # the directory as a source: its own products are no text
    assert manifest(tmp_path / "again")["statistics"]["documents"] == 100


def test_out_is_replaced_only_when_it_is_ours(tmp_path):
    source = write(tmp_path / "a.txt", articles(100))
    out = tmp_path / "out"
    run(source, out)
    run(write(tmp_path / "b.txt", articles(60, seed=3)), out)
    assert manifest(out)["statistics"]["documents"] == 60
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.doc").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds other files \(thesis\.doc"):
        run(source, other)
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "train.bin").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"already has train\.bin"):
        run(source, tmp_path / "nano")
    with pytest.raises(UserError, match="is a file"):
        run(source, tmp_path / "a.txt")


def left_over(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if ".tmp" in path.name or ".old" in path.name)


def test_full_disk(tmp_path, monkeypatch):
    source = write(tmp_path / "a.txt", articles(100))
    out = tmp_path / "out"
    run(source, out)
    before = contents(out)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.SplitWriter, "write", full)
    with pytest.raises(UserError, match="is full"):
        run(source, out)
    assert contents(out) == before
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("split", ["hash", "tail"])
def test_sources_are_read_once(tmp_path, monkeypatch, small_blocks, split):
    """The second pass finds the characters set aside: the sources may be gone by then."""
    texts = [*articles(150), *articles(150)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    run(tmp_path / "a.txt", tmp_path / "plain", split=split, workers=1)
    survey = prepare_module.take_survey

    def lose_sources(*args: object) -> object:
        corpus = survey(*args)
        (tmp_path / "a.txt").unlink()
        return corpus

    monkeypatch.setattr(prepare_module, "take_survey", lose_sources)
    run(tmp_path / "a.txt", tmp_path / "lost", split=split, workers=2)
    assert contents(tmp_path / "lost") == contents(tmp_path / "plain")
    assert left_over(tmp_path) == []


def test_full_disk_while_setting_aside(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(characters.Aside, "put", full)
    with pytest.raises(UserError, match="is full"):
        run(write(tmp_path / "a.txt", articles(100)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_kill_leaves_the_old_directory(tmp_path):
    """SIGKILL just before the directory is put in place, then the same command again."""
    source = write(tmp_path / "a.txt", articles(100))
    out = tmp_path / "out"
    run(source, out)
    before = contents(out)
    code = (
        "import os, signal, sys\n"
        "from miaobi.corpus.config import PrepareConfig\n"
        "from miaobi.corpus import prepare, store\n"
        "store.PreparedWriter.commit = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare.prepare([sys.argv[1]], PrepareConfig(out=sys.argv[2] and __import__('pathlib').Path(sys.argv[2])))\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, source, str(out)], check=False, capture_output=True)
    assert killed.returncode == -9
    assert contents(out) == before
    run(source, out)
    assert contents(out) == before


def test_skip_bad_counts(tmp_path):
    home = tmp_path / "texts"
    home.mkdir()
    write(home / "a.txt", articles(100))
    (home / "b.dat").write_bytes(b"\0\1\2\3" * 100)
    (home / "c.jsonl").write_text('{"text": "好的"}\n{"text"\n', encoding="utf-8")
    named = [str(path) for path in sorted(home.iterdir())]
    with pytest.raises(UserError, match=r"b\.dat is a binary file"):
        run(named, tmp_path / "out")
    result = run(named, tmp_path / "out", skip_bad=True)
    assert (result["skipped"], result["documents"]) == (2, 101)
    assert result["encodings"] == {"utf-8": 2, "skipped": 1}
    assert [Path(name).name for name in result["skipped_in"]] == ["b.dat", "c.jsonl"]


@pytest.mark.parametrize("split", ["hash", "tail"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"\n \n\n", "no text|few|too little"),
        ("只有一行".encode(), "too little"),
        (b"x", "too (little|few)"),
    ],
)
def test_too_little_text(tmp_path, split, text, message):
    (tmp_path / "a.txt").write_bytes(text)
    if split == "tail" and len(text) > 3:
        return  # a few characters can be cut in two; training says when a block does not fit
    with pytest.raises(UserError, match=message):
        run(tmp_path / "a.txt", tmp_path / "out", split=split)
    assert not (tmp_path / "out").exists()
    assert left_over(tmp_path) == []


def test_handful_of_documents(tmp_path):
    for n in (2, 3, 5):
        result = run(write(tmp_path / "a.txt", articles(n)), tmp_path / f"out{n}")
        assert result["train_tokens"] > 0
        assert result["val_tokens"] > 0


def test_worker_errors_reach_the_user(tmp_path, small_blocks):
    data = write(tmp_path / "a.txt", articles(300))
    with open(data, "ab") as file:
        file.write("坏".encode("gbk") * 50)
    with pytest.raises(UserError, match=r"a\.txt: read as utf-8, but byte \d+ does not fit"):
        run(data, tmp_path / "out", workers=2)
    assert not (tmp_path / "out").exists()


def test_no_torch(tmp_path):
    source = write(tmp_path / "a.txt", articles(30))
    code = (
        "import sys, pathlib\n"
        "from miaobi.corpus.config import PrepareConfig\n"
        "from miaobi.corpus.prepare import prepare\n"
        "prepare([sys.argv[1]], PrepareConfig(out=pathlib.Path(sys.argv[2])))\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, source, str(tmp_path / "out")], check=False).returncode == 0


def test_names_on_the_disk_that_are_not_utf8(tmp_path, monkeypatch):
    """As unpacked from an archive that was made on Windows."""
    names = ["新闻.txt".encode("gbk"), "笑话.parquet".encode("gbk"), "诗词.zip".encode("gbk"), b"\xff.txt"]
    folder = os.fsencode(tmp_path) + "/语料/".encode()
    os.mkdir(folder)
    try:
        for name in names:
            open(folder + name, "wb").close()
    except OSError:
        pytest.skip("this file system takes no such names")
    texts = articles(200)
    for name in (names[0], names[3]):
        write(Path(os.fsdecode(folder + name)), texts[:50] if name == names[0] else texts[50:100])
    pq.write_table(pa.table({"text": texts[100:150]}), os.fsdecode(tmp_path / "a.parquet"))
    os.replace(tmp_path / "a.parquet", folder + names[1])
    with zipfile.ZipFile(os.fsdecode(folder + names[2]), "w") as archive:
        archive.writestr("a.txt", "\n\n".join(texts[150:]))
    monkeypatch.setattr(workers, "SMALL_INPUT_BYTES", 0)
    result = run(tmp_path / "语料", tmp_path / "out", workers=2)
    assert result["documents"] == 200
    found = [Path(source["path"]) for source in manifest(tmp_path / "out")["sources"]]
    assert {path.parent for path in found} == {tmp_path / "语料"}
    assert {path.name for path in found} == {"新闻.txt", "笑话.parquet", "诗词.zip!a.txt", "\ufffd.txt"}
    Path(os.fsdecode(folder + names[0])).write_bytes(b"")
    assert [entry["path"] for entry in run(tmp_path / "语料", tmp_path / "out2")["left_out"]] == [
        str(tmp_path / "语料" / "新闻.txt")
    ]
