"""The items of `benchmarks.gpu`: each is a function of a `Bench` that returns figures by name.

Sizes are the seeds': 128.84M parameters are 40 layers of 512 with 8 heads, blocks of 256, 5,791 tokens.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import clock
from miaobi.corpus.config import PrepareConfig
from miaobi.device import keep_allocations, peak_memory, pick_dtype, reset_peak_memory
from miaobi.generate.config import SamplingConfig
from miaobi.generate.cuda_step import CudaStep
from miaobi.generate.slots import Slots, Stream
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer
from miaobi.settings import load_config
from miaobi.train.computing import decide_mode
from miaobi.train.evaluate import ForwardGraph, mean_loss
from miaobi.train.loop import Run
from miaobi.train.setup import set_up
from miaobi.train.world import World

Figures = dict[str, Any]
SEED_JOB = {"family": "gpt2", "n_layer": 40, "n_head": 8, "n_embd": 512, "block_size": 256, "batch_size": 32,
            "vocab_size": 5791}  # fmt: skip
SMALL_JOB = SEED_JOB | {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4}
CHARACTERS = [chr(0x4E00 + i) for i in range(5500)]


@dataclass(frozen=True)
class Bench:
    """Where the items run."""

    device: str
    small: bool
    """Tiny models, few steps."""
    nanogpt: Path | None
    work: Path
    """A directory that is removed afterwards."""

    @property
    def job(self) -> dict[str, Any]:
        """The seed's model and batch."""
        return SMALL_JOB if self.small else SEED_JOB

    @property
    def there(self) -> torch.device:
        """The device; settings that `miaobi train` makes on one are made here too."""
        keep_allocations()
        torch.set_float32_matmul_precision("high")
        return torch.device(self.device)

    def text(self, dialogues: bool = False) -> Path:
        """Random text, with the word frequencies of Zipf's law, in a new directory; prepared."""
        draw, at = random.Random(0), self.work / ("dialogues" if dialogues else "data")
        if not (at / "manifest.json").exists():
            weights = [1 / (i + 10) for i in range(len(CHARACTERS))]
            lines = ["".join(draw.choices(CHARACTERS, weights, k=draw.randint(5, 60))) for _ in range(12_000)]
            if dialogues:
                lines = [line[:20] + ("\n" if i % 4 == 3 else "") for i, line in enumerate(lines)]
            source = self.work / f"{at.name}.txt"
            source.write_text("\n".join(lines), encoding="utf-8")
            from miaobi.corpus.prepare import prepare

            form = "dialogue" if dialogues else "text"
            prepare([str(source)], PrepareConfig(out=at, format=form, dedup="none", split="tail"))
        return at

    def run(self, name: str = "run", dialogues: bool = False, **given: Any) -> Run:
        """A run of the seed's job, set up as `miaobi train` does, before its first step."""
        told = self.job | {"data": self.text(dialogues), "out_dir": self.work / name, "device": self.device,
                           "seed": 1337, "max_iters": 1000, "warmup_iters": 0, "decay_lr": False,
                           "eval_iters": 2} | given  # fmt: skip
        cfg, origin = load_config(None, [(key, str(value)) for key, value in told.items()])
        device = self.there
        run = Run(set_up(cfg, origin, World(), device, pick_dtype(cfg.train.dtype, device)))
        run.plan, run.flex = decide_mode(run.plan, run.objective)
        run.model.train()
        return run

    def timed(self, run: Run, steps: int = 10, warmup: int = 3) -> Figures:
        """Milliseconds and peak memory of a step, and the share of the card's peak that it makes use of."""
        steps = 2 if self.small else steps
        for step in range(warmup):
            run.step(step)
        device = run.plan.device
        reset_peak_memory(device)
        start = clock(device)
        for step in range(warmup, warmup + steps):
            run.step(step)
        seconds = (clock(device) - start) / steps
        tokens = run.cfg.global_batch * run.plan.cfg.model.block_size
        from miaobi.device import peak_flops

        return {"ms": 1000 * seconds, "tokens_per_second": tokens / seconds,
                "mfu": tokens / seconds * run.plan.flops_per_token() / peak_flops(device, run.plan.dtype),
                "peak_gb": peak_memory(device) / 1e9}  # fmt: skip


def kernels(once: Callable[[], object], device: torch.device) -> Figures:
    """Kernels that one call launches, and the milliseconds that the CPU takes to launch them."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    clock(device)
    with profile(activities=activities) as prof:
        started = time.perf_counter()
        once()
        launching = time.perf_counter() - started
        clock(device)
    events = [e for e in prof.events() if str(e.device_type).endswith("CUDA" if on_gpu else "CPU")]
    return {"kernels": len(events), "launch_ms": 1000 * launching}


def environment(bench: Bench) -> Figures:
    """The card, the driver, a large product and a large copy."""
    device = bench.there
    n = 256 if bench.small else 8192
    dtype = pick_dtype("auto", device)
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(5):
        start = clock(device)
        _ = a @ a
        best = min(best, clock(device) - start)
    copied = math.inf
    source = torch.empty(1 << (20 if bench.small else 30), dtype=torch.uint8, device=device)
    for _ in range(5):
        start = clock(device)
        source.clone()
        copied = min(copied, clock(device) - start)
    card = driver = None
    if device.type == "cuda":
        asked = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit",
                                "--format=csv,noheader"], capture_output=True, text=True)  # fmt: skip
        card, driver = torch.cuda.get_device_name(device), asked.stdout.strip().replace("\n", "; ")
    return {"card": card or str(device), "driver": driver, "cards": torch.cuda.device_count(),
            "torch": torch.__version__, "dtype": str(dtype), "product_tflops": 2 * n**3 / best / 1e12,
            "copy_gb_per_second": 2 * source.numel() / copied / 1e9}  # fmt: skip


def loud_model(family: str, device: torch.device, small: bool, **sizes: Any) -> Transformer:
    """A random model whose likeliest token is not always the last one."""
    torch.manual_seed(0)
    shape = {"n_layer": 12, "n_head": 8, "n_embd": 512, "block_size": 256, "vocab_size": 5791} | sizes
    if small:
        shape |= {"n_layer": 2, "n_embd": 64, "block_size": 64}
    model = Transformer(ModelConfig(family=family, **shape)).eval()
    for block in model.blocks:
        for matrix in (block.attn.qkv, block.attn.proj, block.mlp.up, block.mlp.down):
            torch.nn.init.normal_(matrix.weight, std=0.1)
    return model.to(device)


def written(model: Transformer, streams: int, tokens: int, step: Any, temperature: float = 0.0) -> tuple[list, float]:
    """What `streams` prompts become, and the tokens per second of all."""
    device = model.wte.weight.device
    slots = Slots(model, streams, step)
    cfg = SamplingConfig(max_new_tokens=tokens, temperature=temperature)
    texts = [Stream([5 + i, 7, 11], cfg, torch.Generator(device).manual_seed(i)) for i in range(streams)]
    for one in texts:
        slots.add(one)
    slots.advance()
    start, before = clock(device), streams
    count = 0
    while any(one.left for one in texts):
        count += len(slots.advance())
    seconds = clock(device) - start
    return [one.ids for one in texts], max(1, count or before) / seconds


def graph(bench: Bench) -> Figures:
    """A decoding step recorded as a CUDA graph against the plain one, greedy, in fp32: the same tokens?"""
    devices = [bench.there]
    if torch.cuda.device_count() > 1:
        devices.append(torch.device("cuda", torch.cuda.device_count() - 1))
    found: Figures = {}
    for device in devices:
        for family, sizes in (("gpt2", {}), ("qwen3", {}), ("qwen3", {"n_kv_head": 2})):
            model = loud_model(family, device, bench.small, **sizes)
            plain, slow = written(model, 4, 40, None)
            step = CudaStep(model) if device.type == "cuda" else None
            recorded, fast = written(model, 4, 40, step)
            name = f"{family}{' grouped' if sizes else ''}{'' if device == devices[0] else f' {device}'}"
            found[name] = {"same": plain == recorded, "recorded": bool(step and step.recorded), "faster": fast / slow}
    return found


PARITY = {"steps": 20, "n_layer": 4, "n_head": 4, "n_embd": 128, "batch_size": 8, "block_size": 128}


def losses(bench: Bench, name: str, dialogues: bool = False, **given: Any) -> list[float]:
    """Of the first twenty steps of a small model: nats per token, AdamW, no dropout."""
    sizes = {key: value for key, value in PARITY.items() if key != "steps"}
    if bench.small:
        sizes |= {"n_layer": 2, "n_embd": 32, "block_size": 32}
    told = {"family": "qwen3", "optimizer": "adamw", "learning_rate": 1e-3, "compile": False} | sizes | given
    run = bench.run(name, dialogues, **told)
    return [run.step(step)[0].item() for step in range(4 if bench.small else PARITY["steps"])]


def parity(bench: Bench) -> Figures:
    """Largest difference of a loss to the CPU's in fp32, over twenty steps."""
    reference = losses(bench, "cpu", dtype="float32", device="cpu")
    chats = losses(bench, "cpu-chat", True, dtype="float32", device="cpu")
    sides = {
        "fp32": (reference, False, {"dtype": "float32"}),
        "auto": (reference, False, {}),
        "auto, checkpointing": (reference, False, {"gradient_checkpointing": True}),
        "dialogues, mask": (chats, True, {}),
    }
    found = {}
    for number, (name, (theirs, dialogues, given)) in enumerate(sides.items()):
        ours = losses(bench, f"side{number}", dialogues, **given)
        found[name] = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return found


def parity_compiled(bench: Bench) -> Figures:
    """The same, compiled: plain blocks, and dialogues with FlexAttention."""
    if torch.device(bench.device).type == "cpu":
        return {"left_out": "compiled in the tests on CPUs"}
    reference = losses(bench, "cpu", dtype="float32", device="cpu")
    found = {"compiled": max(abs(a - b) for a, b in zip(losses(bench, "gpu", compile=True), reference, strict=True))}
    chats = losses(bench, "cpu-chat", True, dtype="float32", device="cpu")
    flex = losses(bench, "gpu-chat", True, compile=True)
    return found | {"dialogues, flex": max(abs(a - b) for a, b in zip(flex, chats, strict=True))}


def seed_job(optimizer: str, compiled: bool) -> Callable[[Bench], Figures]:
    """The seed's whole step: 128.84M parameters, 32 x 256 tokens."""

    def item(bench: Bench) -> Figures:
        run = bench.run(optimizer=optimizer, compile=compiled)
        found = bench.timed(run) | {"micro_batch": run.plan.micro}
        return found | kernels(lambda: run.step(20), run.plan.device)

    return item


def nanogpt(bench: Bench) -> Figures:
    """nanoGPT's step of the same size, as its train.py sets it up: compiled, bf16, fused AdamW."""
    if bench.nanogpt is None:
        return {"left_out": "no --nanogpt"}
    from benchmarks.peers import Trainer, copy_nanogpt
    from benchmarks.train_speed import OPTIM
    from miaobi.corpus.tokenizer import Tokenizer
    from miaobi.model.checkpoint import save_model

    run = bench.run(compile=False)
    (bench.work / "weights").mkdir()
    save_model(bench.work / "weights", run.model, Tokenizer.load(bench.text()), ())
    rows, block = run.cfg.global_batch, run.plan.cfg.model.block_size
    del run
    copy_nanogpt(bench.nanogpt, bench.work / "nanoGPT")
    side = Trainer("nanogpt", bench.work, bench.device, rows, 1337, OPTIM)
    steps = 2 if bench.small else 10
    side.steps(3)
    seconds = side.steps(steps)[0] / steps
    return {"ms": 1000 * seconds, "tokens_per_second": rows * block / seconds} | side.about()


def decode(streams: int) -> Callable[[Bench], Figures]:
    """Tokens per second of a 128.84M model in the card's precision, with the recorded step."""

    def item(bench: Bench) -> Figures:
        device = bench.there
        dtype = pick_dtype("auto", device)
        model = loud_model("gpt2", device, bench.small, n_layer=40).to(dtype)
        step = CudaStep(model) if device.type == "cuda" else None
        count, many = (3, 8) if bench.small else (streams, 200)
        written(model, count, 8, step)  # records
        rates = [written(model, count, many, step, temperature=0.8)[1] for _ in range(3)]
        found: Figures = {"tokens_per_second": statistics.median(rates), "recorded": bool(step and step.recorded)}
        if step is not None and step.recorded:
            found |= kernels(next(iter(step.recorded.values())).replay, device)
        return found

    return item


def transformers_decode(bench: Bench) -> Figures:
    """transformers' generate on the same shape, static cache and its own compilation, one stream."""
    from transformers import GPT2Config, GPT2LMHeadModel

    device = bench.there
    layers, width = (2, 64) if bench.small else (40, 512)
    cfg = GPT2Config(vocab_size=5791, n_positions=256, n_embd=width, n_layer=layers, n_head=8, eos_token_id=None)
    model = GPT2LMHeadModel(cfg).to(device, pick_dtype("auto", device))
    ids, tokens = torch.tensor([[5, 7, 11]], device=device), 8 if bench.small else 128

    def once() -> float:
        start = clock(device)
        model.generate(ids, max_new_tokens=tokens, do_sample=False, cache_implementation="static", use_cache=True)
        return tokens / (clock(device) - start)

    once()
    return {"tokens_per_second": statistics.median(once() for _ in range(3))}


def muon(bench: Bench) -> Figures:
    """Muon's step alone, on gradients at random."""
    run = bench.run(optimizer="muon", compile=False)
    for p in run.model.parameters():
        p.grad = torch.randn_like(p)
    adamw, ours = run.plan.optimizers
    device, found = run.plan.device, {}
    for name, optimizer in (("adamw", adamw), ("muon", ours)):
        optimizer.step()
        start = clock(device)
        for _ in range(2 if bench.small else 10):
            optimizer.step()
        found[name] = {"ms": 1000 * (clock(device) - start) / (2 if bench.small else 10)}
        found[name] |= kernels(optimizer.step, device)
    return found


def large(bench: Bench) -> Figures:
    """small-gpt's 300M model: the largest micro-batch of blocks of 256 that fits, and its speed."""
    sizes = {} if bench.small else {"n_layer": 24, "n_head": 16, "n_embd": 1024, "vocab_size": 7587}
    best: Figures = {}
    for rows in (2, 4) if bench.small else (8, 16, 32, 64, 128, 256):
        try:
            run = bench.run(f"rows{rows}", batch_size=rows, gradient_accumulation_steps=1, compile=False, **sizes)
            run.plan = replace(run.plan, micro=rows)
            best = bench.timed(run, steps=2, warmup=1) | {"micro_batch": rows}
        except torch.OutOfMemoryError:
            break
        finally:
            run = None
            if torch.device(bench.device).type == "cuda":
                torch.cuda.empty_cache()
    return best


def dialogues(bench: Bench) -> Figures:
    """Packed dialogues: the additive mask, and FlexAttention where the run compiles."""
    found = {"mask": bench.timed(bench.run("mask", True, family="qwen3", compile=False), steps=5)}
    if torch.device(bench.device).type == "cuda":
        run = bench.run("flex", True, family="qwen3", compile=True)
        found["flex" if run.flex else "compiled, no flex"] = bench.timed(run, steps=5)
    return found


def evaluation(bench: Bench) -> Figures:
    """Milliseconds of an evaluation, eager and by a graph of its own, and what the two losses differ by."""
    run = bench.run(compile=torch.device(bench.device).type == "cuda", eval_iters=2 if bench.small else 50)
    device, found, losses = run.plan.device, {}, []
    for name, graph in (("eager", None), ("compiled", ForwardGraph(run.objective))):
        mean_loss(run.plan, run.plan.val_windows, graph)
        start = clock(device)
        losses.append(mean_loss(run.plan, run.plan.val_windows, graph))
        found[name] = {"ms": 1000 * (clock(device) - start), "used": graph is None or bool(graph.ready)}
    return found | {"windows": len(run.plan.val_windows.inputs), "apart": abs(losses[0] - losses[1])}


def stalls(bench: Bench) -> Figures:
    """Seconds that an evaluation, a checkpoint (until the run goes on) and a sample cost."""
    run = bench.run(compile=False)
    run.step(0)
    device, found = run.plan.device, {}
    for name, once in (("evaluation", run.validation_loss), ("saving", run.saver.save), ("written", run.saver.finish)):
        start = clock(device)
        once()
        found[name] = clock(device) - start
    found["windows_evaluated"] = len(run.plan.val_windows.inputs)
    return found


def train_command(bench: Bench, out: str, *given: str) -> list[str]:
    """`miaobi train` of a small model on the random text."""
    return [sys.executable, "-m", "miaobi", "train", f"--data={bench.text()}", f"--out_dir={bench.work / out}",
            f"--device={bench.device}", "--n_layer=4", "--n_head=4", "--n_embd=64", "--block_size=64",
            "--batch_size=8", "--max_iters=60", "--eval_interval=20", "--eval_iters=2", "--save_interval=5",
            "--compile=False", "--log_interval=1", *given]  # fmt: skip


def resume(bench: Bench) -> Figures:
    """kill -9 in the middle, then the same command: the weights of a run that was never killed?"""
    from safetensors.torch import load_file

    subprocess.run(train_command(bench, "whole"), check=True, capture_output=True)
    killed = subprocess.Popen(train_command(bench, "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    saved = bench.work / "killed" / "checkpoints" / "last"
    while killed.poll() is None and not saved.exists():
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run(train_command(bench, "killed"), check=True, capture_output=True)
    a, b = (load_file(bench.work / run / "checkpoints/last/model.safetensors") for run in ("whole", "killed"))
    return {"killed": killed.returncode == -9, "same_bits": all(torch.equal(a[k], b[k]) for k in a),
            "largest_difference": max((a[k] - b[k]).abs().max().item() for k in a)}  # fmt: skip


def half(bench: Bench) -> Figures:
    """float16 with a gradient that is not finite: the step is left out, the weights and the run go on."""
    if torch.device(bench.device).type != "cuda":
        return {"left_out": "float16 needs a GPU"}
    run = bench.run(dtype="float16", compile=False, optimizer="muon")
    run.step(0)
    before = [p.detach().clone() for p in run.model.parameters()]
    scale = run.plan.scaler.get_scale()
    spoilt = next(iter(run.model.parameters())).register_hook(lambda g: g * math.nan)
    run.step(1)
    spoilt.remove()
    same = all(torch.equal(a, p.detach()) for a, p in zip(before, run.model.parameters(), strict=True))
    halved = run.plan.scaler.get_scale() < scale
    loss = run.step(2)[0].item()
    return {"weights_kept": same, "scale_lowered": halved, "loss_after": loss}


def ranks(bench: Bench) -> Figures:
    """Two GPUs: DDP and FSDP under nccl against one, losses of 60 steps."""
    if torch.cuda.device_count() < 2:
        return {"left_out": "one GPU"}
    found, alone = {}, None
    for name, extra in (("one", ()), ("ddp", ("--parallel=ddp",)), ("fsdp", ("--parallel=fsdp",))):
        command = train_command(bench, name, "--dtype=float32", "--optimizer=adamw", *extra)
        if name != "one":
            command = [command[0], "-m", "torch.distributed.run", "--nproc_per_node=2", *command[1:]]
        subprocess.run(command, check=True, capture_output=True)
        rows = [json.loads(line) for line in (bench.work / name / "metrics.jsonl").read_text("utf-8").splitlines()]
        curve = [row["train_loss"] for row in rows if row.get("train_loss") is not None]
        alone = alone or curve
        found[name] = max(abs(a - b) for a, b in zip(curve, alone, strict=True))
    return found


def tests(bench: Bench) -> Figures:
    """`pytest -m gpu`: what the suite leaves out where there is no GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_LAUNCH_BLOCKING": "0"})
    return {"exit_code": done.returncode, "said": (done.stdout.splitlines() or [""])[-1]}


ITEMS: dict[str, Callable[[Bench], Figures]] = {
    "environment": environment,
    "graph": graph,
    "parity": parity,
    "seed job, compiled adamw": seed_job("adamw", True),
    "nanogpt": nanogpt,
    "decode 1 stream": decode(1),
    "decode 256 streams": decode(256),
    "transformers, 1 stream": transformers_decode,
    "seed job, compiled muon": seed_job("muon", True),
    "seed job, eager adamw": seed_job("adamw", False),
    "muon": muon,
    "parity, compiled": parity_compiled,
    "resume": resume,
    "float16": half,
    "evaluation": evaluation,
    "stalls": stalls,
    "dialogues": dialogues,
    "300M": large,
    "ranks": ranks,
    "tests": tests,
}
"""In the order of what one wants to know first, should the time not suffice."""
