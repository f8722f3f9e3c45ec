"""Other projects' GPT checkpoints: read without executing anything, converted to our decoder, and saved."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from miaobi import __version__
from miaobi.checksums import Checksums
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError, brief, number_of
from miaobi.files import read_whole, sha256, write_json, written_whole
from miaobi.model.card import USAGE, Card, write_card
from miaobi.model.checkpoint import save_model
from miaobi.model.config import ModelConfig
from miaobi.model.tensors import is_plain, load_plain
from miaobi.model.transformer import VOCAB_MULTIPLE, Transformer

RECORD = "converted.json"
"""In a converted model directory: which files it was made from."""
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A torch.save file of plain values and tensors; tensors of a zipped one stay on the disk until they are used.

    Raises UserError if it is missing, cut short, or holds anything that would have to be executed.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    checkpoint = load_plain(path, mmap=True)
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint with its settings")
    return checkpoint


def read_sizes(values: dict[str, Any], path: Path, project: str) -> dict[str, int]:
    """The sizes that a checkpoint states. Raises UserError where one is missing or is no size."""
    for key in SIZES:
        value = values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 24:
            raise UserError(
                f"{path}: {key} is {brief(value)}, which is no size; {project} did not write this checkpoint"
            )
    return {key: values[key] for key in SIZES}


def read_bias(values: dict[str, Any], absent: bool, path: Path) -> bool:
    """Whether a checkpoint has biases; `absent` where it does not say. Raises UserError where that is neither."""
    value = values.get("bias", absent)
    if type(value) is not bool:
        raise UserError(
            f"{path}: bias is {brief(value)}, which is neither True nor False; it was altered, get it again"
        )
    return value


def build(cfg: ModelConfig, state: Any, layer: dict[str, tuple[str, ...]], mask: str, path: Path) -> Transformer:
    """A float32 model on the CPU from another project's weights.

    Args:
        cfg: what the checkpoint says about itself.
        state: its state dict.
        layer: our modules of a block -> theirs; several are stacked into one.
        mask: their buffer in a block with the causal mask.
        path: the file, for messages.

    Raises:
        UserError: a tensor is missing, left over, of another shape than `cfg` gives, or the output layer is not the
            embedding.
    """
    unused = _their_tensors(state, mask, cfg.n_layer, path)
    with torch.device("meta"):
        model = Transformer(cfg)
    names = _their_names(model, layer)
    for name, parameter in model.named_parameters():
        rows = cfg.vocab_size if name == "wte.weight" else len(parameter)  # without padding rows
        expected = (rows // len(names[name]), *parameter.shape[1:])
        for theirs in names[name]:
            if theirs not in unused:
                raise UserError(f"{path}: tensor {theirs} is missing, though its own settings ask for it; get it again")
            if unused[theirs].shape != expected:
                has = tuple(unused[theirs].shape)
                raise UserError(f"{path}: {theirs} has shape {has}, its own settings say {expected}; get it again")
    head = unused.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, unused["transformer.wte.weight"]):
        raise UserError(f"{path}: lm_head.weight is not the embedding; only tied output layers can be converted")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = torch.cat([unused.pop(theirs) for theirs in names[name]])
            parameter[: len(source)] = source
            parameter[len(source) :] = 0  # padding rows
    if unused:
        raise UserError(
            f"{path}: {number_of(len(unused), 'tensor')} too many for its own settings, such as {next(iter(unused))}"
        )
    return model


def _their_tensors(state: Any, mask: str, n_layer: int, path: Path) -> dict[str, Tensor]:
    """A state dict without the prefixes of torch.compile and DDP, and without masks."""
    if not isinstance(state, dict) or not all(map(is_plain, state.values())):
        raise UserError(f"{path}: its weights are not a table of tensors; it was altered, get it again")
    tensors = {name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in state.items()}
    blocks = {int(number) for number in re.findall(r"^transformer\.h\.(\d{1,9})\.", "\n".join(tensors), re.MULTILINE)}
    if n_layer != len(blocks):
        raise UserError(
            f"{path} says n_layer={n_layer}, but has weights of {number_of(len(blocks), 'block')}; get it again"
        )
    for i in blocks:
        tensors.pop(f"transformer.h.{i}.{mask}", None)
    return tensors


def _their_names(model: Transformer, layer: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Our parameters -> theirs, under the names that nanoGPT and small-gpt share outside of the blocks."""
    outside = {"wte.weight": "transformer.wte.weight", "wpe.weight": "transformer.wpe.weight",
               "norm.weight": "transformer.ln_f.weight", "norm.bias": "transformer.ln_f.bias"}  # fmt: skip
    names = {}
    for name, _ in model.named_parameters():
        if name in outside:
            names[name] = (outside[name],)
        else:
            _, i, module = name.split(".", 2)
            module, kind = module.rsplit(".", 1)
            names[name] = tuple(f"transformer.h.{i}.{theirs}.{kind}" for theirs in layer[module])
    return names


def append_rows(model: Transformer, row: Tensor, count: int) -> None:
    """`count` more tokens behind the others, each with the embedding `row` (C,)."""
    V = model.cfg.vocab_size
    wte = nn.Embedding(math.ceil((V + count) / VOCAB_MULTIPLE) * VOCAB_MULTIPLE, model.cfg.n_embd)
    with torch.no_grad():
        wte.weight.zero_()
        wte.weight[:V] = model.wte.weight[:V]
        wte.weight[V : V + count] = row
    model.wte, model.cfg = wte, replace(model.cfg, vocab_size=V + count)


# The directory that is written


def check_out(out: Path) -> None:
    """Raises UserError when `out` holds anything but an earlier conversion: it would be replaced."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; give the name of a directory that is to be made")
    if out.is_dir() and any(out.iterdir()) and not (out / RECORD).is_file():
        raise UserError(f"--out={out} holds files that miaobi convert did not write; choose a new directory")


def write(
    out: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    end_ids: tuple[int, ...],
    record: dict[str, Any],
    license: str | None = None,
) -> None:
    """The model directory with its card, whole or not at all. end_ids: as `save_model` takes them."""
    check_out(out)
    with written_whole(out) as directory:
        save_model(directory, model, tokenizer, end_ids)
        write_json(directory / RECORD, record | {"miaobi": __version__})
        with Checksums() as checksums:
            checksums.write(directory)
        write_card(directory, card_of(out, model, record, license), out)


def card_of(out: Path, model: Transformer, record: dict[str, Any], license: str | None) -> Card:
    """What the README of a converted model says."""
    size = f"{model.num_parameters() / 1e6:.1f}M"
    made = {what: found for what, found in record.items() if isinstance(found, dict) and "sha256" in found}
    names = {what: f"{found['name']} ({found['sha256']})" for what, found in made.items()}
    return Card(
        name=out.resolve().name,
        summary=f"A language model 语言模型 of {size} parameters, converted from a checkpoint of {record['project']} "
        "by miaobi 妙笔.",
        tags=(model.cfg.family,),
        license=license,
        usage=USAGE,
        facts={"converted from": record["project"], **{f"{what} (SHA-256)": name for what, name in names.items()}},
        settings={key: getattr(model.cfg, key) for key in ("family", *SIZES, "bias", "activation")},
    )


def fingerprint(path: Path) -> dict[str, Any]:
    """Name, size, time and SHA-256 of a file, by which a later look finds it unchanged."""
    status = path.stat()
    return {"name": path.name, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256(path)}


def is_unchanged(path: Path, known: Any) -> bool:
    """Whether `path` is the file of a `fingerprint`; its bytes are only read when nothing but its time is new."""
    if not isinstance(known, dict) or path.stat().st_size != known.get("size"):
        return False
    return path.stat().st_mtime_ns == known.get("mtime_ns") or fingerprint(path)["sha256"] == known.get("sha256")


def read_record(out: Path) -> dict[str, Any]:
    """What `write` recorded; nothing where it was another version of miaobi, or nobody."""
    try:
        record = json.loads(read_whole(out / RECORD).decode())
    except (UserError, OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and record.get("miaobi") == __version__ else {}
