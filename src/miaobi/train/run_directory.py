"""A run on disk: which configuration it has, its checkpoints, and how it goes on."""

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
from miaobi.train.same_run import TEXT, note_place, own_settings, refuse_changes

# What a run writes besides its checkpoints; `data` only where TEXT says that the run prepared it.
OWN = ("metrics.jsonl", "samples.jsonl", "summary.json", "plan.json", "report.html", "wandb", "swanlog", "config.yaml")


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
    history: list[list[float | None]] = field(default_factory=list)
    """[step, train loss, validation loss] of every evaluation; no train loss before the first step."""
    stopped: str | None = None
    evaluated: int = 0
    """Step of the last evaluation."""
    planned: int = 0
    """Steps the run was to take when this was written."""
    first_iters: int = 0
    """max_iters when the run began: an lr_decay_iters of that many steps grows with max_iters. 0: not known."""
    windows: int = 0
    """Validation windows that every evaluation counts, also when max_iters grows; 0 before it was decided."""
    data: str = ""
    """Fingerprint of the prepared data."""
    bigrams: bool = False
    """The model started from the pairs of its text."""
    base: str = ""
    """MODEL that is tuned: directory or hub name; empty from scratch."""
    computed: dict = field(default_factory=dict)
    """How steps are computed (`measured.ExecutionMode`); empty before it was decided."""
    base_weights: str = ""
    """LoRA: fingerprint of that MODEL's weights."""
    warned: bool = False
    """The overfitting hint was given."""
    laid: list[list[float]] = field(default_factory=list)
    """max_minutes: how the steps were laid over the time (`schedule.Deadline`)."""
    wall: float = 0.0
    """max_minutes: seconds that the run had taken, evaluations included, when this was written."""
    micro: int = 0
    """Sequences at once, where memory did not hold as many as asked for; 0 = as asked."""
    averaging: bool = False
    """The weights are averaged (`average`)."""
    averaged: bool = False
    """The average was better at the last evaluation: it is what the checkpoint shows."""
    slowed: float = 1.0
    """Rates are multiplied by this since the run went back from a loss that was not finite."""
    run: str = field(default_factory=lambda: uuid4().hex)
    """Tells runs apart that share a mirror."""

    def note_evaluation(self) -> None:
        """Take `val_loss` down as that of this step: history, and the best so far."""
        self.evaluated = self.step
        if self.loss_steps:  # else another run's checkpoint, which was evaluated there
            self.train_loss = self.loss_sum / self.loss_steps
        self.loss_sum, self.loss_steps = 0.0, 0
        self.history.append([self.step, self.train_loss, self.val_loss])
        if self.best_val_loss is None or self.val_loss < self.best_val_loss:
            self.best_step, self.best_val_loss = self.step, self.val_loss


def one_writer(cfg: RunConfig, is_first: bool) -> ExitStack:
    """The locks of a run, held by rank 0 while the body runs; reading a run (eval_only) needs none.

    Raises UserError naming the process that holds one, or for a run directory that cannot be made or leads elsewhere.
    """
    stack, out = ExitStack(), Path(cfg.train.out_dir)
    if not is_first or only_reads(cfg):
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


def with_own_settings(cfg: RunConfig, origin: Origin | None) -> tuple[RunConfig, Origin]:
    """`cfg` with the settings of the run that `out_dir`, or its mirror, holds, wherever neither command line nor file
    names a key: a default is no wish to change a run. Without an origin every value counts as named.
    """
    out = Path(cfg.train.out_dir)
    if origin is None or begins_anew(cfg, origin):
        return cfg, origin or {}
    with tempfile.TemporaryDirectory() as folder:
        config = out / "config.yaml" if has_checkpoint(out) else None
        if config is None and cfg.train.mirror:
            config = Mirror(cfg.train.mirror).saved_config(Path(folder))
        return own_settings(config, cfg, origin) if config is not None and config.is_file() else (cfg, origin)


def begins_anew(cfg: RunConfig, origin: Origin) -> bool:
    """Whether the command line says --init_from=scratch."""
    return cfg.train.init_from == "scratch" and origin.get("init_from") == "command line"


def has_checkpoint(out: Path) -> bool:
    """Whether the directory holds a run that has come to a checkpoint, also one whose links a copy has lost."""
    return os.path.lexists(out / "checkpoints" / "last") or bool(step_directories(out / "checkpoints"))


def open_run(cfg: RunConfig, origin: Origin, mirror: Mirror | None = None, restarted: bool = False) -> Path | None:
    """Enter the run directory; return the checkpoint to continue from, or None for a new run.

    Where the directory has no checkpoint, the mirror's is fetched. restarted: --init_from=scratch was obeyed before.

    Raises UserError where the directory holds a run of another configuration, or nothing where a run was asked for.
    """
    out = Path(cfg.train.out_dir)
    link = out / "checkpoints" / "last"
    anew = begins_anew(cfg, origin) and not restarted
    if anew and has_checkpoint(out):
        move_aside(out)
    if anew and mirror is not None:
        mirror.forget()
    if not only_reads(cfg):
        restore_links(link.parent)
    last = pointed(link)
    if last is None and os.path.lexists(link):
        raise UserError(f"{link} names a checkpoint that is gone; continue from another with --resume_from="
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
    """Move what the run in `out` wrote, and nothing else, into the first free of `out`.old-1, `out`.old-2 ..."""
    out, number = out.resolve(), 1
    while (old := out.with_name(f"{out.name}.old-{number}")).exists():
        number += 1
    checkpoints = out / "checkpoints"
    theirs = [checkpoints / "last", checkpoints / "best", *step_directories(checkpoints).values()]
    theirs += [*out.glob("events.out.tfevents.*"), *(out / name for name in OWN)]
    if (out / TEXT).is_file():
        theirs += [out / "data", out / TEXT]
    (old / "checkpoints").mkdir(parents=True)
    for path in theirs:
        if os.path.lexists(path):
            path.rename(old / path.relative_to(out))
    log(f"--init_from=scratch: the run that was in {out} is now {old}")


def step_directories(checkpoints: Path) -> dict[int, Path]:
    """The checkpoints in a run's directory by their step. What users put next to them, step-10.bak, is theirs."""
    found_steps = checkpoints.glob("step-*")
    return {int(path.name[5:]): path for path in found_steps
            if re.fullmatch("step-(0|[1-9][0-9]{0,17})", path.name) and path.is_dir()}  # fmt: skip


def restore_links(checkpoints: Path) -> None:
    """Make `checkpoints` what it was before a kill between two renames, and before a copy that knows no links.

    `rsync --no-links` leaves them out: the highest step is the last. `cp -rL` and zip make directories of them.
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
        log(f"{last} is missing; the run goes on from the highest step there is, {max(resumable)}")
    if (path := pointed(last)) is not None and not os.path.lexists(best):
        best_step = load_progress(path).best_step
        if best_step in steps:
            point_at(best, steps[best_step].name)


def only_reads(cfg: RunConfig) -> bool:
    """Whether a run is only looked at: perhaps one that another process is writing, or may not be written."""
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
    """Begin to hash the checkpoint that the run will go on from, before torch is imported; `verified` compares it.

    Here nothing is refused yet, and where there is no checkpoint, nothing begins.
    """
    train, first = cfg.train, os.environ.get("RANK", "0") == "0"
    with suppress(UserError, OSError, ValueError):
        checkpoint = pointed(Path(train.out_dir) / "checkpoints" / "last")
        if checkpoint is None and train.resume_from:
            checkpoint = find_state(train.resume_from)
        if checkpoint is not None and not begins_anew(cfg, origin):
            hash_ahead(checkpoint, for_training if first else for_model)


def verified(checkpoint: Path | None, is_first: bool) -> AbstractContextManager:
    """While a checkpoint is read, its files are compared with what was written: all on rank 0, on others the model's.

    Raises UserError naming the first file that is not.
    """
    if checkpoint is None:
        return nullcontext()
    return verifying(checkpoint, for_training if is_first else for_model)


def start_run(cfg: RunConfig, origin: Origin) -> None:
    """Make the run directory and write config.yaml."""
    out = Path(cfg.train.out_dir)
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        note_place(out)
        save_config(out / "config.yaml", cfg, origin)
    except OSError as e:
        raise UserError(f"out_dir {out} cannot be written: {e.strerror}; choose another --out_dir") from e


def load_progress(checkpoint: Path) -> Progress:
    """Counters of a checkpoint. Raises UserError if the file is damaged, or of another step than its directory."""
    file = checkpoint / "train_state" / "progress.json"
    try:
        progress = read_record(file, Progress)
    except UserError as e:
        raise UserError(f"{e}; continue from another checkpoint with --resume_from") from e
    rows = all(len(row) == 3 and None not in (row[0], row[2]) for row in progress.history)
    if min(progress.step, progress.evaluated, progress.planned, progress.windows) < 0 or not rows:
        raise UserError(f"{file} is damaged; continue from another checkpoint with --resume_from")
    return progress
