"""LoRA (Hu et al., arXiv:2106.09685): frozen W plus alpha/r · B A, in memory and in PEFT's adapter directories."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from miaobi.errors import UserError, brief, number_of
from miaobi.files import read_whole, write_json
from miaobi.model.checkpoint import save_tensors
from miaobi.model.config import LoraConfig, ModelConfig
from miaobi.model.families import qkv_widths, refuse_unusable
from miaobi.model.transformer import Block, Transformer

# Our linears -> the modules of Hugging Face that each one holds.
GPT2_MODULES = {
    "attn.qkv": ("attn.c_attn",),
    "attn.proj": ("attn.c_proj",),
    "mlp.up": ("mlp.c_fc",),
    "mlp.down": ("mlp.c_proj",),
}
LLAMA_MODULES = {  # of qwen3 too
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "mlp.up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
PLAIN = {  # settings of a PEFT adapter that is nothing but B A on some linears
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_rslora": (False,),
    "use_dora": (False,),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # the others change the base weights too
}


class LoRALinear(nn.Linear):
    """A linear layer whose own weight is frozen, plus alpha/r · B A x.

    Our linears are fused, PEFT's are not: each of the `parts` (row counts, P of them) has an A and a B of its own,
    stacked in lora_A (P r, in_features) and lora_B (out_features, r). The frozen weight and bias keep their names.
    """

    def __init__(self, linear: nn.Linear, parts: list[int], cfg: LoraConfig) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.parts, self.rank, self.dropout = parts, cfg.lora_rank, cfg.lora_dropout
        self.scaling = cfg.lora_alpha / cfg.lora_rank
        self.lora_A = nn.Parameter(linear.weight.new_empty(len(parts) * self.rank, self.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(self.out_features, self.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as PEFT; B = 0: a new adapter changes nothing
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A) * self.scaling  # (..., P r)
        pairs = zip(low.split(self.rank, dim=-1), self.lora_B.split(self.parts), strict=True)
        return F.linear(x, self.weight, self.bias) + torch.cat([F.linear(part, B) for part, B in pairs], dim=-1)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + alpha/r · B A: (out_features, in_features)."""
        pairs = zip(self.lora_B.split(self.parts), self.lora_A.split(self.rank), strict=True)
        return self.weight + self.scaling * torch.cat([B @ A for B, A in pairs])


def modules_of(cfg: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our linears of a block -> Hugging Face's modules."""
    return GPT2_MODULES if cfg.family == "gpt2" else LLAMA_MODULES


def part_rows(block: Block, name: str, parts: int) -> list[int]:
    """Rows of each of Hugging Face's modules in our linear `name`."""
    if parts == 3:
        return qkv_widths(block.attn)
    rows = block.get_submodule(name).out_features
    return [rows // parts] * parts


def add_lora(model: Transformer, cfg: LoraConfig) -> None:
    """Freeze every weight of `model` and add an adapter to the linears of its blocks, in place.

    The global random state decides A. The logits stay what they were, bit for bit.
    """
    model.requires_grad_(False)
    for block in model.blocks:
        for name, modules in modules_of(model.cfg).items():
            if cfg.lora_targets == "all" or name.startswith("attn."):
                adapted = LoRALinear(block.get_submodule(name), part_rows(block, name, len(modules)), cfg)
                block.set_submodule(name, adapted)


def adapters(model: Transformer) -> Iterator[tuple[str, LoRALinear]]:
    """(name, module) of every adapted linear, such as blocks.0.attn.qkv."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def adapter_parameters(model: Transformer) -> int:
    """Numbers in all A and B."""
    return sum(module.lora_A.numel() + module.lora_B.numel() for _, module in adapters(model))


def merged(model: Transformer) -> Transformer:
    """A plain model that computes the same: W + alpha/r · B A in place of W and adapter.

    Weights without an adapter are shared with `model`, not copied. A model without adapters is returned as it is.
    """
    if not any(adapters(model)):
        return model
    plain = copy.deepcopy(model, {id(shared): shared for shared in (*model.parameters(), model.rope)})
    for name, module in list(adapters(plain)):
        linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(module.merged_weight(), requires_grad=False), module.bias
        plain.set_submodule(name, linear.train(module.training))
    return plain


def peft_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every A (r, in) and B (out, r) under PEFT's name, as views into the model's own parameters."""
    prefix = "transformer.h" if model.cfg.family == "gpt2" else "model.layers"
    out = {}
    for name, module in adapters(model):
        _, i, linear = name.split(".", 2)
        modules = modules_of(model.cfg)[linear]
        for letter, parts in ("A", module.lora_A.split(module.rank)), ("B", module.lora_B.split(module.parts)):
            for theirs, part in zip(modules, parts, strict=True):
                out[f"base_model.model.{prefix}.{i}.{theirs}.lora_{letter}.weight"] = part.detach()
    return out


def save_adapter(directory: Path, model: Transformer, base_name: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT reads them, into an existing directory.

    base_name: where PEFT finds the base model. Raises OSError.
    """
    adapted = dict(adapters(model))
    one, gpt2 = next(iter(adapted.values())), model.cfg.family == "gpt2"
    linears = {name.split(".", 2)[2] for name in adapted}
    modules = [theirs for ours, parts in modules_of(model.cfg).items() if ours in linears for theirs in parts]
    alpha = one.scaling * one.rank
    write_json(
        directory / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "r": one.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": one.dropout,
            # PEFT matches the ends of names; GPT-2 has two c_proj, distinguished by their parent module
            "target_modules": modules if gpt2 else [theirs.split(".")[1] for theirs in modules],
            "fan_in_fan_out": gpt2,  # Conv1D stores its weight transposed
            "bias": "none",
            "modules_to_save": None,
        },
    )
    tensors = {name: t.to("cpu", copy=True) for name, t in peft_tensors(model).items()}  # no two in one storage
    save_tensors(directory / "adapter_model.safetensors", tensors)


def read_adapter(directory: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Settings and tensors of a PEFT adapter directory.

    Raises UserError for files that are missing or damaged, and for kinds of LoRA that do more than B A.
    """
    config, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    try:
        peft = json.loads(read_whole(config).decode())
        tensors = load_file(weights)
        refuse_unusable(str(directory), tensors)
        for key, plain in PLAIN.items():
            if (value := peft.get(key, plain[0])) not in plain:
                raise UserError(f"{config} has {key}={brief(value)}; only plain LoRA is read: merge the adapter with "
                                "PEFT's merge_and_unload() and use the model it saves")  # fmt: skip
        ranks = {len(tensor) for name, tensor in tensors.items() if ".lora_A." in name and tensor.ndim == 2}
        if type(peft["r"]) is not int or ranks != {peft["r"]}:  # before anything of that size is made
            raise ValueError(f"adapter_config.json has r={brief(peft['r'])}, its matrices have {sorted(ranks)}")
        targets = "all" if any(".mlp." in name for name in tensors) else "attention"
        return LoraConfig(peft["r"], peft["lora_alpha"], peft.get("lora_dropout") or 0.0, targets), tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as e:
        raise UserError(f"{directory} is not a PEFT adapter that can be read ({e}): adapter_config.json and "
                        "adapter_model.safetensors must both be there, whole; copy them again") from e  # fmt: skip


@torch.no_grad()
def load_adapter(directory: Path, model: Transformer) -> None:
    """Fill the adapters of `model` from a PEFT adapter directory; a plain model gets them first, as the directory says.

    Matrices that PEFT left alone (q and v adapted, k not) then have A = B = 0, where no gradient ever arises.
    Raises UserError for an adapter that does not fit.
    """
    cfg, theirs = read_adapter(directory)
    whole = any(adapters(model))
    if not whole:
        add_lora(model, cfg)
    pairs = {name.replace("lora_B", "lora_A") for name in theirs}
    for name, ours in peft_tensors(model).items():
        saved = theirs.pop(name, None)
        if saved is None and (whole or name.replace("lora_B", "lora_A") in pairs):
            raise UserError(f"{directory} has no {name}: it was trained with other --lora_targets, or is damaged")
        if saved is not None and saved.shape != ours.shape:
            raise UserError(f"{directory}: {name} has shape {tuple(saved.shape)}, the model and its lora_rank ask "
                            f"for {tuple(ours.shape)}: the adapter belongs to another model or rank")  # fmt: skip
        ours.copy_(saved if saved is not None else torch.zeros(()))
    if theirs:
        raise UserError(f"{directory}: {number_of(len(theirs), 'tensor')} that the model has no place for, such as "
                        f"{next(iter(theirs))}: the adapter belongs to another model")  # fmt: skip
