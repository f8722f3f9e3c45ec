"""`miaobi plan`: size, passes over the text, memory, time and cost of a run before it starts."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from miaobi.config import OptimConfig, RunConfig
from miaobi.corpus.prepared import PreparedData
from miaobi.device import peak_flops, pick_device, pick_dtype
from miaobi.model.checkpoint import load_model
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer, head_dim
from miaobi.plan import memory
from miaobi.plan.cards import GIB, Card, find_card, local_card
from miaobi.plan.config import PlanConfig
from miaobi.plan.forecast import RunSize, advice, forecast
from miaobi.plan.measure import Measurement, measure
from miaobi.settings import Origin
from miaobi.train.average import is_averaged
from miaobi.train.data import Blocks, open_blocks, open_data
from miaobi.train.recipe import micro_batch, resolve_model, resolve_optim, total_steps
from miaobi.train.world import World

UTILISATION = {"cuda": 0.30, "mps": 0.20, "cpu": 0.45}
"""Share of the peak FLOP/s that steps reach, if they are not measured. CPU: measured, 0.3 to 0.5 (docs/lab-notes.md);
GPUs: between what small and large models usually reach."""
LAUNCHES, LAUNCH_SECONDS = 150, 7e-6
"""Kernel launches of a block, forward and backward, and the time of each: they limit small models on a GPU."""
CUDA_CONTEXT = int(0.6 * GIB)
"""Bytes of a GPU that CUDA and its libraries take."""
USABLE = 0.93
"""Share of the remaining memory that can be filled, because of fragmentation."""


@dataclass(frozen=True)
class PlannedRun:
    """A run with all open settings resolved as `train` does."""

    cfg: RunConfig
    shape: ModelConfig
    optim: OptimConfig
    data: PreparedData
    blocks: Blocks
    steps: int
    parts: dict[str, int]
    """Parameters by part."""
    device: torch.device
    card: Card | None

    @property
    def tokens(self) -> int:
        """Tokens trained on, with repetitions."""
        return self.steps * self.cfg.train.global_batch * self.shape.block_size

    @property
    def epochs(self) -> float:
        """Passes over the text."""
        return self.steps * self.cfg.train.global_batch / max(1, len(self.blocks))

    @property
    def averages(self) -> bool:
        """Whether the weights are averaged along the run."""
        return is_averaged(self.cfg.train, self.epochs, self.cfg.train.base_model is not None)

    @property
    def parameters(self) -> int:
        """Number of parameters without position embeddings, as nanoGPT counts."""
        return sum(count for name, count in self.parts.items() if name != "positions")

    def flops_per_token(self) -> float:
        """Forward and backward: 6N + 12 L H D T (PaLM, arXiv:2204.02311, appendix B)."""
        shape = self.shape
        return 6 * self.parameters + 12 * shape.n_layer * shape.n_head * head_dim(shape) * shape.block_size


def plan(cfg: PlanConfig, origin: Origin) -> dict[str, Any]:
    """The JSON object of `miaobi plan`. Nothing is written, and nothing is trained except with --measure.

    Raises UserError for settings, text and models that `miaobi train` would refuse.
    """
    with tempfile.TemporaryDirectory(prefix="miaobi-plan-") as aside:
        run = resolve_run(cfg, Path(aside))
        measured = measure(cfg, origin, Path(aside)) if cfg.plan.measure else None
        return {
            "model": {key: value for key, value in asdict(run.shape).items() if value is not None},
            "parameters": {**run.parts, "total": run.parameters},
            "text": text_facts(run),
            "run": run_facts(run),
            "memory": memory_facts(run, measured),
            **cost_facts(run, cfg, measured),
            "forecast": forecast_facts(run),
        }


def resolve_run(cfg: PlanConfig, aside: Path) -> PlannedRun:
    """The run of `cfg`. Raw text is prepared into `aside`, to count its tokens."""
    card = find_card(cfg.plan.gpu) if cfg.plan.gpu else None
    device = torch.device("cuda") if card else pick_device(cfg.train.device)
    data = open_data(cfg, aside, prepares=True)
    base = cfg.train.base_model
    if base:
        theirs = load_model(base)[0].cfg
        shape = dataclasses.replace(theirs, dropout=cfg.model.dropout,
                                    block_size=min(cfg.model.block_size, theirs.block_size))  # fmt: skip
    else:
        shape = resolve_model(cfg.model, data.vocab_size)
    blocks, _ = open_blocks(cfg.data, data, shape.block_size)
    steps = total_steps(cfg, len(blocks))
    tuning = cfg.train.trainable if base else None
    optim = resolve_optim(cfg.optim, shape.family, steps, tuning, n_embd=shape.n_embd)
    return PlannedRun(cfg, shape, optim, data, blocks, steps, parameters_of(shape), device, card or local_card(device))


def parameters_of(shape: ModelConfig) -> dict[str, int]:
    """Parameters by part, without padding rows of the vocabulary."""
    with torch.device("meta"):
        model = Transformer(shape)
    tables = {"embedding": shape.vocab_size * shape.n_embd}
    if model.lm_head is not None:
        tables["head"] = shape.vocab_size * shape.n_embd
    if model.wpe is not None:
        tables["positions"] = model.wpe.weight.numel()
    inside = {"attention": "attn.", "mlp": "mlp.", "norms": "norm"}
    counts = dict.fromkeys(inside, 0)
    for name, p in model.named_parameters():
        if part := next((part for part, mark in inside.items() if re.search(rf"(^|\.){mark}", name)), None):
            counts["norms" if "norm" in name else part] += p.numel()
    return tables | counts


def text_facts(run: PlannedRun) -> dict[str, Any]:
    """Facts about the training text."""
    train, val = run.data.train, run.data.val
    return {
        "data": run.cfg.data.data, "train_tokens": len(train), "val_tokens": len(val), "characters": train.characters,
        "documents": train.documents, "vocab_size": run.data.vocab_size, "dialogue": run.data.is_dialogue,
    }  # fmt: skip


def run_facts(run: PlannedRun) -> dict[str, Any]:
    """Steps, tokens, passes over the text."""
    return {
        "steps": run.steps, "batch_size": run.cfg.train.global_batch, "tokens": run.tokens,
        "epochs": run.epochs, "tokens_per_parameter": run.tokens / run.parameters,
        "distinct_tokens_per_parameter": len(run.data.train) / run.parameters,
        "optimizer": run.optim.optimizer, "evaluations": math.ceil(run.steps / run.cfg.train.eval_interval),
    }  # fmt: skip


def precision(run: PlannedRun) -> torch.dtype:
    """Precision of the matrix products that `train` would choose on that device."""
    if run.cfg.plan.gpu is None:
        return pick_dtype(run.cfg.train.dtype, run.device)
    if run.cfg.train.dtype != "auto":
        return getattr(torch, run.cfg.train.dtype)
    return torch.bfloat16 if run.card.has_bf16 else torch.float16


def step_spec(run: PlannedRun) -> memory.StepSpec:
    """The step whose memory is computed."""
    train = run.cfg.train
    micro = micro_batch(run.cfg, run.device, World().size)
    return memory.StepSpec(
        run.shape, run.optim, run.cfg.lora if train.trainable == "lora" else None, run.device.type, precision(run),
        micro, -(-train.global_batch // micro), train.activation_checkpointing,
        run.data.is_dialogue and run.cfg.data.packing != "stream",
    )  # fmt: skip


def memory_facts(run: PlannedRun, measured: Measurement | None) -> dict[str, Any]:
    """Bytes by part, and the largest micro-batch that fits."""
    work = step_spec(run)
    parts = memory.step_memory(work)
    average = parts.weights if run.averages else 0
    on_cpu = run.device.type == "cpu"
    process = memory.PROCESS if on_cpu else 0
    besides = average + process + (parts.checkpoint + average if on_cpu else 0)
    free = free_memory(run)
    facts = asdict(parts) | {
        "average": average,
        "process": process,
        "run": parts.peak + parts.fragments + besides,
        "free": free,
        "micro_batch": work.micro,
    }
    rows = run.cfg.train.global_batch
    facts["largest_micro_batch"] = memory.largest_micro(work, rows, free - besides) if free else None
    return facts | ({"measured": measured.memory} if measured else {})


def free_memory(run: PlannedRun) -> int | None:
    """Bytes that a run can fill: of a card, or of this machine now; None if the system does not say."""
    if run.card is not None:
        return int(USABLE * (run.card.memory - CUDA_CONTEXT))
    try:
        return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))[1])
    except (OSError, TypeError):
        return None


def forecast_facts(run: PlannedRun) -> dict[str, Any]:
    """The predicted validation curve of a run from scratch, and advice; {} for fine-tuning."""
    if run.cfg.train.base_model:
        return {}
    decay = run.optim.muon_weight_decay if run.optim.optimizer == "muon" else 0.0
    setting = RunSize(run.parameters, len(run.data.train), decay, run.shape.dropout, run.averages)
    expected = forecast(setting, run.epochs)
    return expected | {"advice": advice(expected, setting, run.epochs)}


def cost_facts(run: PlannedRun, cfg: PlanConfig, measured: Measurement | None) -> dict[str, Any]:
    """Time, energy and cost."""
    if measured is not None:
        step, evaluation, basis = measured.step, measured.evaluation, "20 steps measured here"
        start = measured.start
    else:
        start = 0.0
        peak = run.card.flops if run.card else peak_flops(run.device, precision(run))
        if not peak:
            peak = peak_flops(run.device, precision(run))
        reached = UTILISATION[run.device.type]
        step = run.flops_per_token() * run.tokens / run.steps / (peak * reached)
        if run.device.type == "cuda":
            pieces = -(-cfg.train.global_batch // micro_batch(cfg, run.device, World().size))
            step = max(step, pieces * run.shape.n_layer * LAUNCHES * LAUNCH_SECONDS)
        windows = min(cfg.train.eval_iters * cfg.train.batch_size, cfg.train.eval_interval * cfg.train.global_batch)
        evaluation = step / 3 * windows / cfg.train.global_batch * (2.25 if run.averages else 1.25)
        basis = f"{peak / 1e12:.2f} TFLOP/s, assuming that {reached:.0%} of it are reached; --measure measures it"
    seconds = start + run.steps * step + math.ceil(run.steps / cfg.train.eval_interval) * evaluation
    watts = cfg.plan.watts if cfg.plan.watts is not None else (run.card.watts or None) if run.card else None
    hours, price = seconds / 3600, cfg.plan.price_per_hour
    return {
        "device": {"name": run.card.name if run.card else run.device.type, "dtype": str(precision(run))[6:],
                   "memory": run.card.memory if run.card else None},
        "time": {"seconds": seconds, "start": start, "step": step, "evaluation": evaluation, "basis": basis},
        "energy_kwh": None if watts is None else watts * hours / 1000,
        "cost": None if price is None else price * hours,
    }  # fmt: skip
