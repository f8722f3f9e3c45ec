"""Weights as whole numbers of 8 or 4 bits with scales, in a model directory and back. States stay floats.

In model.safetensors a matrix of N outputs and K inputs is

- int8:  `NAME.weight` int8 (N, K), `NAME.weight_scale` float32 (N, 1): a scale per row, symmetric around 0;
- int4:  `NAME.weight` uint8 (N, K/2), column 2i in the low half of byte i, column 2i+1 in the high one, each plus 8;
         `NAME.weight_scale` bfloat16 (N, K/32 rounded up): a scale for every 32 columns.

The embedding and the output matrix are int8 in both (errors there are in every logit), positions, norms and biases
stay floats. GPT-2's matrices, which Hugging Face transposes, stand here as all others do. config.json says
`quantization_config: {"quant_method": "miaobi", "bits": 8 or 4, "group_size": 32, ...}`, with the model_type and
architectures that it had, and a model_type that transformers refuses: it would take int8 for the weights themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from miaobi.errors import UserError, brief

METHOD = "miaobi"
MODEL_TYPE = "miaobi-quantized"
GROUP = 32
"""Columns that share a scale in int4."""
SCALE = "_scale"
TRANSPOSED = re.compile(r"(.*\.)?h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
TABLES = ("wte.weight", "embed_tokens.weight", "lm_head.weight")
FLOATING = ("wpe.weight", "score.weight")
"""Matrices that stay floats: positions, which are added, and a classifier's few rows."""
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of a group's largest weight that may become the end of the scale; the one with the least error is taken."""
TINY = torch.finfo(torch.float32).tiny


def kind_of(config: Mapping[str, Any]) -> str | None:
    """int8 or int4 where a config.json of ours says so, else None."""
    said = config.get("quantization_config")
    if not isinstance(said, Mapping) or said.get("quant_method") != METHOD:
        return None
    return {8: "int8", 4: "int4"}.get(said.get("bits")) if type(said.get("bits")) is int else None


def config_of(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The config.json of the model once it is int8 or int4."""
    named = {key: config.get(key) for key in ("model_type", "architectures")}
    said = {"quant_method": METHOD, "bits": {"int8": 8, "int4": 4}[kind], "group_size": GROUP, **named}
    return {**config, "model_type": MODEL_TYPE, "architectures": [MODEL_TYPE], "quantization_config": said}


def original_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of the model before `config_of`; any other as it is."""
    if kind_of(config) is None:
        return config
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    return rest | {key: config["quantization_config"].get(key) for key in ("model_type", "architectures")}


def quantize(tensors: Mapping[str, Tensor], kind: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under Hugging Face's names, the matrices among them as int8 or int4. Returns also the names of those
    that stay floats though they are matrices: of an odd number of columns.
    """
    out, kept = {}, []
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or name.endswith(FLOATING):
            out[name] = tensor
            continue
        weight = (tensor.T if TRANSPOSED.fullmatch(name) else tensor).float()
        if kind == "int8" or name.endswith(TABLES):
            out[name], out[name + SCALE] = eight_bits(weight)
        elif weight.shape[1] % 2 == 0:
            out[name], out[name + SCALE] = four_bits(weight)
        else:
            out[name] = tensor
            kept.append(name)
    return {name: tensor.contiguous() for name, tensor in out.items()}, kept


def eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> int8 (N, K), symmetric around 0, and the scale of each row, float32 (N, 1): weight ~ int8 * scale."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=TINY) / 127
    return (weight / scale).round().to(torch.int8), scale


def four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K), K even -> two columns a byte, uint8 (N, K/2), and the scale of each group, bfloat16 (N, K/32 rounded up).
    Of several scales a group gets the one with the least squared error.
    """
    rows, columns = weight.shape
    groups = F.pad(weight, (0, -columns % GROUP)).view(rows, -1, GROUP)
    end = groups.abs().amax(-1, keepdim=True).clamp(min=TINY * 256) / 7
    best, least = end.bfloat16().float(), torch.full_like(end, float("inf"))
    for share in CLIPS:
        scale = (end * share).bfloat16().float()
        error = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    whole = ((groups / best).round().clamp(-8, 7) + 8).to(torch.uint8).view(rows, -1)[:, :columns]
    return whole[:, ::2] | whole[:, 1::2] << 4, best[..., 0].bfloat16()


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under Hugging Face's names with whole numbers and scales as float32; all others as they are.

    Raises UserError for whole numbers whose scales do not fit.
    """
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(f".weight{SCALE}"):
            if name.removesuffix(SCALE) not in tensors:
                raise UserError(f"{brief(name)} is the scale of no weight; copy the model again")
            continue
        scale = tensors.get(name + SCALE)
        if scale is not None:
            tensor = _widened(name, tensor, scale)
            tensor = tensor.T.contiguous() if TRANSPOSED.fullmatch(name) else tensor
        out[name] = tensor
    return out


def _widened(name: str, whole: Tensor, scale: Tensor) -> Tensor:
    """One matrix in float32 (N, K)."""
    columns = {torch.int8: 1, torch.uint8: 2}.get(whole.dtype, 0) * (whole.shape[1] if whole.ndim == 2 else 0)
    groups = 1 if whole.dtype == torch.int8 else -(-columns // GROUP)
    if not columns or scale.shape != (len(whole), groups) or not scale.is_floating_point():
        raise UserError(f"{brief(name)} has whole numbers {tuple(whole.shape)} with scales {tuple(scale.shape)}, which "
                        "do not fit; copy the model again")  # fmt: skip
    if whole.dtype == torch.int8:
        return whole.float() * scale.float()
    numbers = torch.stack((whole & 15, whole >> 4), -1).flatten(1).float() - 8
    return numbers.mul_(scale.float().repeat_interleave(GROUP, 1)[:, :columns])
