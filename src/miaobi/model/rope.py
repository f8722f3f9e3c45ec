"""Angles of rotary positions (RoPE, arXiv:2104.09864), and the ways in which hub models stretch them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from miaobi.model.config import ModelConfig


def rope_table(cfg: ModelConfig, width: int) -> Tensor:
    """cos and sin of every position: (2, block_size, width), halves repeated as Hugging Face rotates.

    width: of one attention head. yarn makes them longer by rope_attention_factor.
    """
    angle = torch.outer(torch.arange(cfg.block_size, dtype=torch.float32), rope_frequencies(cfg, width)).repeat(1, 2)
    table = torch.stack((angle.cos(), angle.sin()))
    return table if cfg.rope_attention_factor == 1.0 else table * cfg.rope_attention_factor


def rope_frequencies(cfg: ModelConfig, width: int) -> Tensor:
    """Radians per position: (width / 2,).

    linear divides all by rope_factor (arXiv:2306.15595); llama3 only those that turn less than
    rope_low_freq_factor times within the original context, blending up to rope_high_freq_factor (arXiv:2407.21783);
    yarn likewise, blending by index (arXiv:2309.00071). dynamic stretches beyond block_size only, where none of our
    positions are.
    """
    half = width // 2
    frequency = cfg.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    if cfg.rope_type in ("default", "dynamic"):
        return frequency
    if cfg.rope_type == "linear":
        return frequency / cfg.rope_factor
    if cfg.rope_type == "llama3":
        turns = cfg.rope_original_context * frequency / (2 * math.pi)
        low, high = cfg.rope_low_freq_factor, cfg.rope_high_freq_factor
        unscaled_share = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        low, high = (_index(cfg, width, turns) for turns in (cfg.rope_beta_fast, cfg.rope_beta_slow))
        if cfg.rope_truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0
        unscaled_share = 1 - ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequency * (unscaled_share + (1 - unscaled_share) / cfg.rope_factor)


def _index(cfg: ModelConfig, width: int, turns: float) -> float:
    """Index of the frequency that turns so often within the original context."""
    return width * math.log(cfg.rope_original_context / (turns * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))
