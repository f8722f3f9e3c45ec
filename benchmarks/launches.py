"""What steps cost on a GPU, counted on a machine without one: launches, operations, bytes, and waits for the card.

    python -m benchmarks.launches

Tensors have shapes and no values (fake_cuda.py); what is counted is what PyTorch is asked to do, not what it takes.
A launch is an operation that is no view. A step that asked the card for a value would end this program.
"""

from __future__ import annotations

from benchmarks import fake_cuda  # isort: skip  # before torch

import contextlib
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.amp import GradScaler

from benchmarks.common import machine, parse, report
from benchmarks.fake_cuda import CUDA, Counted, counting
from miaobi.config import OptimConfig
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.generate.cuda_step import CudaStep
from miaobi.generate.memory import Memory
from miaobi.generate.sampling import Drawing
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer, document_mask
from miaobi.settings import load_config
from miaobi.train.average import Average
from miaobi.train.evaluate import nats
from miaobi.train.layout import Objective
from miaobi.train.loop import Run
from miaobi.train.optimizer import make_optimizers, step_all
from miaobi.train.recipe import resolve_optim
from miaobi.train.setup import Plan, set_up
from miaobi.train.world import World

SHAPES = {"qwen3 40x512": ("qwen3", 40, 512, 8), "gpt2 6x384": ("gpt2", 6, 384, 6)}


@dataclass(frozen=True)
class Args:
    """Command line."""

    json: bool = False
    """Print one line of JSON as well."""


def fake_model(family: str, layers: int, width: int, heads: int, **given: Any) -> Transformer:
    """A model on cuda:0, without values."""
    shape = {"block_size": 256, "vocab_size": 5791} | given
    with CUDA:
        model = Transformer(ModelConfig(family=family, n_layer=layers, n_embd=width, n_head=heads, **shape))
    if model.rope is not None:
        model.rope = model.rope.to(CUDA)
    return model


def figures(counted: Counted, flops: int = 0) -> dict[str, Any]:
    """A row of the table."""
    return {"launches": counted.total, "tflop": flops / 1e12, "gigabytes": counted.bytes / 1e9,
            "waits": sum(counted.waits.values()), "by_name": dict(counted.launches)}  # fmt: skip


def muon(family: str, layers: int, width: int, heads: int) -> dict[str, Any]:
    """One step of Muon, after a first one, with the answer whether gradients are finite as a tensor."""
    with fake_cuda.fake_cuda():
        model = fake_model(family, layers, width, heads)
        optimizers = make_optimizers(model, resolve_optim(OptimConfig(), "qwen3", 100), "muon")
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        step_all(optimizers, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        with counting() as (flops, counted):
            optimizers[1].step()
    return figures(counted, flops.get_total_flops())


@contextlib.contextmanager
def small_text() -> Iterator[Path]:
    """A directory with prepared text in `data`."""
    with tempfile.TemporaryDirectory() as directory:
        draw, work = random.Random(0), Path(directory)
        text = "\n\n".join("".join(draw.choices("皇马赢得比赛联赛冠军转会训练", k=60)) for _ in range(200))
        (work / "text.txt").write_text(text, encoding="utf-8")
        prepare([str(work / "text.txt")], PrepareConfig(out=work / "data", workers=1))
        yield work


def on_cuda(plan: Plan, model: Transformer, dtype: torch.dtype) -> Plan:
    """The plan of a run, of `model` on cuda:0."""
    optimizers = make_optimizers(model, plan.optim, plan.optim.optimizer)
    scaler = GradScaler("cuda", enabled=dtype == torch.float16)
    return replace(plan, device=CUDA, dtype=dtype, model=model, optimizers=optimizers, scaler=scaler,
                   average=Average(model, plan.progress))  # fmt: skip


def training(work: Path, family: str, optimizer: str, dtype: str) -> dict[str, Any]:
    """A whole step of a small run as `miaobi train` does it: two micro-batches, dropout, clipping, averaged weights;
    and a batch of its evaluation.
    """
    told = {"family": family, "optimizer": optimizer, "data": work / "data", "out_dir": work / f"{family}{optimizer}",
            "device": "cpu", "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "batch_size": 8,
            "micro_batch_size": 4, "max_iters": 20, "dropout": 0.1, "grad_clip": 1.0, "eval_iters": 2}  # fmt: skip
    cfg, origin = load_config(None, [(key, str(value)) for key, value in told.items()])
    plan = set_up(cfg, origin, World(), torch.device("cpu"), torch.float32)
    with fake_cuda.fake_cuda():
        with CUDA:
            model = Transformer(plan.model.cfg)
        if model.rope is not None:
            model.rope = model.rope.to(CUDA)
        run = Run(on_cuda(plan, model.train(), getattr(torch, dtype)))
        run.step(0)
        with counting() as (flops, counted):
            run.step(1)
            nats(run.model, plan.val_windows, run.plan.dtype)
    return figures(counted, flops.get_total_flops())


def waits_that_are_seen() -> dict[str, Any]:
    """Whether this program would notice: a value asked for, and copies that are told to wait or not to."""
    found: dict[str, Any] = {}
    with fake_cuda.fake_cuda():
        x, pinned = torch.ones(2, device=CUDA), torch.ones(2)
        for name, once in (("item", lambda: x.sum().item()), ("bool", lambda: bool(x.any())), ("list", x.tolist)):
            try:
                once()
                found[name] = False
            except (DataDependentOutputException, DynamicOutputShapeException):
                found[name] = True
        copies = {"to the CPU": lambda: x.cpu(), "from it": lambda: pinned.to(CUDA),
                  "from it, without waiting": lambda: pinned.to(CUDA, non_blocking=True)}  # fmt: skip
        for name, once in copies.items():
            with counting() as (_, counted):
                once()
            found[name] = bool(counted.waits)
    return found


class Recorded(CudaStep):
    """The steps that are recorded as CUDA graphs, counted instead."""

    def __init__(self, model: Transformer) -> None:
        super().__init__(model)
        self.counts: list[Counted] = []

    def capture(self, step):
        with counting() as (_, counted):
            logits = step()
        self.counts.append(counted)
        return logits, lambda: None

    def read(self, ids):
        """Copies once, and waits."""
        torch.empty(ids.shape, dtype=ids.dtype).copy_(ids)
        return [0] * len(ids)


def decode(family: str, n_kv_head: int | None = None, streams: int = 1) -> dict[str, Any]:
    """Launches for each layer of the recorded decoding step, and for the rest of it."""
    found = []
    for layers in (2, 3):
        with fake_cuda.fake_cuda(), torch.inference_mode():
            model = fake_model(family, layers, 512, 8, n_kv_head=n_kv_head).eval()
            for p in model.parameters():
                p.data = p.data.to(torch.bfloat16)
            step = Recorded(model)
            step.record(Memory.make(model, model.make_caches(streams)), streams, 256)
            found += step.counts
    layer = found[1].launches - found[0].launches
    each = found[1].total - found[0].total
    return {"per_layer": each, "rest": found[0].total - 2 * each, "by_name": dict(layer),
            "waits": sum(found[0].waits.values())}  # fmt: skip


def drawing(streams: int, **given: Any) -> dict[str, Any]:
    """What the recorded drawing launches, and what the CPU launches itself for one more token of each stream."""
    settings = {"temperature": 0.8, "top_k": 200, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0} | given
    with fake_cuda.fake_cuda(), torch.inference_mode():
        step = Recorded(fake_model("gpt2", 2, 512, 8).eval())
        memory = step.lend(step, streams, 256)
        for count in range(2):
            how = [Drawing(n, count, **settings) for n in range(streams)]
            with counting() as (_, counted):
                step.draw(memory, [0] * streams, [3 + count] * streams, how)
    recorded = step.counts[1]
    return {"launches": recorded.total, "outside": counted.total, "waits": sum(counted.waits.values()),
            "gigabytes": recorded.bytes / 1e9, "recorded": len(step.counts),
            "by_name": dict(recorded.launches)}  # fmt: skip


def whole_step(layers: int = 40, packed: bool = False) -> dict[str, Any]:
    """Launches and FLOP of forward and backward of the seed's size, eager: 32 x 256 tokens in one micro-batch.

    packed: blocks of several dialogues, told apart by a mask.
    """
    found = []
    for few in (1, 2):
        with fake_cuda.fake_cuda():
            objective = Objective(fake_model("qwen3", few, 512, 8))
            ids = torch.zeros(32, 256, dtype=torch.long, device=CUDA)
            with counting() as (flops, counted):
                mask = document_mask(ids, torch.bfloat16) if packed else None
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = objective(ids, ids, None, mask)
                loss.backward()
            found.append((counted.total, flops.get_total_flops()))
    (launches, work), (more, harder) = found
    return {"launches": launches + (layers - 1) * (more - launches), "per_layer": more - launches,
            "tflop": (work + (layers - 1) * (harder - work)) / 1e12}  # fmt: skip


def counted_all() -> dict[str, dict[str, Any]]:
    """Everything, by name."""
    found: dict[str, dict[str, Any]] = {"waits that are seen": waits_that_are_seen()}
    found |= {f"muon, {name}": muon(*shape) for name, shape in SHAPES.items()}
    found["forward and backward, qwen3 40x512"] = whole_step()
    found["the same, packed dialogues"] = whole_step(packed=True)
    for family, n_kv_head in (("gpt2", None), ("qwen3", None), ("qwen3", 2)):
        name = f"decoding, {family}" + (", 2 heads of keys" if n_kv_head else "")
        found[name] = decode(family, n_kv_head)
    for streams in (1, 256):
        found[f"drawing, {streams} streams"] = drawing(streams)
    found["drawing, all settings"] = drawing(256, top_k=0, top_p=0.9, repetition_penalty=1.1)
    found["drawing, the likeliest"] = drawing(1, temperature=0.0)
    with small_text() as work:
        for family, optimizer, dtype in (("gpt2", "adamw", "bfloat16"), ("qwen3", "muon", "float16")):
            found[f"training, {family}, {optimizer}, {dtype}"] = training(work, family, optimizer, dtype)
    return found


def main() -> None:
    """Print the table."""
    args = parse("launches", Args, __doc__)
    found = counted_all()
    seen = found.pop("waits that are seen")
    rows = [[name, f"{row.get('launches', row.get('per_layer')):,}" + " a layer" * ("launches" not in row),
             f"{row['tflop']:.4g}" if "tflop" in row else "", f"{row['gigabytes']:.3g}" if "gigabytes" in row else "",
             str(row.get("waits", ""))] for name, row in found.items()]  # fmt: skip
    report(
        "launches",
        ["what", "launches", "TFLOP", "GB", "waits"],
        rows,
        {"machine": machine(), "items": found, "seen": seen},
        args.json,
    )


if __name__ == "__main__":
    main()
