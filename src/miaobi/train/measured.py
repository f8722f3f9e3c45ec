"""Autotuning of a step: precision, attention, micro-batch size and compilation are chosen by timing them.

The choice is saved in the run (`Progress.computed`), and a resumed run keeps it, because another one would round
differently. It is also cached per machine and model shape, so that a run that is killed before its first checkpoint
starts again in the same way.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from miaobi.cache import private_cache
from miaobi.console import log, warn
from miaobi.device import peak_memory, reset_peak_memory
from miaobi.model import cpu_attention
from miaobi.model.transformer import head_dim
from miaobi.train import compile_time
from miaobi.train.compile_time import machine_facts, short_digest, write_cache
from miaobi.train.layout import EAGER, WITHOUT, Objective, compile_as, compiled_parts, use_compiled
from miaobi.train.threads import OtherPrograms
from miaobi.train.watch import duration

MIN_MICRO_BATCHES = 400
"""Modes are only timed in runs of this many micro-batches: timing the eager ones takes about ten."""
EXTRA_MEMORY = 0.15
"""Share of a step's memory that explicit attention or a larger micro-batch may add."""
MAX_ENLARGEMENT = 4
"""Largest micro-batch that is tried, in multiples of the usual one, as far as EXTRA_MEMORY allows."""
MIN_SPEEDUP = 1.03
"""A mode must be this many times faster than the best one before it in the list: less is noise."""
ROUNDS = 4
BUSY_CORES = 0.3
"""If other programs use this many cores meanwhile, the timings are not cached."""
TRIAL_SHARE = 0.03
"""Share of a run's time that trying compiled modes may take."""


@dataclass(frozen=True)
class ExecutionMode:
    """How the steps of a run are computed."""

    dtype: str
    """Precision of the matrix products, torch's name."""
    explicit: bool = False
    """Attention as two products and a softmax, instead of by torch's fused kernel."""
    tiled: bool = False
    """Attention by our own kernel for CPUs (`model/cpu_attention.py`)."""
    compiled: str = ""
    """torch.compile over the `blocks` or the `whole` objective; empty = eager."""
    autotuned: bool = False
    """Compiled with max_autotune: products fused with what follows them, where that is faster."""
    micro: int = 0
    """Sequences at once; 0 = as many as `recipe.micro_batch` says."""
    plain_mask: bool = False
    """Compiled, but documents are told apart by a matrix: FlexAttention does not work on this card."""
    seconds: float = 0.0
    """Measured time of a forward and backward pass, per sequence; 0 = not measured."""
    why: str = "not measured: the run is short"

    @property
    def attention(self) -> str:
        """As `Transformer.use_attention` calls it."""
        return "tiled" if self.tiled else "explicit" if self.explicit else "fused"

    def __str__(self) -> str:
        how = f"compiled ({self.compiled}{', max_autotune' if self.autotuned else ''})" if self.compiled else "eager"
        how += " without FlexAttention" * self.plain_mask
        return f"{self.dtype}, {self.attention} attention, {how}{f', {self.micro} at once' if self.micro else ''}"


@dataclass(frozen=True)
class Workload:
    """What a run computes, and how often."""

    objective: Objective
    example: Callable[[int, bool], tuple]
    """(sequences, whether documents are told apart by FlexAttention's mask) -> arguments of the objective."""
    device: torch.device
    steps: int
    """Left in this run."""
    rows: int
    """Sequences of a step on this rank."""
    micro: int
    """Sequences at once, as `recipe.micro_batch` says."""
    is_fixed: bool = False
    """Whether the user set `micro`."""
    flex: bool = False
    """Whether compiled modes may use FlexAttention, and there are documents to tell apart."""
    ready: dict[ExecutionMode, tuple] = field(default_factory=dict)
    """Modes that are compiled already -> their `compiled_parts`."""
    others: list[float] = field(default_factory=list)
    """Cores that other programs used during each timing."""

    def apply(self, mode: ExecutionMode) -> ExecutionMode | None:
        """Compute in `mode` from now on. Returns it, without FlexAttention if that fails. If the compiler fails: a
        warning, None, and nothing changes.
        """
        if mode.compiled and any(known.plain_mask for known in self.ready):  # it has failed before
            mode = replace(mode, plain_mask=True)
        if mode.tiled and not tiled_fits(self):
            warn("this run began with miaobi's own attention kernel, which needs a C++ compiler; it continues with "
                 "torch's, which rounds differently")  # fmt: skip
            mode = replace(mode, tiled=False)
        self.objective.model.use_attention(mode.attention)
        known = replace(mode, seconds=0.0, why="")
        if not mode.compiled:
            use_compiled(self.objective, EAGER)
        elif known in self.ready:
            use_compiled(self.objective, self.ready[known])
        else:
            log(f"compiling now, which takes about {compiling_seconds(self, mode):.0f} s: {mode.why}")
            started, flex = time.perf_counter(), self.flex and not mode.plain_mask
            instead = "trying without FlexAttention" if flex else WITHOUT
            if not compile_as(self.objective, mode.compiled, mode.autotuned, lambda: self.time_pass(mode), instead):
                return self.apply(replace(mode, plain_mask=True)) if flex else None
            kind, times = compiling_kind(self, mode)
            compile_time.remember(self.device, kind, (time.perf_counter() - started) / times)
            self.ready[known] = compiled_parts(self.objective)
        return mode

    def time_pass(self, mode: ExecutionMode) -> float:
        """Seconds per sequence of a forward and backward pass. Gradients are cleared and random states restored;
        attention and compilation are as `apply` has set them.
        """
        dtype = getattr(torch, mode.dtype)
        example = self.example(mode.micro or self.micro, self.flex and bool(mode.compiled) and not mode.plain_mask)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self.wait()
            started = time.perf_counter()
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = self.objective(*example)
            loss.backward()
            self.wait()
            took = time.perf_counter() - started
        self.objective.model.zero_grad(set_to_none=True)
        return took / len(example[0])

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time_mode(self, mode: ExecutionMode) -> float:
        """`apply` the mode, which is eager or compiled already, and time it with `time_pass`."""
        self.apply(mode)
        return self.time_pass(mode)

    def key(self, mode: ExecutionMode) -> str:
        """Cache key: machine, threads, versions, and everything else that the speed depends on."""
        model, (ids, _, _, mask) = self.objective.model, self.example(self.micro, False)
        return short_digest(
            *machine_facts(self.device), asdict(model.cfg), model.recompute, mode.dtype, tuple(ids.shape),
            None if mask is None else tuple(mask.shape), self.rows, self.is_fixed,
            [tuple(p.shape) for p in model.parameters()],
        )  # fmt: skip


def compiling_kind(work: Workload, mode: ExecutionMode) -> tuple[str, int]:
    """Kind of a compiled mode in `compile_time`, and the factor on its seconds for the depth of the model."""
    if mode.compiled == "blocks":
        return "blocks", 1
    return "autotuned" if mode.autotuned else "whole", math.ceil(len(work.objective.model.blocks) / 6)


def compiling_seconds(work: Workload, mode: ExecutionMode) -> float:
    """Estimated seconds to compile the mode."""
    kind, times = compiling_kind(work, mode)
    return times * compile_time.expected_seconds(work.device, kind)


def least_seconds(modes: dict[ExecutionMode, Callable[[], float]]) -> dict[ExecutionMode, float]:
    """Shortest time of each mode, in seconds: disturbances only add time. The modes take turns; the first round is a
    warm-up.
    """
    turns: dict[ExecutionMode, list[float]] = {mode: [] for mode in modes}
    for number in range(ROUNDS + 1):
        for mode, once in modes.items():
            took = once()
            if number:
                turns[mode].append(took)
    return {mode: min(times) for mode, times in turns.items()}


def fastest(seconds: dict[ExecutionMode, float]) -> ExecutionMode:
    """The first mode, or a later one that is faster by MIN_SPEEDUP."""
    best = next(iter(seconds))
    for mode, took in seconds.items():
        if took * MIN_SPEEDUP < seconds[best]:
            best = mode
    return best


def time_modes(work: Workload, modes: list[ExecutionMode], before: str = "") -> ExecutionMode:
    """The fastest of modes that are eager or compiled already, with its time and the reason for the choice.

    before: the reason so far.
    """
    others = OtherPrograms()
    seconds = least_seconds({mode: lambda mode=mode: work.time_mode(mode) for mode in modes})
    work.others.append(others.cores())
    best = fastest(seconds)
    times = "; ".join(f"{mode}: {1000 * took:.3g} ms" for mode, took in seconds.items())
    return replace(best, seconds=seconds[best], why=f"{before or 'measured, a sequence each'}; {times}")


def choose(work: Workload, dtypes: list[str], compiles: bool, why: str) -> ExecutionMode:
    """The fastest mode for a run of MIN_MICRO_BATCHES micro-batches or more; for a shorter run the usual one, untimed.

    dtypes: precisions to try, the usual one first. compiles: whether to try compiled modes, as many as pay off in a run
    of this length. why: the reason to compile the blocks in any case; "" = there is none.
    """
    usual = ExecutionMode(dtypes[0])
    if not is_long(work):
        return usual
    key = work.key(usual)
    best = usual
    if work.device.type == "cpu":
        best = remembered(key).get("eager") or remember_if_undisturbed(work, key, "eager", choose_eager(work, dtypes))
    if not compiles:
        return best
    name = f"compiled for {work.steps} steps{', blocks anyway' if why else ''}"
    return remembered(key).get(name) or remember_if_undisturbed(
        work, key, name, choose_compiled(work, best, dtypes[0], why)
    )


def is_long(work: Workload) -> bool:
    """Whether the run is so long that the time for timing does not matter."""
    return work.steps * math.ceil(work.rows / work.micro) >= MIN_MICRO_BATCHES


def choose_eager(work: Workload, dtypes: list[str]) -> ExecutionMode:
    """Precision, attention and micro-batch size, by timing eager passes on a CPU."""
    usual = ExecutionMode(dtypes[0])
    work.apply(usual)
    reset_peak_memory(work.device)
    held = peak_memory(work.device)
    work.time_pass(usual)
    peak = peak_memory(work.device)
    modes = [ExecutionMode(dtype) for dtype in dtypes]
    if explicit_fits(work):
        modes += [replace(mode, explicit=True) for mode in modes]
    if "float32" in dtypes and tiled_fits(work):
        modes.append(ExecutionMode("float32", tiled=True))
    best = time_modes(work, modes)
    more = larger_micro_batch(work, EXTRA_MEMORY * peak / max(1, peak - held))
    return time_modes(work, [best, replace(best, micro=more)], best.why) if more else best


def larger_micro_batch(work: Workload, room: float) -> int:
    """A larger micro-batch, up to MAX_ENLARGEMENT times the usual one, whose activations take at most 1 + `room` times
    the memory.

    The micro-batches of a step stay about equal; 0 if there would be no fewer of them.
    """
    if work.is_fixed or work.device.type != "cpu":
        return 0
    pieces = math.ceil(work.rows / max(1, math.floor(work.micro * min(MAX_ENLARGEMENT, 1 + room))))
    return math.ceil(work.rows / pieces) if pieces < math.ceil(work.rows / work.micro) else 0


def tiled_fits(work: Workload) -> bool:
    """Whether miaobi's own kernel supports this attention: on a CPU, without dropout and without a mask."""
    model, (_, _, _, mask) = work.objective.model, work.example(work.micro, False)
    is_plain = work.device.type == "cpu" and mask is None and model.cfg.dropout == 0.0
    return is_plain and cpu_attention.is_ready(head_dim(model.cfg))


def explicit_fits(work: Workload) -> bool:
    """Whether the attention probabilities, which explicit attention keeps for the backward pass, are small compared
    with the peak memory so far.
    """
    rows, length = work.example(work.micro, False)[0].shape
    cfg = work.objective.model.cfg
    kept = 4 * rows * cfg.n_head * length * length * (1 if work.objective.model.recompute else cfg.n_layer)
    return kept <= EXTRA_MEMORY * peak_memory(work.device)


def choose_compiled(work: Workload, best: ExecutionMode, usual: str, why: str) -> ExecutionMode:
    """`best`, or a faster compiled mode: they are tried in turn for as long as that pays off in a run of this length.

    The usual precision and explicit attention may be faster when compiled, even if they were slower in eager mode.
    """
    run_seconds = work.steps * work.rows * best.seconds
    tried = why or f"a run of {duration(run_seconds)} is long enough to try whether that is faster"
    tiled = best.tiled and usual == "float32"
    plain = replace(best, dtype=usual, tiled=tiled, compiled="blocks", seconds=0.0, why=tried)
    whole = replace(plain, compiled="whole")
    spent = 0.0
    other = replace(whole, explicit=not plain.explicit, tiled=False)
    for mode in (plain, whole, other, replace(whole, autotuned=True)):
        spent += compiling_seconds(work, mode)
        if spent > TRIAL_SHARE * run_seconds and not (why and mode.compiled == "blocks"):
            break
        if mode.explicit and not plain.explicit and (work.device.type != "cpu" or not explicit_fits(work)):
            continue
        if mode.autotuned:
            mode = replace(mode, explicit=best.explicit, tiled=best.tiled)
        if (mode := work.apply(mode)) is None:
            break
        # On a GPU eager attention over packed documents would fill the memory, so it is not timed there.
        candidates = [mode] if work.device.type == "cuda" and not best.compiled else [best, mode]
        best = time_modes(work, candidates, best.why if best.seconds else "")
    return best


def remembered(key: str) -> dict[str, ExecutionMode]:
    """Cached choices for a shape, by name; {} if there are none that can be read."""
    try:
        stored = json.loads(cache_file(key).read_text(encoding="utf-8"))
        return {name: checked(fields) for name, fields in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def remember_if_undisturbed(work: Workload, key: str, name: str, mode: ExecutionMode) -> ExecutionMode:
    """`remember` the mode, unless other programs disturbed its timing. Returns it."""
    cores = max(work.others, default=0.0)
    if cores < BUSY_CORES:
        remember(key, name, mode)
    else:
        log(f"other programs took {cores:.1f} cores while this was timed: the next run of this shape times it again")
    return mode


def remember(key: str, name: str, mode: ExecutionMode) -> None:
    """Cache a choice for the next run of this shape."""
    known = {each: asdict(other) for each, other in remembered(key).items()}
    write_cache(cache_file(key), known | {name: asdict(mode)})


def cache_file(key: str) -> Path:
    """Where this machine's choices for a shape are cached."""
    return private_cache() / f"computed-{key}.json"


def checked(fields: dict[str, Any]) -> ExecutionMode:
    """Fields read from a file as `ExecutionMode`. Raises ValueError or TypeError for values that are not valid."""
    mode = ExecutionMode(**fields)
    flags = all(isinstance(flag, bool) for flag in (mode.explicit, mode.tiled, mode.autotuned, mode.plain_mask))
    is_count = type(mode.micro) is int and mode.micro >= 0
    is_time = isinstance(mode.seconds, int | float) and 0 <= mode.seconds < math.inf
    if not (flags and is_count and is_time and isinstance(mode.why, str)):
        raise TypeError(f"{mode} is not known")
    if mode.dtype not in ("float32", "bfloat16", "float16") or mode.compiled not in ("", "blocks", "whole"):
        raise ValueError(f"{mode} is not known")
    return mode
