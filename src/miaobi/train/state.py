"""A run on disk: which configuration it has, its checkpoints, and how it goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from miaobi.config import RunConfig
from miaobi.console import log
from miaobi.errors import UserError
from miaobi.files import point, pointed, put_back
from miaobi.settings import Origin, flatten, load_config, read_yaml, save_config
from miaobi.train.mirror import Mirror

# How a run is entered, where it lies and how its memory is used, not what it is.
STEERING = {"init_from", "resume_from", "eval_only", "out_dir", "micro_batch_size", "parallel", "fsdp_shard_size",
            "activation_checkpointing", "comm_timeout", "mirror"}  # fmt: skip


@dataclass
class Progress:
    """What a run knows besides weights and optimizer; all of it survives a kill."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Time spent in training steps."""
    train_loss: float | None = None
    """Mean since the evaluation before."""
    loss_sum: float = 0.0
    loss_steps: int = 0
    val_loss: float | None = None
    val_bits_per_char: float | None = None
    best_step: int | None = None
    best_val_loss: float | None = None
    history: list[list[float]] = field(default_factory=list)
    """[step, train loss, validation loss] of every evaluation."""
    stopped: str | None = None
    evaluated: int = 0
    """Step of the last evaluation."""
    planned: int = 0
    """Steps the run was to take when this was written."""
    windows: int = 0
    """Validation windows that every evaluation counts, also when max_iters grows; 0 before it was decided."""
    data: str = ""
    """Fingerprint of the prepared data."""
    bigrams: bool = False
    """The model started from the pairs of its text."""
    base: str = ""
    """MODEL that is tuned: directory or hub name; empty from scratch."""
    computed: dict = field(default_factory=dict)
    """How steps are computed (`measured.Computed`); empty before it was decided."""
    base_weights: str = ""
    """LoRA: fingerprint of that MODEL's weights."""


def open_run(cfg: RunConfig, origin: Origin, mirror: Mirror | None = None, restarted: bool = False) -> Path | None:
    """Make or enter the run directory; return the checkpoint to continue from, or None for a new run.

    Where the directory has no checkpoint, the mirror's is fetched. restarted: --init_from=scratch was obeyed before.

    Raises UserError where the directory holds a run of another configuration, or nothing where a run was asked for.
    """
    out = Path(cfg.train.out_dir)
    link = out / "checkpoints" / "last"
    asked = cfg.train.init_from == "scratch" and origin.get("init_from") == "command line" and not restarted
    if asked and (os.path.lexists(link) or steps(link.parent)):
        move_aside(out)
    if asked and mirror is not None:
        mirror.forget()
    mend(link.parent)
    last = pointed(link)
    if last is None and os.path.lexists(link):
        raise UserError(f"{link} names a checkpoint that is gone; continue from another with --resume_from="
                        f"{link.parent}/step-N in a new --out_dir, or start over with --init_from=scratch")  # fmt: skip
    if last is None and mirror is not None and not asked:
        mirror.pull(out / "checkpoints")
        last = pointed(link)
        if last is not None and not (out / "config.yaml").is_file():
            return last  # fetched into an empty place: there is no older configuration to compare with
    if last is not None:
        refuse_changes(out, cfg)
        return last
    if cfg.train.resume_from:
        return find_state(cfg.train.resume_from)
    if cfg.train.init_from == "resume":
        raise UserError(f"init_from=resume, but {out} has no checkpoint; leave it out to start a new run")
    if out.exists() and not out.is_dir():
        raise UserError(f"out_dir {out} is a file; choose another --out_dir")
    return None


def move_aside(out: Path) -> None:
    """Give the run in `out` the first free name of `out`.old-1, `out`.old-2 ...

    Raises UserError where it cannot be renamed: this process works inside it.
    """
    if Path.cwd().is_relative_to(out.resolve()):
        raise UserError(f"--init_from=scratch renames the run that is in {out}, but the command is run from inside it; "
                        "go to the directory above, and give its name with --out_dir")  # fmt: skip
    number = 1
    while (aside := out.with_name(f"{out.name}.old-{number}")).exists():
        number += 1
    out.rename(aside)
    log(f"--init_from=scratch: the run that was in {out} is now {aside}")


def steps(checkpoints: Path) -> dict[int, Path]:
    """The checkpoints in a run's directory by their step. What users put beside them, step-10.bak, is theirs."""
    there = checkpoints.glob("step-*")
    return {int(path.name[5:]): path for path in there if re.fullmatch("step-[0-9]+", path.name)}


def mend(checkpoints: Path) -> None:
    """Make `checkpoints` what it was before a kill between two renames, and before a copy that knows no links.

    `rsync --no-links` leaves them out: the highest step is the last. `cp -rL` and zip make directories of them.
    """
    for older in checkpoints.glob(".step-*.old"):
        put_back(older.with_name(older.name.removeprefix(".").removesuffix(".old")))
    last, best = checkpoints / "last", checkpoints / "best"
    for link in (last, best):
        if link.is_dir() and not link.is_symlink():
            step = checkpoints / f"step-{load_progress(link).step}"
            if step.exists():
                shutil.rmtree(link)
            else:
                link.rename(step)
            point(link, step.name)
    resumable = [n for n, path in steps(checkpoints).items() if (path / "train_state" / "progress.json").is_file()]
    if resumable and not os.path.lexists(last):
        point(last, f"step-{max(resumable)}")
        log(f"{last} is missing; the run goes on from the highest step there is, {max(resumable)}")
    if (path := pointed(last)) is not None and not os.path.lexists(best):
        found = steps(checkpoints).get(load_progress(path).best_step)
        if found is not None:
            point(best, found.name)


def find_state(name: str) -> Path:
    """The checkpoint directory with a train_state that `resume_from` means: a run's last, or step-N itself."""
    path = Path(name)
    if path.suffix in (".pth", ".pt"):
        raise UserError(f"resume_from: {path} is another project's checkpoint; convert it (miaobi convert --help) and "
                        "start from the result with --init_from")  # fmt: skip
    found = pointed(path / "checkpoints" / "last") or path
    if not (found / "train_state" / "progress.json").is_file():
        raise UserError(f"resume_from: no train_state in {path}; give a run directory, RUN/checkpoints/step-N, "
                        "or use --init_from to start from a model's weights alone")  # fmt: skip
    return found


def refuse_changes(out: Path, cfg: RunConfig) -> None:
    """Raise UserError naming the first key in which `cfg` is not the run's own configuration.

    A larger max_iters is let through: it extends the run.
    """
    values, _ = read_yaml(out / "config.yaml")
    saved = flatten(load_config(None, list(values.items()))[0])
    for key, now in flatten(cfg).items():
        was = saved[key]
        if key in STEERING or now == was:
            continue
        if key == "max_iters":
            if now > was:
                continue
            advice = f"max_iters can only grow here (it was {was})"
        else:
            advice = "a run keeps its configuration"
        raise UserError(
            f"{out} holds a run with {key}={was}, now {key}={now}: {advice}. Take another --out_dir, "
            "or --init_from=scratch to start over (the old run is moved aside, not deleted)"
        )


def start_run(cfg: RunConfig, origin: Origin) -> None:
    """Make the run directory and write config.yaml."""
    out = Path(cfg.train.out_dir)
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        save_config(out / "config.yaml", cfg, origin)
    except OSError as e:
        raise UserError(f"out_dir {out} cannot be written: {e.strerror}; choose another --out_dir") from e


def load_progress(checkpoint: Path) -> Progress:
    """Counters of a checkpoint. Raises UserError if the file is damaged."""
    file = checkpoint / "train_state" / "progress.json"
    try:
        return Progress(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"{file} cannot be read ({e}); continue from another checkpoint with --resume_from") from e
