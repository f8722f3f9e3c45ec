"""One writer: real processes that hold a lock, are killed, or are on another machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tests.conftest import tiny
from tests.processes import Process

from miaobi import lock
from miaobi.corpus import store
from miaobi.errors import UserError
from miaobi.lock import locked, this_process

HOLD = """
import sys, time
from pathlib import Path
from miaobi.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_and_told_who_the_first_is(holder, tmp_path):
    with (
        pytest.raises(UserError, match=rf"run is being written by process {holder.pid} on .*since 2"),
        locked(tmp_path / "run"),
    ):
        pytest.fail("two writers")


def test_a_killed_holder_is_taken_over_at_once(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    began = time.monotonic()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    assert time.monotonic() - began < 2
    assert os.listdir(tmp_path / "run") == []


def test_two_writers_in_one_process(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"), locked(tmp_path):
        pytest.fail("two writers")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("lives", [True, False])
def test_a_holder_on_another_machine_shows_by_signs_of_life(tmp_path, monkeypatch, lives):
    """Its clock may be wrong, and its disk's locks may not reach here: only a sign that changes counts."""
    monkeypatch.setattr(lock, "SILENCE", 1.0)
    there = replace(this_process(), machine="elsewhere", host="node-7", pid=1)
    (tmp_path / ".lock").write_text(json.dumps(asdict(there)))
    os.utime(tmp_path / ".lock", (0, 0))
    if lives:
        threading.Timer(0.4, os.utime, [tmp_path / ".lock", (1, 1)]).start()
        with pytest.raises(UserError, match="process 1 on node-7"), locked(tmp_path):
            pytest.fail("two writers")
    else:
        with locked(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"pid": "x"}', b"[1]", b'{"pid": 1}'])
def test_a_lock_that_tells_nothing_is_of_a_dead_process(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with locked(tmp_path):
        pass


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to("../precious")
    with pytest.raises(OSError, match="symbolic"), locked(tmp_path / "run"):
        pytest.fail("followed")
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("name", ["link", "link/../run", "run/", "elsewhere/run"])
def test_another_way_to_the_same_directory_meets_the_same_lock(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run", target_is_directory=True)
    (tmp_path / "elsewhere").symlink_to(".", target_is_directory=True)
    with locked(tmp_path / "run"), pytest.raises(UserError, match=f"process {os.getpid()}"), locked(Path(name)):
        pytest.fail("two writers")
    held = prepare_lock(Path("run"))
    with held, pytest.raises(UserError, match=f"process {os.getpid()}"), prepare_lock(Path(name)):
        pytest.fail("two writers")


def prepare_lock(out: Path):
    """The lock of `prepare --out`, which resolves the name first."""
    return store.one_writer(out.resolve())


def test_signs_of_life_are_given_while_the_work_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    with locked(tmp_path):
        first = (tmp_path / ".lock").stat().st_mtime_ns
        give_up = time.monotonic() + 10
        while (tmp_path / ".lock").stat().st_mtime_ns == first:
            assert time.monotonic() < give_up
            time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["prepare", "classify train", "classify ablate", "demo"])
def test_a_second_writer_of_any_kind_is_refused_and_changes_nothing(miaobi, prepared, trained, tmp_path, verb):
    out, reviews = tmp_path / "out", tmp_path / "reviews.csv"
    reviews.write_text("label,review\n" + "".join(f"{i % 2},皇马{i}\n" for i in range(40)), encoding="utf-8")
    words = {
        "prepare": ["prepare", reviews, "--field=review", f"--out={out}", "--workers=1"],
        "demo": ["demo", "--quick", f"--out_dir={out}"],
    }.get(verb, [*verb.split(), f"--data={reviews}", f"--base_model={trained()}", f"--out_dir={out}", "--device=cpu"])
    if verb == "demo":  # its texts are there already
        shutil.copytree(prepared(), out / "data")
        shutil.copytree(prepared(), out / "chat" / "data")
    out.mkdir(exist_ok=True)
    with locked(out, file=out.with_name(".out.lock") if verb == "prepare" else None):
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        answer = miaobi(*words)
        assert answer.code == 2
        assert f"is being written by process {os.getpid()}" in answer.err
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_second_train_in_one_out_dir_exits_with_2_and_changes_nothing(miaobi, prepared, tmp_path):
    run = tmp_path / "run"
    flags = tiny(data=prepared(), out_dir=run, max_iters=100_000, eval_interval=100)
    first = Process(["-m", "miaobi", "train", *flags])
    try:
        give_up = time.monotonic() + 120
        while not (run / "checkpoints" / "last").exists():
            assert first.poll() is None, first.said()
            assert time.monotonic() < give_up
            time.sleep(0.05)
        answer = miaobi("train", *flags)
        assert answer.code == 2
        assert f"process {first.pid} on " in answer.err
        assert first.poll() is None
        read = miaobi("train", *flags, "--eval_only=True", "--json")
        assert read.code == 0, read.err
    finally:
        first.send_signal(signal.SIGTERM)
        code = first.wait(timeout=60).returncode
    assert code == 143
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert Path(run / "checkpoints" / "last" / "train_state" / "optimizer-0-of-1.safetensors").is_file()
