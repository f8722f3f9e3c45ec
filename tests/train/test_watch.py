"""What a run writes down and warns of."""

import json
import os
import signal
import threading
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from miaobi.train.watch import Metrics, evaluations_since_best, last_step, on_signals, overfitting_warning, time_left

RISING = [[100, 4.0, 4.5], [200, 3.0, 4.2], [300, 2.0, 5.1], [400, 1.2, 5.2], [500, 0.3, 6.4], [600, 0.13, 7.2]]


@pytest.fixture(autouse=True)
def first_files_of_a_process(monkeypatch):
    """TensorBoard orders files of one second by the text of their number: the tenth of a process before the ninth."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def test_the_seeds_overfitting_gives_a_warning():
    """Its figures: train 1.18, 0.30, 0.13 while validation went 5.20, 6.41, 7.19."""
    seed = [[2000, 1.1798, 5.1980], [3000, 0.2954, 6.4054], [4000, 0.1332, 7.1862]]
    warning = overfitting_warning(seed, 0.0, 1e-3)
    assert "overfitting" in warning
    assert "1.18 -> 0.13" in warning
    assert "5.20 -> 7.19" in warning
    assert "step 2000" in warning, "the best checkpoint so far"
    assert "step 200 " in overfitting_warning(RISING, 0.0, 1e-3)


@pytest.mark.parametrize(
    ("dropout", "said", "unsaid"),
    [(0.0, "--dropout=0.2", "more"), (0.2, "more --dropout than 0.2", "=0.2"), (0.5, "a smaller", "--dropout")],
)
def test_the_advice_is_what_was_not_tried(dropout, said, unsaid):
    advice = overfitting_warning(RISING, dropout, 6e-4).rpartition("; then ")[2]
    assert said in advice
    assert unsaid not in advice
    assert "a lower --learning_rate than 0.0006" in advice


@pytest.mark.parametrize(
    "history",
    [
        [],
        RISING[:2],
        RISING[:3],  # validation rose once
        [[1, 3.0, 5.0], [2, 3.1, 5.1], [3, 3.2, 5.2]],  # both rise: the rate is too high, which is not overfitting
        [[1, 3.0, 5.0], [2, 2.0, 4.0], [3, 1.0, 3.0]],
        [[1, 3.0, 5.0], [2, 2.0, 5.1], [3, 1.0, 5.05]],
    ],
)
def test_no_warning_without_cause(history):
    assert overfitting_warning(history, 0.0, 1e-3) is None


@given(st.lists(st.floats(0, 10), max_size=20))
def test_evaluations_since_the_best(losses):
    count, best = 0, float("inf")
    for loss in losses:
        count, best = (0, loss) if loss < best else (count + 1, best)
    assert evaluations_since_best([[i, 0.0, loss] for i, loss in enumerate(losses)]) == count


def lines(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_figures_go_to_metrics_jsonl_and_tensorboard(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in (10, 20):
        metrics.log(step, train_loss=5.0 / step, val_loss=None)
    metrics.close()
    assert lines(tmp_path) == [{"step": 10, "train_loss": 0.5}, {"step": 20, "train_loss": 0.25}]
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert board.Tags()["scalars"] == ["train_loss"]
    assert [(e.step, e.value) for e in board.Scalars("train_loss")] == [(10, 0.5), (20, 0.25)]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.log(10, train_loss=1.0)
    assert lines(tmp_path) == [{"step": 10, "train_loss": 1.0}]
    metrics.close()


def test_what_a_killed_run_logged_after_its_checkpoint_is_dropped(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in range(10, 60, 10):
        metrics.log(step, train_loss=float(step))
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 6')  # cut by the kill
    metrics = Metrics(tmp_path, 30)
    metrics.log(40, train_loss=-1.0)
    metrics.close()
    assert [(row["step"], row["train_loss"]) for row in lines(tmp_path)] == [(10, 10), (20, 20), (30, 30), (40, -1)]


def points(run) -> list[tuple[int, float]]:
    board = EventAccumulator(str(run))
    board.Reload()
    return [(e.step, e.value) for e in board.Scalars("train_loss")]


@pytest.mark.parametrize("start", [0, 30])
def test_curves_keep_the_step_that_is_gone_on_from_and_drop_those_run_again(tmp_path, start):
    metrics = Metrics(tmp_path, 0)
    for step in range(10, 60, 10):
        metrics.log(step, train_loss=float(step))
    metrics.close()
    metrics = Metrics(tmp_path, start)
    for step in range(start + 10, 50, 10):
        metrics.log(step, train_loss=-1.0)
    metrics.close()
    assert points(tmp_path) == [(s, float(s) if s <= start else -1.0) for s in range(10, 50, 10)]


def test_events_go_where_small_gpts_tensorboard_path_says_too(tmp_path):
    elsewhere = tmp_path / "tensorboard" / "any&name"
    metrics = Metrics(tmp_path, 0, events=elsewhere)
    for step in (10, 20):
        metrics.log(step, train_loss=float(step))
    metrics.close()
    assert points(tmp_path) == points(elsewhere) == [(10, 10.0), (20, 20.0)]


@pytest.mark.parametrize("same", ["run", "run/../run", "run/"])
def test_events_are_not_written_twice_into_one_directory(tmp_path, same):
    Metrics(tmp_path / "run", 0, events=f"{tmp_path}/{same}").close()
    assert len(list((tmp_path / "run").glob("events.out.tfevents*"))) == 1


def test_a_place_for_events_that_cannot_be_written_costs_them_alone(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    (tmp_path / "run").mkdir()
    metrics = Metrics(tmp_path / "run", 0, events=tmp_path / "tensorboard")
    metrics.log(10, train_loss=1.0)
    metrics.close()
    assert points(tmp_path / "run") == [(10, 1.0)]
    assert capsys.readouterr().err.count("warning:") == 1


def test_an_evaluation_that_was_not_saved_is_not_logged_twice(tmp_path):
    """Interrupted at an evaluation, continued, and killed between it and its checkpoint."""
    metrics = Metrics(tmp_path, 0)
    metrics.log(20, train_loss=1.0)
    metrics.log(20, val_loss=2.0)
    metrics.close()
    Metrics(tmp_path, 20, evaluated=False).close()
    assert lines(tmp_path) == [{"step": 20, "train_loss": 1.0}]
    metrics = Metrics(tmp_path, 20)
    metrics.log(20, val_loss=2.0)
    metrics.close()
    Metrics(tmp_path, 20).close()
    assert lines(tmp_path) == [{"step": 20, "train_loss": 1.0}, {"step": 20, "val_loss": 2.0}]


def test_a_new_run_starts_a_new_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "train_loss": 1}\n')
    Metrics(tmp_path, 0).close()
    assert lines(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "terminated"),
     (signal.SIGUSR1, "terminated"), (signal.SIGXCPU, "terminated")],
)  # fmt: skip
def test_signals_become_requests_and_the_old_handlers_return(number, reason):
    heard, outer = [], signal.getsignal(number)
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, before)  # the suite itself may run under nohup
    try:
        with on_signals(heard.append):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        assert heard == [reason, reason]
        assert signal.getsignal(number) is before
    finally:
        signal.signal(number, outer)


def test_a_thread_that_may_not_handle_signals_still_trains():
    done = []

    def body() -> None:
        with on_signals(done.append):
            done.append("ran")

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert done == ["ran"]


@pytest.mark.parametrize(
    ("steps", "per_step", "blocks", "end", "said"),
    [(5, 1.0, 100, 5, "0 s left"), (94, 1.0, 100, 94, "89 s left"), (605, 1.0, 100, 605, "10 min left"),
     (7205, 1.0, 999, 7205, "2.0 h left"), (31 * 86400, 1.0, 10**6, 31 * 86400, ""), (15_238_491, 0.068, 253, None, ""),
     (11_398_871, 1e-3, 47, None, ""), (3000, 0.01, 2, None, ""), (2500, 0.01, 2, 2500, "25 s left")],
)  # fmt: skip
def test_the_time_that_is_left_is_said_unless_there_is_no_end(steps, per_step, blocks, end, said):
    """Of many steps a second an endless max_epochs is less than a month: passes over the text tell it too."""
    plan = SimpleNamespace(total_steps=steps, progress=SimpleNamespace(step=5), blocks=range(blocks),
                           cfg=SimpleNamespace(train=SimpleNamespace(global_batch=8)))  # fmt: skip
    assert (last_step(plan), time_left(plan, per_step)) == (end, said)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has none")
def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        heard = []
        with on_signals(heard.append):
            os.kill(os.getpid(), signal.SIGHUP)
        assert heard == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
