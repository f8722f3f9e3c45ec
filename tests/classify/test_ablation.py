"""Runs through the command: the grid, going on after a kill, tables, refusals, small-gpt's own files."""

import csv
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from review_tables import reviews, write
from sklearn.metrics import f1_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.processes import Process
from transformers import pipeline

from miaobi.classify import ablation
from miaobi.classify.config import load_config

FAST = ("--device=cpu", "--dtype=float32", "--max_epoch=1", "--batch_size=32", "--dropout=0")


@pytest.fixture
def ask(miaobi: Callable, table: Path, trained: Callable, tmp_path: Path) -> Callable:
    """`ask("train", "--seeds=2")`: the command on the tiny model, with --json's object and the log."""

    def command(kind: str, *flags: str, code: int = 0) -> tuple[dict, str]:
        given = [f"--base_model={trained('gpt2')}", f"--data={table}", f"--out_dir={tmp_path / 'run'}", *FAST]
        answer = miaobi("classify", kind, *given, *flags, "--json")
        assert answer.code == code, answer.err
        return json.loads(answer.out) if answer.out else {}, answer.err

    return command


def test_ablate_trains_the_grid_once_and_draws_it(ask: Callable, tmp_path: Path):
    result, _ = ask("ablate", "--seeds=2", "--seed=7")
    cells = {(row["pooling"], row["trainable"], row["seed"]) for row in result["rows"]}
    assert cells == {
        (p, t, s) for p in ("mask", "no_mask") for t in ("full", "last_block", "lora", "head") for s in (7, 8)
    }
    assert len(result["rows"]) == 16
    for row in result["rows"]:
        assert 0 <= row["accuracy"] <= 1
        assert 0 <= row["macro_f1"] <= 1
        assert row["seconds"] > 0
        assert row["peak_memory_mb"] > 50
    trained = {row["trainable"]: row["trained_parameters"] for row in result["rows"]}
    assert trained["full"] > max(trained["last_block"], trained["lora"])
    assert trained["head"] == 2 * 32
    assert [(row["name"], row["seed"]) for row in result["baselines"]] == [
        (name, seed) for seed in (7, 8) for name in ("majority", "svm")
    ]
    with (tmp_path / "run" / "ablation.csv").open(encoding="utf-8") as f:
        lines = list(csv.DictReader(f))
    shown = [row["accuracy"] for row in [*result["rows"], *result["baselines"]]]
    assert [float(line["accuracy"]) for line in lines] == shown
    assert (tmp_path / "run" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "run").rglob("*.safetensors"))

    started = time.perf_counter()
    again, err = ask("ablate", "--seeds=2", "--seed=7")
    assert again == result  # figures, seconds included: nothing was trained anew
    assert err.count("finished earlier") == 16
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    ("flags", "cells"),
    [
        (["--pooling=mean"], [("mean", t) for t in ("full", "last_block", "lora", "head")]),
        (["--trainable=head"], [("mask", "head"), ("no_mask", "head")]),
        (["--use_mask=False", "--frozen=True"], [("no_mask", "last_block")]),
    ],
)
def test_ablate_keeps_to_what_the_command_line_names(ask: Callable, tmp_path: Path, flags: list[str], cells: list):
    result, _ = ask("ablate", *flags)
    assert [(row["pooling"], row["trainable"]) for row in result["rows"]] == cells
    assert (tmp_path / "run" / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_ablate_runs_the_whole_grid_of_a_file_made_for_train(ask: Callable, miaobi: Callable, tmp_path: Path):
    (tmp_path / "a.yaml").write_text("pooling: mask\ntrainable: full\n", encoding="utf-8")
    result, _ = ask("ablate", str(tmp_path / "a.yaml"), "--baselines=False")
    assert len(result["rows"]) == 8
    assert "mask and no_mask" in " ".join(miaobi("classify", "ablate", "--help").out.split())


def test_a_cell_that_was_not_finished_is_trained_when_the_command_is_given_again(ask: Callable, tmp_path: Path):
    first, _ = ask("ablate", "--baselines=False")
    lost = tmp_path / "run" / "checkpoints" / "no_mask-lora-1337" / "result.json"
    kept = tmp_path / "run" / "checkpoints" / "mask-full-1337" / "result.json"
    times = kept.stat().st_mtime_ns
    lost.write_text(lost.read_text(encoding="utf-8")[:40], encoding="utf-8")
    again, err = ask("ablate", "--baselines=False")
    assert err.count("finished earlier") == 7
    assert kept.stat().st_mtime_ns == times
    for before, after in zip(first["rows"], again["rows"], strict=True):
        assert before["loss"] == after["loss"]  # the same seed, the same cell


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_its_finished_cells(tmp_path: Path, table: Path, trained: Callable, number, code: int):
    command = ["-m", "miaobi", "classify", "ablate", f"--base_model={trained('gpt2')}",
               f"--data={table}", f"--out_dir={tmp_path / 'run'}", *FAST[:2], "--max_epoch=6", "--dropout=0",
               "--batch_size=4", "--patience=0", "--baselines=False", "--json"]  # fmt: skip
    process = Process(command)
    first = tmp_path / "run" / "checkpoints" / "mask-full-1337" / "result.json"
    while not first.is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    done = process.wait(timeout=120)
    assert done.returncode == code, done.stderr
    assert "finished cells are kept" in done.stderr
    assert 1 <= len(json.loads(done.stdout)["rows"]) < 8
    assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if not (p / "result.json").is_file()]


def test_train_keeps_a_classifier_per_seed_and_compares_with_the_svm(ask: Callable, miaobi: Callable, tmp_path: Path):
    result, err = ask("train", "--seeds=3", "--max_epoch=2", "--learning_rate=1e-2")
    rows, svm = result["rows"], [row["accuracy"] for row in result["baselines"] if row["name"] == "svm"]
    accuracies = [row["accuracy"] for row in rows]
    assert result["accuracy"] == pytest.approx(np.mean(accuracies))
    assert result["accuracy_deviation"] == pytest.approx(np.std(accuracies, ddof=1))
    assert result["versus_svm"]["difference"] == pytest.approx(np.mean(accuracies) - np.mean(svm))
    assert result["versus_svm"]["low"] <= result["versus_svm"]["difference"] <= result["versus_svm"]["high"]
    assert result["data"]["corrected"] == {"train": 96, "dev": 12, "test": 12, "commonest_label": pytest.approx(7 / 12)}
    assert "corrected: 96 texts to train, 12 to choose, 12 to test" in err
    best = tmp_path / "run" / "checkpoints" / "best"
    chosen = int(np.argmax([row["dev_accuracy"] for row in rows]))
    assert best.resolve().name == f"mask-full-{rows[chosen]['seed']}"
    assert json.loads(miaobi("classify", "predict", tmp_path / "run", "皇马赢得比赛", "--json").out)["predictions"]
    assert pipeline("text-classification", str(best))("皇马赢得比赛")[0]["label"] in ("0", "1")


def test_the_figures_are_those_of_the_saved_classifier(ask: Callable, miaobi: Callable, table: Path, tmp_path: Path):
    """Every review of the table, judged again by the classifier on the disk; the test part picked out by its texts."""
    result, _ = ask("train", "--max_epoch=3", "--learning_rate=1e-2", "--baselines=False")
    cfg, _ = load_config(None, [("data", str(table))])
    data = ablation.read_labelled(cfg)
    _, _, test = ablation_split(data, 1337)
    answer = miaobi("classify", "predict", tmp_path / "run", table, "--json", "--label_column=label")
    found = json.loads(answer.out)
    said = {item["text"]: item["label"] for item in found["predictions"]}
    true, predicted = [data.names[i] for i in data.labels[test]], [said[data.texts[i]] for i in test]
    assert result["rows"][0]["accuracy"] == pytest.approx(np.mean(np.array(true) == predicted))
    assert result["rows"][0]["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro"))
    assert found["accuracy"] == pytest.approx(
        np.mean([said[t] == data.names[i] for t, i in zip(data.texts, data.labels, strict=True)])
    )


def ablation_split(data, seed: int):
    from miaobi.classify.data import stratified

    return stratified(data.labels, data.names, seed)


def test_a_run_with_other_settings_is_not_mixed_up(ask: Callable):
    ask("train", "--baselines=False")
    _, err = ask("train", "--baselines=False", "--learning_rate=5e-3", code=2)
    assert "holds mask-full-1337 with learning_rate=None, now learning_rate=0.005" in err
    result, _ = ask("train", "--baselines=False", "--pooling=mean")  # another cell of the same run
    assert result["rows"][0]["pooling"] == "mean"


def test_what_ablate_left_has_no_classifier_so_train_trains(ask: Callable, tmp_path: Path):
    ask("ablate", "--baselines=False")
    _, err = ask("train", "--baselines=False")
    assert "finished earlier" not in err
    assert (tmp_path / "run" / "checkpoints" / "best" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base_model="], "base_model is empty"),
        (["--data="], "data is empty"),
        (["--data=nowhere.csv"], "no such file"),
        (["--text_column=words"], "no column 'words'"),
        (["--base_model=nowhere/at/all"], "no model at"),
        (["--block_size=33"], "reads 32 tokens at most"),
        (["--learning_rat=1"], "Did you mean learning_rate?"),
    ],
)
def test_mistakes_end_with_two_and_a_way_out(ask: Callable, flags: list[str], message: str):
    _, err = ask("train", *flags, code=2)
    assert message in err
    assert "Traceback" not in err


def test_an_out_dir_that_is_a_file_is_refused(ask: Callable, tmp_path: Path):
    (tmp_path / "run").write_text("")
    _, err = ask("train", code=2)
    assert "cannot be written" in err


def test_kinds_and_help(miaobi: Callable):
    answer = miaobi("classify")
    assert all(kind in answer.out for kind in ("train", "ablate", "predict"))
    assert "does not know 'tran'" in miaobi("classify", "tran").err
    for kind in ("train", "ablate", "predict"):
        assert "--device" in miaobi("classify", kind, "--help").out
    table = miaobi("--help").out
    assert "classify" in table


def test_the_table_is_printed_for_people(miaobi: Callable, table: Path, trained: Callable, tmp_path: Path):
    answer = miaobi("classify", "train", f"--base_model={trained('gpt2')}", f"--data={table}",
                    f"--out_dir={tmp_path / 'run'}", *FAST, "--seeds=2")  # fmt: skip
    assert answer.code == 0, answer.err
    assert "last_block" not in answer.out
    assert all(word in answer.out for word in ("mask", "full", "majority", "svm", "±", "miaobi classify predict"))
    rows = [json.loads((tmp_path / f"run/checkpoints/mask-full-{s}/result.json").read_text(encoding="utf-8"))["row"]
            for s in (1337, 1338)]  # fmt: skip
    svm = [
        json.loads((tmp_path / f"run/baselines/{s}.json").read_text(encoding="utf-8"))["rows"][1] for s in (1337, 1338)
    ]
    gaps = [row["accuracy"] - simple["accuracy"] for row, simple in zip(rows, svm, strict=True)]
    half = 12.706204736 * abs(gaps[0] - gaps[1]) / 2  # Student's t with one degree of freedom
    low, high = (100 * (np.mean(gaps) + side * half) for side in (-1, 1))
    assert f"{100 * np.mean(gaps):+.2f} points (95% interval {low:+.2f} to {high:+.2f})" in answer.out
    best = max(rows, key=lambda row: row["dev_accuracy"])
    assert f"surest errors of mask-full-{best['seed']}" in answer.out
    assert best["worst_errors"][0]["text"][:60] in answer.out


def test_small_gpts_checkpoint_and_yaml_train_as_they_are(miaobi: Callable, tmp_path: Path, monkeypatch):
    import torch
    from originals import SMALL_GPT, Original

    monkeypatch.chdir(tmp_path)
    rows = reviews(60, long=60)
    write(tmp_path / "htl.csv", [*rows, ("1", "")])
    corpus = "\n\n".join(f"{text}\n好" for _, text in rows)
    (tmp_path / "train.txt").write_text(corpus, encoding="utf-8")
    vocab_size = 3 + len(set(corpus) - {"\n"})
    torch.save(Original.random(SMALL_GPT, True, vocab_size).small_gpt(""), tmp_path / "cpt.pth")
    (tmp_path / "sentimental.yaml").write_text(
        "data_path: train.txt\nsentimental_data_path: htl.csv\ntrain_percent: 0.8\nblock_size: 32\n"
        f"vocab_size: {vocab_size}\nn_layer: 2\nn_head: 2\nn_embd: 32\ndropout: 0.05\nbias: True\ncompile: True\n"
        "use_mask: False\nmax_epoch : 1\ntensorboard_path : ./tensorboard/x\ndevice: cpu\neval_freq: 2\nfrozen: True\n"
        "train_batch: 24\ntest_batch: 8\nlr : 5e-5\nwarmup_steps: 100\ndecay_steps: 5000\nmin_lr: 6e-6\n"
        "checkpoint_root: ./checkpoints\nsave_freq: 1919810\nbase_model: cpt.pth\nresume_from: NULL\nseed : 114514\n",
        encoding="utf-8",
    )
    answer = miaobi("classify", "train", "sentimental.yaml", "--json")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    (row,) = result["rows"]
    assert (row["pooling"], row["trainable"], row["protocol"]) == ("no_mask", "last_block", "as-published")
    chunks = sum(max(1, -(-len(text or "nan") // 30)) for _, text in [*rows, ("1", "")])
    assert result["data"]["as_published"]["chunks"] == chunks
    assert row["test_units"] == chunks - int(0.8 * chunks)
    assert "train_loss" in curves("tensorboard/x")
    assert answer.err.count("not needed:") == 1


def curves(directory: str | Path) -> list[str]:
    """Names of the curves that TensorBoard shows of a directory."""
    board = EventAccumulator(str(directory))
    board.Reload()
    return board.Tags()["scalars"]


def test_each_of_several_classifiers_has_curves_of_its_own(ask: Callable, tmp_path: Path):
    ask("train", "--seeds=2", "--trainable=head", f"--tensorboard_path={tmp_path / 'board'}", "--baselines=False")
    assert sorted(p.name for p in (tmp_path / "board").iterdir()) == ["mask-head-1337", "mask-head-1338"]
    for name in ("mask-head-1337", "mask-head-1338"):
        assert curves(tmp_path / "board" / name) == curves(tmp_path / "run" / "logs" / name) != []


def test_small_gpts_three_files_end_in_one_table_that_grows(miaobi, table: Path, trained, tmp_path: Path, monkeypatch):
    """config/sentimental*.yaml have one checkpoint_root; its README sets their accuracies and times side by side."""
    monkeypatch.chdir(tmp_path)
    seeds = {"sentimental": (True, False), "sentimental1": (True, True), "sentimental2": (False, False)}
    names = {(True, False): ("mask", "full"), (True, True): ("mask", "last_block"), (False, False): ("no_mask", "full")}
    known: dict[tuple, float] = {}
    for name, (mask, frozen) in seeds.items():
        Path(f"{name}.yaml").write_text(
            f"sentimental_data_path: {table}\nuse_mask: {mask}\nfrozen: {frozen}\ncheckpoint_root: ./checkpoints\n"
            f"base_model: {trained('gpt2')}\nblock_size: 32\n", encoding="utf-8",
        )  # fmt: skip
        flags = (f"{name}.yaml", "--device=cpu", "--dtype=float32", "--max_epoch=1", "--baselines=False")
        answer = miaobi("classify", "train", *flags)
        assert answer.code == 0, answer.err
        result = json.loads(miaobi("classify", "train", *flags, "--json").out)
        assert {(row["pooling"], row["trainable"]): row["accuracy"] for row in result["earlier"]} == known
        (row,) = result["rows"]
        known[names[mask, frozen]] = row["accuracy"]
        lines = [line for line in answer.out.splitlines() if line.count("│") > 5 and "mask" in line]
        cells = {tuple(word.strip() for word in line.split("│")[1:3]): line for line in lines}
        assert list(cells) == list(known), "as they were trained"
        for (pooling, trainable), accuracy in known.items():
            assert f" {accuracy:.2%} " in cells[pooling, trainable]
            assert re.search(r" [\d.]+ (s|min) ", cells[pooling, trainable])
    other = miaobi("classify", "train", "sentimental.yaml", *flags[1:], "--trainable=head", "--block_size=16", "--json")
    assert json.loads(other.out)["earlier"] == [], "other pieces are another test part"


def test_a_table_grows_by_what_was_tested_alike_and_by_nothing_else(ask, miaobi, table: Path, trained, tmp_path: Path):
    """Cells of several seeds, of ablate, of the same texts under another name; not of other texts or another cut."""

    def earlier(*flags: str, data: Path = table) -> list[tuple]:
        result, _ = ask("train", "--baselines=False", "--trainable=head", f"--data={data}", *flags)
        return sorted((row["pooling"], row["trainable"], row["seed"]) for row in result["earlier"])

    ask("ablate", "--baselines=False", "--pooling=no_mask", "--trainable=last_block")
    ask("train", "--baselines=False", "--trainable=head", "--pooling=mean", "--seeds=2")
    known = [("mean", "head", 1337), ("mean", "head", 1338), ("no_mask", "last_block", 1337)]
    assert earlier() == known
    renamed = tmp_path / "same.csv"
    renamed.write_bytes(table.read_bytes())
    assert earlier("--seed=5", data=renamed) == known, "cells of its own kind are no earlier ones"
    fewer = write(tmp_path / "fewer.csv", reviews(100, long=60))
    for flags, data in ((["--protocol=as-published", "--seed=6"], table), (["--train_fraction=0.7", "--seed=7"], table),
                        (["--seed=8"], fewer)):  # fmt: skip
        assert earlier(*flags, data=data) == []
    shown = miaobi("classify", "train", f"--base_model={trained('gpt2')}", f"--data={table}", *FAST, "--trainable=head",
                   f"--out_dir={tmp_path / 'run'}", "--baselines=False").out  # fmt: skip
    (mean,) = (line for line in shown.splitlines() if "│ mean" in line)
    assert mean.split("│")[3].strip() == "2"
    assert "±" in mean
