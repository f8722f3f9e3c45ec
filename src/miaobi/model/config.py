"""Settings of the decoder, and of LoRA on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from miaobi.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The decoder. `None` means: decided by the family and the other sizes."""

    family: Literal["auto", "gpt2", "qwen3", "llama", "qwen2"] = "auto"
    """gpt2 = the seeds' model; qwen3 = RoPE, RMSNorm, QK-norm, SwiGLU; for hub models: llama = qwen3 without QK-norm,
    qwen2 = llama with biases on q, k and v. auto = qwen3, or gpt2 where the configuration speaks of biases or of a
    seed's own keys."""
    n_layer: int = 6
    """Blocks."""
    n_head: int = 6
    """Attention heads."""
    n_kv_head: int | None = None
    """qwen3, llama: key/value heads, fewer than n_head for grouped-query attention; default n_head."""
    n_embd: int = 384
    """Width of the residual stream."""
    head_dim: int | None = None
    """qwen3, llama: width of one head; default n_embd / n_head."""
    intermediate_size: int | None = None
    """Width inside the MLP; default 4 n_embd (gpt2), 8/3 n_embd rounded down to 32 (others): equal parameters."""
    block_size: int = 256
    """Context in tokens."""
    vocab_size: int | None = None
    """Rows of the embedding; default: as many as the prepared data has."""
    dropout: float = 0.0
    """Share of activations dropped in training: attention and residuals, with gpt2 the embeddings too."""
    bias: bool = False
    """gpt2: biases in linears and LayerNorms."""
    activation: Literal["gelu", "gelu_new"] = "gelu"
    """gpt2: exact GELU (nanoGPT, small-gpt) or its tanh approximation (hub GPT-2s)."""
    rope_theta: float = 10000.0
    """qwen3, llama: base of the rotary angles."""
    rope_type: Literal["default", "linear", "llama3", "yarn", "dynamic"] = "default"
    """How a hub model's rotary angles were stretched to a longer context; the keys below say how far. (dynamic: only
    beyond block_size, so not here.)"""
    rope_factor: float = 1.0
    """linear, llama3, yarn: angles of slow frequencies are divided by this."""
    rope_low_freq_factor: float = 1.0
    """llama3: frequencies that turn at most this often within the original context are slow."""
    rope_high_freq_factor: float = 4.0
    """llama3: frequencies that turn at least this often keep their angles; between the two they blend."""
    rope_original_context: int = 8192
    """llama3, yarn: tokens of context before the stretch."""
    rope_beta_fast: float = 32.0
    """yarn: frequencies that turn at least this often within the original context keep their angles."""
    rope_beta_slow: float = 1.0
    """yarn: frequencies that turn at most this often are slow; between the two they blend."""
    rope_truncate: bool = True
    """yarn: the blend begins and ends at whole indices."""
    rope_attention_factor: float = 1.0
    """yarn: queries and keys are longer by this."""
    norm_eps: float | None = None
    """Epsilon of the norms; default 1e-5 (gpt2), 1e-6 (others)."""
    tie_word_embeddings: bool = True
    """Share the embedding with the output layer."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise UserError(
                f"n_embd ({self.n_embd}) is not divisible by n_head ({self.n_head}); "
                f"try n_embd={self.n_embd // self.n_head * self.n_head or self.n_head} or another n_head"
            )
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            raise UserError(f"n_head ({self.n_head}) is not a multiple of n_kv_head ({self.n_kv_head})")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"dropout is {self.dropout}; give a share from 0 up to below 1")
        for name in ("vocab_size", "head_dim", "intermediate_size", "rope_original_context"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in (
            "rope_theta",
            "norm_eps",
            "rope_factor",
            "rope_beta_fast",
            "rope_beta_slow",
            "rope_attention_factor",
        ):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive and finite")
        if self.rope_theta < 1:
            raise UserError(f"rope_theta is {self.rope_theta}; it must be at least 1, and 10000 is usual")
        if self.family == "gpt2" and (self.head_dim is not None or self.n_kv_head is not None):
            raise UserError("the gpt2 family has neither head_dim nor n_kv_head; drop them or use --family=qwen3")
        rotary = self.family in ("qwen3", "llama", "qwen2")
        if rotary and self.bias:
            raise UserError(f"the {self.family} family has no biases; drop bias or use --family=gpt2")
        if rotary and (self.head_dim or self.n_embd // self.n_head) % 2:
            raise UserError("rotary embeddings need an even head width; change n_embd, n_head or head_dim")
        if not (self.rope_factor > 0 and self.rope_high_freq_factor > self.rope_low_freq_factor):
            raise UserError(
                f"rope_factor ({self.rope_factor}) must be positive, and rope_high_freq_factor "
                f"({self.rope_high_freq_factor}) above rope_low_freq_factor ({self.rope_low_freq_factor})"
            )
        if self.rope_type == "yarn" and self.rope_theta <= 1:
            raise UserError(f"rope_theta is {self.rope_theta}; yarn needs it above 1")


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv:2106.09685), for --trainable=lora."""

    lora_rank: int = 16
    """Rank of the update of each matrix."""
    lora_alpha: float = 32.0
    """The update is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """Share of the adapters' inputs dropped in training."""
    lora_targets: Literal["all", "attention"] = "all"
    """Which of a block's matrices are adapted: all = attention's and the MLP's."""

    def __post_init__(self) -> None:
        if self.lora_rank < 1:
            raise UserError(f"lora_rank is {self.lora_rank}; it must be at least 1")
        if not 0 < self.lora_alpha < float("inf"):
            raise UserError(f"lora_alpha is {self.lora_alpha}; it must be positive and finite, such as twice lora_rank")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UserError(f"lora_dropout is {self.lora_dropout}; give a share from 0 up to below 1")
