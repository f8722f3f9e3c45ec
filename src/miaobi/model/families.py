"""Our weights under Hugging Face's names and back: GPT2LMHeadModel, Qwen3ForCausalLM, LlamaForCausalLM."""

from __future__ import annotations

import torch
from torch import Tensor

from miaobi.config import ModelConfig
from miaobi.errors import UserError
from miaobi.model.transformer import Transformer, head_dim, intermediate_size

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}

GPT2_LAYER = {  # ours -> (theirs, stored transposed as Conv1D)
    "attn_norm": ("ln_1", False),
    "attn.qkv": ("attn.c_attn", True),
    "attn.proj": ("attn.c_proj", True),
    "mlp_norm": ("ln_2", False),
    "mlp.up": ("mlp.c_fc", True),
    "mlp.down": ("mlp.c_proj", True),
}
LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn.proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.down": "mlp.down_proj",
}
QWEN3_LAYER = LLAMA_LAYER | {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}


def hf_config(cfg: ModelConfig, end_ids: tuple[int, ...]) -> dict:
    """config.json of the family.

    `rope_theta` and `rope_scaling` are written beside `rope_parameters`: transformers 4 reads those, 5 this.
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
    common |= {"use_sliding_window": False, "sliding_window": None} if cfg.family == "qwen3" else {"mlp_bias": False}
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
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def rope_scaling(cfg: ModelConfig) -> dict | None:
    """How the rotary angles are stretched, in Hugging Face's words; None if they are not."""
    if cfg.rope_type == "default":
        return None
    scaling = {"rope_type": cfg.rope_type, "factor": cfg.rope_factor}
    if cfg.rope_type == "llama3":
        scaling |= {
            "low_freq_factor": cfg.rope_low_freq_factor,
            "high_freq_factor": cfg.rope_high_freq_factor,
            "original_max_position_embeddings": cfg.rope_original_context,
        }
    return scaling


def model_config(hf: dict, tensors: dict[str, Tensor]) -> ModelConfig:
    """ModelConfig of a Hugging Face config.json.

    gpt2's `bias` is read off the weights: a model trained without has zeros there (Hugging Face always has biases).

    Raises UserError for an architecture or a setting that the decoder does not have.
    """
    if hf.get("quantization_config"):
        raise UserError("config.json has a quantization_config; take the model whose weights are not quantized")
    kind = hf.get("model_type")
    if kind == "gpt2":
        _refuse(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
        if hf.get("activation_function", "gelu_new") not in ("gelu", "gelu_new"):
            raise UserError(f"activation_function {hf['activation_function']!r} is not gelu or gelu_new")
        return ModelConfig(
            family="gpt2",
            n_layer=_whole(hf, "n_layer"),
            n_head=_whole(hf, "n_head"),
            n_embd=_whole(hf, "n_embd"),
            intermediate_size=None if hf.get("n_inner") is None else _whole(hf, "n_inner"),
            block_size=_whole(hf, "n_positions"),
            vocab_size=_whole(hf, "vocab_size"),
            bias=any(name.endswith(".bias") and t.ndim == 1 and bool(t.any()) for name, t in tensors.items()),
            activation=hf.get("activation_function", "gelu_new"),
            norm_eps=_number(hf, "layer_norm_epsilon", 1e-5),
            tie_word_embeddings=hf.get("tie_word_embeddings", True),
        )
    if kind in ("qwen3", "llama"):
        _refuse(hf, attention_bias=False, mlp_bias=False, use_sliding_window=False, hidden_act="silu")
        return ModelConfig(
            family=kind,
            n_layer=_whole(hf, "num_hidden_layers"),
            n_head=_whole(hf, "num_attention_heads"),
            n_kv_head=None if hf.get("num_key_value_heads") is None else _whole(hf, "num_key_value_heads"),
            n_embd=_whole(hf, "hidden_size"),
            head_dim=None if hf.get("head_dim") is None else _whole(hf, "head_dim"),
            intermediate_size=_whole(hf, "intermediate_size"),
            block_size=_whole(hf, "max_position_embeddings"),
            vocab_size=_whole(hf, "vocab_size"),
            **_rope(hf),
            norm_eps=_number(hf, "rms_norm_eps", 1e-6),
            tie_word_embeddings=hf.get("tie_word_embeddings", False),
        )
    raise UserError(f"model_type {kind!r} is not one of {', '.join(ARCHITECTURES)}; "
                    f"miaobi runs {', '.join(ARCHITECTURES.values())}")  # fmt: skip


def _whole(hf: dict, key: str) -> int:
    if type(hf[key]) is not int:
        raise UserError(f"config.json has {key}={hf[key]!r}, a value of the wrong kind; it must be a whole number")
    return hf[key]


def _number(hf: dict, key: str, default: float | None = None) -> float:
    """A key that may be missing where there is a default."""
    value = hf[key] if default is None else hf.get(key, default)
    if type(value) not in (int, float):
        raise UserError(f"config.json has {key}={value!r}, a value of the wrong kind; it must be a number")
    return float(value)


def _rope(hf: dict) -> dict:
    """The rope keys of ModelConfig, from transformers 5's rope_parameters or 4's rope_theta and rope_scaling."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"config.json has rope_scaling={rope!r}, a value of the wrong kind; it must be an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    found = {"rope_type": kind, "rope_theta": _number(rope if "rope_theta" in rope else hf, "rope_theta", 10000.0)}
    if kind == "default":
        return found
    if kind == "linear":
        return found | {"rope_factor": _number(rope, "factor")}
    if kind == "llama3":
        return found | {
            "rope_factor": _number(rope, "factor"),
            "rope_low_freq_factor": _number(rope, "low_freq_factor"),
            "rope_high_freq_factor": _number(rope, "high_freq_factor"),
            "rope_original_context": _whole(rope, "original_max_position_embeddings"),
        }
    raise UserError(f"rope type {kind!r} is not supported, only default, linear and llama3")


def _refuse(hf: dict, **supported) -> None:
    for key, value in supported.items():
        if hf.get(key, value) != value:
            raise UserError(f"config.json has {key}={hf[key]!r}; the decoder only does {key}={value!r}")


def to_hf(model: Transformer) -> dict[str, Tensor]:
    """Weights under Hugging Face's names, padding rows trimmed, contiguous; tied output layers are left out."""
    cfg, ours = model.cfg, {k: v.detach() for k, v in model.state_dict().items()}
    V, out = cfg.vocab_size, {}
    if cfg.family == "gpt2":
        out["transformer.wte.weight"] = ours["wte.weight"][:V]
        out["transformer.wpe.weight"] = ours["wpe.weight"]
        for i in range(cfg.n_layer):
            for mine, (theirs, transposed) in GPT2_LAYER.items():
                weight = ours[f"blocks.{i}.{mine}.weight"]
                width = weight.shape[0]
                bias = ours.get(f"blocks.{i}.{mine}.bias", weight.new_zeros(width))
                out[f"transformer.h.{i}.{theirs}.weight"] = weight.T if transposed else weight
                out[f"transformer.h.{i}.{theirs}.bias"] = bias
        out["transformer.ln_f.weight"] = ours["norm.weight"]
        out["transformer.ln_f.bias"] = ours.get("norm.bias", ours["norm.weight"].new_zeros(cfg.n_embd))
    else:
        out["model.embed_tokens.weight"] = ours["wte.weight"][:V]
        out["model.norm.weight"] = ours["norm.weight"]
        for i, block in enumerate(model.blocks):
            prefix = f"model.layers.{i}."
            for mine, theirs in rotary_layer(cfg).items():
                out[f"{prefix}{theirs}.weight"] = ours[f"blocks.{i}.{mine}.weight"]
            q, k, v = ours[f"blocks.{i}.attn.qkv.weight"].split(qkv_widths(block.attn))
            gate, up = ours[f"blocks.{i}.mlp.up.weight"].chunk(2)
            for name, weight in {
                "self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                "mlp.gate_proj": gate, "mlp.up_proj": up,
            }.items():  # fmt: skip
                out[f"{prefix}{name}.weight"] = weight
    if model.lm_head is not None:
        out["lm_head.weight"] = ours["lm_head.weight"][:V]
    return {name: weight.contiguous() for name, weight in out.items()}


def rotary_layer(cfg: ModelConfig) -> dict[str, str]:
    """Weights of a block that have the same form here and there: ours -> theirs."""
    return QWEN3_LAYER if cfg.family == "qwen3" else LLAMA_LAYER


def qkv_widths(attn) -> list[int]:
    """Rows of q, k and v in the fused projection."""
    return [n * attn.head_dim for n in (attn.n_head, attn.n_kv_head, attn.n_kv_head)]


def load_hf(model: Transformer, tensors: dict[str, Tensor], where: str) -> None:
    """Copy Hugging Face weights into `model`, whose config came from `model_config`.

    Raises UserError naming the first tensor that is missing, left over or of another shape.
    """
    cfg, rest = model.cfg, dict(tensors)
    if cfg.family == "gpt2":
        rest = {(n if n.startswith(("transformer.", "lm_head.")) else f"transformer.{n}"): t for n, t in rest.items()}

    def take(name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        if name not in rest:
            raise UserError(f"{where}: tensor {name} is missing; the checkpoint does not match its config.json")
        tensor = rest.pop(name)
        if shape is not None and tensor.shape != shape:
            raise UserError(f"{where}: {name} has shape {tuple(tensor.shape)}, config.json says {shape}")
        return tensor

    new = {"wte.weight": take("transformer.wte.weight" if cfg.family == "gpt2" else "model.embed_tokens.weight")}
    if cfg.family == "gpt2":
        new["wpe.weight"] = take("transformer.wpe.weight")
        for i in range(cfg.n_layer):
            for mine, (theirs, transposed) in GPT2_LAYER.items():
                weight = take(f"transformer.h.{i}.{theirs}.weight")
                new[f"blocks.{i}.{mine}.weight"] = weight.T if transposed else weight
                bias = rest.pop(f"transformer.h.{i}.{theirs}.bias", None)
                if cfg.bias:
                    new[f"blocks.{i}.{mine}.bias"] = bias
            rest.pop(f"transformer.h.{i}.attn.bias", None)  # the causal mask that old files carry
            rest.pop(f"transformer.h.{i}.attn.masked_bias", None)
        new["norm.weight"] = take("transformer.ln_f.weight")
        bias = rest.pop("transformer.ln_f.bias", None)
        if cfg.bias:
            new["norm.bias"] = bias
    else:
        new["norm.weight"] = take("model.norm.weight")
        for i in range(cfg.n_layer):
            prefix = f"model.layers.{i}."
            for mine, theirs in rotary_layer(cfg).items():
                new[f"blocks.{i}.{mine}.weight"] = take(f"{prefix}{theirs}.weight")
            fused = {"attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                     "mlp.up": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip
            widths = {"attn.qkv": qkv_widths(model.blocks[i].attn), "mlp.up": [intermediate_size(cfg)] * 2}
            for mine, parts in fused.items():
                sizes = zip(parts, widths[mine], strict=True)
                weights = [take(f"{prefix}{part}.weight", (width, cfg.n_embd)) for part, width in sizes]
                new[f"blocks.{i}.{mine}.weight"] = torch.cat(weights)
            rest.pop(f"{prefix}self_attn.rotary_emb.inv_freq", None)  # a constant that old files carry
    head = rest.pop("lm_head.weight", None)
    if model.lm_head is not None:
        if head is None:
            raise UserError(f"{where}: lm_head.weight is missing although tie_word_embeddings is false")
        new["lm_head.weight"] = head
    if rest:
        raise UserError(f"{where}: {len(rest)} tensors that the model does not have, such as {next(iter(rest))}")
    _copy(model, new, where)


@torch.no_grad()
def _copy(model: Transformer, new: dict[str, Tensor], where: str) -> None:
    for name, param in model.named_parameters():
        source = new.get(name)
        if source is None:
            raise UserError(f"{where}: nothing to fill {name} with")
        target = param
        if name in ("wte.weight", "lm_head.weight"):
            param.zero_()  # padding rows
            target = param[: model.cfg.vocab_size]
        if source.shape != target.shape:
            raise UserError(f"{where}: {name} has shape {tuple(source.shape)}, config.json says {tuple(target.shape)}")
        target.copy_(source)
