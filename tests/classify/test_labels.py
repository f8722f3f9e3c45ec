"""Which labels are the same, and which are none."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from review_tables import write

from miaobi.classify.config import ClassifyConfig
from miaobi.classify.data import read_labelled
from miaobi.classify.labels import label_names
from miaobi.errors import UserError


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["1", "1.0", "0"], {"1": "1", "1.0": "1", "0": "0"}),
        (["1.0", "0.0"], {"1.0": "1.0", "0.0": "0.0"}),
        (["+2", "2e0", "-1", "-1.00"], {"+2": "+2", "2e0": "+2", "-1": "-1", "-1.00": "-1"}),
        (["007", "7", "１"], {"007": "7", "7": "7", "１": "１"}),
        (["1", "1.0", "好"], {"1": "1", "1.0": "1.0", "好": "好"}),  # words: as they are written
        (["1", "nan", "NaN", "0"], {"1": "1", "0": "0"}),
        (["TRUE", "False", "true"], {"TRUE": "TRUE", "true": "TRUE", "False": "False"}),  # Excel's, pandas', JSON's
        (["True", "true", "好"], {"True": "True", "true": "true", "好": "好"}),
        (["nan", "nv"], {"nan": "nan", "nv": "nv"}),
        (["nan", "", "nan"], {}),
        (["1_0", "10"], {"1_0": "1_0", "10": "10"}),
        (["1e999999999", "1"], {"1e999999999": "1e999999999", "1": "1"}),
    ],
)
def test_labels_of_one_value_are_one_class(labels, expected):
    assert label_names(labels) == expected


def test_the_names_of_known_classes_stay():
    assert label_names(["1", "2"], known=["1.0", "0.0"]) == {"1.0": "1.0", "0.0": "0.0", "1": "1.0", "2": "2"}
    assert label_names(["TRUE", "false"], known=["True", "False"])["TRUE"] == "True"
    assert label_names(["nan"], known=["0", "1"]) == {"0": "0", "1": "1"}
    assert label_names(["nan"], known=["nan", "nv"])["nan"] == "nan"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet"])
def test_numbers_and_words_in_every_kind_of_table(tmp_path: Path, name: str):
    rows = [(1, "好"), (1.0, "不错"), (0, "坏"), (float("nan"), "没写"), (None, "也没写")]
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"label": [r[0] for r in rows], "text": [r[1] for r in rows]}), path)
    elif name == "a.csv":
        write(path, [("" if label is None else str(label), text) for label, text in rows])
    else:
        records = [{"label": label, "text": text} for label, text in rows]
        path.write_text(
            json.dumps(records) if name == "a.json" else "\n".join(map(json.dumps, records)), encoding="utf-8"
        )
    found = read_labelled(ClassifyConfig(data=str(path), skip_bad=True))
    assert [float(label) for label in found.names] == [0, 1]
    assert found.labels.tolist() == [1, 1, 0]
    assert (found.texts, found.skipped) == (["好", "不错", "坏"], 2)
    with pytest.raises(UserError, match=r"no label \(2 such rows"):
        read_labelled(ClassifyConfig(data=str(path)))


def test_pinyin_is_no_missing_label(tmp_path: Path):
    rows = [("nan", "他来了"), ("nv", "她来了"), ("Nan", "他走了"), ("nan", "他在")]
    found = read_labelled(ClassifyConfig(data=str(write(tmp_path / "a.csv", rows))))
    assert found.names == ["Nan", "nan", "nv"]
    assert np.bincount(found.labels).tolist() == [1, 2, 1]


def test_texts_that_are_judged_later_are_left_out(tmp_path: Path, capsys):
    judged = "房间很大，早餐丰富，前台服务热情，离地铁站只有五分钟路程"
    write(tmp_path / "later.csv", [("1", judged)])
    path = write(tmp_path / "a.csv", [("1", "送得快"), ("0", "太慢"), ("1", "听说：" + judged)])
    found = read_labelled(ClassifyConfig(data=str(path), without=str(tmp_path / "later.csv")))
    assert found.texts == ["送得快", "太慢"]
    assert re.search("left out, as in .* too: 1 text$", capsys.readouterr().err, re.MULTILINE)
