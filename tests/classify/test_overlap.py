"""What is pretrained on shares nothing with the evaluation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from review_tables import write

from miaobi.classify.data import normalized
from miaobi.classify.overlap import PREFIX, WINDOW, Args, Evaluation, clean, window_hashes
from miaobi.errors import UserError

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


@pytest.mark.parametrize("out", ["news.jsonl", "more/shop.csv", "reviews.csv", "link.jsonl", "./more/../news.jsonl"])
def test_what_is_read_is_not_written_over(tmp_path: Path, monkeypatch, out: str):
    monkeypatch.chdir(tmp_path)
    Path("more").mkdir()
    write(Path("reviews.csv"), [("1", text) for text in REVIEWS])
    write(Path("more/shop.csv"), [("1", "太吵。"), ("0", "书很好看")])
    Path("news.jsonl").write_text('{"text": "新闻一则"}\n', encoding="utf-8")
    Path("link.jsonl").symlink_to("news.jsonl")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"is among what is read .*write to another file"):
        clean(Args(("news.jsonl", "more"), "reviews.csv", Path(out)))
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_source_that_fails_leaves_what_was_there(tmp_path: Path):
    evaluation = write(tmp_path / "reviews.csv", [("1", text) for text in REVIEWS])
    good, bad, out = tmp_path / "a.jsonl", tmp_path / "b.txt", tmp_path / "out.jsonl"
    good.write_text('{"text": "新闻一则"}\n', encoding="utf-8")
    bad.write_bytes(b"\0\1\2\3" * 99)
    args = Args((str(good), str(bad)), str(evaluation), out)
    for before in (None, "of an earlier command"):
        if before:
            out.write_text(before, encoding="utf-8")
        with pytest.raises(UserError, match="is a binary file"):
            clean(args)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            ["a.jsonl", "b.txt", "reviews.csv", *(["out.jsonl"] if before else [])]
        )
        assert not before or out.read_text(encoding="utf-8") == before


@pytest.mark.parametrize(("out", "said"), [("nowhere/clean.jsonl", "cannot be written"), (".", "is no regular file")])
def test_an_out_that_cannot_be_written_ends_with_two(tmp_path: Path, out: str, said: str):
    write(tmp_path / "reviews.csv", [("1", text) for text in REVIEWS])
    (tmp_path / "news.jsonl").write_text('{"text": "新闻一则"}\n', encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "miaobi.classify.overlap",
        "news.jsonl",
        "--evaluation=reviews.csv",
        f"--out={out}",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
