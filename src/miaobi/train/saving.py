"""Checkpoints: copied in an instant, written in the background, visible only when whole.

A checkpoint is a model directory plus train_state/: the optimizer's moments in torch's distributed format (each rank
writes its own shards; any number of ranks reads them again) and the counters.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.amp import GradScaler
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from miaobi.console import warn
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.files import aside_of, point, pointed, written_whole
from miaobi.model.checkpoint import Unfilled, save_model
from miaobi.model.lora import adapters, merged, save_adapter
from miaobi.model.transformer import Transformer
from miaobi.train.layout import is_sharded, whole
from miaobi.train.mirror import Mirror
from miaobi.train.state import Progress, steps
from miaobi.train.world import World

LOOK = 10.0  # seconds after which a rank that waits for a checkpoint looks whether the others still live
Optimizers = list[torch.optim.Optimizer]


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Training stands still while weights and moments are copied in memory (`save`); files are written, flushed and
    renamed by a thread. Whatever fails there costs that checkpoint, not the run.

    Attributes:
        best: (step, validation loss) of the checkpoint that `best` names.
        lost: whether the latest checkpoint could not be written.
    """

    def __init__(
        self,
        out: Path,
        world: World,
        tokenizer: Tokenizer,
        end_ids: tuple[int, ...],
        save_interval: int | None,
        mirror: Mirror | None,
        best: tuple[int | None, float | None],
    ) -> None:
        self.root, self.world = out / "checkpoints", world
        self.tokenizer, self.end_ids, self.save_interval, self.mirror = tokenizer, end_ids, save_interval, mirror
        self.best = best
        self.thread: Thread | None = None
        self.outcome: bool | BaseException = False
        self.lost = False

    def save(self, model: Transformer, optimizers: Optimizers, scaler: GradScaler, progress: Progress) -> None:
        """Copy everything and go on; a checkpoint still being written is waited for first."""
        self.finish(progress)
        plain = snapshot(model, self.world)
        state = staged({"optimizer": moments(model, optimizers), "scaler": scaler.state_dict()})
        # a daemon: a rank that lost the others must be able to leave
        self.thread = Thread(target=self._run, args=(plain, state, copy.deepcopy(progress)), daemon=True)
        self.thread.start()

    def finish(self, progress: Progress) -> None:
        """Wait for the checkpoint under way; where it was lost, so is a best model in it.

        Raises UserError where a rank is lost that has a part to write.
        """
        if self.thread is None:
            return
        while self.thread.is_alive():
            self.thread.join(LOOK)
            if self.thread.is_alive() and self.world.unreachable():
                raise self.world.lost("while a checkpoint was written")
        self.thread = None
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        self.lost = not self.outcome
        if self.outcome:
            self.best = (progress.best_step, progress.best_val_loss)
        else:
            progress.best_step, progress.best_val_loss = self.best

    def _run(self, *args) -> None:
        try:
            # no rank is through before all are: one that has left the run would be taken for lost
            self.outcome = all(self.world.gather(self._write(*args), self.world.slow))
        except BaseException as e:  # raised again by `finish`, in the run's own thread
            self.outcome = e

    def _write(self, plain: Transformer | None, state: dict, progress: Progress) -> bool:
        """Whether the checkpoint is whole on the disk."""
        path = self.root / f"step-{progress.step}"
        try:
            with ExitStack() as stack:
                error = None
                try:
                    aside = stack.enter_context(written_whole(path)) if self.world.is_first else aside_of(path)
                except OSError as e:
                    error = e
                failed = [e for e in self.world.gather(error, self.world.slow) if e is not None]
                if failed:
                    raise failed[0]
                write_shards(state, aside / "train_state", self.world)
                if plain is not None:
                    self._write_plain(aside, plain, progress)
            if plain is not None:
                self._show(path, progress)
        except OSError as e:
            warn(f"checkpoint of step {progress.step} could not be written ({e}); {kept(self.root)}: free some space")
            return False
        if plain is not None and self.mirror is not None:
            self.mirror.push(self.root)
        return True

    def _write_plain(self, aside: Path, plain: Transformer, progress: Progress) -> None:
        save_model(aside, merged(plain), self.tokenizer, self.end_ids)
        if progress.base_weights:
            (aside / "adapter").mkdir()
            save_adapter(aside / "adapter", plain, progress.base)
        text = json.dumps(asdict(progress), ensure_ascii=False)
        (aside / "train_state" / "progress.json").write_text(text, encoding="utf-8")

    def _show(self, path: Path, progress: Progress) -> None:
        """Point `last` (and `best`) at a whole checkpoint; drop those nothing points at any more."""
        if progress.best_step == progress.step:
            point(self.root / "best", path.name)
        point(self.root / "last", path.name)
        keep = {path, pointed(self.root / "best")}
        for step, old in steps(self.root).items():
            regular = self.save_interval and step % self.save_interval == 0
            if old not in keep and not regular:
                shutil.rmtree(old)


def kept(checkpoints: Path) -> str:
    """What there is where a checkpoint was lost."""
    before = pointed(checkpoints / "last")
    return f"the checkpoint before it, {before.name}, is still whole" if before else "there is none before it"


@torch.no_grad()
def snapshot(model: Transformer, world: World) -> Transformer | None:
    """A copy of `model` on the CPU that training does not touch: on rank 0, None elsewhere. Shards are gathered."""
    if not is_sharded(model) and not world.is_first:
        return None
    values = {}
    for name, p in model.named_parameters():
        gathered = whole(p.detach())
        if world.is_first:
            values[name] = gathered.to("cpu", copy=True)
    if not world.is_first:
        return None
    if any(adapters(model)):
        plain = copy.deepcopy(model, {id(p): torch.nn.Parameter(values[n], False) for n, p in model.named_parameters()})
        return plain.to("cpu")
    with Unfilled():
        plain = Transformer(model.cfg)
    plain.load_state_dict(values, assign=True)
    plain.end_ids, plain.generation = model.end_ids, model.generation
    return plain


def moments(model: Transformer, optimizers: Optimizers) -> dict[str, Any]:
    """Optimizer state by parameter name, whatever the layout. Rates and decays are the configuration's, not kept."""
    return get_optimizer_state_dict(model, optimizers)["state"]


def staged(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of `state` on the CPU."""
    stager = DefaultStager(StagingOptions(False, False, False, False))
    try:
        return stager.stage(state)
    finally:
        stager.close()


def write_shards(state: dict[str, Any], directory: Path, world: World) -> None:
    """Every rank writes its part; returns when all have. Raises OSError on every rank if one of them fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to save in a single process"
            dcp.save(state, checkpoint_id=directory, process_group=world.slow, no_dist=world.size == 1)
    except CheckpointException as e:
        rank, (error, _) = next(iter(e.failures.items()))
        if isinstance(error, OSError) or "PytorchStreamWriter" in str(error) or "unexpected pos" in str(error):
            raise OSError(f"rank {rank}: {error}; is the disk full?") from e
        raise


def load_optimizers(
    checkpoint: Path, model: Transformer, optimizers: Optimizers, scaler: GradScaler, world: World
) -> None:
    """Fill optimizer state from a checkpoint of any layout; rates and decays stay those of the configuration.

    Raises UserError if train_state is damaged, cut short, or of another model or optimizer.
    """
    directory = checkpoint / "train_state"
    whole_state = get_optimizer_state_dict(model, optimizers)  # with empty moments to be filled
    state = {"optimizer": whole_state["state"], "scaler": scaler.state_dict()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(state, checkpoint_id=directory, process_group=world.slow, no_dist=world.size == 1)
    except (CheckpointException, OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as e:
        reason = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
        raise UserError(f"{directory} cannot be read ({reason or type(reason).__name__}); it was cut short or altered, "
                        "or belongs to another model or optimizer: continue from another checkpoint with "
                        "--resume_from=RUN/checkpoints/step-N")  from e  # fmt: skip
    set_optimizer_state_dict(model, optimizers, whole_state)
    scaler.load_state_dict(state["scaler"])
