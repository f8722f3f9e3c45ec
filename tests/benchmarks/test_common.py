"""The arithmetic of the benchmarks, sides in processes of their own, and each benchmark without nanoGPT, very small."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from benchmarks.common import Ratio, Worker, ratio, take_turns
from tests import processes

from benchmarks import common
from miaobi.device import can_compile

ROOT = Path(__file__).parents[2]


class Counter:
    """Something for a worker to hold."""

    def __init__(self, start: int) -> None:
        self.value = start
        print("this must not reach stdout")

    def add(self, n: int) -> tuple[int, int]:
        self.value += n
        return self.value, os.getpid()

    def fail(self) -> None:
        raise ValueError("told to fail")

    def die(self) -> None:
        os._exit(3)


def test_ratio_of_pairs():
    assert ratio([4.0, 9.0, 8.0], [2.0, 3.0, 1.0]) == Ratio(pairs=[2.0, 3.0, 8.0], median=3.0, low=2.0, high=8.0)
    assert ratio([1.0, 3.0], [1.0, 1.0]).median == 2.0
    assert str(ratio([4.0, 9.0, 8.0], [2.0, 3.0, 1.0])) == "3.00 (2.00-8.00)"


def test_a_slow_spell_leaves_the_ratio_of_pairs_alone():
    ours, theirs = [40.0, 40.0, 4.0, 40.0], [10.0, 10.0, 1.0, 10.0]  # the third pair ran ten times slower
    assert ratio(ours, theirs) == Ratio([4.0] * 4, 4.0, 4.0, 4.0)


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [1.0, 2.0]), ([], []), ([0.0], [1.0]), ([1.0], [-1.0])])
def test_ratio_refuses_what_is_no_pairs(ours, theirs):
    with pytest.raises(ValueError, match="not pairs"):
        ratio(ours, theirs)


def test_turns_alternate(monkeypatch):
    monkeypatch.setattr(common, "SETTLE", 0.0)
    order = []

    def side(name):
        order.append(name)
        return float(len(order))

    figures = take_turns({"a": lambda: side("a"), "b": lambda: side("b")}, pairs=3)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert figures == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}


def test_worker_keeps_an_object_in_another_process(capfd):
    """Idle, it uses no processor; what fails in it arrives here."""
    with closing(Worker(Counter, 5)) as worker:
        assert worker.call("add", 2)[0] == 7
        value, pid = worker.call("add", 3)
        assert value == 10
        assert pid != os.getpid()
        before = processor_seconds(worker.process.pid)
        time.sleep(0.5)
        assert processor_seconds(worker.process.pid) - before < 0.05
        with pytest.raises(RuntimeError, match="told to fail"):
            worker.call("fail")
    assert capfd.readouterr().out == ""


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        pytest.skip("reads Linux's /proc")
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_worker_that_dies_or_cannot_be_made_says_so():
    with closing(Worker(Counter, 0)) as worker, pytest.raises(RuntimeError, match="exit code 3"):
        worker.call("die")
    with pytest.raises(RuntimeError, match="invalid literal"):
        Worker(int, "five")


FORKED = """
import multiprocessing, runpy, sys
server = multiprocessing.get_context("forkserver")
multiprocessing.get_context = lambda _: server
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
"""`python -m` whose workers are forks of the tests' server, which has imported torch; those above start Python."""


def run(name: str, *args: object) -> dict:
    """The JSON line of a benchmark."""
    done = processes.run(["-c", FORKED, f"benchmarks.{name}", "--json", *args], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def text(tmp_path) -> Path:
    """Enough Chinese for a few blocks."""
    file = tmp_path / "text.txt"
    lines = (f"第{i}天，妙笔写了{i * 7}个字。它读了一本书？是的！\n再过{i + 1}天，花开了。\n\n" for i in range(200))
    file.write_text("".join(lines), encoding="utf-8")
    return file


SMALL = ("--n_layer", 1, "--n_head", 2, "--n_embd", 32, "--block_size", 32)


@pytest.mark.slow
def test_train_speed_against_transformers(text):
    told = run("train_speed", "--data", text, *SMALL, "--batch_size", 2, "--steps", 1, "--pairs", 1, "--device", "cpu",
               "--compile", "False")  # fmt: skip
    assert told["same_first_loss"]
    assert told["last_loss"]["miaobi"] == pytest.approx(told["last_loss"]["transformers"], abs=1e-3)
    rates = told["tokens_per_second"]
    assert told["ratios"]["transformers"]["median"] == pytest.approx(rates["miaobi"][0] / rates["transformers"][0])
    assert told["machine"]["cores"] >= 1


@pytest.mark.slow
def test_sample_speed_against_transformers():
    told = run("sample_speed", *SMALL, "--vocab_size", 400, "--cases", "1x20", "2x40", "--pairs", 1, "--device", "cpu")
    assert told["greedy_equal"]
    assert set(told["ratios"]["1x20"]) == {"transformers"}
    assert told["ratios"]["2x40"] == {}  # beyond the block only miaobi goes on


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no C++ compiler")
def test_decode_speed_without_llama():
    """Greedy texts of even and of uneven requests are compared with transformers' on the way."""
    sizes = ("--n_layer", 2, "--n_head", 4, "--n_embd", 64, "--vocab_size", 600)
    told = run("decode_speed", *sizes, "--pairs", 1, "--tokens", 8, "--streams", 2, "--stream_tokens", 4, "--uneven", 3)
    assert max(told["distances"].values()) < 0.1
    assert set(told["ratios"]["3 uneven, 2 at a time"]) == {"transformers float32"}


@pytest.mark.slow
def test_prepare_speed_alone(text):
    told = run("prepare_speed", "--text", text, "--megabytes", 0.2, "--pairs", 1, "--modes", "tail", "default",
               "--tokenizers")  # fmt: skip
    reported = told["reported"]
    assert reported["tail"]["characters"] == reported["default"]["characters"] == told["characters"]
    assert reported["default"]["duplicates_removed"] == 0
    assert reported["tokenizers"]["val_tokens"] == reported["tail"]["val_tokens"]
    assert told["ratios"]["tokenizers"]["tail"]["median"] > 0
    assert told["peak_mib"]["tail"]["largest"] < 1024


@pytest.mark.slow
def test_quality_race_merges_results(text, tmp_path):
    sizes = (*SMALL, "--batch_size", 2, "--recipe_batch", 2, "--steps", 20)
    common_flags = ("--data", text, "--results", tmp_path / "race.json", *sizes)
    run("quality_race", *common_flags, "--sides", "miaobi-gpt2")
    told = run("quality_race", *common_flags, "--sides", "miaobi", "--plot", tmp_path / "race.png")
    assert set(told["sides"]) == {"miaobi-gpt2", "miaobi"}
    assert told["sides"]["miaobi"]["characters"] == told["sides"]["miaobi-gpt2"]["characters"]
    assert [step for _, step, _ in told["sides"]["miaobi"]["curve"]] == [10, 20]
    assert (tmp_path / "race.png").stat().st_size > 1000
