"""A run directory: its configuration, its checkpoints, and how a run is continued."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from miaobi.checksums import for_model, for_training, hash_ahead, verifying
from miaobi.config import RunConfig
from miaobi.console import log
from miaobi.errors import UserError
from miaobi.files import no_links, pointed, put_back, read_record, remove
from miaobi.files import point as point_at
from miaobi.lock import locked
from miaobi.settings import Origin, save_config
from miaobi.train.mirror import Mirror
from miaobi.train.same_run import TEXT, note_location, refuse_changes, saved_settings

# What a run writes besides its checkpoints; `data` only where TEXT says that the run prepared it.
WRITTEN_BY_RUN = (
    "metrics.jsonl",
    "samples.jsonl",
    "summary.json",
    "plan.json",
    "report.html",
    "wandb",
    "swanlog",
    "config.yaml",
)


@dataclass
class Progress:
    """Everything that a run knows besides weights and optimizer; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """Time spent in training steps."""
    train_loss: float | None = None
    """Mean over the steps since the evaluation before."""
    loss_sum: float = 0.0
    loss_steps: int = 0
    val_loss: float | None = None
    val_bits_per_char: float | None = None
    best_step: int | None = None
    best_val_loss: float | None = None
    history: list[list[float | None]] = field(default_factory=list)
    """[step, train loss, validation loss] of every evaluation; no train loss before the first step."""
    stopped: str | None = None
    evaluated: int = 0
    """Step of the last evaluation."""
    planned: int = 0
    """Total steps of the run when this was saved."""
    first_iters: int = 0
    """max_iters when the run began: an lr_decay_iters equal to it grows with max_iters. 0: not known."""
    windows: int = 0
    """Number of validation windows of every evaluation, the same when max_iters grows; 0 before it was decided."""
    data: str = ""
    """SHA-256 of the prepared data."""
    bigrams: bool = False
    """Whether the model was initialised from bigrams."""
    base: str = ""
    """The MODEL that is fine-tuned: directory or hub name; empty from scratch."""
    computed: dict = field(default_factory=dict)
    """The execution mode (`measured.ExecutionMode`); empty before it was chosen."""
    base_weights: str = ""
    """LoRA: SHA-256 of that MODEL's weights."""
    warned: bool = False
    """Whether the overfitting warning was given."""
    laid: list[list[float]] = field(default_factory=list)
    """max_minutes: every plan of the steps (`schedule.Deadline`)."""
    wall: float = 0.0
    """max_minutes: seconds that the run had taken, with evaluations, when this was saved."""
    micro: int = 0
    """Micro-batch size, if memory was too small for the requested one; 0 = as requested."""
    averaging: bool = False
    """Whether the weights are averaged (`average`)."""
    averaged: bool = False
    """Whether the average was better at the last evaluation, and is the model of the checkpoint."""
    slowed: float = 1.0
    """Factor on the learning rates, after a rollback."""
    run: str = field(default_factory=lambda: uuid4().hex)
    """Unique id of the run, to tell apart runs that share a mirror."""

    def note_evaluation(self) -> None:
        """Record `val_loss` as that of this step: in the history, and as the best if it is."""
        self.evaluated = self.step
        if self.loss_steps:  # else another run's checkpoint, which was evaluated there
            self.train_loss = self.loss_sum / self.loss_steps
        self.loss_sum, self.loss_steps = 0.0, 0
        self.history.append([self.step, self.train_loss, self.val_loss])
        if self.best_val_loss is None or self.val_loss < self.best_val_loss:
            self.best_step, self.best_val_loss = self.step, self.val_loss


def run_lock(cfg: RunConfig, is_first: bool) -> ExitStack:
    """The locks of a run, held by rank 0 until the stack is closed; eval_only needs none.

    Raises UserError naming the process that holds one, or for a run directory that cannot be created or is a link.
    """
    stack, out = ExitStack(), Path(cfg.train.out_dir)
    if not is_first or is_read_only(cfg):
        return stack
    no_links(out, "checkpoints", "wandb", "swanlog")
    mirror = Mirror(cfg.train.mirror) if cfg.train.mirror else None
    try:
        stack.enter_context(locked(out))
    except FileExistsError as e:
        raise UserError(f"out_dir {out} is a file; choose another --out_dir") from e
    except OSError as e:
        raise UserError(f"out_dir {out} cannot be written: {e.strerror}; choose another --out_dir") from e
    try:
        if mirror is not None:
            stack.enter_context(mirror.locked())
    except BaseException:
        stack.close()
        raise
    return stack


def with_saved_settings(cfg: RunConfig, origin: Origin | None) -> tuple[RunConfig, Origin]:
    """`cfg` with the settings of the run in `out_dir`, or in its mirror, for all keys that neither command line nor
    file sets: a default must not change a run. Without an origin every value counts as set by the user.
    """
    out = Path(cfg.train.out_dir)
    if origin is None or starts_over(cfg, origin):
        return cfg, origin or {}
    with tempfile.TemporaryDirectory() as folder:
        config = out / "config.yaml" if has_checkpoint(out) else None
        if config is None and cfg.train.mirror:
            config = Mirror(cfg.train.mirror).saved_config(Path(folder))
        return saved_settings(config, cfg, origin) if config is not None and config.is_file() else (cfg, origin)


def starts_over(cfg: RunConfig, origin: Origin) -> bool:
    """Whether the command line says --init_from=scratch."""
    return cfg.train.init_from == "scratch" and origin.get("init_from") == "command line"


def has_checkpoint(out: Path) -> bool:
    """Whether the directory holds a run with a checkpoint, even if copying has lost the links."""
    return os.path.lexists(out / "checkpoints" / "last") or bool(step_directories(out / "checkpoints"))


def open_run(cfg: RunConfig, origin: Origin, mirror: Mirror | None = None, restarted: bool = False) -> Path | None:
    """Open the run directory; returns the checkpoint to continue from, or None for a new run.

    If the directory has no checkpoint, the mirror's is fetched. restarted: --init_from=scratch has been carried out.

    Raises UserError if the directory holds a run of another configuration, or none although one was asked for.
    """
    out = Path(cfg.train.out_dir)
    link = out / "checkpoints" / "last"
    anew = starts_over(cfg, origin) and not restarted
    if anew and has_checkpoint(out):
        move_aside(out)
    if anew and mirror is not None:
        mirror.forget()
    if not is_read_only(cfg):
        restore_links(link.parent)
    last = pointed(link)
    if last is None and os.path.lexists(link):
        raise UserError(f"{link} points to a checkpoint that does not exist; continue from another with --resume_from="
                        f"{link.parent}/step-N in a new --out_dir, or start over with --init_from=scratch")  # fmt: skip
    if mirror is not None and not anew:
        if last is None:
            mirror.pull(out, lambda config: refuse_changes(config, cfg, f"the mirror {mirror.url}"))
            last = pointed(link)
        else:
            mirror.refuse_other(load_progress(last).run)
    if last is not None:
        if (out / "config.yaml").is_file() or mirror is None:  # an older mirror did not keep it
            refuse_changes(out / "config.yaml", cfg, str(out))
        return last
    if cfg.train.resume_from:
        return find_state(cfg.train.resume_from)
    if cfg.train.init_from == "resume":
        raise UserError(f"init_from=resume, but {out} has no checkpoint; leave it out to start a new run")
    return None


def move_aside(out: Path) -> None:
    """Move the files that the run in `out` wrote, and no others, to the first free of `out`.old-1, `out`.old-2 ..."""
    out, number = out.resolve(), 1
    while (old := out.with_name(f"{out.name}.old-{number}")).exists():
        number += 1
    checkpoints = out / "checkpoints"
    theirs = [checkpoints / "last", checkpoints / "best", *step_directories(checkpoints).values()]
    theirs += [*out.glob("events.out.tfevents.*"), *(out / name for name in WRITTEN_BY_RUN)]
    if (out / TEXT).is_file():
        theirs += [out / "data", out / TEXT]
    (old / "checkpoints").mkdir(parents=True)
    for path in theirs:
        if os.path.lexists(path):
            path.rename(old / path.relative_to(out))
    log(f"--init_from=scratch: the run that was in {out} was moved to {old}")


def step_directories(checkpoints: Path) -> dict[int, Path]:
    """The checkpoints in a run's directory, by step. Other names, such as step-10.bak, are the user's."""
    found_steps = checkpoints.glob("step-*")
    return {int(path.name[5:]): path for path in found_steps
            if re.fullmatch("step-(0|[1-9][0-9]{0,17})", path.name) and path.is_dir()}  # fmt: skip


def restore_links(checkpoints: Path) -> None:
    """Repair `checkpoints` after a kill between two renames, or after a copy without symlinks.

    `rsync --no-links` omits them: then the highest step is the last. `cp -rL` and zip turn them into directories.
    """
    for older in checkpoints.glob(".step-*.old"):
        put_back(older.with_name(older.name.removeprefix(".").removesuffix(".old")))
    for leftover in checkpoints.glob(".*.tmp"):
        if re.fullmatch(r"\.(step-[0-9]+|best|last)(\.[0-9]+-[0-9a-f]{8})?\.tmp", leftover.name):
            remove(leftover)  # of a killed process: this one holds the run's lock
    last, best = checkpoints / "last", checkpoints / "best"
    for link in (last, best):
        if link.is_dir() and not link.is_symlink() and pointed(link) == link:
            step = checkpoints / f"step-{load_progress(link).step}"
            if step.exists():
                remove(link)
            else:
                link.rename(step)
            point_at(link, step.name)
    steps = step_directories(checkpoints)
    resumable = [n for n, path in steps.items() if (path / "train_state" / "progress.json").is_file()]
    if resumable and not os.path.lexists(last):
        point_at(last, f"step-{max(resumable)}")
        log(f"{last} is missing; the run continues from its highest step, {max(resumable)}")
    if (path := pointed(last)) is not None and not os.path.lexists(best):
        best_step = load_progress(path).best_step
        if best_step in steps:
            point_at(best, steps[best_step].name)


def is_read_only(cfg: RunConfig) -> bool:
    """Whether the run is only evaluated: another process may be writing it, or it may be write-protected."""
    return cfg.train.eval_only and pointed(Path(cfg.train.out_dir) / "checkpoints" / "last") is not None


def find_state(name: str) -> Path:
    """The checkpoint directory with a train_state that `resume_from` means: a run's last, or step-N itself."""
    path = Path(name)
    if path.suffix in (".pth", ".pt"):
        raise UserError(f"resume_from: {path} is another project's checkpoint; convert it (miaobi convert --help) and "
                        "start from the result with --init_from")  # fmt: skip
    directory = pointed(path / "checkpoints" / "last") or pointed(path) or path
    if not (directory / "train_state" / "progress.json").is_file():
        raise UserError(f"resume_from: no train_state in {path}; give a run directory, RUN/checkpoints/step-N, "
                        "or use --init_from to start from a model's weights alone")  # fmt: skip
    return directory


def hash_early(cfg: RunConfig, origin: Origin) -> None:
    """Start to hash the checkpoint that the run will continue from, before torch is imported; `verified` compares.

    Errors are left to `verified`; without a checkpoint nothing is started.
    """
    train, first = cfg.train, os.environ.get("RANK", "0") == "0"
    with suppress(UserError, OSError, ValueError):
        checkpoint = pointed(Path(train.out_dir) / "checkpoints" / "last")
        if checkpoint is None and train.resume_from:
            checkpoint = find_state(train.resume_from)
        if checkpoint is not None and not starts_over(cfg, origin):
            hash_ahead(checkpoint, for_training if first else for_model)


def verified(checkpoint: Path | None, is_first: bool) -> AbstractContextManager:
    """Compares the files of a checkpoint with their checksums while it is read: all on rank 0, the model on other
    ranks.

    Raises UserError naming the first file that differs.
    """
    if checkpoint is None:
        return nullcontext()
    return verifying(checkpoint, for_training if is_first else for_model)


def create_run(cfg: RunConfig, origin: Origin) -> None:
    """Create the run directory and write config.yaml."""
    out = Path(cfg.train.out_dir)
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        note_location(out)
        save_config(out / "config.yaml", cfg, origin)
    except OSError as e:
        raise UserError(f"out_dir {out} cannot be written: {e.strerror}; choose another --out_dir") from e


def load_progress(checkpoint: Path) -> Progress:
    """Progress of a checkpoint. Raises UserError if the file is damaged or of another step than its directory."""
    file = checkpoint / "train_state" / "progress.json"
    try:
        progress = read_record(file, Progress)
    except UserError as e:
        raise UserError(f"{e}; continue from another checkpoint with --resume_from") from e
    rows = all(len(row) == 3 and None not in (row[0], row[2]) for row in progress.history)
    if min(progress.step, progress.evaluated, progress.planned, progress.windows) < 0 or not rows:
        raise UserError(f"{file} is damaged; continue from another checkpoint with --resume_from")
    return progress
