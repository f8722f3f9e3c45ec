"""What a run starts from: prepared data (raw text is prepared once into the run), and a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from miaobi.config import PrepareConfig, RunConfig
from miaobi.console import log
from miaobi.corpus.dataset import PreparedData
from miaobi.corpus.prepare import prepare
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
        field=d.field,
        dedup=d.dedup,
        split=d.split,
        val_fraction=d.val_fraction,
    )
    if not prepared_as(wanted):
        log(f"preparing {source} into {wanted.out}")
        prepare([d.data], wanted)
    return PreparedData.open(wanted.out)


def prepared_as(wanted: PrepareConfig) -> bool:
    """Whether `wanted.out` holds data prepared with just these settings (an earlier try may have had others)."""
    manifest = wanted.out / "manifest.json"
    if not manifest.is_file():
        return False
    settings = {key: str(v) if isinstance(v, Path) else v for key, v in dataclasses.asdict(wanted).items()}
    try:
        return json.loads(manifest.read_text(encoding="utf-8")).get("settings") == settings
    except ValueError:
        return False  # damaged: prepare again


def build_model(
    cfg: RunConfig, origin: Origin, data: PreparedData, tokenizer: Tokenizer, checkpoint: Path | None
) -> Transformer:
    """The model to start with: new, from a checkpoint, or from another MODEL's weights.

    A checkpoint brings its own shape; raises UserError where the configuration explicitly asks for another.
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
        if asked != has and not origin.get(key, "default").startswith(("default", "auto")):
            raise UserError(f"{source} has {key}={has}, asked for was {key}={asked}; leave {key} out")
    changed = dataclasses.replace(model.cfg, dropout=cfg.model.dropout)
    again = Transformer(changed)
    again.load_state_dict(model.state_dict())
    return again
