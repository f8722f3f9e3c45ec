"""One cell of an ablation: a base model, a split, a pooling and a trainable part -> a classifier and its figures."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miaobi.classify.base import base_classifier, prepare_base
from miaobi.classify.config import LEARNING_RATES, ClassifyConfig
from miaobi.classify.data import Labelled, Part, Split, make_split
from miaobi.classify.evaluation import fit_temperature, judged, log_loss
from miaobi.classify.head import Classifier, Judge, token_budget
from miaobi.config import OptimConfig
from miaobi.console import console, log, progress
from miaobi.corpus.dataset import derive
from miaobi.device import explain_memory, peak_memory, reset_peak_memory
from miaobi.errors import UserError, number_of
from miaobi.model.lora import add_lora
from miaobi.model.transformer import Transformer
from miaobi.train.optimizer import rate, set_rate
from miaobi.train.watch import Metrics

CACHE_BYTES = 4 << 30
"""Frozen layers' states are kept up to this size; beyond it they are computed anew in every epoch."""


class Interrupted(Exception):  # noqa: N818 - nothing is wrong
    """Ctrl-C or SIGTERM: the cell at hand is given up."""


@dataclass(frozen=True)
class Cell:
    """One place of the grid."""

    pooling: str
    trainable: str
    seed: int

    @property
    def name(self) -> str:
        """Directory of its figures."""
        return f"{self.pooling}-{self.trainable}-{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """What the cells of one command share."""

    cfg: ClassifyConfig
    base: str
    """Directory or .pth of the model that is tuned."""
    data: Labelled
    device: torch.device
    dtype: torch.dtype
    states: dict[Hashable, Tensor] = field(default_factory=dict)
    """Outputs of frozen layers, filled on the way (corrected alone: as-published gives every seed's base two rows of
    its own)."""


def build(cfg: ClassifyConfig, cell: Cell, model: Transformer, labels: int) -> Classifier:
    """The classifier with a fresh head; what `cell` does not train is frozen and without dropout."""
    torch.manual_seed(derive(cell.seed, "head"))
    classifier = Classifier(model, labels, cell.pooling)  # torch's own random head, as small-gpt's
    published = cfg.protocol == "as-published"
    if not published:
        torch.nn.init.normal_(classifier.score.weight, std=0.02)
    if cell.trainable == "lora":
        add_lora(model, cfg)
    elif cell.trainable != "full":
        classifier.requires_grad_(False)
        if cell.trainable == "last_block":
            model.blocks[-1].requires_grad_(True)
            model.norm.requires_grad_(True)
        classifier.score.requires_grad_(cell.trainable == "head" or not published)
    dropout = cfg.dropout if cell.trainable != "head" else 0.0
    frozen = model.blocks[:-1] if cell.trainable == "last_block" else ()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = dropout
    for module in (m for block in frozen for m in block.modules() if hasattr(m, "dropout")):
        module.dropout = 0.0
    model.cfg = dataclasses.replace(model.cfg, dropout=dropout if not frozen else 0.0)  # of the embeddings
    return classifier


def keep_head(classifier: Classifier, base: str, names: list[str]) -> None:
    """Where the base is a classifier with the same labels and pooling, its head is where training starts."""
    trained = base_classifier(base)
    if trained and trained.labels == names and trained.classifier.pooling == classifier.pooling:
        classifier.score.weight.data.copy_(trained.classifier.score.weight)


def optimizer_of(classifier: Classifier, cfg: ClassifyConfig, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW; a parameter `d` layers below the head learns at layer_decay ** d of the rate. Vectors do not decay."""
    depth = classifier.model.cfg.n_layer
    groups: dict[tuple[int, bool], list[Tensor]] = {}
    for name, p in classifier.named_parameters():
        if p.requires_grad:
            below = 0 if name.startswith("score") else depth + 1
            if name.startswith("model.blocks."):
                below = depth - int(name.split(".")[2])
            elif name.startswith("model.norm"):
                below = 1
            groups.setdefault((below, p.ndim >= 2), []).append(p)
    peaks = [
        {"params": params, "lr": optim.learning_rate * cfg.layer_decay**d, "weight_decay": decays * cfg.weight_decay}
        for (d, decays), params in groups.items()
    ]
    fused = classifier.score.weight.device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW(peaks, lr=optim.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=fused)
    for group in adamw.param_groups:
        group["peak_lr"] = group["lr"]
    return adamw


def schedule_of(cfg: ClassifyConfig, trainable: str, steps: int) -> OptimConfig:
    """Rates over `steps` steps: linear warm-up, then a cosine."""
    peak = cfg.learning_rate or LEARNING_RATES[trainable]
    return OptimConfig(
        schedule="cosine",
        learning_rate=peak,
        min_lr=peak / 10 if cfg.min_lr is None else cfg.min_lr,
        warmup_iters=steps // 20 if cfg.warmup_iters is None else cfg.warmup_iters,
        lr_decay_iters=cfg.lr_decay_iters or steps,
        grad_clip=cfg.grad_clip,
    )


@dataclass
class Progress:
    """How far a cell has come."""

    step: int = 0
    best_step: int = 0
    best_accuracy: float = 0.0
    """On the dev part."""
    seconds: float = 0.0
    """Training time."""


class Finetuning:
    """Fine-tuning of one cell."""

    def __init__(self, cfg: ClassifyConfig, cell: Cell, judge: Judge, split: Split,
                 states: dict[Hashable, Tensor] | None = None) -> None:  # fmt: skip
        self.cfg, self.cell, self.judge, self.split = cfg, cell, judge, split
        self.classifier = judge.classifier
        self.inputs: dict[int, list[Tensor]] = {}
        self.states = {} if states is None or cfg.protocol == "as-published" else states  # there two rows are drawn
        self.weights = row_weights(split.train, len(judge.labels), cfg.class_weights)
        per_epoch = math.ceil(len(split.train.rows) / cfg.batch_size)
        self.steps = cfg.max_epoch * per_epoch
        self.eval_interval = cfg.eval_interval or max(1, math.ceil(per_epoch / 2))
        published = cfg.protocol == "as-published"
        self.patience = cfg.patience if cfg.patience is not None else (0 if published else 6)
        self.optim = schedule_of(cfg, cell.trainable, self.steps)
        self.optimizer = optimizer_of(self.classifier, cfg, self.optim)
        self.scaler = torch.amp.GradScaler(judge.device.type, enabled=judge.dtype == torch.float16)
        self.progress = Progress()

    def rows(self, part: Part) -> list[Tensor]:
        """What goes into the classifier for `part`: ids, or the states that frozen layers make of them, made once."""
        key = id(part)
        if key not in self.inputs:
            ids = [torch.from_numpy(row) for row in part.rows]
            self.inputs[key] = ids
            if self.cell.trainable in ("last_block", "head") and self.state_bytes(ids) <= CACHE_BYTES:
                self.inputs[key] = self.frozen(ids)
        return self.inputs[key]

    def state_bytes(self, ids: list[Tensor]) -> int:
        """Memory that the frozen layers' states take."""
        width = self.classifier.model.cfg.n_embd * 4
        if self.cell.trainable == "head":
            return len(ids) * width
        return sum(self.judge.full_length or len(row) for row in ids) * width

    def frozen(self, ids: list[Tensor]) -> list[Tensor]:
        """Outputs of the frozen layers, on the CPU: (T, C) in front of the last block, or pooled (C,)."""
        c, full = self.classifier, self.judge.full_length
        kind = (self.cell.trainable, c.pooling if self.cell.trainable == "head" else full)
        keys = [(*kind, row.numpy().tobytes()) for row in ids]
        if sum(state.nbytes for state in self.states.values()) + self.state_bytes(ids) > CACHE_BYTES:
            self.states.clear()
        new = [i for i, key in enumerate(keys) if key not in self.states]
        if new:
            c.eval()
            rows = [ids[i] for i in new]
            if self.cell.trainable == "head":
                states = self.judge.run(lambda x, lengths: c.pooled(c.lower(x), lengths), rows)
            else:
                padded = self.judge.run(lambda x, _: c.lower(x), rows)
                states = [s[: full or len(row)].clone() for s, row in zip(padded, rows, strict=True)]
            self.states |= {keys[i]: state for i, state in zip(new, states, strict=True)}
        return [self.states[key] for key in keys]

    def order(self) -> Iterator[np.ndarray]:
        """Rows of every step: each epoch a permutation of its own, a pure function of (seed, epoch)."""
        for epoch in range(self.cfg.max_epoch):
            draw = np.random.default_rng(derive(self.cell.seed, "order", epoch))
            order = draw.permutation(len(self.split.train.rows))
            for i in range(0, len(order), self.cfg.batch_size):
                yield order[i : i + self.cfg.batch_size]

    def step(self, chosen: np.ndarray) -> float:
        """One optimizer step on the rows `chosen`; the mean loss in nats.

        The rows go through in micro-batches of like length, whose gradients add up to that of the whole batch.
        """
        rows = [self.rows(self.split.train)[i] for i in chosen]
        weights = self.weights[chosen]
        total = 0.0
        for micro, part in enumerate(self.judge.buckets(rows)):
            x, lengths = self.judge.batch([rows[i] for i in part])
            targets = torch.from_numpy(self.split.train.labels[self.split.train.owner[chosen[part]]]).to(x.device)
            torch.manual_seed(derive(self.cell.seed, "dropout", self.progress.step, micro))
            with torch.autocast(x.device.type, dtype=self.judge.dtype, enabled=self.judge.dtype != torch.float32):
                logits = self.classifier(x, lengths)
            nats = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.cfg.label_smoothing)
            share = torch.from_numpy(weights[part] / weights.sum()).to(nats)
            loss = (nats * share).sum()
            self.scaler.scale(loss).backward()
            total += loss.item()
        if not math.isfinite(total):
            raise UserError(f"the loss is not finite at step {self.progress.step + 1}; try a smaller --learning_rate, "
                            "then --dtype=float32")  # fmt: skip
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.classifier.parameters(), self.cfg.grad_clip or math.inf)
        set_rate([self.optimizer], rate(self.progress.step, self.optim))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        return total

    def logits(self, part: Part) -> np.ndarray:
        """Of every unit of a part: (N, labels)."""
        return self.judge.logits(self.rows(part), part.owner, len(part.labels))

    def go(self, metrics: Metrics | None, interrupted: Callable[[], bool]) -> None:
        """Train, and leave the classifier as it was at its best evaluation. Raises Interrupted."""
        dev, best, best_state, since = self.split.dev, None, {}, 0
        now = self.progress
        started, losses = time.perf_counter(), []
        trained = {name: p for name, p in self.classifier.named_parameters() if p.requires_grad}
        with progress("{task.fields[figures]}") as bar:
            task = bar.add_task(self.cell.name, total=self.steps, figures="", visible=console.is_terminal)
            for chosen in self.order():
                self.classifier.train()
                losses.append(self.step(chosen))
                bar.update(task, completed=now.step)
                if interrupted():
                    raise Interrupted
                if now.step % self.eval_interval and now.step != self.steps:
                    continue
                logits = self.logits(dev)
                accuracy = float((logits.argmax(-1) == dev.labels).mean())
                nats = log_loss(logits, dev.labels)
                figures = f"loss {np.mean(losses):.4f}  dev {nats:.4f}  accuracy {accuracy:.2%}"
                bar.update(task, figures=figures)
                if not console.is_terminal:
                    log(f"{self.cell.name}  step {now.step}/{self.steps}  {figures}")
                if metrics is not None:
                    metrics.log(now.step, train_loss=float(np.mean(losses)), dev_loss=nats, dev_accuracy=accuracy,
                                learning_rate=rate(now.step - 1, self.optim) * self.optim.learning_rate)  # fmt: skip
                losses, since = [], since + 1
                if best is None or (accuracy, -nats) > best:
                    best, since = (accuracy, -nats), 0
                    now.best_step, now.best_accuracy = now.step, accuracy
                    best_state = {name: p.detach().clone() for name, p in trained.items()}
                if self.patience and since >= self.patience:
                    log(f"{self.cell.name}: stopped, no better on dev for {number_of(since, 'evaluation')}")
                    break
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(best_state[name])
        now.seconds = time.perf_counter() - started


def row_weights(part: Part, labels: int, how: str) -> np.ndarray:
    """(R,) float64: every unit weighs the same, however many rows it has; `balanced`: every label does."""
    weights = 1.0 / np.bincount(part.owner)[part.owner]
    if how == "balanced":
        counts = np.bincount(part.labels, minlength=labels)
        weights = weights * (len(part.labels) / (labels * np.maximum(counts, 1)))[part.labels[part.owner]]
    return weights


def finetune(
    experiment: Experiment,
    cell: Cell,
    metrics: Path | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    events: Path | None = None,
) -> tuple[Judge, Split, dict[str, Any]]:
    """Train one cell; its curves go into the directory `metrics`, TensorBoard's also into `events`.

    Returns the classifier at its best, the split, and the figures of its test part (`evaluation.judged`) with
    dev_accuracy, seconds, trained_parameters, peak_memory_mb, best_step, train_rows.
    Raises Interrupted; UserError for data and settings that do not fit, a loss that is not finite, too little memory.
    """
    cfg, data, device = experiment.cfg, experiment.data, experiment.device
    reset_peak_memory(device)
    model, tokenizer, reading = prepare_base(cfg, experiment.base, cell.seed)
    split = make_split(data, cfg, cell.seed, reading, tokenizer)
    classifier = build(cfg, cell, model, len(data.names))
    if cfg.protocol == "corrected":
        keep_head(classifier, experiment.base, data.names)
    classifier.to(device)
    judge = Judge(classifier, tokenizer, reading, data.names, dtype=experiment.dtype, micro_tokens=cfg.micro_tokens)
    tokens, _ = token_budget(device, cfg.micro_tokens)
    advice = f"try --micro_tokens={max(1, tokens // 2)} (same result, less memory), then a smaller base_model"
    with explain_memory(device, advice):
        run = Finetuning(cfg, cell, judge, split, experiment.states)
        if metrics is not None:
            metrics.mkdir(parents=True, exist_ok=True)
        curves = Metrics(metrics, 0, events=events) if metrics is not None else None
        try:
            run.go(curves, interrupted)
        finally:
            if curves is not None:
                curves.close()
        if cfg.protocol == "corrected":  # dev is not what is reported: it may set the temperature
            judge.temperature = fit_temperature(run.logits(split.dev), split.dev.labels)
        result = judged(run.logits(split.test) / judge.temperature, split.test.labels, data.names, split.test.texts)
    trained = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    return judge, split, {
        "pooling": cell.pooling, "trainable": cell.trainable, "seed": cell.seed, "protocol": cfg.protocol,
        **result, "dev_accuracy": run.progress.best_accuracy, "seconds": round(run.progress.seconds, 2),
        "trained_parameters": trained,
        "peak_memory_mb": round(peak_memory(device) / 2**20), "temperature": judge.temperature,
        "best_step": run.progress.best_step, "steps": run.progress.step, "train_rows": len(split.train.rows),
        "test_units": len(split.test.labels),
    }  # fmt: skip
