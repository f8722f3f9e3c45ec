"""Gives cores to other programs that need them, by using fewer threads.

libgomp's threads wait for each other by spinning. If another program takes one of their cores, all others spin until
the one that lost it is scheduled again. Less spinning would cost up to a third on an idle machine (docs/lab-notes.md),
so only the number of threads is changed, and only for as long as needed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from miaobi.console import log

CHECK_SECONDS = 5.0
"""Least seconds between two checks."""
BUSY = 0.6
"""A core counts as taken if others use this share of it, and as free again below half of that."""


class Threads:
    """Uses one thread less for each core that other programs keep busy, and takes it back afterwards.

    With another number of threads sums round differently. So the change is logged, and OMP_NUM_THREADS switches it off:
    such runs end in the same bits whatever else the machine does.
    """

    def __init__(self, alone: bool = True) -> None:
        """alone: whether this run has no other process on the machine; those would count as other programs."""
        self.most = torch.get_num_threads()
        self.adapts = alone and self.most > 1 and "OMP_NUM_THREADS" not in os.environ and cpu_seconds() is not None
        self.others = OtherPrograms()
        self.readings: list[float] = []

    def check(self) -> None:
        """Called after every step; changes the number of threads when two readings in a row agree."""
        if not self.adapts or self.others.seconds() < CHECK_SECONDS:
            return
        self.readings = [*self.readings[-1:], self.others.cores()]
        self.others = OtherPrograms()
        self.decide()

    def decide(self) -> None:
        """Change the number of threads if the last two readings agree."""
        if len(self.readings) < 2:
            return
        now = torch.get_num_threads()
        fewest, highest = min(self.readings), max(self.readings)
        if fewest > BUSY and now == self.most:
            cores = max(1, min(self.most - 1, self.most - round(fewest)))
            torch.set_num_threads(cores)
            log(f"other programs take {fewest:.1f} cores: going on with {cores} of {self.most} threads (results "
                "round differently; OMP_NUM_THREADS fixes the number of threads)")  # fmt: skip
        elif highest < BUSY / 2 and now < self.most:
            torch.set_num_threads(self.most)
            log(f"the other programs are done: going on with {self.most} threads")

    def close(self) -> None:
        """Restore the number of threads."""
        if self.adapts:
            torch.set_num_threads(self.most)


class OtherPrograms:
    """CPU time of other programs, from now on."""

    def __init__(self) -> None:
        self.began = _counters()

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began[0]

    def cores(self) -> float:
        """Average number of this process's cores that other programs kept busy; 0 if the system does not say, or if the
        time was too short for its clock (hundredths of a second).
        """
        spent, total, own = (b - a for a, b in zip(self.began, _counters(), strict=True))
        return (total - own) / spent if total and spent > 0.2 else 0.0


def _counters() -> tuple[float, float, float]:
    return time.monotonic(), cpu_seconds() or 0.0, own_seconds()


def cpu_seconds() -> float | None:
    """CPU seconds of all programs on the cores of this process since boot; None if the system does not say (only Linux
    does), or if the process may not use all cores.
    """
    try:
        lines = Path("/proc/stat").read_text(encoding="ascii").splitlines()
        cores = os.sched_getaffinity(0)
    except (OSError, AttributeError):
        return None
    spent = 0
    for line in lines:
        name, *ticks = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
            spent += sum(map(int, ticks[:3]))  # user, nice, system
    return spent / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU seconds of this process and its finished children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
