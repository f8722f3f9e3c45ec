"""What a run starts from: prepared data (raw text is prepared once into the run), and a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miaobi.config import DataConfig, ModelConfig, RunConfig
from miaobi.console import log
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.dataset import TextWindows
from miaobi.corpus.dialogue import first_message
from miaobi.corpus.packing import PackedDialogues
from miaobi.corpus.prepare import prepare, settings_of
from miaobi.corpus.prepared import PreparedData, is_prepared
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.model.checkpoint import load_model, model_directory
from miaobi.model.lora import add_lora, load_adapter
from miaobi.model.transformer import Transformer, head_dim, intermediate_size
from miaobi.settings import Origin
from miaobi.train import bigrams
from miaobi.train.recipe import resolve_model
from miaobi.train.state import Progress, load_progress

OPENING_TOKENS = 8
SIZES = ("family", "n_layer", "n_head", "n_embd", "block_size")
SHAPE = tuple(key.name for key in dataclasses.fields(ModelConfig) if key.name != "dropout")  # what weights are bound to


def open_data(cfg: RunConfig, out: Path) -> PreparedData:
    """Open `cfg.data.data`; raw text is prepared into `out`/data the first time.

    A run with a checkpoint is bound to what it has: the model whose tokenizer prepared that may be gone, or unnamed
    (--init_from=resume). Raises UserError for data that is missing, damaged or empty.
    """
    source, own = Path(cfg.data.data), out / "data"
    if is_prepared(source):
        return PreparedData.open(source)
    if pointed(out / "checkpoints" / "last") is not None and (own / "manifest.json").is_file():
        return PreparedData.open(own)
    d, base = cfg.data, cfg.train.base_model
    wanted = PrepareConfig(
        out=own,
        tokenizer=str(model_directory(base)) if base else d.tokenizer,
        vocab_size=None if base else cfg.model.vocab_size,
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


def opening(data: PreparedData, tokenizer: Tokenizer) -> str:
    """What a sample of the run starts from: the first words of the validation text, or its first message."""
    if not data.is_dialogue:
        return tokenizer.decode(data.val.read(0, OPENING_TOKENS).tolist())
    return first_message(tokenizer, data.val.read(0, int(np.append(data.val.starts[1:], len(data.val))[0])).tolist())


def prepared_as(wanted: PrepareConfig) -> bool:
    """Whether `wanted.out` holds data prepared with just these settings (an earlier try may have had others)."""
    manifest = wanted.out / "manifest.json"
    if not manifest.is_file():
        return False
    try:
        return json.loads(manifest.read_text(encoding="utf-8")).get("settings") == settings_of(wanted)
    except ValueError:
        return False  # damaged: prepare again


def start_or_continue(cfg: RunConfig, data: PreparedData, checkpoint: Path | None) -> Progress:
    """Where the run stands: at its beginning, or where the checkpoint is.

    Of another run's checkpoint (resume_from) the steps count, not what was best there: that model is not in this run,
    and may have been measured on other windows. It is evaluated again where an evaluation is due.

    Raises UserError for other data than the checkpoint's.
    """
    if checkpoint is None:
        base = cfg.train.base_model
        return Progress(data=data.fingerprint, base=base_name(base) if base else "")
    progress = load_progress(checkpoint)
    if progress.data != data.fingerprint:
        raise UserError(f"the data in {data.path} is not what {checkpoint} was trained on; "
                        "restore it, or start another --out_dir")  # fmt: skip
    if not is_own(checkpoint, cfg):
        fresh = Progress()
        for key in ("best_step", "best_val_loss", "history", "stopped", "evaluated", "planned", "windows"):
            setattr(progress, key, getattr(fresh, key))
    return progress


def is_own(checkpoint: Path, cfg: RunConfig) -> bool:
    """Whether the checkpoint is in the directory of the run, which `refuse_changes` has compared already."""
    return checkpoint.parent.resolve() == (Path(cfg.train.out_dir) / "checkpoints").resolve()


def build_model(
    cfg: RunConfig,
    origin: Origin,
    data: PreparedData,
    tokenizer: Tokenizer,
    checkpoint: Path | None,
    progress: Progress,
    place: Callable[[ModelConfig, dict[str, Tensor] | None], Transformer],
) -> Transformer:
    """The model to start with: new, from a checkpoint, or from another MODEL's weights, with adapters for LoRA.

    place: makes a model of that shape with those weights, or with initial ones, on this rank's device.

    A checkpoint brings its own shape; raises UserError where the configuration explicitly asks for another. Only
    block_size may be less than another MODEL's: the hub's contexts are longer than most texts and memories.
    """
    lora = cfg.train.trainable == "lora"
    if checkpoint is not None and lora != bool(progress.base_weights):
        was, now = ("full", "lora") if lora else ("lora", "full")
        raise UserError(f"{checkpoint} was trained with trainable={was}, now trainable={now}; "
                        f"tune its model in a new --out_dir with --init_from={checkpoint}")  # fmt: skip
    source = find_base(cfg, progress, checkpoint) if lora else checkpoint or cfg.train.base_model
    if source is None:
        shape = resolve_model(cfg.model, data.vocab_size)
        if not bigrams.wanted(cfg, shape, data):
            return place(shape, None)
        started = time.perf_counter()
        torch.manual_seed(cfg.train.seed)
        model = Transformer(shape)
        tokens = bigrams.sample(data.train, bigrams.COUNTED)
        bigrams.start_from_bigrams(model, tokens)
        log(f"started from the bigrams of {len(tokens):,} tokens in {time.perf_counter() - started:.2f} s")
        progress.bigrams = True
        return place(shape, model.state_dict())
    model, theirs = load_model(source)
    if theirs.backend.to_str() != tokenizer.backend.to_str():
        raise UserError(
            f"{data.path} was prepared with another tokenizer than {source} has; prepare it with --tokenizer={source}"
        )
    own = checkpoint is not None and is_own(checkpoint, cfg)  # from when only the sizes were compared, maybe
    refuse_shape(cfg.model, origin, model.cfg, source, SIZES if own else SHAPE, may_shorten=source != checkpoint)
    asked = model.cfg.block_size if origin.get("block_size", "default") == "default" else cfg.model.block_size
    changed = dataclasses.replace(model.cfg, dropout=cfg.model.dropout, block_size=min(asked, model.cfg.block_size))
    weights = model.state_dict()
    if model.wpe is not None:
        weights["wpe.weight"] = weights["wpe.weight"][: changed.block_size]
    again = place(changed, weights)
    again.end_ids, again.generation = model.end_ids, model.generation
    if lora:
        adapt(again, cfg, checkpoint, progress)
    return again


def refuse_shape(
    asked: ModelConfig, origin: Origin, has: ModelConfig, source: Path | str, keys: tuple[str, ...], may_shorten: bool
) -> None:
    """Raise UserError naming the first of `keys` that was given explicitly and is not what `source` has.

    may_shorten: block_size may be less.
    """
    actual = dataclasses.asdict(has) | {
        "n_kv_head": has.n_kv_head or has.n_head, "head_dim": head_dim(has), "intermediate_size": intermediate_size(has)
    }  # fmt: skip
    for key in keys:
        now = getattr(asked, key)
        shorter = key == "block_size" and may_shorten and now < has.block_size
        given = now is not None and not origin.get(key, "default").startswith(("default", "auto"))
        if given and now != actual[key] and not shorter:
            raise UserError(f"{source} has {key}={actual[key]}, asked for was {key}={now}; leave {key} out")


def base_name(model: str) -> str:
    """What PEFT, and this run when it goes on, find a MODEL by: its directory from the root, or its hub name."""
    return str(model_directory(model).resolve()) if Path(model).exists() else model


def find_base(cfg: RunConfig, progress: Progress, checkpoint: Path | None) -> str:
    """The model that LoRA leaves as it is: where it was when the run began, else where init_from says it is now.

    Raises UserError if it is gone.
    """
    base = cfg.train.base_model
    if base is None or Path(progress.base).exists():
        base = progress.base
    try:
        model_directory(base)
    except UserError as e:
        if checkpoint is None:
            raise
        raise UserError(f"{checkpoint} needs the model that it tunes ({e}); put it back, "
                        "or say where it is now with --init_from=MODEL") from e  # fmt: skip
    return base


def adapt(model: Transformer, cfg: RunConfig, checkpoint: Path | None, progress: Progress) -> None:
    """Give the base model its adapters, new or the checkpoint's; a new run notes down what its base is.

    Raises UserError for another base than the checkpoint's.
    """
    found = fingerprint(model)
    torch.manual_seed(cfg.train.seed)
    add_lora(model, cfg.lora)
    if checkpoint is None:
        progress.base_weights = found
        return
    if found != progress.base_weights:
        raise UserError(f"the weights of {progress.base} are not those that {checkpoint} tunes: "
                        "they were changed since; put them back, or start another --out_dir")  # fmt: skip
    load_adapter(checkpoint / "adapter", model)


def fingerprint(model: Transformer) -> str:
    """SHA-256 of every parameter, in the model's own order."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy())
    return digest.hexdigest()
