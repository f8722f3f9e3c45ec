"""A model directory is a Hugging Face model directory: written whole or not at all, read without executing anything."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.files import pointed, read_json, write_json
from miaobi.model.families import hf_config, load_hf, model_config, to_hf
from miaobi.model.hub import resolve
from miaobi.model.transformer import Transformer

WRITTEN_ANEW = ("eos_token_id", "transformers_version", "_from_model_config")  # of generation_config.json


def save_model(directory: Path, model: Transformer, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> None:
    """Write config.json, model.safetensors, tokenizer and generation_config.json into an existing directory.

    end_ids: tokens that end a text or a turn, the one that ends a document last; empty where the model saw none.
    How a tuned model is to be sampled stays as its makers said, and what begins a text, which its tokenizer knows too.
    """
    config = hf_config(model.cfg, end_ids)
    if model.generation is not None:
        config["bos_token_id"] = model.generation.get("bos_token_id")
    write_json(directory / "config.json", config)
    ends = [*(id_ for id_ in model.end_ids if id_ not in end_ids), *end_ids]  # what ended a text before still does
    generation = {"bos_token_id": config["bos_token_id"], "pad_token_id": None, "do_sample": True}
    generation |= model.generation or {}
    generation["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    if tokenizer.pad_id is not None:
        generation["pad_token_id"] = tokenizer.pad_id
    write_json(directory / "generation_config.json", generation)
    save_tensors(directory / "model.safetensors", {k: v.cpu() for k, v in to_hf(model).items()})
    tokenizer.save(directory, model_max_length=model.cfg.block_size)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file. Raises OSError, also for a full disk."""
    try:
        save_file(tensors, path, {"format": "pt"})
    except SafetensorError as e:  # how it reports a full disk
        raise OSError(f"{path.name} was not written whole ({e})") from e


def model_directory(name: str | Path, checkpoint: str = "best") -> Path:
    """The model directory that a MODEL argument means.

    name: a run directory (its `checkpoint`: best, last or step-N), a model directory, or a hub name (`resolve`).
    Raises UserError if there is none.
    """
    path = resolve(str(name))
    if (path / "config.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        found = pointed(path / "checkpoints" / checkpoint)
        if found is None and checkpoint == "best":
            found = pointed(path / "checkpoints" / "last")  # interrupted before its first evaluation
        if found is not None:
            return found
        there = sorted(p.name for p in (path / "checkpoints").iterdir() if not p.name.startswith("."))
        raise UserError(f"{path} has no checkpoint {checkpoint!r}; it has: {', '.join(there) or 'none yet'}")
    if not path.exists():
        raise UserError(f"no model at {path}: no such directory. Give a run directory (out_dir of `miaobi train`) "
                        "a Hugging Face model directory, or a model of the hub as OWNER/NAME")  # fmt: skip
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path} is a PEFT adapter, not a whole model: merge it into its base with PEFT's "
                        "merge_and_unload(), and give the directory that save_pretrained() then writes")  # fmt: skip
    raise UserError(f"no model at {path}: neither config.json nor checkpoints/ in it")


def ends_documents(name: str | Path, checkpoint: str = "best") -> bool:
    """Whether the model was trained on documents that end in an end-of-text token."""
    return read_json(model_directory(name, checkpoint) / "config.json").get("eos_token_id") is not None


def end_ids(path: Path) -> tuple[int, ...]:
    """Tokens that end a text or a turn, as a model directory says; often more than one in a chat model.

    generation_config.json is asked first, then config.json. Raises UserError for a damaged file.
    """
    for file in ("generation_config.json", "config.json"):
        named = read_json(path / file).get("eos_token_id")
        if named is not None:
            ids = named if isinstance(named, list) else [named]
            if not all(type(id_) is int for id_ in ids):
                raise UserError(f"{path / file}: eos_token_id is {named!r}; it must be a token id, or a list of them")
            return tuple(ids)
    return ()


def generation_settings(path: Path) -> dict[str, Any]:
    """What generation_config.json says besides what ends a text, and the bos_token_id. Raises UserError if damaged."""
    told = read_json(path / "generation_config.json")
    settings = {key: value for key, value in told.items() if key not in WRITTEN_ANEW}
    return {"bos_token_id": read_json(path / "config.json").get("bos_token_id")} | settings


class Unfilled(TorchFunctionMode):
    """Weights about to be read from a file are born without random values.

    (The `meta` device does that too, but its first operations import sympy and all of dynamo: 3 s and more.)
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load_model(name: str | Path, checkpoint: str = "best") -> tuple[Transformer, Tokenizer]:
    """Read a model directory (see `model_directory`) into a float32 model on the CPU, and its tokenizer.

    Raises UserError for files that are missing, cut short, or do not fit together.
    """
    path = model_directory(name, checkpoint)
    hf = read_json(path / "config.json")
    try:
        tensors = read_tensors(path)
        cfg = model_config(hf, tensors)
    except KeyError as e:
        raise UserError(f"{path / 'config.json'} has no key {e}") from e
    except TypeError as e:
        raise UserError(f"{path / 'config.json'} has a value of the wrong kind ({e})") from e
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, config.json says vocab_size is "
                        f"{cfg.vocab_size}; they are not of one model")  # fmt: skip
    with Unfilled():
        model = Transformer(cfg)
    load_hf(model, tensors, str(path))
    model.end_ids, model.generation = end_ids(path), generation_settings(path)
    return model, tokenizer


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of model.safetensors or pytorch_model.bin (weights only: no code in it can run), whole or in shards.

    Raises UserError for files that are missing, cut short or altered.
    """
    for whole, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pickle)):
        index = path / f"{whole}.index.json"
        if (path / whole).is_file():
            return read(path / whole)
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict):
                raise UserError(f"{index.name} is damaged (it has no weight_map); copy it again")
            tensors: dict[str, Tensor] = {}
            for name in sorted(set(names.values())):
                tensors |= read(path / Path(name).name)
            return tensors
    raise UserError("there is no model.safetensors or pytorch_model.bin")


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Tensors of one .safetensors file. Raises UserError if it is not whole."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as e:
        raise UserError(
            f"{file.name} cannot be read ({e}); it was cut short or altered: copy it again, "
            "or use another checkpoint (--checkpoint=last)"
        ) from e


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Tensors of one .bin file. Raises UserError if it is not whole, or holds anything but tensors."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise UserError(f"{file.name} cannot be read as plain weights ({e}); copy it again") from e
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{file.name} holds more than named tensors; it is not a Hugging Face model's")
    return tensors
