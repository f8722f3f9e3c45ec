"""config.json of Hugging Face <-> ModelConfig. A file from elsewhere is checked before anything is built from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from miaobi.console import log
from miaobi.errors import UserError, brief
from miaobi.model.config import ModelConfig
from miaobi.model.quantized import kind_of, original_config
from miaobi.model.transformer import head_dim, intermediate_size

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
ACTIVATIONS = {  # names of the same two functions
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new",
}  # fmt: skip
LONGEST_CONTEXT = 1 << 17
"""Positions that a model from the hub is given at most; nothing in its weights says how many rotary ones there are."""


def hf_config(cfg: ModelConfig, end_ids: tuple[int, ...]) -> dict:
    """config.json of the family.

    `rope_theta` and `rope_scaling` are written next to `rope_parameters`: transformers 4 reads those, 5 this.
    """
    common = {
        "architectures": [ARCHITECTURES[cfg.family]],
        "model_type": cfg.family,
        "vocab_size": cfg.vocab_size,
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "bos_token_id": end_ids[-1] if end_ids else None,
        "eos_token_id": end_ids[-1] if end_ids else None,
        "initializer_range": 0.02,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    if cfg.family == "gpt2":
        return common | {
            "n_positions": cfg.block_size,
            "n_embd": cfg.n_embd,
            "n_layer": cfg.n_layer,
            "n_head": cfg.n_head,
            "n_inner": cfg.intermediate_size,
            "activation_function": cfg.activation,
            "layer_norm_epsilon": cfg.norm_eps or 1e-5,
            "resid_pdrop": cfg.dropout,
            "embd_pdrop": cfg.dropout,
            "attn_pdrop": cfg.dropout,
        }
    common |= {"mlp_bias": False} if cfg.family == "llama" else {"use_sliding_window": False, "sliding_window": None}
    scaling = rope_scaling(cfg)
    return common | {
        "hidden_size": cfg.n_embd,
        "intermediate_size": intermediate_size(cfg),
        "num_hidden_layers": cfg.n_layer,
        "num_attention_heads": cfg.n_head,
        "num_key_value_heads": cfg.n_kv_head or cfg.n_head,
        "head_dim": head_dim(cfg),
        "hidden_act": "silu",
        "max_position_embeddings": cfg.block_size,
        "rms_norm_eps": cfg.norm_eps or 1e-6,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": cfg.rope_theta},
        "attention_bias": cfg.family == "qwen2",
        "attention_dropout": 0.0,
    }


def rope_scaling(cfg: ModelConfig) -> dict | None:
    """How the rotary angles are stretched, in Hugging Face's words; None if they are not."""
    if cfg.rope_type == "default":
        return None
    scaling = {"rope_type": cfg.rope_type, "factor": cfg.rope_factor}
    if cfg.rope_type in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = cfg.rope_original_context
    if cfg.rope_type == "llama3":
        scaling |= {"low_freq_factor": cfg.rope_low_freq_factor, "high_freq_factor": cfg.rope_high_freq_factor}
    if cfg.rope_type == "yarn":
        scaling |= {
            "beta_fast": cfg.rope_beta_fast,
            "beta_slow": cfg.rope_beta_slow,
            "truncate": cfg.rope_truncate,
            "attention_factor": cfg.rope_attention_factor,
        }
    return scaling


def model_config(hf: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelConfig:
    """ModelConfig of a Hugging Face config.json.

    gpt2's `bias` is read off the weights: a model trained without has zeros there (Hugging Face always has biases).

    Raises UserError for an architecture or a setting that the decoder does not have, and for a value of a wrong kind.
    """
    if hf.get("quantization_config") and kind_of(hf) is None:
        raise UserError("config.json has a quantization_config; take the model whose weights are not quantized")
    hf = original_config(hf)
    kind = hf.get("model_type")
    if kind == "gpt2":
        _refuse(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        activation = hf.get("activation_function", "gelu_new")
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise UserError(f"activation_function {brief(activation)} is not gelu or gelu_new")
        return ModelConfig(
            family="gpt2",
            n_layer=_size(hf, "n_layer"),
            n_head=_size(hf, "n_head"),
            n_embd=_size(hf, "n_embd"),
            intermediate_size=_optional_size(hf, "n_inner"),
            block_size=_size(hf, "n_positions"),
            vocab_size=_size(hf, "vocab_size"),
            bias=any(name.endswith(".bias") and t.ndim == 1 and bool(t.any()) for name, t in tensors.items()),
            activation=ACTIVATIONS[activation],
            norm_eps=_number(hf, "layer_norm_epsilon", 1e-5),
            tie_word_embeddings=_flag(hf, "tie_word_embeddings", True),
        )
    if kind in ("qwen3", "llama", "qwen2"):
        _refuse(hf, mlp_bias=False, use_sliding_window=False, hidden_act="silu", partial_rotary_factor=1.0)
        if kind != "qwen2":  # which has them on q, k and v whatever its config says
            _refuse(hf, attention_bias=False)
        if any(layer != "full_attention" for layer in _list(hf, "layer_types")):
            raise UserError("config.json has layer_types other than full_attention; the decoder only does that")
        return ModelConfig(
            family=kind,
            n_layer=_size(hf, "num_hidden_layers"),
            n_head=_size(hf, "num_attention_heads"),
            n_kv_head=_optional_size(hf, "num_key_value_heads"),
            n_embd=_size(hf, "hidden_size"),
            head_dim=_optional_size(hf, "head_dim"),
            intermediate_size=_size(hf, "intermediate_size"),
            block_size=_context(hf),
            vocab_size=_size(hf, "vocab_size"),
            **_rope(hf),
            norm_eps=_number(hf, "rms_norm_eps", 1e-6),
            tie_word_embeddings=_flag(hf, "tie_word_embeddings", False),
        )
    raise UserError(f"model_type {brief(kind)} is not one of {', '.join(ARCHITECTURES)}; "
                    f"miaobi runs {', '.join(ARCHITECTURES.values())}")  # fmt: skip


def _wrong(key: str, value: Any, expected: str) -> UserError:
    return UserError(f"config.json has {key}={brief(value)}, a value of the wrong kind; it must be {expected}")


def _size(hf: Mapping[str, Any], key: str) -> int:
    if key not in hf:
        raise UserError(f"config.json has no key {key!r}")
    value = hf[key]
    if type(value) is not int:
        raise _wrong(key, value, "a whole number")
    if not 1 <= value < 1 << 31:
        raise UserError(f"config.json has {key}={brief(value)}, which is no size of a model")
    return value


def _optional_size(hf: Mapping[str, Any], key: str) -> int | None:
    return None if hf.get(key) is None else _size(hf, key)


def _context(hf: Mapping[str, Any]) -> int:
    stated = _size(hf, "max_position_embeddings")
    if stated > LONGEST_CONTEXT:
        log(f"the model's context of {stated:,} tokens is used up to {LONGEST_CONTEXT:,}")
    return min(stated, LONGEST_CONTEXT)


def _number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A key that may be missing where there is a default."""
    if key not in hf and default is None:
        raise UserError(f"config.json has no key {key!r}")
    value = hf.get(key, default)
    if type(value) not in (int, float) or abs(value) > 1e300 or math.isnan(value):
        raise _wrong(key, value, "a number")
    return float(value)


def _flag(hf: Mapping[str, Any], key: str, default: bool) -> bool:
    value = hf.get(key, default)
    if type(value) is not bool:
        raise _wrong(key, value, "true or false")
    return value


def _list(hf: Mapping[str, Any], key: str) -> list:
    value = hf.get(key) or []
    if not isinstance(value, list):
        raise _wrong(key, value, "a list")
    return value


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The rope keys of ModelConfig, from transformers 5's rope_parameters or 4's rope_theta and rope_scaling."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise _wrong("rope_scaling", rope, "an object")
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("config.json has rope_parameters of several kinds of layers; the decoder has one kind")
    _refuse(rope, partial_rotary_factor=1.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = _number(rope if "rope_theta" in rope else hf, "rope_theta", 10000.0)
    settings = {"rope_type": kind, "rope_theta": theta}
    if kind == "default":
        return settings
    if kind in ("linear", "dynamic"):
        return settings | {"rope_factor": _number(rope, "factor")}
    if kind == "llama3":
        return settings | {
            "rope_factor": _number(rope, "factor"),
            "rope_low_freq_factor": _number(rope, "low_freq_factor"),
            "rope_high_freq_factor": _number(rope, "high_freq_factor"),
            "rope_original_context": _size(rope, "original_max_position_embeddings"),
        }
    if kind == "yarn":
        return settings | _yarn(hf, rope)
    raise UserError(f"rope type {brief(kind)} is not supported, only default, linear, dynamic, llama3 and yarn")


def _yarn(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers computes what a config leaves open."""
    stated = {key: value for key, value in rope.items() if value is not None}
    original = next((_size(where, key) for where, key in (
        (stated, "original_max_position_embeddings"), (hf, "original_max_position_embeddings"),
        (hf, "max_position_embeddings")) if where.get(key) is not None), 0)  # fmt: skip
    if not original:
        raise UserError("config.json has no key 'max_position_embeddings'")
    factor = _number(stated, "factor", _size(hf, "max_position_embeddings") / original)

    def longer(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    scales = [_number(stated, key, 0.0) for key in ("mscale", "mscale_all_dim")]
    default = longer(scales[0]) / longer(scales[1]) if all(scales) and longer(scales[1]) else longer(1.0)
    return {
        "rope_factor": factor,
        "rope_original_context": original,
        "rope_beta_fast": _number(stated, "beta_fast", 32.0) or 32.0,
        "rope_beta_slow": _number(stated, "beta_slow", 1.0) or 1.0,
        "rope_truncate": _flag(stated, "truncate", True),
        "rope_attention_factor": _number(stated, "attention_factor", default),
    }


def _refuse(hf: Mapping[str, Any], **supported: Any) -> None:
    for key, value in supported.items():
        if hf.get(key, value) not in (value, None):
            raise UserError(f"config.json has {key}={brief(hf[key])}; the decoder only does {key}={value!r}")
