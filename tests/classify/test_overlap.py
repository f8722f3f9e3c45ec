"""What is pretrained on shares nothing with the evaluation."""

import json
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from review_tables import write

from miaobi.classify.data import normalized
from miaobi.classify.overlap import PREFIX, WINDOW, Args, Evaluation, clean, window_hashes

REVIEWS = ["房间很大，早餐丰富，前台服务热情，离地铁站只有五分钟路程，下次还会选择这里入住", "太吵", "x" * 200]


def naive(text: str, reviews: list[str]) -> bool:
    key, keys = normalized(text), [normalized(review) for review in reviews]
    windows = {k[i : i + WINDOW] for k in keys for i in range(len(k) - WINDOW + 1)}
    return key[:PREFIX] in {k[:PREFIX] for k in keys} or any(
        key[i : i + WINDOW] in windows for i in range(len(key) - WINDOW + 1)
    )


@given(st.lists(st.text("ab，", min_size=1, max_size=60), min_size=1, max_size=5), st.text("ab，", max_size=80))
def test_overlap_is_what_comparing_strings_finds(reviews: list[str], text: str):
    assert bool(Evaluation(reviews).overlaps(text)) == naive(text, [r for r in reviews if normalized(r)])


def test_twenty_characters_in_a_row_are_found_through_width_and_punctuation():
    evaluation = Evaluation(REVIEWS)
    assert evaluation.overlaps("引用：早餐丰富、前台服务热情！离地铁站只有五分钟路程。完") == "window"
    assert evaluation.overlaps("太　吵！") == "prefix"
    assert evaluation.overlaps("x" * 70 + "y") == "prefix"
    assert evaluation.overlaps("早餐丰富，前台服务热情，但是离地铁站只有五分钟") == ""
    assert len(window_hashes("a" * WINDOW)) == 1


def test_the_command_writes_what_is_left_and_counts_the_rest(tmp_path: Path):
    write(tmp_path / "reviews.csv", [("1", text) for text in REVIEWS])
    write(tmp_path / "shop.csv", [("1", "太吵。"), ("0", "书很好看")])
    lines = [json.dumps({"text": text}) for text in ("新闻一则", "前言" + REVIEWS[0] + "后记")]
    (tmp_path / "news.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "miaobi.classify.overlap", "news.jsonl", "shop.csv", "--evaluation=reviews.csv",
               "--out=clean.jsonl"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"documents": 4, "elsewhere": 0, "prefix": 1, "window": 1, "kept": 2}
    kept = [json.loads(line)["text"] for line in (tmp_path / "clean.jsonl").read_text(encoding="utf-8").splitlines()]
    assert kept == ["新闻一则", "书很好看"]


def test_labels_are_kept_when_asked_and_rows_without_one_left_out(tmp_path: Path):
    write(tmp_path / "reviews.csv", [("1", text) for text in REVIEWS])
    write(tmp_path / "shop.csv", [("1", "太吵。"), ("0", "书很好看"), ("", "没有标签")])
    (tmp_path / "more.jsonl").write_text('{"text": "送得慢", "label": 0}\n', encoding="utf-8")
    args = Args((str(tmp_path / "shop.csv"), str(tmp_path / "more.jsonl")), str(tmp_path / "reviews.csv"),
                tmp_path / "clean.jsonl", labels=True)  # fmt: skip
    assert clean(args) == {"documents": 3, "elsewhere": 0, "prefix": 1, "window": 0, "kept": 2}
    kept = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
    assert kept == [{"text": "书很好看", "label": "0"}, {"text": "送得慢", "label": "0"}]


def test_only_what_mentions_a_word(tmp_path: Path):
    write(tmp_path / "reviews.csv", [("1", text) for text in REVIEWS])
    texts = ["酒店新闻一则", "体育新闻一则", "宾馆：" + REVIEWS[0]]
    (tmp_path / "news.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    args = Args((str(tmp_path / "news.jsonl"),), str(tmp_path / "reviews.csv"), tmp_path / "clean.jsonl",
                mentioning=("酒店", "宾馆"))  # fmt: skip
    assert clean(args) == {"documents": 3, "elsewhere": 1, "prefix": 0, "window": 1, "kept": 1}
    assert json.loads(args.out.read_text(encoding="utf-8")) == {"text": "酒店新闻一则"}
