"""What a run starts from: prepared data (raw text is prepared once into the run), and a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from miaobi.config import DataConfig, PrepareConfig, RunConfig
from miaobi.console import log
from miaobi.corpus.dataset import PreparedData, TextWindows
from miaobi.corpus.packing import PackedDialogues
from miaobi.corpus.prepare import prepare, settings_of
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.model.checkpoint import load_model, model_directory
from miaobi.model.transformer import Transformer
from miaobi.overrides import Origin
from miaobi.train.recipe import resolve_model


def open_data(cfg: RunConfig, out: Path) -> PreparedData:
    """Open `cfg.data.data`; raw text is prepared into `out`/data the first time.

    Raises UserError for data that is missing, damaged or empty.
    """
    source = Path(cfg.data.data)
    if (source / "manifest.json").is_file():
        return PreparedData.open(source)
    d, start_from = cfg.data, cfg.train.init_from not in ("scratch", "resume")
    wanted = PrepareConfig(
        out=out / "data",
        tokenizer=str(model_directory(cfg.train.init_from)) if start_from else d.tokenizer,
        vocab_size=None if start_from else cfg.model.vocab_size,
        format=d.format,
        template=d.template,
        loss=d.loss,
        field=d.field,
        dedup=d.dedup,
        split=d.split,
        val_fraction=d.val_fraction,
    )
    if not prepared_as(wanted):
        log(f"preparing {source} into {wanted.out}")
        prepare([d.data], wanted)
    return PreparedData.open(wanted.out)


def open_blocks(
    cfg: DataConfig, data: PreparedData, block_size: int
) -> tuple[PackedDialogues | TextWindows, PackedDialogues | TextWindows]:
    """Training and validation as blocks: dialogues packed (unless `packing` is stream), text in windows.

    Raises UserError for a split that is too small.
    """
    if len(data.val) < 2:
        raise UserError("the validation part of the data is empty; prepare it with a larger --val_fraction")
    if not data.is_dialogue or cfg.packing == "stream":
        if cfg.packing == "documents":
            raise UserError("packing=documents is for dialogues; prepare the data with --format=dialogue")
        if data.train.scored is not None:
            raise UserError("packing=stream learns all tokens, but the data marks the assistant's; use packing=auto")
        return TextWindows(data.train, block_size), TextWindows(data.val, block_size)
    train = PackedDialogues(data.train, block_size, cfg.long_history, data.sep_id)
    log(f"{len(train.starts):,} dialogues in {len(train):,} blocks, {train.useful:.1%} of their tokens in use"
        + (f"; {train.cut_dialogues:,} dialogues were longer than a block and were cut between turns, "
           f"{train.cut_turns:,} turns inside" if train.cut_dialogues else ""))  # fmt: skip
    return train, PackedDialogues(data.val, block_size)


def prepared_as(wanted: PrepareConfig) -> bool:
    """Whether `wanted.out` holds data prepared with just these settings (an earlier try may have had others)."""
    manifest = wanted.out / "manifest.json"
    if not manifest.is_file():
        return False
    try:
        return json.loads(manifest.read_text(encoding="utf-8")).get("settings") == settings_of(wanted)
    except ValueError:
        return False  # damaged: prepare again


def build_model(
    cfg: RunConfig, origin: Origin, data: PreparedData, tokenizer: Tokenizer, checkpoint: Path | None
) -> Transformer:
    """The model to start with: new, from a checkpoint, or from another MODEL's weights.

    A checkpoint brings its own shape; raises UserError where the configuration explicitly asks for another. Only
    block_size may be less than another MODEL's: the hub's contexts are longer than most texts and memories.
    """
    source = checkpoint or (cfg.train.init_from if cfg.train.init_from not in ("scratch", "resume") else None)
    if source is None:
        torch.manual_seed(cfg.train.seed)
        return Transformer(resolve_model(cfg.model, data.vocab_size))
    model, theirs = load_model(source)
    if theirs.backend.to_str() != tokenizer.backend.to_str():
        raise UserError(
            f"{data.path} was prepared with another tokenizer than {source} has; prepare it with --tokenizer={source}"
        )
    for key in ("family", "n_layer", "n_head", "n_embd", "block_size"):
        asked, has = getattr(cfg.model, key), getattr(model.cfg, key)
        shorter = key == "block_size" and asked < has and checkpoint is None
        if asked != has and not shorter and not origin.get(key, "default").startswith(("default", "auto")):
            raise UserError(f"{source} has {key}={has}, asked for was {key}={asked}; leave {key} out")
    asked = model.cfg.block_size if origin.get("block_size", "default") == "default" else cfg.model.block_size
    changed = dataclasses.replace(model.cfg, dropout=cfg.model.dropout, block_size=min(asked, model.cfg.block_size))
    again, weights = Transformer(changed), model.state_dict()
    if again.wpe is not None:
        weights["wpe.weight"] = weights["wpe.weight"][: changed.block_size]
    again.load_state_dict(weights)
    again.end_ids = model.end_ids
    return again
