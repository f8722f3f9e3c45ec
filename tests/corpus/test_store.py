"""What a killed `prepare` leaves, and what the next one makes of it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import sports_text

from miaobi.corpus import store
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.corpus.prepared import PreparedData
from miaobi.errors import UserError
from miaobi.lock import this_process

TEXT = "\n\n".join(f"第{i}场，皇马赢了曼联" for i in range(100))
OTHER = TEXT.replace("皇马", "巴萨")
# The process is killed where it is about to rename for the nth time, from when the new data is complete.
KILLED = """
import os, pathlib, sys
from miaobi.corpus import store
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare

commit, replace, left = store.PreparedWriter.commit, os.replace, int(sys.argv[3])

def counted(*names):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    replace(*names)

def last_step(*args):
    os.replace = counted
    commit(*args)

store.PreparedWriter.commit = last_step
prepare([sys.argv[1]], PrepareConfig(out=pathlib.Path(sys.argv[2])))
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


def killed(source: Path, out: Path, after: int) -> bool:
    code = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out), str(after)], check=False).returncode
    assert code in (-9, 0)
    return code != 0


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.fixture
def home(tmp_path) -> Path:
    """A directory with a text, the data made of it, and what the next text should become."""
    (tmp_path / "old.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "new.txt").write_text(OTHER, encoding="utf-8")
    prepare([str(tmp_path / "old.txt")], PrepareConfig(out=tmp_path / "out"))
    prepare([str(tmp_path / "new.txt")], PrepareConfig(out=tmp_path / "expected"))
    return tmp_path


@pytest.mark.parametrize("after", [0, 1])
def test_killed_while_directories_change_places(home, after):
    old = contents(home / "out")
    assert killed(home / "new.txt", home / "out", after)
    assert len([path for path in home.iterdir() if path.name.startswith(".out")]) >= 2
    store.clear_leftovers(home / "out")
    assert contents(home / "out") == old
    prepare([str(home / "new.txt")], PrepareConfig(out=home / "out"))
    assert contents(home / "out") == contents(home / "expected")
    assert not [path for path in home.iterdir() if path.name.startswith(".")]


def test_killed_while_files_move_beside_the_text(home):
    """At no moment is there data that looks whole, nor files that the next run takes for somebody else's."""
    out, after = home / "data", 0
    out.mkdir()
    shutil.copy(home / "new.txt", out / "input.txt")
    while killed(out / "input.txt", out, after):
        after += 1
        with pytest.raises(UserError, match=r"prepare the data again|no manifest"):
            PreparedData.open(out)
    assert after > 6
    assert PreparedData.open(out).fingerprint == PreparedData.open(home / "expected").fingerprint


def test_a_run_that_goes_on_keeps_its_files(tmp_path):
    mine = store._beside(tmp_path / "out", "tmp")
    another = mine.with_name(mine.name.replace(f"-{os.getpid()}", "-x"))
    for directory in (mine, another):
        directory.mkdir()
    store.clear_leftovers(tmp_path / "out")
    assert mine.is_dir()
    assert another.is_dir()


def test_out_is_where_one_stands(home, monkeypatch):
    (home / "here").mkdir()
    shutil.copy(home / "new.txt", home / "here" / "input.txt")
    monkeypatch.chdir(home / "here")
    assert prepare(["input.txt"], PrepareConfig(out=Path()))["out"] == "."
    assert PreparedData.open(home / "here").fingerprint == PreparedData.open(home / "expected").fingerprint
    with pytest.raises(UserError, match="root of a disk"):
        prepare(["input.txt"], PrepareConfig(out=Path("/")))


def test_out_is_a_link(home):
    (home / "disk").mkdir()
    (home / "link").symlink_to("disk")
    for _ in range(2):
        prepare([str(home / "new.txt")], PrepareConfig(out=home / "link"))
        assert contents(home / "disk") == contents(home / "expected")
        assert (home / "link").is_symlink()


def test_two_prepares_do_not_write_one_directory(home):
    before = contents(home / "out")
    with (
        store.one_writer(home / "out"),
        pytest.raises(UserError, match=rf"out is being written by process {os.getpid()} .* choose another --out"),
    ):
        prepare([str(home / "new.txt")], PrepareConfig(out=home / "out"))
    assert contents(home / "out") == before
    dead = subprocess.Popen(["true"])
    dead.wait()
    holder = dataclasses.asdict(this_process()) | {"pid": dead.pid}
    (home / ".out.lock").write_text(json.dumps(holder), encoding="utf-8")
    prepare([str(home / "new.txt")], PrepareConfig(out=home / "out"))
    assert contents(home / "out") == contents(home / "expected")
    assert not list(home.glob(".*"))


def test_a_prepare_that_fails_leaves_no_lock(home):
    (home / "few.txt").write_text("好", encoding="utf-8")
    with pytest.raises(UserError):
        prepare([str(home / "few.txt")], PrepareConfig(out=home / "few"))
    assert sorted(path.name for path in home.iterdir()) == ["expected", "few.txt", "new.txt", "old.txt", "out"]


@pytest.mark.parametrize(("trainer", "is_refused"), [("another", True), ("this process", False), ("dead", False)])
def test_the_data_of_a_run_that_is_going_on_is_not_replaced(trainer: str, is_refused: bool, tmp_path: Path, miaobi):
    pid = {"another": os.getppid(), "this process": os.getpid(), "dead": 1 << 22}[trainer]
    (tmp_path / "input.txt").write_text(sports_text(20), encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    holder = dataclasses.replace(this_process(), pid=pid)
    (run / ".lock").write_text(json.dumps(dataclasses.asdict(holder)), encoding="utf-8")
    answer = miaobi("prepare", tmp_path / "input.txt", "--out", run / "data", "--workers=1")
    assert answer.code == (2 if is_refused else 0), answer.err
    assert (f"{run} is being written by process {pid}" in answer.err) == is_refused
    assert (run / "data").exists() != is_refused
    assert miaobi("prepare", tmp_path / "input.txt", "--out", run / "other", "--workers=1").code == 0
