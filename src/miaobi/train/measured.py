"""How a step is computed, chosen by timing it on the machine: precision and attention.

What was taken is written into the run (`Progress.computed`), and a resumed run keeps it: another choice would give
other roundings. It is remembered per machine and shape too: a run that is killed before its first checkpoint starts
again in the same way.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from miaobi.cache import private_cache
from miaobi.console import warn
from miaobi.device import cpu_flags, peak_memory
from miaobi.train.layout import compile_as, uncompile

PIECES = 400
"""Micro-batches of a run from which on eager steps are compared: that takes as long as about ten of them."""
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
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
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


def choose_eager(work: Work, dtypes: list[str]) -> Computed:
    """Precision and attention by timing eager passes on a CPU.

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
    best = replace(best, why=f"measured, a micro-batch of {len(work.example[0])}: {told(seconds)}")
    remember(work.key(usual), "eager", best)
    return best


def kept_by_explicit(work: Work) -> int:
    """Bytes of attention probabilities that explicit attention keeps for the backward pass."""
    rows, length = work.example[0].shape
    cfg = work.objective.model.cfg
    return 4 * rows * cfg.n_head * length * length * (1 if work.objective.model.recompute else cfg.n_layer)


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
    """What was remembered: `eager`, the fields of `Computed`; {} where nothing can be read."""
    try:
        found = json.loads(memory_file(key).read_text(encoding="utf-8"))
        return {name: asdict(checked(found[name])) for name in ("eager",) if name in found}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def checked(fields: dict[str, Any]) -> Computed:
    """Fields from a file as `Computed`. Raises ValueError or TypeError for any that it cannot be."""
    way = Computed(**fields)
    if way.dtype not in ("float32", "bfloat16", "float16") or way.compiled not in ("", "blocks", "whole"):
        raise ValueError(f"{way} is not known")
    if not isinstance(way.explicit, bool):
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
