"""A run that ends in time, with its schedule finished, whatever the speed does meanwhile."""

import itertools
import json
import math
import time

import pytest

from miaobi.errors import UserError
from miaobi.files import pointed, read_json
from miaobi.settings import load_config
from miaobi.train import schedule
from miaobi.train.layout import Objective
from miaobi.train.loop import Run
from miaobi.train.loop import train as loop_train


@pytest.fixture
def train(train):
    """The smallest model: only its steps are counted."""
    small = {"n_layer": 1, "n_head": 1, "n_embd": 16, "batch_size": 2, "block_size": 16, "eval_iters": 1}
    return lambda **values: train(**small | values)


@pytest.fixture
def machine(monkeypatch):
    """`machine(seconds)`: a clock that only steps and evaluations move; seconds(step) is what a step takes."""

    def begin(seconds, evaluation: float = 1.0) -> list[float]:
        now, step, score = [0.0], Run.step, Run.validation_loss

        def timed(self, n):
            now[0] += seconds(n)
            return step(self, n)

        def scored(self):
            now[0] += evaluation
            return score(self)

        for room in ("loop", "schedule"):
            monkeypatch.setattr(f"miaobi.train.{room}.clock", lambda: now[0])
        monkeypatch.setattr(Run, "step", timed)
        monkeypatch.setattr(Run, "validation_loss", scored)
        monkeypatch.setattr(schedule.Workload, "time_pass", lambda self, mode: seconds(0) / self.rows)
        return now

    return begin


def rates(run) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}


SPEEDS = {
    "steady": lambda n: 1.0,
    "slower later": lambda n: 1.0 if n < 30 else 2.5,
    "faster later": lambda n: 2.0 if n < 20 else 0.8,
    "a slow start": lambda n: 9.0 if n < 2 else 1.0,
}


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_a_run_ends_in_time_with_its_decay_finished(train, prepared, tmp_path, machine, speed, kind):
    now = machine(SPEEDS[speed])
    result = train(data=prepared(), out_dir=tmp_path / "run", max_minutes=2, max_iters=10**6, eval_interval=25,
                   log_interval=1, schedule=kind)  # fmt: skip
    assert result["stopped"] == "max_minutes"
    assert 0.95 * 120 <= now[0] <= 1.05 * 120
    curve = rates(tmp_path / "run")
    peak, last = max(curve.values()), curve[result["step"]]
    assert last <= 0.06 * peak if kind == "wsd" else last <= 0.115 * peak
    falling = [curve[step] for step in sorted(curve) if step > 0.55 * result["step"]]
    assert all(b <= a for a, b in itertools.pairwise(falling)), "no jump up"


def test_a_schedule_that_is_cut_short_is_said(train, prepared, tmp_path, machine, capsys):
    """Steps become so slow that those which are left cannot carry the decay; the run ends in time all the same."""
    now = machine(lambda n: 1.0 if n < 5 else 25.0)
    train(data=prepared(), out_dir=tmp_path / "run", max_minutes=2, max_iters=10**6, eval_interval=25, log_interval=1)
    assert capsys.readouterr().err.count("which is cut short: steps are slow now") == 1
    assert now[0] <= 1.05 * 120


def test_what_went_by_before_training_counts(prepared, tmp_path, machine):
    """Starting Python, reading and preparing the text: the minutes are the command's."""
    now = machine(SPEEDS["steady"])
    settings = {"data": prepared(), "out_dir": tmp_path / "run", "max_minutes": 2, "max_iters": 10**6,
                "eval_interval": 25, "device": "cpu", "block_size": 32, "n_layer": 1, "n_head": 1, "n_embd": 16,
                "batch_size": 4, "eval_iters": 2, "sample_tokens": 0, "compile": False}  # fmt: skip
    result = loop_train(*load_config(None, [(key, str(value)) for key, value in settings.items()]), since=-40.0)
    assert result["stopped"] == "max_minutes"
    assert 0.95 * 120 <= 40 + now[0] <= 1.05 * 120


def test_a_run_that_goes_back_has_no_more_time_and_no_less(train, prepared, tmp_path, machine, monkeypatch):
    """Three steps that are not finite send it back to step 50; the way from there is gone a second time."""
    now, forward, ran = machine(SPEEDS["steady"]), Objective.forward, []
    step = Run.step

    def noted(self, n):
        ran.append(n)
        return step(self, n)

    def broken(self, *args):
        loss = forward(self, *args)
        return loss * float("nan") if self.training and ran and ran[-1] in (60, 61, 62) and ran.count(60) == 1 else loss

    monkeypatch.setattr(Run, "step", noted)
    monkeypatch.setattr(Objective, "forward", broken)
    result = train(data=prepared(), out_dir=tmp_path / "run", max_minutes=2, max_iters=10**6, eval_interval=25,
                   log_interval=1)  # fmt: skip
    assert ran.count(55) == 2
    assert result["stopped"] == "max_minutes"
    assert 0.95 * 120 <= now[0] <= 1.05 * 120


def test_without_max_minutes_nothing_is_laid(train, prepared, tmp_path):
    train(data=prepared(), out_dir=tmp_path / "run")
    state = read_json(pointed(tmp_path / "run" / "checkpoints" / "last") / "train_state" / "progress.json")
    assert state["laid"] == []


def test_max_iters_may_come_first(train, prepared, tmp_path, machine):
    now = machine(SPEEDS["steady"])
    assert train(data=prepared(), out_dir=tmp_path / "run", max_minutes=2, max_iters=30)["step"] == 30
    assert now[0] < 60
    assert rates(tmp_path / "run")[30] <= 0.1 * 3e-3


def test_a_run_that_is_cut_has_the_rest_of_its_time(train, prepared, tmp_path, machine, monkeypatch):
    """Time that lies between two commands does not count, and the schedule goes on without a jump."""
    now = machine(SPEEDS["steady"])
    settings = {"data": prepared(), "out_dir": tmp_path / "run", "max_minutes": 2, "max_iters": 10**6,
                "eval_interval": 25, "log_interval": 1}  # fmt: skip
    step = Run.step

    def cut(self, n):
        if n == 70:
            self.interrupt("terminated")
        return step(self, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", cut)
        assert train(**settings)["stopped"] == "terminated"
    spent = now[0]
    now[0] += 5000
    result = train(**settings)
    assert result["stopped"] == "max_minutes"
    assert 0.95 * 120 <= now[0] - 5000 <= 1.05 * 120
    assert now[0] - 5000 > spent
    curve = rates(tmp_path / "run")
    assert abs(curve[72] - curve[70]) < 0.08 * max(curve.values())
    assert train(**settings)["step"] == result["step"], "finished"


def test_a_resumed_run_goes_by_the_decisions_that_were_recorded(train, prepared, tmp_path, machine):
    machine(SPEEDS["slower later"])
    train(data=prepared(), out_dir=tmp_path / "run", max_minutes=2, max_iters=10**6, eval_interval=25, log_interval=1)
    state = read_json(pointed(tmp_path / "run" / "checkpoints" / "last") / "train_state" / "progress.json")
    laid, curve = state["laid"], rates(tmp_path / "run")
    assert [row[0] for row in laid] == sorted({row[0] for row in laid})
    first, peak = laid[0][1], max(curve.values())
    for step in sorted(curve):  # metrics count from 1
        before = [row for row in laid if row[0] <= step - 1]
        done = before[-1][2] + (1 - before[-1][2]) * (step - 1 - before[-1][0]) / (before[-1][1] - before[-1][0])
        expected = min(1.0, (first - done * first) / max(1, round(0.5 * first)))
        if step > 10:
            assert curve[step] == pytest.approx(expected * peak, rel=1e-6)


@pytest.mark.parametrize("minutes", [0, -1, "nan", "inf"])
def test_minutes_that_are_none_are_refused(train, prepared, tmp_path, minutes):
    with pytest.raises(UserError, match="max_minutes is"):
        train(data=prepared(), out_dir=tmp_path / "run", max_minutes=minutes)


def test_a_real_run_ends_in_time(train, prepared, tmp_path):
    started = time.perf_counter()
    result = train(data=prepared(), out_dir=tmp_path / "run", max_minutes=0.1, max_iters=10**6, eval_interval=10**6)
    took = time.perf_counter() - started
    assert took <= 15, f"of 6 s, {took:.1f}; machines that run tests are busy"
    assert result["stopped"] == "max_minutes"
    assert result["step"] >= 5
    assert not math.isnan(result["val_loss"])
