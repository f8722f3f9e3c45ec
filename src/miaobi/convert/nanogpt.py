"""nanoGPT's checkpoints (`ckpt.pt`): characters by their meta.pkl, or GPT-2's BPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from miaobi.console import warn
from miaobi.convert import reading
from miaobi.convert.config import NanoGPTConfig
from miaobi.corpus.nanogpt import character_tokenizer, read_characters
from miaobi.corpus.tokenizer import BYTE_PIECES, EOT, Tokenizer
from miaobi.errors import UserError
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import VOCAB_MULTIPLE, Transformer

LAYER = {
    "attn_norm": ("ln_1",),
    "attn.qkv": ("attn.c_attn",),
    "attn.proj": ("attn.c_proj",),
    "mlp_norm": ("ln_2",),
    "mlp.up": ("mlp.c_fc",),
    "mlp.down": ("mlp.c_proj",),
}
MASK = "attn.bias"
"""Kept by the code path without flash attention."""
MOST_FOR_SPARE_ROWS = 0.01
"""A model that has learned gives rows that no text has less of its probability; another text's tokens get more."""


def convert(
    path: Path, meta: str | None, tokenizer_dir: str | None, out: Path, license: str | None = None
) -> dict[str, Any]:
    """Write the model directory `out` from a checkpoint and either its meta.pkl or a directory with GPT-2's tokenizer.

    nanoGPT pads GPT-2's 50,257 tokens to 50,304, takes those also where train.py found no meta.pkl, and its users pad
    to multiples of 64: rows beyond the vocabulary are kept, as spare ones.

    Returns out, parameters, vocab_size, spare_rows, step, and doubt: why the vocabulary may be another one, or None.
    Raises UserError for files that are missing, damaged, of something else, or that do not belong together.
    """
    checkpoint = read(path)
    reading.check_out(out)
    if (meta is None) == (tokenizer_dir is None):
        raise UserError(_which_tokenizer(checkpoint, path))
    cfg = model_config(checkpoint, path)
    rows = cfg.vocab_size
    if meta is not None:
        pieces = read_characters(Path(meta).expanduser())
        tokenizer = character_tokenizer(pieces, [], first_byte=rows, config={})
        size, source = len(pieces), meta
    else:
        loaded = Tokenizer.load(Path(tokenizer_dir).expanduser())
        tokenizer = Tokenizer(loaded.backend, {"eos_token": EOT})  # nothing else of the other model's configuration
        size, source = tokenizer.vocab_size, tokenizer_dir
    if rows != size and (rows < size or rows % VOCAB_MULTIPLE):
        raise UserError(f"{path} has {rows:,} tokens, {source} has {size:,}: it is not the vocabulary that this model "
                        "was trained with; give that one")  # fmt: skip
    model = reading.build(cfg, checkpoint["model"], LAYER, MASK, path)
    doubts = doubt(model, size, path, source) if rows - size >= VOCAB_MULTIPLE else None
    if doubts is not None:
        warn(doubts)
    if meta is not None:
        reading.append_rows(model, least_expected(model), len(BYTE_PIECES))
    record = {"project": "nanoGPT", "checkpoint": reading.fingerprint(path), "doubt": doubts}
    end_ids = () if tokenizer.eot_id is None else (tokenizer.eot_id,)
    reading.write(out, model, tokenizer, end_ids, record, license)
    return {
        "out": str(out),
        "parameters": model.num_parameters(),
        "vocab_size": model.cfg.vocab_size,
        "spare_rows": rows - size,
        "step": checkpoint.get("iter_num"),
        "doubt": doubts,
    }


def doubt(model: Transformer, known: int, path: Path, source: str) -> str | None:
    """Why a vocabulary of `known` tokens is probably not the model's: it expects other rows. None if it does not."""
    share = float(expected(model, known)[known:].sum())
    if share <= MOST_FOR_SPARE_ROWS:
        return None
    return (
        f"{source} is probably not the vocabulary of {path}: {model.cfg.vocab_size - known:,} of its "
        f"{model.cfg.vocab_size:,} rows would be padding, but it expects those {share:.0%} of the time. "
        "Unless it hardly learned, give the vocabulary that it was trained with"
    )


def convert_checkpoint(cfg: NanoGPTConfig) -> dict[str, Any]:
    """`miaobi convert nanogpt`; see `convert`."""
    return convert(cfg.checkpoint, cfg.meta, cfg.tokenizer, cfg.directory, cfg.license)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint of nanoGPT. Raises UserError when it is damaged or not nanoGPT's."""
    checkpoint = reading.read_checkpoint(path)
    if not isinstance(checkpoint.get("model_args"), dict) or "model" not in checkpoint:
        hint = "; it looks like small-gpt's: miaobi convert small-gpt" if "state_dict" in checkpoint else ""
        raise UserError(f"{path} is not a checkpoint of nanoGPT, it has no model and model_args{hint}")
    return checkpoint


def model_config(checkpoint: dict[str, Any], path: Path) -> ModelConfig:
    """The decoder that a checkpoint describes. Raises UserError for sizes that make no sense."""
    sizes = reading.read_sizes(checkpoint["model_args"], path, "nanoGPT")
    try:
        return ModelConfig(family="gpt2", bias=reading.read_bias(checkpoint["model_args"], True, path), **sizes)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


@torch.no_grad()
def least_expected(model: Transformer) -> torch.Tensor:
    """The embedding row (C,) of the token that the model expects least, whatever it reads.

    Byte tokens begin as copies of it: 256 of them together then take next to nothing from the tokens it has learned.
    """
    return model.wte.weight[expected(model, model.cfg.vocab_size).argmin()].clone()


@torch.no_grad()
def expected(model: Transformer, known: int) -> torch.Tensor:
    """The mean probability (V,) of each token, where the model has read any of the first `known`."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(known, (4, min(64, model.cfg.block_size)), generator=draw)
    return model.eval()(ids).softmax(-1).mean((0, 1))


def _which_tokenizer(checkpoint: dict[str, Any], path: Path) -> str:
    settings = checkpoint.get("config")
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    return (
        f"{path} has no vocabulary of its own; give --meta=data/{dataset or 'NAME'}/meta.pkl for a model "
        "of characters, or --tokenizer=DIR, GPT-2's tokenizer.json (or vocab.json and merges.txt), for its BPE"
    )
