"""Continuing a run: which settings it keeps, which may change, and which are refused."""

from __future__ import annotations

import dataclasses
import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaobi.config import RunConfig
from miaobi.console import log
from miaobi.corpus.prepared import is_prepared
from miaobi.errors import UserError
from miaobi.files import small_text, write_text
from miaobi.settings import UNLIMITED, Origin, flatten, load_config, read_yaml, with_values

if TYPE_CHECKING:
    from miaobi.train.run_directory import Progress

# How a run is started, and on which machine: every command sets these anew.
PER_COMMAND = {"init_from", "resume_from", "eval_only", "eval_first", "out_dir", "micro_batch_size", "parallel",
           "fsdp_shard_size", "activation_checkpointing", "comm_timeout"}  # fmt: skip
# Where it is copied and reported to: may change when it is continued.
REPORTING = {"mirror", "tensorboard_path", "trackers", "wandb_log", "wandb_project", "wandb_run_name", "license"}
TEXT = "text.json"
"""Describes the text that a run prepared for itself; see train/data.py."""
LOCATION = ".place"
"""Tells the original run directory from copies of it, whatever their names: see `is_original`."""


def is_named(origin: Origin, key: str) -> bool:
    """Whether the user set the key, on the command line or in a file; otherwise its value is a default, or derived from
    another key.
    """
    where = origin.get(key, "default")
    return where == "command line" or ", line " in where


def read_saved(config: Path) -> dict[str, Any]:
    """The configuration that a run has saved, key -> value."""
    values, _ = read_yaml(config)
    return flatten(load_config(None, list(values.items()))[0])


def saved_settings(config: Path, cfg: RunConfig, origin: Origin) -> tuple[RunConfig, Origin]:
    """`cfg` with the values of the run's `config` for all keys that the user did not set; they are logged.

    Raises UserError naming a key that was set and does not go with them.
    """
    saved, current = read_saved(config), flatten(cfg)
    others = [key for key, was in saved.items() if was != current[key] and not is_named(origin, key)]
    own = {key: saved[key] for key in others if key not in PER_COMMAND}
    if "init_from" in others and saved["init_from"] not in ("scratch", "resume"):  # the model that it tunes
        own["init_from"] = saved["init_from"]
    if not is_original(config.parent, saved["out_dir"]):
        # two runs must not write to one place, nor may whoever sent a run choose where this machine writes
        left = [f"--{key}={own.pop(key)}" for key in ("mirror", "tensorboard_path") if own.get(key)]
        if left and os.environ.get("RANK", "0") == "0":
            log(f"{cfg.train.out_dir} is a copy of a run in {saved['out_dir']}: it does not write to the storage "
                f"of that run; give {' '.join(left)} if it shall")  # fmt: skip
    if own.get("lr_decay_iters") == saved["max_iters"]:  # follows max_iters
        del own["lr_decay_iters"]
    if not own:
        return cfg, origin
    if os.environ.get("RANK", "0") == "0":
        listed = ", ".join(f"{key}={value}" for key, value in own.items() if value != UNLIMITED)
        log(f"{cfg.train.out_dir} continues with its saved settings: {listed}")
    try:
        return with_values(cfg, own), origin | dict.fromkeys(own, "as the run began")
    except UserError:  # the key that was set may be valid by itself
        refuse_changed_values(saved, current | own, cfg.train.out_dir)
        raise


def is_original(out: Path, name: str) -> bool:
    """Whether the run was written in this very directory, not in a copy. name: path of the directory when it was
    written.

    The path alone could be guessed by whoever sends a run, so the directory's inode must match as well.
    """
    noted = small_text(out / LOCATION) if (out / LOCATION).is_file() else ""
    return os.path.realpath(name) == os.path.realpath(out) and noted == inode_of(out)


def note_location(out: Path) -> None:
    """Save the inode of a run directory in it. Raises OSError."""
    write_text(out / LOCATION, inode_of(out) + "\n")


def inode_of(out: Path) -> str:
    """The inode of a directory, which no other directory of the file system has."""
    return str(out.stat().st_ino)


def refuse_changes(config: Path, cfg: RunConfig, what: str) -> None:
    """Raise UserError naming the first key in which `cfg` differs from the saved configuration of a run.

    what: names that run in the message.
    """
    refuse_changed_values(read_saved(config), flatten(cfg), what)


def refuse_changed_values(saved: dict[str, Any], current: dict[str, Any], what: str) -> None:
    """`refuse_changes` on dictionaries.

    A larger max_iters is allowed: it extends the run. An lr_decay_iters that was equal to it, or not set, may grow with
    it.
    """
    grows = current["max_iters"] >= saved["max_iters"]
    for key, now in current.items():
        was = saved[key]
        if key in PER_COMMAND | REPORTING or now == was or may_be_same_text(key, was, now, Path(current["out_dir"])):
            continue
        if key == "max_iters":
            if grows:
                continue
            advice = f"max_iters can only grow here (it was {was})"
        elif key == "lr_decay_iters" and was in (None, saved["max_iters"]):
            if now in (None, current["max_iters"]) or (was is not None and now <= current["max_iters"]):
                continue
            advice = f"it grows with max_iters, to {current['max_iters']}"
        else:
            advice = "a run keeps its configuration"
        raise UserError(
            f"{what} holds a run with {key}={was}, now {key}={now}: {advice}. Take another --out_dir, "
            "or --init_from=scratch to start over (the old run is moved aside, not deleted)"
        )


def may_be_same_text(key: str, was: Any, now: Any, out: Path) -> bool:
    """Whether two paths may lead to the same text: different spellings of one path; or, for `data`, whose content the
    run knows, any existing text. Whoever opens the text compares it.
    """
    if key not in ("data", "val") or was is None or now is None:
        return False
    knows = is_prepared(now) or ((out / TEXT).is_file() and bool(glob.glob(now)))
    return os.path.realpath(was) == os.path.realpath(now) or (key == "data" and knows)


def with_longer_decay(cfg: RunConfig, progress: Progress) -> RunConfig:
    """The configuration with lr_decay_iters grown to max_iters, if the two were equal when the run began."""
    end, first = cfg.optim.lr_decay_iters, progress.first_iters
    if end is None or end != first or first >= cfg.train.max_iters:
        return cfg
    log(f"lr_decay_iters was max_iters ({first}) when the run began, and grows with it to {cfg.train.max_iters}")
    return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, lr_decay_iters=cfg.train.max_iters))
