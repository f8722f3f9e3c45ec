"""Our weights under Hugging Face's names and back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from miaobi.errors import UserError, brief, number_of
from miaobi.model.config import ModelConfig
from miaobi.model.tensors import FLOATS
from miaobi.model.transformer import Transformer, head_dim, intermediate_size

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
FUSED = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
}
CONSTANT = re.compile(
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias)|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)
"""What old files carry: causal masks, angles."""
QWEN3_LAYER = LLAMA_LAYER | {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}


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
            widths = qkv_widths(block.attn)
            q, k, v = ours[f"blocks.{i}.attn.qkv.weight"].split(widths)
            if block.attn.qkv.bias is not None:
                for name, bias in zip("qkv", ours[f"blocks.{i}.attn.qkv.bias"].split(widths), strict=True):
                    out[f"{prefix}self_attn.{name}_proj.bias"] = bias
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


def hf_shapes(cfg: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of Hugging Face's weights, one by one: sizes may be a stranger's, and are no memory yet."""
    C, V, inner = cfg.n_embd, cfg.vocab_size, intermediate_size(cfg)
    if cfg.family == "gpt2":
        yield "transformer.wte.weight", (V, C)
        yield "transformer.wpe.weight", (cfg.block_size, C)
        for i in range(cfg.n_layer):
            prefix = f"transformer.h.{i}."
            sizes = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, inner), "mlp.c_proj": (inner, C)}
            for name, shape in {"ln_1": (C,), "ln_2": (C,), **sizes}.items():
                yield f"{prefix}{name}.weight", shape
        yield "transformer.ln_f.weight", (C,)
    else:
        D, H, kv = head_dim(cfg), cfg.n_head, cfg.n_kv_head or cfg.n_head
        yield "model.embed_tokens.weight", (V, C)
        for i in range(cfg.n_layer):
            prefix = f"model.layers.{i}."
            for name, rows in ("q", H * D), ("k", kv * D), ("v", kv * D):
                yield f"{prefix}self_attn.{name}_proj.weight", (rows, C)
                if cfg.family == "qwen2":
                    yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
                if cfg.family == "qwen3" and name != "v":
                    yield f"{prefix}self_attn.{name}_norm.weight", (D,)
            sizes = {"self_attn.o_proj": (C, H * D), "mlp.gate_proj": (inner, C), "mlp.up_proj": (inner, C),
                     "mlp.down_proj": (C, inner)}  # fmt: skip
            for name, shape in {"input_layernorm": (C,), "post_attention_layernorm": (C,), **sizes}.items():
                yield f"{prefix}{name}.weight", shape
        yield "model.norm.weight", (C,)
    if not cfg.tie_word_embeddings:
        yield "lm_head.weight", (V, C)


def check_hf(cfg: ModelConfig, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors by Hugging Face's full names, without the constants that old files carry.

    Raises UserError naming the first one that is missing, left over, of another shape, or not of finite numbers.
    """
    unused = dict(tensors)
    if cfg.family == "gpt2":
        unused = {
            (n if n.startswith(("transformer.", "lm_head.")) else f"transformer.{n}"): t for n, t in unused.items()
        }
    checked = {}
    for name, shape in hf_shapes(cfg):
        if name not in unused:
            if name == "lm_head.weight":
                raise UserError(f"{where}: lm_head.weight is missing although tie_word_embeddings is false")
            raise UserError(f"{where}: tensor {name} is missing; the checkpoint does not match its config.json")
        checked[name] = unused.pop(name)
        if checked[name].shape != shape:
            has = tuple(checked[name].shape)
            raise UserError(f"{where}: {name} has shape {has}, config.json says {shape}")
    for name in list(unused):
        weight = checked.get(f"{name.removesuffix('bias')}weight") if name.endswith(".bias") else None
        if cfg.family == "gpt2" and weight is not None:  # zeros, where `bias` is false
            bias = unused.pop(name)
            if bias.shape != weight.shape[-1:]:
                has = tuple(bias.shape)
                raise UserError(f"{where}: {name} has shape {has}, config.json says {tuple(weight.shape[-1:])}")
            checked[name] = bias
        elif CONSTANT.fullmatch(name) or name == "lm_head.weight":  # which is the embedding where those are tied
            del unused[name]
    if unused:
        first = brief(next(iter(unused))).strip("'")
        raise UserError(f"{where}: {number_of(len(unused), 'tensor')} that the model does not have, such as {first}")
    if cfg.bias:
        for name in [
            name for name in checked if name.endswith(".weight") and ".wte." not in name and ".wpe." not in name
        ]:
            if (bias := f"{name.removesuffix('weight')}bias") not in checked and name != "lm_head.weight":
                raise UserError(f"{where}: tensor {bias} is missing, though others have biases; copy the model again")
    refuse_unusable(where, checked)
    return checked


def refuse_unusable(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise UserError naming the first tensor from a file that cannot be weights: no fractions, or not finite.

    where: whose they are, in words.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{where}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, not the numbers of a "
                            "model; take the one whose weights are not quantized")  # fmt: skip
        if not is_finite(tensor):
            raise UserError(f"{where}: {name} has numbers that are not finite (nan or inf): it was damaged, or the "
                            "run that wrote it diverged; copy it again, or use an older checkpoint")  # fmt: skip


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no nan or infinity in it. The sum of all, in one pass: it is neither where none of them is;
    where it overflowed, each is looked at.
    """
    return bool(tensor.sum(dtype=torch.float32).isfinite()) or bool(tensor.float().isfinite().all())


@torch.no_grad()
def load_hf(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy Hugging Face weights, of which `check_hf` found nothing wrong, into `model`, whose config is theirs."""
    cfg, ours = model.cfg, dict(model.named_parameters())

    def fill(name: str, *parts: Tensor) -> None:
        target, at = ours.pop(name), 0
        for part in parts:
            target[at : at + len(part)] = part
            at += len(part)
        target[at:] = 0  # padding rows

    if cfg.family == "gpt2":
        fill("wte.weight", tensors["transformer.wte.weight"])
        fill("wpe.weight", tensors["transformer.wpe.weight"])
        layers = {mine: ((theirs,), transposed) for mine, (theirs, transposed) in GPT2_LAYER.items()}
        prefix, norm = "transformer.h", "transformer.ln_f"
    else:
        fill("wte.weight", tensors["model.embed_tokens.weight"])
        layers = {mine: ((theirs,), False) for mine, theirs in rotary_layer(cfg).items()}
        layers |= {mine: (parts, False) for mine, parts in FUSED.items()}
        prefix, norm = "model.layers", "model.norm"
    names = [(f"blocks.{i}.{mine}", [f"{prefix}.{i}.{part}" for part in parts], transposed)
             for i in range(cfg.n_layer) for mine, (parts, transposed) in layers.items()]  # fmt: skip
    for mine, parts, transposed in [*names, ("norm", [norm], False)]:
        weights = [tensors[f"{part}.weight"] for part in parts]
        fill(f"{mine}.weight", *(weight.T if transposed else weight for weight in weights))
        if f"{mine}.bias" in ours:
            fill(f"{mine}.bias", *(tensors[f"{part}.bias"] for part in parts))
    if model.lm_head is not None:
        fill("lm_head.weight", tensors["lm_head.weight"])
