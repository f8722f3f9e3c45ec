"""`miaobi convert quantize`: a MODEL of 8 or 4 bits a weight, in a directory that every verb here reads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from miaobi import __version__
from miaobi.console import log
from miaobi.convert.config import QuantizeConfig
from miaobi.convert.reading import RECORD, check_out
from miaobi.errors import UserError
from miaobi.files import CHECKSUMS, Checksums, read_json, verifying, write_json, written_whole
from miaobi.model import quantized
from miaobi.model.card import CARD, Card, write_card
from miaobi.model.checkpoint import WEIGHED, model_directory, save_tensors
from miaobi.model.tensors import FLOATS, is_plain, read_tensors

WEIGHTS = (".safetensors", ".bin", ".index.json", ".pt", ".gguf")
LEFT_OUT = {CARD, CHECKSUMS, RECORD, "config.json"}


def convert(cfg: QuantizeConfig) -> dict[str, Any]:
    """Write the directory. Returns out, dtype, bytes and bytes_before of the weights, and kept_in_float: the names of
    matrices that stay as they are.

    Raises UserError for a MODEL that is quantized already, and what `read_tensors` raises.
    """
    source = model_directory(cfg.model, cfg.checkpoint)
    config = read_json(source / "config.json")
    if config.get("quantization_config"):
        raise UserError(f"{source} is quantized already; take the model that it was made from")
    with verifying(source, lambda name: name in WEIGHED):
        tensors = read_tensors(source)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or not is_plain(tensor) or not bool(tensor.isfinite().all()):
            raise UserError(f"{source}: {name} holds something else than finite numbers; copy the model again")
    own = Path(cfg.model).resolve().name if Path(cfg.model).exists() else cfg.model.rpartition("/")[2]
    out = cfg.out or Path(f"{own}-{cfg.dtype}")
    check_out(out)
    whole, kept = quantized.quantize(tensors, cfg.dtype)
    with written_whole(out) as directory:
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith(WEIGHTS) and file.name not in LEFT_OUT:
                shutil.copyfile(file, directory / file.name)
        write_json(directory / "config.json", quantized.config_of(config, cfg.dtype))
        save_tensors(directory / "model.safetensors", whole)
        write_json(directory / RECORD, {"project": "miaobi", "quantized": cfg.dtype, "miaobi": __version__})
        with Checksums() as checksums:
            checksums.write(directory)
        write_card(directory, card_of(out, own, cfg), out)
    if kept:
        log(f"{len(kept)} matrices have an odd number of columns and stay as they are, such as {kept[0]}")
    return {
        "out": str(out),
        "dtype": cfg.dtype,
        "bytes": (out / "model.safetensors").stat().st_size,
        "bytes_before": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "kept_in_float": kept,
    }


def card_of(out: Path, source: str, cfg: QuantizeConfig) -> Card:
    """What the README says: above all who can read it."""
    return Card(
        name=out.resolve().name,
        summary=f"{source} with weights of {cfg.dtype[3:]} bits 权重为 {cfg.dtype[3:]} 位整数. For miaobi 妙笔 alone: "
        "transformers, vLLM and PEFT do not read this layout 其他程序读不了; give them the model it was made from, "
        "and llama.cpp a file of `miaobi convert gguf`.",
        library="miaobi",
        tags=(cfg.dtype,),
        license=cfg.license,
        usage='import miaobi\n\nmodel = miaobi.load(".")  # this directory',
        facts={"made from": source, "weights": cfg.dtype},
    )
