"""What is pretrained on shares nothing with the evaluation."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.overlap import PREFIX, WINDOW, Evaluation, normalized, window_hashes
from miaobi.corpus.prepare import prepare
from miaobi.corpus.prepared import PreparedData
from miaobi.corpus.tokenizer import Tokenizer
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


def everything(out: Path) -> list[str]:
    data, tokenizer, found = PreparedData.open(out), Tokenizer.load(out), []
    for stream in (data.train, data.val):
        found += [tokenizer.decode(part) for part in np.split(stream.read(0, len(stream)), stream.starts[1:])]
    return sorted(text.replace("<|endoftext|>", "") for text in found)


def write_evaluation(path: Path) -> Path:
    """REVIEWS as a file of the kind that its name says."""
    if path.suffix == ".csv":
        path.write_text("label,review\n" + "".join(f'1,"{text}"\n' for text in REVIEWS), encoding="gb18030")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"label": 1, "text": text}) for text in REVIEWS), encoding="utf-8")
    elif path.suffix == ".json":
        records = [{"messages": [{"role": "user", "content": text}]} for text in REVIEWS]
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"content": REVIEWS, "label": [1] * len(REVIEWS)}), path)
    else:
        path.write_text("\n".join(REVIEWS), encoding="utf-16")
    return path


@pytest.mark.parametrize("name", ["r.csv", "r.jsonl", "r.json", "r.parquet", "r.txt"])
@pytest.mark.parametrize("workers", [1, 2])
def test_what_shares_text_is_left_out_counted_and_said(tmp_path, capsys, name, workers):
    files = write_evaluation(tmp_path / name)
    clean = [f"第{i}则新闻与此无关" for i in range(40)]
    dirty = ["前言" + REVIEWS[0] + "后记", "太吵。", "x" * 61]
    (tmp_path / "news.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in clean + dirty), encoding="utf-8")
    cfg = PrepareConfig(out=tmp_path / "out", without=(str(files),), workers=workers)
    prepare([str(tmp_path / "news.jsonl")], cfg)
    assert everything(tmp_path / "out") == sorted(clean)
    assert "left out, as they share text with" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["statistics"]["left_out_by_without"] == 3


def test_dialogues_that_quote_the_evaluation_are_left_out(tmp_path):
    files = write_evaluation(tmp_path / "r.csv")
    talks = [
        {"messages": [{"role": "user", "content": f"问{i}"}, {"role": "assistant", "content": "答"}]} for i in range(30)
    ]
    quoting = {"messages": [{"role": "user", "content": "评价"}, {"role": "assistant", "content": REVIEWS[0]}]}
    lines = [json.dumps(talk, ensure_ascii=False) for talk in [*talks, quoting]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    prepare([str(tmp_path / "a.jsonl")], PrepareConfig(out=tmp_path / "out", format="dialogue", without=(str(files),)))
    found = everything(tmp_path / "out")
    assert len(found) == 30
    assert not any("早餐" in text for text in found)


def test_what_cannot_be_left_out_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("一\n\n二\n\n三", encoding="utf-8")
    (tmp_path / "r.csv").write_text("label,words\n1,好\n", encoding="utf-8")
    for settings, message in (
        ({"without": (str(tmp_path / "no.csv"),)}, "no.csv: no such file"),
        ({"without": (str(tmp_path / "r.csv"),)}, "no column called text, review"),
        ({"without": (str(tmp_path / "a.txt"),), "split": "tail"}, "--split=tail takes the text as one stream"),
    ):
        with pytest.raises(UserError, match=message):
            prepare([str(tmp_path / "a.txt")], PrepareConfig(out=tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()
