"""Worker processes that are interrupted, and those whose main process is gone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORK = """
import signal, sys
from pathlib import Path
from miaobi.corpus.workers import Workers

signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background of a shell have it ignored

def work(_, number, *, large=bytes(50 << 20)):
    Path(sys.argv[1], f"{number}.pid").write_text(str(__import__("os").getpid()))
    return large  # which takes a while to come back

with Workers(2).started() as run:
    for _ in run(work, ((number,) for number in range(1000))):
        pass
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


@pytest.fixture
def working(tmp_path):
    """A main process, in a group of its own, whose workers are sending results."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(tmp_path)], start_new_session=True, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) > 8)
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def wait_for(happened) -> None:
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)


def is_running(process: int) -> bool:
    """Zombies, which wait for somebody to ask how they ended, run no more."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("_", range(3))
def test_ctrl_c_is_the_main_process_s(working, _):
    """A worker that it met in the middle of a result (3 times of 4) left the main process reading for ever."""
    os.killpg(working.pid, signal.SIGINT)
    _, told = working.communicate(timeout=60)
    assert told.count("Traceback") == 1  # its own
    assert told.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_with_the_main_process(working, tmp_path):
    workers = {int(text) for file in tmp_path.glob("*.pid") if (text := file.read_text())}
    assert len(workers) == 2
    working.kill()
    wait_for(lambda: not any(map(is_running, workers)))
