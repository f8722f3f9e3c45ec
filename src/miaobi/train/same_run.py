"""Which settings a run keeps when a command continues it, which may change, and which are refused."""

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

# How a run is entered, and on which machine: each command says it anew.
PER_COMMAND = {"init_from", "resume_from", "eval_only", "eval_first", "out_dir", "micro_batch_size", "parallel",
           "fsdp_shard_size", "activation_checkpointing", "comm_timeout"}  # fmt: skip
# Where it is copied to and reported: may change while it goes on.
REPORTING = {"mirror", "tensorboard_path", "trackers", "wandb_log", "wandb_project", "wandb_run_name", "license"}
TEXT = "text.json"
"""Which text a run prepared for itself: see train/data.py."""
PLACE = ".place"
"""Tells the directory that a run was written in from copies of it, whatever they are called: see `is_here`."""


def is_named(origin: Origin, key: str) -> bool:
    """Whether a user wrote the key, on the command line or in a file; else its value is a default, or follows from
    another key.
    """
    where = origin.get(key, "default")
    return where == "command line" or ", line " in where


def read_saved(config: Path) -> dict[str, Any]:
    """Key -> value of the configuration that a run has saved."""
    values, _ = read_yaml(config)
    return flatten(load_config(None, list(values.items()))[0])


def own_settings(config: Path, cfg: RunConfig, origin: Origin) -> tuple[RunConfig, Origin]:
    """`cfg` with what the run's `config` says wherever nobody named a key; said in a line.

    Raises UserError naming a key that was named and does not go with them.
    """
    saved, current = read_saved(config), flatten(cfg)
    others = [key for key, was in saved.items() if was != current[key] and not is_named(origin, key)]
    own = {key: saved[key] for key in others if key not in PER_COMMAND}
    if "init_from" in others and saved["init_from"] not in ("scratch", "resume"):  # the model that it tunes
        own["init_from"] = saved["init_from"]
    if not is_here(config.parent, saved["out_dir"]):
        # what the first one still writes to must not be written by two, nor what somebody wishes who sent a run
        left = [f"--{key}={own.pop(key)}" for key in ("mirror", "tensorboard_path") if own.get(key)]
        if left and os.environ.get("RANK", "0") == "0":
            log(f"{cfg.train.out_dir} is a copy of a run that was written elsewhere (in {saved['out_dir']}): it does "
                f"not write to what that run may still write to; say {' '.join(left)} if it shall")  # fmt: skip
    if own.get("lr_decay_iters") == saved["max_iters"]:  # follows max_iters
        del own["lr_decay_iters"]
    if not own:
        return cfg, origin
    if os.environ.get("RANK", "0") == "0":
        listed = ", ".join(f"{key}={value}" for key, value in own.items() if value != UNLIMITED)
        log(f"{cfg.train.out_dir} goes on with its own settings where none are given: {listed}")
    try:
        return with_values(cfg, own), origin | dict.fromkeys(own, "as the run began")
    except UserError:  # by itself the key that was named may be possible
        refuse(saved, current | own, cfg.train.out_dir)
        raise


def is_here(out: Path, name: str) -> bool:
    """Whether a run was written in this very directory; name: what it was called then.

    A name alone can be guessed by who sends a run, so the directory's number in its file system must be noted there.
    """
    noted = small_text(out / PLACE) if (out / PLACE).is_file() else ""
    return os.path.realpath(name) == os.path.realpath(out) and noted == place_of(out)


def note_place(out: Path) -> None:
    """Say in a run directory which directory it is. Raises OSError."""
    write_text(out / PLACE, place_of(out) + "\n")


def place_of(out: Path) -> str:
    """A number that no other directory of the file system has."""
    return str(out.stat().st_ino)


def refuse_changes(config: Path, cfg: RunConfig, what: str) -> None:
    """Raise UserError naming the first key in which `cfg` is not the configuration that a run has saved.

    what: where that run is, in words.
    """
    refuse(read_saved(config), flatten(cfg), what)


def refuse(saved: dict[str, Any], current: dict[str, Any], what: str) -> None:
    """`refuse_changes`, of settings by their keys.

    A larger max_iters is let through: it extends the run, and an lr_decay_iters that was equal to it, or left open, may
    follow.
    """
    grows = current["max_iters"] >= saved["max_iters"]
    for key, now in current.items():
        was = saved[key]
        if key in PER_COMMAND | REPORTING or now == was or is_same_place(key, was, now, Path(current["out_dir"])):
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


def is_same_place(key: str, was: Any, now: Any, out: Path) -> bool:
    """Whether two places may hold the same text: one spelled in two ways; for `data`, of which the run knows the
    content, wherever there is text now. Whoever opens it compares.
    """
    if key not in ("data", "val") or was is None or now is None:
        return False
    knows = is_prepared(now) or ((out / TEXT).is_file() and bool(glob.glob(now)))
    return os.path.realpath(was) == os.path.realpath(now) or (key == "data" and knows)


def grown(cfg: RunConfig, progress: Progress) -> RunConfig:
    """The configuration with an lr_decay_iters that was the run's whole length when it began following max_iters."""
    end, first = cfg.optim.lr_decay_iters, progress.first_iters
    if end is None or end != first or first >= cfg.train.max_iters:
        return cfg
    log(f"lr_decay_iters was max_iters ({first}) when the run began, and grows with it to {cfg.train.max_iters}")
    return dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, lr_decay_iters=cfg.train.max_iters))
