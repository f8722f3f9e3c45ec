"""Time and memory of a run's own steps, of which nothing is kept."""

from __future__ import annotations

import dataclasses
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from miaobi.device import explain_memory, keep_allocations, peak_memory, pick_dtype, reset_peak_memory
from miaobi.plan.config import PlanConfig
from miaobi.settings import Origin
from miaobi.train.computing import decide
from miaobi.train.loop import Run
from miaobi.train.recipe import memory_advice, micro_batch
from miaobi.train.rendezvous import join, rank_device
from miaobi.train.setup import set_up

STEPS = 20


@dataclass(frozen=True)
class Measured:
    """What the steps took."""

    step: float
    """Seconds, the mean of the later ones: a run has its slow ones, too."""
    evaluation: float
    """Seconds of one."""
    start: float
    """Seconds before steps go at that speed: choosing how to compute, compiling, the first step's own work."""
    memory: int
    """Most bytes that this process (CPU), or the GPU's allocator, held at once."""


def measure(cfg: PlanConfig, origin: Origin, aside: Path) -> Measured:
    """Run STEPS steps and an evaluation of the run as it would begin, in the directory `aside`.

    Raises UserError for too little memory, as `miaobi train` would.
    """
    keep_allocations()
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, out_dir=str(aside / "run"), mirror=None))
    world = join(cfg.train)
    try:
        device = rank_device(cfg.train.device, world)
        reset_peak_memory(device)
        with explain_memory(device, memory_advice(micro_batch(cfg, device, world.size), cfg.model.block_size)):
            run = Run(set_up(cfg, origin, world, device, pick_dtype(cfg.train.dtype, device)))
            began = time.perf_counter()
            run.plan, run.flex = decide(run.plan, run.objective)
            run.model.train()
            start = time.perf_counter() - began
            seconds = []
            for step in range(STEPS):
                started = time.perf_counter()
                loss, _, _ = run.step(step)
                loss.item()  # waits for the device
                seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            run.validation_loss()
            evaluation = time.perf_counter() - started
        share = len(run.plan.train_windows.inputs) / len(run.plan.val_windows.inputs) if run.plan.train_windows else 0
        step = statistics.fmean(seconds[STEPS // 4 :])
        return Measured(
            step,
            evaluation * ((2 if run.plan.average else 1) + share),
            start + max(0.0, seconds[0] - step),
            peak_memory(device),
        )
    finally:
        world.leave()
        if device.type == "cuda":
            torch.cuda.empty_cache()
