"""The text of a run: prepared data, or raw text that is prepared once into the run and identified by its content."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from miaobi.config import DataConfig, RunConfig
from miaobi.console import log, warn
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.dataset import TextWindows
from miaobi.corpus.dialogue import first_message
from miaobi.corpus.packing import PackedDialogues
from miaobi.corpus.prepare import prepare, settings_of
from miaobi.corpus.prepared import PreparedData, is_prepared
from miaobi.corpus.sources import find_sources
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError, number_of
from miaobi.files import MOST_OF_A_LIST, pointed, read_record, sha256, write_json
from miaobi.model.checkpoint import model_directory
from miaobi.train.same_run import TEXT

OPENING_TOKENS = 8
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "vocab.txt", "vocab.json", "merges.txt")  # fmt: skip
Blocks = PackedDialogues | TextWindows


@dataclass(frozen=True)
class Text:
    """What a run's own data was prepared from: `text.json`."""

    settings: dict[str, Any]
    """The settings of its preparation, as in manifest.json."""
    sizes: dict[str, int]
    """Bytes of every file, by its absolute path."""
    times: dict[str, int]
    """Modification time of each file in ns: a file of the same size and time is not hashed again."""
    sha256: dict[str, str]
    without: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files of --without."""
    tokenizer: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files of a reused tokenizer. Once training has begun, the run has its own copy."""


def open_data(cfg: RunConfig, out: Path, prepares: bool) -> PreparedData:
    """Open `cfg.data.data`; raw text is prepared into `out`/data.

    prepares: whether this process prepares the text (rank 0; the other ranks find it done).

    Until a run has a checkpoint, its data follows the text; after that the text may not change. Text that was deleted,
    or the model of a reused tokenizer, is not needed again. Raises UserError for data that is missing, damaged, changed
    or empty.
    """
    source, own = Path(cfg.data.data), out / "data"
    if is_prepared(source):
        return PreparedData.open(source)
    if not prepares:
        return PreparedData.open(own)
    begun = is_prepared(own)
    if begun and pointed(out / "checkpoints" / "last") is not None:
        refuse_changed_text(cfg.data, out)
        return PreparedData.open(own)
    settings = prepare_settings(cfg, own)
    was = read_text(out) if begun else None
    now = describe_text(cfg.data, was, settings_of(settings))
    if was is not None and (change := first_difference(was, now)) is None:
        return PreparedData.open(own)
    if begun:
        log(f"{own} is prepared again: {change if was is not None else 'there is no record of its text'}")
    log(f"preparing {source} into {own}")
    (out / TEXT).unlink(missing_ok=True)  # it must not describe data that a kill left half written
    prepare([cfg.data.data], settings)
    write_json(out / TEXT, asdict(now))
    return PreparedData.open(own)


def prepare_settings(cfg: RunConfig, own: Path) -> PrepareConfig:
    """The settings with which the text of a run is prepared."""
    base = cfg.train.base_model
    return PrepareConfig(
        out=own,
        vocab_size=None if base else cfg.model.vocab_size,
        **cfg.data.corpus() | ({"tokenizer": str(model_directory(base))} if base else {}),
    )


def read_text(out: Path) -> Text | None:
    """The record of the run's own data; None if there is none."""
    try:
        return read_record(out / TEXT, Text, MOST_OF_A_LIST)
    except UserError:
        return None


def describe_text(data: DataConfig, before: Text | None, settings: dict[str, Any]) -> Text:
    """The run's text as it is now. Raises UserError if there is none."""
    text = Text(settings, {}, {}, {})
    sources = [data.data, *([data.val] if data.val else [])]
    for file in sorted({source.path.resolve() for source in find_sources(sources, data.format)}):
        name, stat = str(file), file.stat()
        text.sizes[name], text.times[name] = stat.st_size, stat.st_mtime_ns
        same = before is not None and (before.sizes.get(name), before.times.get(name)) == (
            stat.st_size,
            stat.st_mtime_ns,
        )
        text.sha256[name] = before.sha256.get(name, "") if same else sha256(file)
    tokenizer, without = Path(settings.get("tokenizer", "char")), settings.get("without", ())
    parts = [tokenizer / name for name in TOKENIZER_FILES] if tokenizer.is_dir() else [tokenizer]
    evaluation = [source.path for source in find_sources(list(without))] if without else []
    return replace(text, without=hashes_of(evaluation), tokenizer=hashes_of(parts))


def hashes_of(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of the files that exist, by absolute path."""
    return {str(file.resolve()): sha256(file) for file in files if file.is_file()}


def first_difference(was: Text, now: Text) -> str | None:
    """The first difference between two records of a text, in words; None if it is the same text."""
    for key, value in was.settings.items():
        if now.settings.get(key) != value:
            return f"{key} was {value}, now it is {now.settings.get(key)}"
    for before, after in ((was.without, now.without), (was.tokenizer, now.tokenizer)):
        if before and (name := next((name for name in before | after if before.get(name) != after.get(name)), None)):
            return f"{name} has changed"
    # a file that moved is the same text: only what is in the files, and in which order they are read, counts
    if list(was.sha256.values()) == list(now.sha256.values()):
        return None
    for name, digest in was.sha256.items():
        if name not in now.sha256:
            return f"{name} is no longer part of the text"
        if now.sha256[name] != digest:
            return f"{name} has changed ({number_of(was.sizes.get(name, 0), 'byte')}, now {now.sizes[name]:,})"
    return f"{next(name for name in now.sha256 if name not in was.sha256)} is new in the text"


def refuse_changed_text(data: DataConfig, out: Path) -> None:
    """Raise UserError naming the file that is no longer what the run in `out` has learned from."""
    if (was := read_text(out)) is None:
        return  # a run of an older version, without this record
    try:
        now = describe_text(data, was, was.settings)
    except UserError as e:
        warn(f"{e}. The run continues with the data that it prepared from it, {out / 'data'}")
        return
    if (change := first_difference(was, replace(now, tokenizer=was.tokenizer))) is not None:
        raise UserError(f"the run in {out} has learned from another text: {change}. Restore it, take another "
                        "--out_dir, or --init_from=scratch to start over (the old run is moved aside)")  # fmt: skip


def open_blocks(cfg: DataConfig, data: PreparedData, block_size: int) -> tuple[Blocks, Blocks]:
    """Training and validation data as blocks: dialogues packed (unless `packing` is stream), other text in windows.

    Raises UserError for a split that is too small.
    """
    if len(data.val) < 2:
        raise UserError("the validation part of the data is empty; prepare it with a larger --val_fraction")
    if not data.is_dialogue or cfg.packing == "stream":
        if cfg.packing == "documents":
            raise UserError("packing=documents is for dialogues; prepare the data with --format=dialogue")
        if data.train.scored is not None:
            raise UserError("packing=stream learns all tokens, but the data marks the assistant's; use packing=auto")
        if len(data.train) < 2:
            raise UserError("the training part of the data has fewer than two tokens, so there is nothing to predict; "
                            "give more text")  # fmt: skip
        return TextWindows(data.train, block_size), TextWindows(data.val, block_size)
    train = PackedDialogues(data.train, block_size, cfg.long_history, data.sep_id)
    log(f"{number_of(len(train.starts), 'dialogue')} in {number_of(len(train), 'block')}, {train.useful:.1%} of "
        f"their tokens in use"
        + (f"; {number_of(train.cut_dialogues, 'dialogue')} were longer than a block and were cut between turns, "
           f"{number_of(train.cut_turns, 'turn')} inside" if train.cut_dialogues else ""))  # fmt: skip
    if not len(train):
        raise UserError("no dialogue of the training part has a token to learn; give more text")
    return train, PackedDialogues(data.val, block_size)


def opening(data: PreparedData, tokenizer: Tokenizer) -> str:
    """The prompt of a run's samples: the first words of the validation text, or its first message."""
    if not data.is_dialogue:
        return tokenizer.decode(data.val.read(0, OPENING_TOKENS).tolist())
    return first_message(tokenizer, data.val.read(0, int(np.append(data.val.starts[1:], len(data.val))[0])).tolist())
