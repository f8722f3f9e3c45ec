"""How a step is computed, chosen by timing it on the machine: precision, attention, compilation.

What was taken is written into the run (`Progress.computed`), and a resumed run keeps it: another choice would give
other roundings. It is remembered per machine and shape too: a run that is killed before its first checkpoint starts
again in the same way.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from miaobi.cache import private_cache
from miaobi.console import log, warn
from miaobi.device import can_compile, cpu_flags, peak_memory
from miaobi.train.layout import compile_as, uncompile

PIECES = 400
"""Micro-batches of a run from which on eager steps are compared: that takes as long as about ten of them."""
COMPILE_PAYS = 240.0
"""Seconds that the rest of a run must take, uncompiled, for compilation to be tried beside it."""
BACKGROUND = 90.0
"""Seconds of eager steps before the switch: about what the compilers take on a core they share."""
WHOLE_LAYERS = 16
"""Deeper models are compiled block by block: tracing the whole of them takes minutes."""
KEPT_SHARE = 0.15
"""Of the memory of a step: as much as the probabilities of explicit attention may add to it."""
GAIN = 1.03
"""A way must be this much faster than the one before it in the list: less is noise."""
ROUNDS = 3


@dataclass(frozen=True)
class Computed:
    """How the steps of a run are computed."""

    dtype: str
    """Precision of the matrix products, torch's name."""
    explicit: bool = False
    """Attention as two products and a softmax, instead of by torch's fused kernel."""
    compiled: str = ""
    """torch.compile over the `blocks` or the `whole` objective; empty = eager."""
    switch: int | None = None
    """Step before which compilation is decided and, if it wins, begins; None = it is settled already."""
    why: str = "not measured: the run is short"

    def __str__(self) -> str:
        attention = "explicit" if self.explicit else "fused"
        return f"{self.dtype}, {attention} attention, {f'compiled ({self.compiled})' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Work:
    """What is to be computed how often. `example` are the arguments of the objective for one micro-batch."""

    objective: nn.Module
    example: tuple
    device: torch.device
    steps: int
    """Left in this run."""
    pieces: int
    """Micro-batches of a step."""

    def once(self, way: Computed) -> float:
        """Seconds of one forward and backward pass. Gradients and random states are left as they were found."""
        dtype = getattr(torch, way.dtype)
        model = self.objective.model
        model.use_explicit_attention(way.explicit)
        with torch.random.fork_rng(devices=[]):
            started = time.perf_counter()
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = self.objective(*self.example)
            loss.backward()
            took = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
        return took

    def key(self, way: Computed) -> str:
        """Of this machine, its threads and versions, and everything that the speed depends on."""
        model = self.objective.model
        mask = self.example[3]
        told = (
            cpu_flags(), torch.__version__, torch.get_num_threads(), asdict(model.cfg), model.recompute, way.dtype,
            tuple(self.example[0].shape), None if mask is None else tuple(mask.shape), self.pieces,
            [tuple(p.shape) for p in model.parameters()],
        )  # fmt: skip
        return hashlib.sha256(repr(told).encode()).hexdigest()[:24]


def compare(ways: dict[Computed, Callable[[], float]]) -> dict[Computed, float]:
    """Median seconds of each way, which take turns; one turn before does not count."""
    turns: dict[Computed, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        for way, once in ways.items():
            took = once()
            if number:
                turns[way].append(took)
    return {way: statistics.median(each) for way, each in turns.items()}


def fastest(seconds: dict[Computed, float]) -> Computed:
    """The first of the ways, unless a later one is faster by GAIN."""
    best = next(iter(seconds))
    for way, took in seconds.items():
        if took * GAIN < seconds[best]:
            best = way
    return best


def told(seconds: dict[Computed, float]) -> str:
    """Milliseconds of a micro-batch, each way."""
    return "; ".join(f"{way}: {1000 * took:.0f} ms" for way, took in seconds.items())


def choose_eager(work: Work, dtypes: list[str], compile_too: bool) -> Computed:
    """Precision and attention by timing eager passes on a CPU, and when to decide about compilation.

    dtypes: the usual one first. Only for runs of some length: `Computed()` of the first else.
    """
    usual = Computed(dtypes[0])
    if work.device.type != "cpu" or work.steps * work.pieces < PIECES:
        return usual
    known = recall(work.key(usual))
    if "eager" in known:
        return Computed(**known["eager"])
    work.once(usual)
    ways = [Computed(dtype) for dtype in dtypes]
    if kept_by_explicit(work) <= KEPT_SHARE * peak_memory(work.device):
        ways += [replace(way, explicit=True) for way in ways]
    seconds = compare({way: lambda way=way: work.once(way) for way in ways})
    best = fastest(seconds)
    left = seconds[best] * work.pieces * work.steps
    if compile_too and left >= COMPILE_PAYS and can_compile(work.device):
        soon = math.ceil(BACKGROUND / (seconds[best] * work.pieces))
        best = replace(best, switch=max(1, min(soon, work.steps // 3)))
    best = replace(best, why=f"measured, a micro-batch of {len(work.example[0])}: {told(seconds)}")
    remember(work.key(usual), "eager", best)
    return best


def kept_by_explicit(work: Work) -> int:
    """Bytes of attention probabilities that explicit attention keeps for the backward pass."""
    rows, length = work.example[0].shape
    cfg = work.objective.model.cfg
    return 4 * rows * cfg.n_head * length * length * (1 if work.objective.model.recompute else cfg.n_layer)


def compiled_ways(work: Work, now: Computed) -> list[Computed]:
    """What to compare with the eager way that is in use."""
    ways = [replace(now, compiled="blocks", switch=None)]
    if work.objective.model.cfg.n_layer <= WHOLE_LAYERS:
        ways.append(replace(now, compiled="whole", switch=None))
    return ways


def compile_beside(work: Work, now: Computed) -> subprocess.Popen | None:
    """Start to compile in another process, which leaves the results in torch's cache on the disk; None if known."""
    known = recall(work.key(replace(now, explicit=False)))
    ways = [Computed(**known["compiled"])] if "compiled" in known else compiled_ways(work, now)
    ways = [way for way in ways if way.compiled]
    if not ways:
        return None
    _, _, positions, mask = work.example
    job = {
        "model": asdict(work.objective.model.cfg), "recompute": work.objective.model.recompute,
        "rows": len(work.example[0]), "positions": positions is not None,
        "mask": mask is not None, "threads": torch.get_num_threads(), "ways": [asdict(way) for way in ways],
    }  # fmt: skip
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-m", "miaobi.train.precompile", json.dumps(job)], **nowhere)


def choose_compiled(work: Work, now: Computed, beside: subprocess.Popen | None) -> Computed:
    """Compile each way, from the cache that `beside` has filled, and keep the fastest; the eager one if none wins."""
    usual = replace(now, explicit=False)
    known = recall(work.key(usual))
    eager = replace(now, switch=None)
    if beside is not None:
        beside.wait()
    if "compiled" in known:
        settled = replace(Computed(**known["compiled"]), dtype=now.dtype, explicit=now.explicit)
        return settled if apply(work, settled) else replace(eager, why="torch.compile failed")
    seconds, started = {}, time.perf_counter()
    for way in [eager, *compiled_ways(work, now)]:
        if apply(work, way):
            seconds |= compare({way: lambda way=way: work.once(way)})
    best = fastest(seconds)
    best = replace(best, why=f"{now.why}; {told(seconds)}")
    apply(work, best)
    log(f"compared compiled steps in {time.perf_counter() - started:.0f} s; from here on: {best}")
    remember(work.key(usual), "compiled", best)
    return best


def apply(work: Work, way: Computed) -> bool:
    """Compute as `way` says from now on; where the compiler fails: eager, a line of warning, and False."""
    work.objective.model.use_explicit_attention(way.explicit)
    uncompile(work.objective)
    if not way.compiled:
        return True
    return compile_as(work.objective, way.compiled, lambda: work.once(way))


def memory_file(key: str) -> Path:
    """Where this machine's choices for a shape are kept."""
    return private_cache() / f"computed-{key}.json"


def recall(key: str) -> dict[str, Any]:
    """What was remembered: `eager` and `compiled`, each as the fields of `Computed`; {} where nothing can be read."""
    try:
        found = json.loads(memory_file(key).read_text(encoding="utf-8"))
        return {name: asdict(checked(found[name])) for name in ("eager", "compiled") if name in found}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def checked(fields: dict[str, Any]) -> Computed:
    """Fields from a file as `Computed`. Raises ValueError or TypeError for any that it cannot be."""
    way = Computed(**fields)
    if way.dtype not in ("float32", "bfloat16", "float16") or way.compiled not in ("", "blocks", "whole"):
        raise ValueError(f"{way} is not known")
    if not isinstance(way.explicit, bool) or not (way.switch is None or isinstance(way.switch, int)):
        raise TypeError(f"{way} is not known")
    return replace(way, why=str(way.why))


def remember(key: str, name: str, way: Computed) -> None:
    """Keep a choice for the next run of this shape; a home that cannot be written forgets."""
    file = memory_file(key)
    try:
        aside = file.with_name(f".{file.name}.{os.getpid()}")
        aside.write_text(json.dumps(recall(key) | {name: asdict(way)}), encoding="utf-8")
        os.replace(aside, file)
    except OSError as e:
        warn(f"{file} cannot be written ({e.strerror}); the next run measures again")
