"""Defaults that depend on the family, the size and the length of the run."""

from __future__ import annotations

import dataclasses

import torch

from miaobi.config import OptimConfig, RunConfig
from miaobi.console import warn
from miaobi.errors import UserError
from miaobi.model.config import ModelConfig

WIDTH = 256  # n_embd of the models on which the default rates were tuned
CPU_TOKENS = 2048  # per micro-batch: more are no faster on a CPU, and need more memory for activations


def resolve_model(cfg: ModelConfig, vocab_size: int) -> ModelConfig:
    """Fill in vocab_size. Raises UserError if the model has fewer rows than the data has tokens."""
    if cfg.vocab_size is not None and cfg.vocab_size < vocab_size:
        raise UserError(
            f"vocab_size is {cfg.vocab_size}, but the data was prepared with {vocab_size} tokens; "
            f"leave vocab_size out, or prepare again with --vocab_size={cfg.vocab_size}"
        )
    return dataclasses.replace(cfg, vocab_size=cfg.vocab_size or vocab_size)


def resolve_optim(
    cfg: OptimConfig,
    family: str,
    max_iters: int,
    tuning: str | None = None,
    bigrams: bool = False,
    n_embd: int = WIDTH,
) -> OptimConfig:
    """Fill in optimizer, rates and schedule; see the help of each key for the rule.

    bigrams: the model was initialised from bigrams, which larger rates would destroy (docs/lab-notes.md).
    n_embd: AdamW's rate falls with the root of the width, because each output of a wider model sums over more inputs;
    Muon scales its updates by their shape already.
    tuning: None from scratch, else `trainable` (full or lora). LoRA needs ten times the rate of full fine-tuning,
    whatever its rank (Schulman et al. 2025, thinkingmachines.ai/blog/lora).
    """
    kind = cfg.optimizer if cfg.optimizer != "auto" else ("adamw" if family == "gpt2" or tuning else "muon")
    schedule = cfg.schedule if cfg.schedule != "auto" else ("cosine" if kind == "adamw" else "wsd")
    usual = 1e-3 if kind == "adamw" or bigrams else 3e-3 * min(1.0, (WIDTH / n_embd) ** 0.5)
    learning_rate = cfg.learning_rate or usual * (0.1 if tuning == "full" else 1.0)
    min_lr = cfg.min_lr if cfg.min_lr is not None else (learning_rate / 10 if schedule == "cosine" else 0.0)
    if min_lr > learning_rate:
        warn(f"min_lr ({min_lr:g}) is above learning_rate ({learning_rate:g}): the rate will rise, not fall")
    longest = 2000 if kind == "adamw" else 10
    warmup = cfg.warmup_iters if cfg.warmup_iters is not None else min(longest, max_iters // 20)
    return dataclasses.replace(
        cfg,
        optimizer=kind,
        schedule=schedule,
        learning_rate=learning_rate,
        muon_learning_rate=cfg.muon_learning_rate or (0.005 if bigrams else 0.02),
        muon_weight_decay=cfg.muon_weight_decay or 0.0,
        min_lr=min_lr,
        warmup_iters=warmup,
        lr_decay_iters=cfg.lr_decay_iters or max_iters,
    )


def total_steps(cfg: RunConfig, windows: int) -> int:
    """Steps of the run: max_iters, or fewer where max_epochs passes over `windows` windows come first."""
    steps = cfg.train.max_iters
    if cfg.train.max_epochs is not None:
        steps = min(steps, max(1, cfg.train.max_epochs * windows // cfg.train.global_batch))
    return steps


def micro_batch(cfg: RunConfig, device: torch.device, ranks: int) -> int:
    """Sequences of a micro-batch on each rank: all of its step, but on a CPU about CPU_TOKENS tokens."""
    rows = cfg.train.global_batch // ranks
    micro = min(cfg.train.micro_batch, rows)
    if device.type != "cpu" or cfg.train.micro_batch_size:
        return micro
    pieces = -(-rows // max(1, min(micro, CPU_TOKENS // cfg.model.block_size)))
    return -(-rows // pieces)


def memory_advice(micro: int, block_size: int) -> str:
    """The advice when micro-batches of `micro` sequences do not fit into memory."""
    return (
        f"micro-batches of {micro} x {block_size} tokens were too large. "
        f"Try --micro_batch_size={max(1, micro // 2)} (same step, less memory), "
        "then --activation_checkpointing=True, then a smaller --block_size or model"
    )
