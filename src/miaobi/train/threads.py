"""Threads that leave a core to the program that wants it.

libgomp's threads wait for each other by spinning. Where another program takes one of their cores, the others spin
while the one that lost it waits for its turn. Spinning less costs a quiet machine up to a third (docs/lab-notes.md), so
that only the number of threads is changed, and only for as long.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from miaobi.console import log

LOOK = 5.0
"""Seconds between looks, at least."""
TAKEN = 0.6
"""Share of a core that others take when it counts as lost; with half as much it counts as free again."""


class Threads:
    """Gives up a thread for each core that other programs keep busy, and takes it back.

    Sums of fewer threads are rounded otherwise, so this is said, and does not happen where OMP_NUM_THREADS says how
    many there shall be: such runs end in the same bits whatever else the machine does.
    """

    def __init__(self, alone: bool = True) -> None:
        """alone: no other processes of this run, which are no strangers."""
        self.most = torch.get_num_threads()
        self.adapts = alone and self.most > 1 and "OMP_NUM_THREADS" not in os.environ and cpu_seconds() is not None
        self.others = Others()
        self.looks: list[float] = []

    def look(self) -> None:
        """Called after every step: twice in a row the same answer changes the number of threads."""
        if not self.adapts or self.others.seconds() < LOOK:
            return
        self.looks = [*self.looks[-1:], self.others.cores()]
        self.others = Others()
        self.decide()

    def decide(self) -> None:
        """Change the number of threads, where the last two looks agree."""
        if len(self.looks) < 2:
            return
        now = torch.get_num_threads()
        fewest, highest = min(self.looks), max(self.looks)
        if fewest > TAKEN and now == self.most:
            cores = max(1, min(self.most - 1, self.most - round(fewest)))
            torch.set_num_threads(cores)
            log(f"other programs take {fewest:.1f} cores: going on with {cores} of {self.most} threads (results are "
                "rounded otherwise; OMP_NUM_THREADS fixes their number)")  # fmt: skip
        elif highest < TAKEN / 2 and now < self.most:
            torch.set_num_threads(self.most)
            log(f"the other programs are done: going on with {self.most} threads")

    def close(self) -> None:
        """As many threads as before the run."""
        if self.adapts:
            torch.set_num_threads(self.most)


class Others:
    """What other programs compute from now on."""

    def __init__(self) -> None:
        self.began = _counters()

    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began[0]

    def cores(self) -> float:
        """Cores that they have kept busy since then, of those of this process; 0 where the system does not say, and
        where its clock (hundredths of a second) is too coarse for so short a time.
        """
        spent, total, own = (b - a for a, b in zip(self.began, _counters(), strict=True))
        return (total - own) / spent if total and spent > 0.2 else 0.0


def _counters() -> tuple[float, float, float]:
    return time.monotonic(), cpu_seconds() or 0.0, own_seconds()


def cpu_seconds() -> float | None:
    """Seconds that all programs have computed on the cores of this process since the system began; None where it does
    not say (elsewhere than on Linux), or where the process may not use all cores.
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
    """Seconds that this process and its finished children have computed."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
