"""The model card (README.md) of a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from miaobi.config import RunConfig
from miaobi.errors import UserError
from miaobi.files import read_whole
from miaobi.model.card import USAGE, Card, Metric
from miaobi.settings import flatten
from miaobi.train.run_directory import Progress
from miaobi.train.setup import Plan

PRIVATE = {
    "out_dir",
    "mirror",
    "tensorboard_path",
    "trackers",
    "wandb_project",
    "wandb_run_name",
    "init_from",
    "resume_from",
    "license",
}
"""Settings that reveal the machine, or that the card has elsewhere."""
PLACES = {"data", "val", "without", "tokenizer"}
"""Settings with paths, of which only the last part is shown."""


def card_of(plan: Plan, progress: Progress) -> Card:
    """The card of the checkpoint of `progress`. Nothing in it depends on the time of day: a run that was killed and
    resumed ends in the same bytes.
    """
    cfg, shape, data = plan.cfg, plan.model.cfg, plan.data
    size = f"{plan.parameters / 1e6:.1f}M" if plan.parameters >= 1e5 else f"{plan.parameters:,}"
    kind = "chat model 对话模型" if data.is_dialogue else "language model 语言模型"
    base = progress.base or None
    text = Path(cfg.data.data).resolve().name
    return Card(
        name=plan.out.resolve().name,
        summary=f"A Chinese {kind} of {size} parameters ({shape.family}, {shape.n_layer} layers × {shape.n_embd}), "
        f"trained with miaobi 妙笔.",
        tags=(shape.family, *(("conversational",) if data.is_dialogue else ())),
        license=cfg.train.license,
        base_model=base,
        data=text,
        metrics=metrics(progress),
        usage=USAGE,
        facts={
            "base model": base and Path(base).name if base and Path(base).exists() else base,
            "text": text,
            "text (SHA-256 of its tokens)": data.fingerprint,
            "training characters": f"{data.train.characters:,}",
            "validation characters": f"{data.val.characters:,}",
            "steps": f"{progress.step:,} of {plan.total_steps:,}",
            "tokens learned": f"{progress.tokens:,}",
            "seed": cfg.train.seed,
            "optimizer": f"{plan.optim.optimizer}, learning rate {plan.optim.learning_rate:g}, {plan.optim.schedule}",
            "precision": str(plan.dtype).removeprefix("torch."),
        },
        settings=changed(cfg),
        samples=[sample] if (sample := latest_sample(plan.out / "samples.jsonl", progress.step)) else [],
    )


def metrics(progress: Progress) -> list[Metric]:
    """Metrics of an evaluation at this very step; none if the checkpoint lies between two evaluations."""
    if progress.val_loss is None or progress.evaluated != progress.step or not math.isfinite(progress.val_loss):
        return []
    perplexity = math.exp(min(progress.val_loss, 700.0))
    found = [Metric("loss", "validation loss (nats per token)", progress.val_loss),
             Metric("perplexity", "validation perplexity (per token)", perplexity)]  # fmt: skip
    if progress.val_bits_per_char is not None:
        found.insert(0, Metric("bits_per_character", "validation bits per character", progress.val_bits_per_char))
    return found


def changed(cfg: RunConfig) -> dict[str, Any]:
    """Settings that differ from the defaults, without paths of this machine."""
    defaults = flatten(RunConfig())
    changed = {key: value for key, value in flatten(cfg).items() if value != defaults[key] and key not in PRIVATE}
    return {key: _names(value) if key in PLACES else value for key, value in changed.items()}


def _names(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [Path(str(item)).name for item in value]
    return Path(value).name if isinstance(value, str) else value


def latest_sample(file: Path, step: int) -> str | None:
    """The latest text that the model generated, up to `step`."""
    try:
        rows = [json.loads(line) for line in read_whole(file).decode().split("\n") if line]
        return next((row["text"] for row in reversed(rows) if row["step"] <= step), None)
    except (UserError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # a card without a sample is a card
