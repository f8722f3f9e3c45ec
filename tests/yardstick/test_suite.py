"""`miaobi eval --suite`: the texts against a naive choice, the figures against `miaobi eval` and by hand."""

import hashlib
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from miaobi.corpus.prepared import PreparedData
from miaobi.corpus.template import SEP_TEMPLATE
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.model.checkpoint import save_model
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer
from miaobi.yardstick import suite
from miaobi.yardstick.suite import Genre

DRAW = random.Random(0)
NEWS = [
    f"第{i}条：{''.join(DRAW.choices('皇马赢得比赛主教练谈到训和转会球迷期待下一个冠军，', k=40))}。" for i in range(60)
]
TALKS = [f"你好{i}\n我是{i % 7}号\n再见" for i in range(40)]
REVIEWS = [f"房间{i}很干净，“早餐”不错，{'下次还来' * (i % 3)}" for i in range(40)]
FORMS = {"news": "auto", "chat": "dialogue", "reviews": "csv"}


def number(text: str) -> int:
    """By which the hash split divides: the upper half of BLAKE2b, as the manifest of prepared data has it."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=16).digest()[8:], "little")


def naive(texts: list[str], count: int) -> list[str]:
    return sorted(dict.fromkeys(texts), key=number)[:count]


@pytest.fixture(scope="module")
def small_suite(tmp_path_factory) -> tuple[Path, list[Genre], dict[str, list[str]]]:
    """Directory of the files, rows of a suite.json, the documents that it should choose."""
    root = tmp_path_factory.mktemp("suite")
    lines = "".join(json.dumps({"title": "x", "text": text}, ensure_ascii=False) + "\n" for text in [*NEWS, NEWS[0]])
    (root / "news.jsonl").write_text(lines, encoding="utf-8")
    (root / "chat.txt").write_text("\n\n".join(TALKS) + "\n", encoding="gb18030")
    (root / "reviews.csv").write_text("label,review\n" + "".join(f"1,{text}\n" for text in REVIEWS), encoding="utf-8")
    texts = {"news": naive(NEWS, 6), "chat": naive(TALKS, 5), "reviews": naive(REVIEWS, 7)}
    files = {"news": "news.jsonl", "chat": "chat.txt", "reviews": "reviews.csv"}
    rows = []
    for genre, documents in texts.items():
        written = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
        digest = hashlib.sha256(written.encode()).hexdigest()
        field = "review" if genre == "reviews" else "text"
        rows.append(
            Genre(genre, (files[genre],), len(documents), sum(map(len, documents)), digest, FORMS[genre], field)
        )
    return root, rows, texts


@pytest.fixture
def root(small_suite, monkeypatch) -> Path:
    monkeypatch.setattr(suite, "genres", lambda: small_suite[1])
    return small_suite[0]


def directory(path: Path, tokenizer: Tokenizer, family: str = "qwen3", end: bool = True) -> Path:
    """A model with random weights, always the same."""
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 64, "vocab_size": tokenizer.vocab_size}
    model = Transformer(ModelConfig(family=family, **sizes))
    for weights in model.parameters():
        torch.nn.init.normal_(weights, mean=1.0 if weights.ndim == 1 else 0.0, std=0.2)
    path.mkdir()
    save_model(path, model, tokenizer, (tokenizer.eot_id,) if end else ())
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Characters (few are known), BPE, a chit-chat model, one that knows no end of a text."""
    place, everything = tmp_path_factory.mktemp("models"), "".join(NEWS + TALKS)
    chatty = Tokenizer.train_char(Counter(everything))
    chatty.config["chat_template"] = SEP_TEMPLATE
    return {
        "char": directory(place / "char", Tokenizer.train_char(Counter(everything[:300])), "gpt2"),
        "bpe": directory(place / "bpe", Tokenizer.train_bpe(NEWS + TALKS + REVIEWS, vocab_size=400)),
        "chat": directory(place / "chat", chatty),
        "endless": directory(place / "endless", Tokenizer.train_char(Counter(everything)), end=False),
    }


# --- the texts ---------------------------------------------------------------------------------------------------


def test_the_documents_are_those_of_the_smallest_numbers_each_once(root, small_suite):
    assert {row.genre: suite.read(row, root) for row in small_suite[1]} == small_suite[2]


def test_prepare_keeps_them_for_validation_and_takes_them_out_elsewhere(root, small_suite, miaobi, tmp_path):
    texts = small_suite[2]["news"]
    miaobi("prepare", root / "news.jsonl", "--val_fraction=0.25", "--out", tmp_path / "data", "--workers=1")
    data = PreparedData.open(tmp_path / "data")
    learned = data.tokenizer.decode(data.train.read(0, len(data.train)))
    assert not any(text in learned for text in texts)
    answer = miaobi("eval", f"--suite={root}", f"--suite_out={tmp_path / 'texts'}")
    assert answer.code == 0
    assert f"--without={tmp_path / 'texts'}" in answer.out
    (tmp_path / "all.txt").write_text("\n\n".join(NEWS) + "\n", encoding="utf-8")  # as other files have the same text
    out = tmp_path / "without"
    without = miaobi("prepare", tmp_path / "all.txt", f"--without={tmp_path / 'texts'}", "--val_fraction=0.01",
                     "--out", out, "--workers=1")  # fmt: skip
    assert without.code == 0, without.err
    data = PreparedData.open(out)
    kept = data.tokenizer.decode(data.train.read(0, len(data.train))) + data.tokenizer.decode(
        data.val.read(0, len(data.val))
    )
    assert not any(text in kept for text in texts)


def test_what_is_written_has_the_digests_of_the_manifest(root, small_suite, miaobi, tmp_path):
    answer = miaobi("eval", f"--suite={root}", f"--suite_out={tmp_path / 'texts'}", "--json")
    for row in small_suite[1]:
        written = (tmp_path / "texts" / f"{row.genre}.jsonl").read_bytes()
        assert hashlib.sha256(written).hexdigest() == row.sha256
        assert json.loads(answer.out)["genres"][row.genre]["sha256"] == row.sha256


@pytest.mark.parametrize(
    ("file", "old", "new", "is_refused"),
    [
        ("news.jsonl", None, None, True),  # missing
        ("news.jsonl", naive(NEWS, 6)[3][:8], "第 八 条", True),
        ("chat.txt", naive(TALKS, 5)[0], "你好吗\n再见", True),
        ("reviews.csv", "房间", "客房", True),
        ("news.jsonl", sorted(NEWS, key=number)[-1], "另一条新闻", False),  # no document of the suite
    ],
)
def test_other_texts_are_refused_by_the_names_of_their_files(
    root, models, miaobi, tmp_path, file, old, new, is_refused
):
    for path in root.iterdir():
        text = path.read_bytes().decode("gb18030" if path.name == "chat.txt" else "utf-8")
        if path.name != file or old is not None:
            (tmp_path / path.name).write_text(text.replace(old, new) if path.name == file else text, encoding="utf-8")
    answer = miaobi("eval", models["bpe"], f"--suite={tmp_path}", "--suite_samples=0", "--device=cpu")
    assert answer.code == (2 if is_refused else 0)
    if is_refused:
        assert file in answer.err
        assert ("no such file" if old is None else "SHA-256") in answer.err


def test_the_shipped_suite_has_six_genres_and_a_digest_for_each():
    rows = suite.genres()
    assert [row.genre for row in rows] == ["news", "sports", "chat", "novels", "reviews", "encyclopedia"]
    assert all(len(row.sha256) == 64 and row.documents >= 20 and 30_000 <= row.characters < 40_000 for row in rows)
    assert all(not Path(file).is_absolute() and ".." not in file for row in rows for file in row.files)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("M x.txt --suite=D", "not both"),
        ("M x.txt --suite_out=D", "--suite=DIRECTORY"),
        ("M x.txt --trained_on=y", "--suite=DIRECTORY"),
        ("M --suite=D --suite_samples=-1", "suite_samples is -1"),
        ("M", "--suite=DIRECTORY"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(miaobi, words, said):
    answer = miaobi("eval", *words.split())
    assert (answer.code, said in answer.err) == (2, True), answer.err


# --- bits per character ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["char", "bpe", "chat"])
def test_bits_are_those_that_eval_gives_for_the_files(root, small_suite, models, miaobi, tmp_path, kind):
    answer = miaobi("eval", models[kind], f"--suite={root}", f"--suite_out={tmp_path / 'texts'}", "--suite_samples=0",
                    "--device=cpu", "--json")  # fmt: skip
    result = json.loads(answer.out)
    for genre, row in result["genres"].items():
        data = [tmp_path / "texts" / f"{genre}.jsonl", "--format=jsonl"]
        if genre == "chat" and kind == "chat":
            (tmp_path / "chat.txt").write_text("\n\n".join(small_suite[2]["chat"]), encoding="utf-8")
            data = [tmp_path / "chat.txt"]
        expected = json.loads(miaobi("eval", models[kind], *data, "--device=cpu", "--json").out)
        assert {key: row[key] for key in expected if key != "seconds"} == pytest.approx(
            {key: value for key, value in expected.items() if key != "seconds"}, rel=1e-6
        )
    bits = [row["bits_per_char"] for row in result["genres"].values()]
    assert result["bits_per_char"] == pytest.approx(sum(bits) / 3)


def test_a_model_without_an_end_of_text_is_scored_on_the_same_characters(root, small_suite, models, miaobi):
    answer = miaobi("eval", models["endless"], f"--suite={root}", "--suite_samples=0", "--device=cpu", "--json")
    for row in small_suite[1]:
        found = json.loads(answer.out)["genres"][row.genre]
        assert found["characters"] == row.characters
        assert found["bits_per_char"] == pytest.approx(found["loss"] * found["tokens"] / math.log(2) / row.characters)
        assert found["tokens"] >= row.characters + row.documents, "the end of each is paid for"


def test_unknown_characters_make_no_model_look_better(root, small_suite, miaobi, tmp_path):
    """Two BERT vocabularies, of which one lacks most characters; its model finds <unk> easy, as one would that learned
    from such a text."""
    documents = small_suite[2]["news"]
    found = {}
    for name, known in (("whole", sorted(set("".join(documents)))), ("lacking", list("皇马第条"))):
        path = tmp_path / name
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *known, *(f"##{c}" for c in known if c.isdecimal())]
        source = tmp_path / f"{name}-vocabulary"
        source.mkdir()
        (source / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
        directory(path, Tokenizer.load(source))
        answer = miaobi("eval", path, f"--suite={root}", "--suite_samples=0", "--device=cpu", "--json")
        found[name] = json.loads(answer.out)["genres"]["news"]
        unknown = sum(c not in known and not c.isspace() for text in documents for c in text)
        assert found[name]["unknown"] == unknown
        plain = found[name]["loss"] * found[name]["tokens"] / math.log(2)
        total = found[name]["bits_per_char"] * found[name]["characters"]
        assert total == pytest.approx(plain + unknown * math.log2(0x110000))
    assert found["lacking"]["bits_per_char"] > found["whole"]["bits_per_char"]


# --- what the model was trained on -------------------------------------------------------------------------------


def test_documents_that_the_training_text_has_are_counted(root, small_suite, models, miaobi, tmp_path):
    texts = small_suite[2]
    (tmp_path / "a.txt").write_text(
        "某报：" + texts["news"][0][3:30] + "\n\n" + texts["news"][4] + "！\n", encoding="utf-8"
    )
    (tmp_path / "b.txt").write_text(texts["chat"][1] + "\n\n" + texts["reviews"][0][:12] + "\n", encoding="utf-8")
    learned = [f"--trained_on={tmp_path / name}" for name in ("a.txt", "b.txt")]
    answer = miaobi("eval", models["bpe"], f"--suite={root}", *learned, "--suite_samples=0", "--device=cpu", "--json")
    assert answer.code == 0, answer.err
    learned = ["".join(c for c in line if c.isalnum()) for name in ("a.txt", "b.txt")
               for line in (tmp_path / name).read_text(encoding="utf-8").split("\n\n")]  # fmt: skip
    for genre, documents in texts.items():
        keys = ["".join(c for c in text if c.isalnum()) for text in documents]
        seen = [
            any(key[i : i + 20] in text for text in learned for i in range(len(key) - 19)) if len(key) >= 20
            else key in learned
            for key in keys
        ]  # fmt: skip
        assert json.loads(answer.out)["genres"][genre]["seen"] == sum(seen)
    assert json.loads(answer.out)["genres"]["news"]["seen"] >= 2


# --- what the model writes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "chat"])
def test_what_is_written_is_judged_and_the_same_each_time(root, small_suite, models, miaobi, kind):
    answers = [miaobi("eval", models[kind], f"--suite={root}", "--suite_samples=4", "--device=cpu", "--json")
               for _ in range(2)]  # fmt: skip
    first, again = (json.loads(answer.out) for answer in answers)
    assert first["written"] == again["written"]
    assert first["people"]["news"]["stop_rate"] == 1.0
    own = [text[12:] for text in small_suite[2]["news"][:4]]
    pairs = [text[i : i + 2] for text in own for i in range(len(text) - 1)]
    assert first["people"]["news"]["distinct_2"] == pytest.approx(len(set(pairs)) / len(pairs))
    said = [text.split("\n")[1] for text in small_suite[2]["chat"][:4]]
    assert first["people"]["chat"]["characters"] == pytest.approx(sum(map(len, said)) / 4)
    assert first["written"]["all"]["samples"] == sum(first["written"][genre]["samples"] for genre in FORMS)
    table = miaobi("eval", models[kind], f"--suite={root}", "--suite_samples=4", "--device=cpu").out
    assert all(word in table for word in ("bits/char", "news", "mean", "distinct-2", "stops"))
