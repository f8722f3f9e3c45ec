"""How a step is computed, chosen by timing it on the machine: precision, attention, micro-batch, compilation.

What was taken is written into the run (`Progress.computed`), and a resumed run keeps it: another choice would give
other roundings. It is remembered per machine and shape too: a run that is killed before its first checkpoint starts
again in the same way.
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
from miaobi.train.compile_time import digest, machine, store
from miaobi.train.layout import EAGER, WITHOUT, Objective, compile_as, compiled_parts, use_compiled
from miaobi.train.threads import Others
from miaobi.train.watch import duration

PIECES = 400
"""Micro-batches of a run from which on modes are compared: eager ones take as long as about ten of them."""
KEPT_SHARE = 0.15
"""Of the memory of a step: as much as explicit attention or a larger micro-batch may add to it."""
LARGER = 4
"""How many times the usual micro-batch is tried, where that share allows it."""
GAIN = 1.03
"""A mode must be this much faster than the one before it in the list: less is noise."""
ROUNDS = 4
DISTURBED = 0.3
"""Cores taken by others, from which on what was timed beside them is not remembered."""
WORTH = 0.03
"""Share of a run that trying compiled modes may cost."""


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
    """Of one sequence, forward and backward, when it was measured; 0 = it was not."""
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
class Work:
    """What is to be computed how often."""

    objective: Objective
    example: Callable[[int, bool], tuple]
    """Arguments of the objective for so many sequences; whether documents are told apart by FlexAttention's mask."""
    device: torch.device
    steps: int
    """Left in this run."""
    rows: int
    """Sequences of a step on this rank."""
    micro: int
    """Sequences at once, as `recipe.micro_batch` says."""
    bound: bool = False
    """The user says how many."""
    flex: bool = False
    """Compiled modes may use FlexAttention, and have documents to tell apart."""
    ready: dict[ExecutionMode, tuple] = field(default_factory=dict)
    """Ways that are compiled, by their `compiled_parts`."""
    others: list[float] = field(default_factory=list)
    """Cores that other programs took while modes were timed."""

    def set(self, mode: ExecutionMode) -> ExecutionMode | None:
        """Compute in `mode` from now on. Returns it, without FlexAttention where that fails; where the compiler does,
        None, a line of warning, and all is as before.
        """
        if mode.compiled and any(known.plain_mask for known in self.ready):  # it has failed before
            mode = replace(mode, plain_mask=True)
        if mode.tiled and not tiled_fits(self):
            warn("this run's attention was computed by a kernel of ours, which needs a C++ compiler; it goes on with "
                 "torch's, with other roundings")  # fmt: skip
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
            if not compile_as(self.objective, mode.compiled, mode.autotuned, lambda: self.once(mode), instead):
                return self.set(replace(mode, plain_mask=True)) if flex else None
            kind, times = compiling_kind(self, mode)
            compile_time.remember(self.device, kind, (time.perf_counter() - started) / times)
            self.ready[known] = compiled_parts(self.objective)
        return mode

    def once(self, mode: ExecutionMode) -> float:
        """Seconds of a forward and backward pass, for each sequence. Gradients and random states are left as they were
        found; what is compiled, and attention, are as `set` has made them.
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
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, mode: ExecutionMode) -> float:
        """`once` in `mode`, which is eager or compiled already."""
        self.set(mode)
        return self.once(mode)

    def key(self, mode: ExecutionMode) -> str:
        """Of this machine, its threads and versions, and everything that the speed depends on."""
        model, (ids, _, _, mask) = self.objective.model, self.example(self.micro, False)
        return digest(
            *machine(self.device), asdict(model.cfg), model.recompute, mode.dtype, tuple(ids.shape),
            None if mask is None else tuple(mask.shape), self.rows, self.bound,
            [tuple(p.shape) for p in model.parameters()],
        )  # fmt: skip


def compiling_kind(work: Work, mode: ExecutionMode) -> tuple[str, int]:
    """What `compile_time` calls a compiled mode, and how many times its seconds the model takes."""
    if mode.compiled == "blocks":
        return "blocks", 1
    return "autotuned" if mode.autotuned else "whole", math.ceil(len(work.objective.model.blocks) / 6)


def compiling_seconds(work: Work, mode: ExecutionMode) -> float:
    """About what compiling the mode takes before its first step."""
    kind, times = compiling_kind(work, mode)
    return times * compile_time.expected(work.device, kind)


def compare(modes: dict[ExecutionMode, Callable[[], float]]) -> dict[ExecutionMode, float]:
    """Least seconds of each mode, which take turns: what disturbs only adds. One turn before does not count."""
    turns: dict[ExecutionMode, list[float]] = {mode: [] for mode in modes}
    for number in range(ROUNDS + 1):
        for mode, once in modes.items():
            took = once()
            if number:
                turns[mode].append(took)
    return {mode: min(times) for mode, times in turns.items()}


def fastest(seconds: dict[ExecutionMode, float]) -> ExecutionMode:
    """The first of the modes, unless a later one is faster by GAIN."""
    best = next(iter(seconds))
    for mode, took in seconds.items():
        if took * GAIN < seconds[best]:
            best = mode
    return best


def compared(work: Work, modes: list[ExecutionMode], before: str = "") -> ExecutionMode:
    """The fastest of modes that are eager or compiled already, with its seconds and why it was taken.

    before: what was found earlier.
    """
    others = Others()
    seconds = compare({mode: lambda mode=mode: work.timed(mode) for mode in modes})
    work.others.append(others.cores())
    best = fastest(seconds)
    times = "; ".join(f"{mode}: {1000 * took:.3g} ms" for mode, took in seconds.items())
    return replace(best, seconds=seconds[best], why=f"{before or 'measured, a sequence each'}; {times}")


def choose(work: Work, dtypes: list[str], compiles: bool, why: str) -> ExecutionMode:
    """The fastest mode for a run of PIECES micro-batches or more; the usual one, not measured, for a shorter.

    dtypes: precisions that make sense, the usual one first. compiles: compiled modes are tried too, as many as the
    length of the run pays for. why: the blocks are in any case, and this is what to say of it; "" = they are not.
    """
    usual = ExecutionMode(dtypes[0])
    if not is_long(work):
        return usual
    key = work.key(usual)
    best = usual
    if work.device.type == "cpu":
        best = recall(key).get("eager") or keep(work, key, "eager", choose_eager(work, dtypes))
    if not compiles:
        return best
    name = f"compiled for {work.steps} steps{', blocks anyway' if why else ''}"
    return recall(key).get(name) or keep(work, key, name, choose_compiled(work, best, dtypes[0], why))


def is_long(work: Work) -> bool:
    """Whether timing costs next to nothing of the run."""
    return work.steps * math.ceil(work.rows / work.micro) >= PIECES


def choose_eager(work: Work, dtypes: list[str]) -> ExecutionMode:
    """Precision, attention and micro-batch by timing eager passes on a CPU."""
    usual = ExecutionMode(dtypes[0])
    work.set(usual)
    reset_peak_memory(work.device)
    held = peak_memory(work.device)
    work.once(usual)
    peak = peak_memory(work.device)
    modes = [ExecutionMode(dtype) for dtype in dtypes]
    if explicit_fits(work):
        modes += [replace(mode, explicit=True) for mode in modes]
    if "float32" in dtypes and tiled_fits(work):
        modes.append(ExecutionMode("float32", tiled=True))
    best = compared(work, modes)
    more = larger(work, KEPT_SHARE * peak / max(1, peak - held))
    return compared(work, [best, replace(best, micro=more)], best.why) if more else best


def larger(work: Work, room: float) -> int:
    """Sequences at once, up to LARGER times the usual: as many as take `room` times more memory for activations.

    In equal pieces; 0 where that gives no fewer of them.
    """
    if work.bound or work.device.type != "cpu":
        return 0
    pieces = math.ceil(work.rows / max(1, math.floor(work.micro * min(LARGER, 1 + room))))
    return math.ceil(work.rows / pieces) if pieces < math.ceil(work.rows / work.micro) else 0


def tiled_fits(work: Work) -> bool:
    """Whether our own kernel computes this attention: on a CPU, of undivided blocks, with nothing dropped."""
    model, (_, _, _, mask) = work.objective.model, work.example(work.micro, False)
    is_plain = work.device.type == "cpu" and mask is None and model.cfg.dropout == 0.0
    return is_plain and cpu_attention.is_ready(head_dim(model.cfg))


def explicit_fits(work: Work) -> bool:
    """Whether the attention probabilities that explicit attention keeps for the backward pass take little memory,
    compared with the most that was held so far.
    """
    rows, length = work.example(work.micro, False)[0].shape
    cfg = work.objective.model.cfg
    kept = 4 * rows * cfg.n_head * length * length * (1 if work.objective.model.recompute else cfg.n_layer)
    return kept <= KEPT_SHARE * peak_memory(work.device)


def choose_compiled(work: Work, best: ExecutionMode, usual: str, why: str) -> ExecutionMode:
    """`best`, or a compiled mode that is faster: they are tried one by one for as long as the run pays for it.

    Compiled, the usual precision may win although it lost by its conversions; and so may explicit attention.
    """
    run_seconds = work.steps * work.rows * best.seconds
    tried = why or f"a run of {duration(run_seconds)} pays for trying whether that is faster"
    tiled = best.tiled and usual == "float32"
    plain = replace(best, dtype=usual, tiled=tiled, compiled="blocks", seconds=0.0, why=tried)
    whole = replace(plain, compiled="whole")
    spent = 0.0
    other = replace(whole, explicit=not plain.explicit, tiled=False)
    for mode in (plain, whole, other, replace(whole, autotuned=True)):
        spent += compiling_seconds(work, mode)
        if spent > WORTH * run_seconds and not (why and mode.compiled == "blocks"):
            break
        if mode.explicit and not plain.explicit and (work.device.type != "cpu" or not explicit_fits(work)):
            continue
        if mode.autotuned:
            mode = replace(mode, explicit=best.explicit, tiled=best.tiled)
        if (mode := work.set(mode)) is None:
            break
        # On a GPU eager attention over packed documents would fill the memory: its blocks are compiled to begin with.
        rivals = [mode] if work.device.type == "cuda" and not best.compiled else [best, mode]
        best = compared(work, rivals, best.why if best.seconds else "")
    return best


def recall(key: str) -> dict[str, ExecutionMode]:
    """What was remembered of a shape, by name; {} where nothing can be read."""
    try:
        stored = json.loads(memory_file(key).read_text(encoding="utf-8"))
        return {name: checked(fields) for name, fields in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def keep(work: Work, key: str, name: str, mode: ExecutionMode) -> ExecutionMode:
    """`remember` what was chosen, unless other programs had a part in it. Returns it."""
    cores = max(work.others, default=0.0)
    if cores < DISTURBED:
        remember(key, name, mode)
    else:
        log(f"other programs took {cores:.1f} cores while this was timed: the next run of this shape times it again")
    return mode


def remember(key: str, name: str, mode: ExecutionMode) -> None:
    """Keep a choice for the next run of this shape."""
    known = {each: asdict(other) for each, other in recall(key).items()}
    store(memory_file(key), known | {name: asdict(mode)})


def memory_file(key: str) -> Path:
    """Where this machine's choices for a shape are kept."""
    return private_cache() / f"computed-{key}.json"


def checked(fields: dict[str, Any]) -> ExecutionMode:
    """Fields from a file as `ExecutionMode`. Raises ValueError or TypeError for any that it cannot be."""
    mode = ExecutionMode(**fields)
    flags = all(isinstance(flag, bool) for flag in (mode.explicit, mode.tiled, mode.autotuned, mode.plain_mask))
    is_count = type(mode.micro) is int and mode.micro >= 0
    is_time = isinstance(mode.seconds, int | float) and 0 <= mode.seconds < math.inf
    if not (flags and is_count and is_time and isinstance(mode.why, str)):
        raise TypeError(f"{mode} is not known")
    if mode.dtype not in ("float32", "bfloat16", "float16") or mode.compiled not in ("", "blocks", "whole"):
        raise ValueError(f"{mode} is not known")
    return mode
