"""A thread is given up while another program takes a core, and only then."""

import os
import subprocess
import sys
import time

import pytest
import torch

from miaobi.train import threads as module
from miaobi.train.threads import Threads, cpu_seconds, own_seconds

pytestmark = pytest.mark.skipif(cpu_seconds() is None, reason="the system does not say what other programs take")


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_core_that_others_take_costs_a_thread_until_they_are_done(capsys):
    threads = Threads()
    seen = []
    for taken in (0.1, 0.9, 0.2, 0.9, 1.0, 0.9, 0.4, 0.1, 0.1, 0.0):
        threads.readings = [*threads.readings[-1:], taken]
        threads.decide()
        seen.append(torch.get_num_threads())
    assert seen == [2, 2, 2, 2, 1, 1, 1, 1, 2, 2]  # one look alone changes nothing
    assert len(capsys.readouterr().err.splitlines()) >= 2
    threads.readings = [5.0, 5.0]
    threads.decide()
    assert torch.get_num_threads() == 1  # one always works
    threads.close()
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_program_that_computes_is_seen_and_this_one_is_not(monkeypatch):
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.0)
    threads = Threads()
    total, own = cpu_seconds(), own_seconds()
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    until = time.monotonic() + 3
    while time.monotonic() < until:
        pass
    threads.check()
    others, mine = cpu_seconds() - total - (own_seconds() - own), own_seconds() - own
    loop.kill()
    loop.wait()
    assert others > 0.3  # of 3 seconds, on a machine that may be full
    assert mine > 0.2
    assert threads.readings[0] == pytest.approx(others / 3, abs=0.3)


@pytest.mark.usefixtures("two_threads")
def test_a_number_of_threads_that_was_given_stays(monkeypatch):
    monkeypatch.setattr(module, "CHECK_SECONDS", 0.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    for threads in (Threads(), Threads(alone=False)):
        assert not threads.adapts
        threads.check()
        assert torch.get_num_threads() == 2
    del os.environ["OMP_NUM_THREADS"]
    assert not Threads(alone=False).adapts
    assert Threads().adapts
