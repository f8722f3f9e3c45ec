"""Time and memory of a run, measured on some of its own steps."""

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
from miaobi.train.computing import decide_mode
from miaobi.train.loop import Run
from miaobi.train.recipe import memory_advice, micro_batch
from miaobi.train.rendezvous import join, rank_device
from miaobi.train.setup import set_up

STEPS = 20


@dataclass(frozen=True)
class Measurement:
    """Results of the measured steps."""

    step: float
    """Mean seconds of the later steps, slow ones included."""
    evaluation: float
    """Seconds of an evaluation."""
    start: float
    """Seconds before steps run at full speed: choosing the execution mode, compiling, overhead of the first step."""
    memory: int
    """Peak bytes of this process (CPU) or of the GPU's allocator."""


def measure(cfg: PlanConfig, origin: Origin, aside: Path) -> Measurement:
    """Run STEPS steps and an evaluation of the run that `cfg` describes, in the temporary directory `aside`.

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
            run.plan, run.flex = decide_mode(run.plan, run.objective)
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
        return Measurement(
            step,
            evaluation * ((2 if run.plan.average else 1) + share),
            start + max(0.0, seconds[0] - step),
            peak_memory(device),
        )
    finally:
        world.leave()
        if device.type == "cuda":
            torch.cuda.empty_cache()
