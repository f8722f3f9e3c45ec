"""Predictions: every kind of input, in order, as they come."""

import io
import itertools
import json
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from review_tables import reviews, write

from miaobi import cli
from miaobi.classify import predict as room
from miaobi.classify.config import PredictConfig, load_config
from miaobi.classify.data import Row, read_labelled
from miaobi.classify.finetune import Cell, Experiment, finetune
from miaobi.classify.head import save


@pytest.fixture(scope="session")
def classifier(table: Path, trained: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that knows who won."""
    given = {"base_model": trained("qwen3"), "data": table, "max_epoch": 6, "learning_rate": 1e-2, "dropout": 0.0,
             "batch_size": 16}  # fmt: skip
    cfg, _ = load_config(None, [(key, str(value)) for key, value in given.items()])
    experiment = Experiment(cfg, cfg.base_model, read_labelled(cfg), torch.device("cpu"), torch.float32)
    judge, _, result = finetune(experiment, Cell("mask", "full", 1))
    assert result["accuracy"] > 0.9
    path = tmp_path_factory.mktemp("classifier")
    save(path, judge)
    return path


@pytest.fixture
def ask(miaobi: Callable, classifier: Path, monkeypatch) -> Callable:
    """`ask("皇马赢得比赛")`: predict's JSON; stdin: bytes of standard input."""

    def command(*args: object, stdin: bytes = b"", code: int = 0) -> dict:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        answer = miaobi("classify", "predict", classifier, *args, "--device=cpu", "--json")
        assert answer.code == code, answer.err
        return json.loads(answer.out) if code == 0 else {"error": answer.err}

    return command


def labels(found: dict) -> list[str]:
    return [item["label"] for item in found["predictions"]]


@pytest.mark.bf16
def test_a_text_gets_a_label_and_probabilities_that_add_up(ask: Callable):
    (won,) = ask("皇马赢得比赛，球迷赢得冠军。")["predictions"]
    assert won["label"] == "1"
    assert won["probability"] == won["probabilities"]["1"] > 0.5
    assert sum(won["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    assert labels(ask("皇马输掉比赛，球迷输掉冠军。")) == ["0"]


@pytest.mark.bf16
def test_files_are_judged_in_their_order_whatever_the_batches(ask: Callable, tmp_path: Path):
    rows = [text for _, text in reviews(50, seed=4, long=60)]
    (tmp_path / "a.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    found = ask(tmp_path / "a.txt")
    assert [item["text"] for item in found["predictions"]] == rows
    alone = [ask(text)["predictions"][0] for text in rows[:5]]
    assert [item["label"] for item in alone] == labels(found)[:5]
    for one, many in zip(alone, found["predictions"], strict=False):
        assert one["probability"] == pytest.approx(many["probability"], abs=2e-4)
    assert labels(ask(tmp_path / "a.txt", "--batch_size=7", "--micro_tokens=40")) == labels(found)
    write(tmp_path / "a.csv", [("1", text) for text in rows], ("stars", "text"))
    assert labels(ask(tmp_path / "a.csv")) == labels(found)
    lines = [json.dumps({"content": text}) for text in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="gb18030")
    assert labels(ask(tmp_path / "a.jsonl")) == labels(found)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-be", "big5"])
def test_standard_input_is_a_text_a_line(ask: Callable, encoding: str):
    rows = (
        ["皇马赢得比赛", "", "皇马输掉比赛"]
        if encoding != "big5"
        else ["這場比賽贏得很好", "", "我們這個國家輸掉了比賽"]
    )
    text = f"{rows[0]}\r\n\n{rows[2]}"
    found = ask("-", stdin=text.encode(encoding))
    assert [item["text"] for item in found["predictions"]] == rows
    if encoding != "big5":
        assert labels(found)[::2] == ["1", "0"]
    assert ask(stdin=text.encode(encoding)) == found
    assert ask("-", stdin=b"") == {"predictions": []}


@pytest.mark.parametrize("encoding", ["gbk", "ascii"])
def test_a_poor_output_loses_no_prediction(classifier: Path, monkeypatch, encoding: str):
    def written(*args: str) -> str:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        cli.main(["classify", "predict", str(classifier), "房间干净😀", *args])
        return sys.stdout.buffer.getvalue().decode(encoding)

    assert written().endswith("\t房间干净?\n" if encoding == "gbk" else "\t?????\n")
    assert json.loads(written("--json"))["predictions"][0]["text"] == "房间干净😀"


def test_an_empty_text_gets_a_label(ask: Callable):
    assert labels(ask("")) in (["0"], ["1"])


def test_input_is_read_no_faster_than_it_is_judged(classifier: Path):
    """Files of any size: an endless one gives its first answers."""
    read = []
    endless = (read.append(i) or Row("", f"皇马赢得比赛{i}") for i in itertools.count())
    cfg = PredictConfig(str(classifier), batch_size=10, device="cpu")
    found = list(itertools.islice(room.predictions(room.load(cfg.model, cfg), endless, cfg), 25))
    assert [row.text for row, _ in found] == [f"皇马赢得比赛{i}" for i in range(25)]
    assert len(read) == 30


@pytest.mark.bf16
def test_true_labels_are_scored_and_unseen_ones_count_as_wrong(ask: Callable, miaobi: Callable, classifier, tmp_path):
    rows = [("1", "皇马赢得比赛"), ("0", "皇马输掉比赛"), ("2", "曼联赢得冠军"), ("1", "球迷赢得联赛")]
    path = write(tmp_path / "a.csv", rows)
    found = ask(path, "--label_column=label")
    assert found["accuracy"] == 0.75
    assert found["unseen_labels"] == ["2"]
    assert found["labels"] == ["0", "1", "2"]
    assert found["confusion"] == [[1, 0, 0], [0, 2, 0], [0, 1, 0]]
    assert found["macro_f1"] == pytest.approx((1 + 0.8 + 0) / 3)
    answer = miaobi("classify", "predict", classifier, path, "--label_column=label", "--device=cpu")
    assert "label '2' was not in training; such rows count as wrong" in answer.err
    assert "accuracy 75.00%" in answer.err
    assert [line.split("\t")[0] for line in answer.out.splitlines()] == ["1", "0", "1", "1"]
    assert "accuracy" not in ask(path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.csv"], "nowhere.csv: no such file"),
        (["nowhere.csv.gz"], "nowhere.csv.gz: no such file"),
        (["nowhere.ZIP"], "nowhere.ZIP: no such file"),
        (["."], ". is a directory; give a text, a file"),
        (["TABLE", "--text_column=words"], "no column 'words'; there are label, review"),
        (["TABLE", "--label_column=stars"], "no column 'stars'"),
        (["TABLE", "--batch_size=0"], "batch_size is 0"),
    ],
)
def test_mistakes_end_with_two_and_a_way_out(ask: Callable, table: Path, args: list[str], message: str):
    assert message in ask(*[table if a == "TABLE" else a for a in args], code=2)["error"]


def test_bytes_that_are_no_text_are_named(ask: Callable):
    noise = bytes(b or 1 for b in random.Random(2).randbytes(5000))
    assert "standard input: neither UTF-8, GB18030, Big5 nor UTF-16" in ask("-", stdin=noise, code=2)["error"]
    text = "皇马赢得比赛，球迷赢得冠军。\n".encode() * 9
    error = ask("-", stdin=text + b"\xff\xff\n" + text, code=2)["error"]
    assert f"standard input: read as utf-8, but byte {len(text)} does not fit" in error


def test_lines_and_rows_that_cannot_be_read_are_left_out_when_asked(ask: Callable, tmp_path: Path, capsys):
    found = ask("-", "--skip_bad=True", stdin="皇马赢得比赛\n".encode() + b"\xff\xff\n" + "皇马输掉比赛".encode())
    assert [item["text"] for item in found["predictions"]] == ["皇马赢得比赛", "\ufffd\ufffd", "皇马输掉比赛"]
    rows = ["皇马赢得比赛", "半个\ud83d", "皇马输掉比赛"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in rows), encoding="utf-8")
    assert [item["text"] for item in ask(path, "--skip_bad=True")["predictions"]] == rows[::2]
    assert f"{path}, line 2: it has half a character" in ask(path, code=2)["error"]
    path.write_text("\n".join(json.dumps({"text": "赢", "label": text}) for text in rows), encoding="utf-8")
    assert f"{path}, line 2: it has half a character" in ask(path, "--label_column=label", code=2)["error"]


def test_what_is_left_out_is_counted(miaobi: Callable, classifier: Path, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "皇马"}\n[]\n{"text": 5}\n', encoding="utf-8")
    answer = miaobi("classify", "predict", classifier, path, "--skip_bad=True", "--device=cpu")
    assert "2 rows left out" in answer.err
    assert len(answer.out.splitlines()) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_read_like_standard_input(ask: Callable, tmp_path: Path):
    pipe = tmp_path / "63"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("皇马赢得比赛\n皇马输掉比赛\n", "utf-8"), daemon=True)
    writer.start()
    found = ask(pipe)
    writer.join(10)
    assert [item["text"] for item in found["predictions"]] == ["皇马赢得比赛", "皇马输掉比赛"]
    assert labels(found) == ["1", "0"]


def test_rows_without_a_label_are_not_scored(miaobi: Callable, ask: Callable, classifier: Path, tmp_path: Path):
    path = write(tmp_path / "a.csv", [("1", "皇马赢得比赛"), ("", "皇马输掉比赛"), ("nan", "曼联赢得冠军")])
    found = ask(path, "--label_column=label")
    assert (found["accuracy"], found["labels"], found["unseen_labels"]) == (1.0, ["0", "1"], [])
    assert len(found["predictions"]) == 3
    answer = miaobi("classify", "predict", classifier, path, "--label_column=label", "--device=cpu")
    assert "not scored, without a label: 2 rows" in answer.err


def test_a_label_keeps_to_its_column(classifier: Path, capsys):
    """Whatever is in it, predict prints lines of three columns."""
    cfg = PredictConfig(str(classifier), device="cpu")
    judge = room.load(cfg.model, cfg)
    judge.labels = ["输\t了", "赢\r\n了"]
    rows = [Row("", "皇马赢得\t比赛"), Row("", "皇马输掉比赛")]
    room.write(judge, iter(rows), cfg, as_json=False)
    assert [line.split("\t")[::2] for line in capsys.readouterr().out.split("\n")[:-1]] == [
        ["赢 了", "皇马赢得 比赛"], ["输 了", "皇马输掉比赛"],
    ]  # fmt: skip
    room.write(judge, iter(rows), cfg, as_json=True)
    assert [item["label"] for item in json.loads(capsys.readouterr().out)["predictions"]] == judge.labels[::-1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "text\n皇马赢得比赛\n".encode() + b"\xff\xfe\xff\n"),
        ("a.jsonl", '{"text": "皇马赢得比赛"}\n{"text": \n'.encode()),
        ("a.jsonl", '{"text": "皇马赢得比赛"}\n{"other": "曼联"}\n'.encode()),
    ],
    ids=["bytes of no encoding", "broken JSON", "no such field"],
)
def test_a_bad_row_leaves_no_half_of_a_json_object(classifier: Path, miaobi, tmp_path: Path, name: str, content: bytes):
    """Whatever is wrong with it, and however many good ones were read before."""
    (tmp_path / name).write_bytes(content)
    answer = miaobi("classify", "predict", classifier, tmp_path / name, "--device=cpu", "--batch_size=1", "--json")
    assert answer.code == 2
    assert answer.out == ""
