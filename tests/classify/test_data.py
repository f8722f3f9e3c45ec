"""Tables as they come, both protocols, and what becomes of long texts."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from review_tables import reviews, write

from miaobi.classify.config import ClassifyConfig
from miaobi.classify.data import (
    Labelled,
    Reading,
    differences,
    distinct,
    make_split,
    normalized,
    read_labelled,
    read_rows,
    shuffled,
    stratified,
)
from miaobi.errors import UserError


class Characters:
    """A tokenizer whose ids are code points."""

    def encode_documents(self, texts: list[str], end_id: None) -> tuple[np.ndarray, np.ndarray]:
        ends = np.cumsum([len(text) for text in texts])
        return np.array([ord(c) for text in texts for c in text], np.int64), np.append(0, ends[:-1])

    def decode(self, ids: np.ndarray) -> str:
        return "".join(map(chr, ids))


def read(path: Path, **values: object) -> Labelled:
    return read_labelled(ClassifyConfig(data=str(path), **values))


# Reading

ROWS = [("1", "房间很好"), ("0", '他说"太贵",\n还很吵\r\n'), ("1", " 前台，热情 ")]


def test_cells_with_quotes_delimiters_and_line_breaks_are_read_as_written(tmp_path: Path):
    found = read(write(tmp_path / "a.csv", ROWS))
    assert found.texts == [text for _, text in ROWS]
    assert [found.names[i] for i in found.labels] == ["1", "0", "1"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
def test_a_table_in_any_encoding_reads_the_same(tmp_path: Path, encoding: str):
    path = write(tmp_path / "a.csv", ROWS)
    text = path.read_bytes().decode()
    path.write_bytes(text.encode(encoding))
    assert read(path).texts == [text for _, text in ROWS]


def test_jsonl_and_packed_tsv_read_like_csv(tmp_path: Path):
    lines = [json.dumps({"label": int(label), "review": text}, ensure_ascii=False) for label, text in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    with gzip.open(tmp_path / "a.tsv.gz", "wt", encoding="utf-8", newline="") as f:
        f.write("\n".join(["label\treview", "1\t房间很好", '0\t"他说""太贵"",\n还很吵\r\n"', "1\t 前台，热情 "]))
    for name in ("a.jsonl", "a.tsv.gz"):
        found = read(tmp_path / name)
        assert found.texts == [text for _, text in ROWS], name
        assert found.names == ["0", "1"]


def test_quotes_of_a_tsv_that_do_not_pair_up_are_text(tmp_path: Path):
    (tmp_path / "a.tsv").write_text('label\ttext\n1\t"好"吃\n0\t"难吃\n1\t真的\n', encoding="utf-8")
    assert read(tmp_path / "a.tsv").texts == ['"好"吃', '"难吃', "真的"]


def test_columns_go_by_any_name_that_is_given(tmp_path: Path):
    path = write(tmp_path / "a.csv", ROWS, ("stars", "words"))
    assert read(path, text_column="words", label_column="stars").texts[0] == "房间很好"
    with pytest.raises(UserError, match=r"no column called text.*stars, words.*--text_column"):
        read(path)
    with pytest.raises(UserError, match=r"no column 'star'; there are stars, words.*--label_column"):
        read(path, text_column="words", label_column="star")


def test_labels_that_are_numbers_are_sorted_as_numbers(tmp_path: Path):
    rows = [(label, f"文{i}") for i, label in enumerate(["10", "9", "-1", "10"])]
    assert read(write(tmp_path / "a.csv", rows)).names == ["-1", "9", "10"]
    words = [(label, f"文{i}") for i, label in enumerate(["好", "10", "坏"])]
    assert read(write(tmp_path / "b.csv", words)).names == sorted(["好", "10", "坏"])


@pytest.mark.parametrize("missing", ["", "nan", " NaN "])
def test_rows_without_a_label_are_named_or_left_out_and_counted(tmp_path: Path, missing: str):
    path = write(tmp_path / "a.csv", [*ROWS, (missing, "没写"), (missing, "也没写")])
    with pytest.raises(UserError, match=r"line 7: no label \(2 such rows"):  # the second row has three lines
        read(path)
    found = read(path, skip_bad=True)
    assert (len(found.texts), found.skipped) == (3, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('label,review\n1,"好\n0,坏\n', "line 2: .*is a quote not closed"),
        ("label,review\n1,好\n0\n", "line 3: 1 column where the header has 2"),
        ("label,review\n1,好,吃\n0,坏\n", "line 2: 3 columns where the header has 2"),
        ("label,review\n1,好\n1,很好\n", "only one label, '1'"),
        ("label,review\n", "no labelled rows"),
        ("", "empty"),
    ],
)
def test_a_table_that_cannot_be_learned_from_says_why(tmp_path: Path, content: str, message: str):
    path = tmp_path / "a.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read(path)


def test_rows_that_are_too_short_are_left_out_when_asked(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("label,review\n1,好\n0\n0,坏\n", encoding="utf-8")
    found = read(path, skip_bad=True)
    assert (found.texts, found.skipped) == (["好", "坏"], 1)


def test_damaged_tables_of_a_directory_are_left_out_and_said(tmp_path: Path, capsys):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.csv", ROWS)
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 no table")
    (tmp_path / "in" / "c.csv.gz").write_bytes(gzip.compress("label,review\n1,好极了\n".encode() * 99)[:-20])
    found = read(tmp_path / "in")
    assert found.texts == read(tmp_path / "in" / "a.csv").texts
    said = capsys.readouterr().err
    for name, why in {"b.parquet": "not a readable parquet", "c.csv.gz": "damaged or cut short"}.items():
        assert f"{tmp_path / 'in' / name} is {why}" in said
        with pytest.raises(UserError, match=why):
            read(tmp_path / "in" / name)


def test_json_that_is_no_record_names_its_line(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"label": 1, "text": "好"}\n[1]\n{"label": 0, "text": 5}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2: list instead of an object, .* not a JSON object"):
        read(path)
    assert [row and row.text for row in read_rows(str(path), None, None, skip_bad=True)] == ["好", None, None]
    path.write_text('{"label": 0, "text": 5}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 1: text is int, not text"):
        read(path)


def test_half_a_character_names_its_line_or_is_left_out(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    rows = [("赢", "1"), ("\ud83d", "1"), ("输", "0"), ("平", "\ude00")]
    path.write_text("\n".join(json.dumps({"text": t, "label": label}) for t, label in rows), encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: it has half a character .*--skip_bad=True"):
        read(path)
    data = read(path, skip_bad=True)
    assert (data.texts, data.skipped) == (["赢", "输"], 2)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_refused_by_what_it_is(tmp_path: Path):
    os.mkfifo(tmp_path / "63")
    with pytest.raises(UserError, match=r"63 is a pipe: .* save what comes out of it"):
        read(tmp_path / "63")


def test_lines_of_text_have_no_labels(tmp_path: Path):
    (tmp_path / "a.txt").write_text("好\n坏\n", encoding="utf-8")
    with pytest.raises(UserError, match="have no labels"):
        read(tmp_path / "a.txt")


# Long texts


def naive_chunks(text: str | list[int], room: int) -> list:
    """As small-gpt describes it: whole pieces, and the last `room` of a long text."""
    whole = (len(text) - 1) // room if len(text) > room else 0
    return [text[room * i : room * (i + 1)] for i in range(whole)] + [text[-room:] if whole else text]


@given(st.integers(0, 60), st.integers(4, 12))
def test_chunks_are_those_of_small_gpt(length: int, block: int):
    text = list(range(100, 100 + length))
    rows = Reading(block, "chunks", (1,), (2,), 0).cut(np.array(text, np.int64))
    assert [row.tolist() for row in rows] == [[1, *chunk, 2] for chunk in naive_chunks(text, block - 2)]


def test_truncation_keeps_the_beginning_and_an_empty_text_is_one_padding():
    assert [r.tolist() for r in Reading(5, "truncate", (), (9,), 0).cut(np.arange(10))] == [[0, 1, 2, 3, 9]]
    assert [r.tolist() for r in Reading(5, "chunks", (), (), 7).cut(np.array([], np.int64))] == [[7]]


# Protocols


def test_the_shuffle_is_pandas():
    data = Labelled([f"{i}" for i in range(10)], np.arange(10), [])
    order = [8, 6, 4, 0, 1, 5, 9, 2, 7, 3]  # pandas 2.3.3: DataFrame({"a": range(10)}).sample(frac=1, random_state=...)
    texts, labels = shuffled(data, 114514)
    assert labels.tolist() == order
    assert texts == [str(i) for i in order]


def labelled(rows: list[tuple[str, str]]) -> Labelled:
    return Labelled([text for _, text in rows], np.array([int(label) for label, _ in rows]), ["0", "1"])


def test_as_published_cuts_at_a_share_of_the_chunks_and_tests_on_what_chooses():
    data = labelled(reviews(50, long=60))
    cfg = ClassifyConfig(protocol="as-published", data="x")
    split = make_split(data, cfg, 3, Reading(32, "chunks", (1,), (2,), 0), Characters())
    texts, labels = shuffled(data, 3)
    chunks = [(chunk, label) for text, label in zip(texts, labels, strict=True) for chunk in naive_chunks(text, 30)]
    cut = int(0.8 * len(chunks))
    assert len(chunks) > 50
    assert split.train.texts == [text for text, _ in chunks[:cut]]
    assert split.test.texts == [text for text, _ in chunks[cut:]]
    assert split.test.labels.tolist() == [label for _, label in chunks[cut:]]
    assert split.dev is split.test
    assert split.train.rows[0].tolist() == [1, *map(ord, chunks[0][0]), 2]


def test_corrected_splits_distinct_reviews_with_equal_shares_of_labels():
    rows = reviews(200, long=60)
    copies = [(label, f"  {text.replace('，', ',')}!") for label, text in rows[:20]]
    split = make_split(labelled([*rows, *copies, ("1", " ")]), ClassifyConfig(data="x"), 1,
                       Reading(32, "chunks", (), (2,), 0), Characters())  # fmt: skip
    keys = [{normalized(text) for text in part.texts} for part in (split.train, split.dev, split.test)]
    assert len(set.union(*keys)) == sum(map(len, keys)) == len(rows)
    share = np.mean([label == "1" for label, _ in rows])
    for part, size in (split.train, 0.8), (split.dev, 0.1), (split.test, 0.1):
        assert abs(len(part.labels) - size * len(rows)) <= 2
        assert abs(part.labels.mean() - share) < 1.5 / len(part.labels)
        assert sorted(set(part.owner.tolist())) == list(range(len(part.labels)))


def test_a_split_is_decided_by_its_seed_alone():
    data = labelled(reviews(60))
    splits = [stratified(data.labels, data.names, seed)[2].tolist() for seed in (1, 1, 2)]
    assert splits[0] == splits[1] != splits[2]


def test_duplicates_differ_in_width_case_blanks_and_punctuation_only():
    data = Labelled(["Ｗifi 很快！", "wifi很快", "wifi很慢", "", "。。", "。。", "！"], np.zeros(7, int), ["0"])
    assert distinct(data).texts == ["Ｗifi 很快！", "wifi很慢", "。。", "！"]


def test_a_label_that_is_too_rare_is_named():
    with pytest.raises(UserError, match="label '2' has 2 distinct texts"):
        stratified(np.array([0] * 9 + [1] * 9 + [2] * 2), ["0", "1", "2"], 0)


def test_counts_of_the_two_protocols_agree_with_counting_by_hand():
    rows = [("1", "a" * 40), *(("0", chr(0x4E00 + i)) for i in range(20)), *(("1", chr(0x5E00 + i)) for i in range(9))]
    counts = differences(labelled([*rows, ("1", "a" * 40), ("1", "")]), 5, block_size=12)
    assert (counts["reviews"], counts["empty"], counts["duplicates"]) == (32, 1, 1)
    published = counts["as_published"]
    assert (published["chunks"], published["reviews_of_several_chunks"], published["chunks_of_those"]) == (38, 2, 8)
    assert (published["train_chunks"], published["test_chunks"]) == (30, 8)
    assert sum(counts["corrected"][part] for part in ("train", "dev", "test")) == 30
    leaked = [
        differences(labelled([*rows, ("1", "a" * 40)]), seed, block_size=12)["as_published"] for seed in range(40)
    ]
    assert any(found["test_chunks_whose_review_is_also_trained_on"] for found in leaked)
    assert any(found["test_chunks_with_a_duplicate_trained_on"] for found in leaked)
    for found in leaked:  # only the review at the cut can be on both sides of it
        assert found["test_chunks_whose_review_is_also_trained_on"] <= 3
