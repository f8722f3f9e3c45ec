"""Saving checkpoints: copied in memory, written in the background, visible only when complete.

A checkpoint is a model directory plus train_state/, which holds the optimizers' state (`optimizer_state`) and the
progress; checksums.json has the SHA-256 of every file.
"""

from __future__ import annotations

import copy
import shutil
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from miaobi.checksums import Checksums
from miaobi.console import warn
from miaobi.errors import UserError
from miaobi.files import json_of, point, pointed, write_text, written_whole
from miaobi.model.card import write_card
from miaobi.model.checkpoint import Unfilled, save_model, save_tensors
from miaobi.model.lora import adapters, merged, save_adapter
from miaobi.model.transformer import Transformer
from miaobi.train import average, optimizer_state
from miaobi.train.layout import is_sharded, whole
from miaobi.train.model_card import card_of
from miaobi.train.run_directory import Progress, step_directories
from miaobi.train.setup import Plan
from miaobi.train.world import World

POLL_SECONDS = 10.0  # a rank that waits for a checkpoint tests so often whether the others still live


class Saver:
    """Writes the checkpoints of a run, one at a time.

    Training pauses only while weights and optimizer state are copied in memory (`save`); a thread then writes the
    files, flushes and renames them. An error there costs that checkpoint, not the run.

    Attributes: best, (step, validation loss) of the checkpoint that `best` points to; lost, whether the latest
    checkpoint could not be written.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.world, self.root = plan, plan.world, plan.out / "checkpoints"
        self.best = (plan.progress.best_step, plan.progress.best_val_loss)
        self.thread: Thread | None = None
        self.outcome: bool | BaseException = False
        self.lost = False

    def save(self) -> None:
        """Copy everything in memory and start writing; waits first for a checkpoint that is still being written."""
        self.finish()
        plan = self.plan
        with plan.average.using_better() if plan.average else nullcontext():
            plain = snapshot(plan.model, self.world)
        other = plan.average.copy_of_other() if plan.average and self.world.is_first else None
        state = optimizer_state.copied(plan.model, plan.optimizers, plan.scaler, self.world)
        # a daemon, so that a rank that lost the others can exit
        self.thread = Thread(target=self._run, args=(plain, state, copy.deepcopy(plan.progress), other), daemon=True)
        self.thread.start()

    def refuse_lost(self) -> None:
        """Raise UserError if the last checkpoint could not be written."""
        if self.lost:
            raise UserError(f"the last checkpoint, of step {self.plan.progress.step}, could not be written; "
                            f"{checkpoint_before(self.root)}. Free some space: the same command again continues "
                            "from there")  # fmt: skip

    def finish(self) -> None:
        """Wait for the checkpoint that is being written; if it fails, a best model in it is lost, too.

        Raises UserError if a rank is lost that has a part to write.
        """
        if self.thread is None:
            return
        while self.thread.is_alive():
            self.thread.join(POLL_SECONDS)
            if self.thread.is_alive() and self.world.unreachable():
                raise self.world.lost_ranks_error("while a checkpoint was written")
        self.thread = None
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        self.lost = not self.outcome
        progress = self.plan.progress
        if self.outcome:
            self.best = (progress.best_step, progress.best_val_loss)
        else:
            progress.best_step, progress.best_val_loss = self.best

    def _run(self, *args) -> None:
        try:
            # ranks finish together: one that has left the run would count as lost
            self.outcome = all(self.world.gather(self._write(*args), self.world.slow))
        except BaseException as e:  # raised again by `finish`, in the main thread
            self.outcome = e

    def _write(
        self,
        plain: Transformer | None,
        state: optimizer_state.State,
        progress: Progress,
        other: dict[str, Tensor] | None = None,
    ) -> bool:
        """Write a checkpoint; returns whether it is complete on the disk."""
        path = self.root / f"step-{progress.step}"
        try:
            with ExitStack() as stack:
                temporary, error = None, None
                try:
                    if plain is not None:
                        refuse_not_finite(plain)
                        temporary = stack.enter_context(written_whole(path))
                except OSError as e:
                    error = str(e)
                directory, error = self.world.gather([str(temporary) if temporary else None, error], self.world.slow)[0]
                if error:
                    raise OSError(error)
                checksums = stack.enter_context(Checksums())
                self._write_state(state, Path(directory), checksums)
                if plain is not None:
                    if other is not None:
                        save_tensors(Path(directory) / "train_state" / average.FILE, other)
                    self._write_plain(Path(directory), plain, progress)
                    checksums.write(Path(directory))
            if plain is not None:
                self._update_pointers(path, progress)
        except OSError as e:
            warn(f"checkpoint of step {progress.step} could not be written ({e}); "
                 f"{checkpoint_before(self.root)}: free some space")  # fmt: skip
            return False
        if plain is not None:
            self._remove_old(path)
            if self.plan.mirror is not None:
                self.plan.mirror.push(self.root.parent, progress.run)
        return True

    def _write_state(self, state: optimizer_state.State, aside: Path, checksums: Checksums) -> None:
        """Write this rank's part of the optimizers' state, hashing each file while the next is written.

        Raises OSError on every rank if one of them fails.
        """
        error, digests, folder = None, {}, aside / "train_state"
        try:
            names = []
            for name in optimizer_state.write(state, folder, self.world):
                checksums.add(folder / name)
                names.append(name)
            if self.world.size > 1:
                digests = {name: checksums.begun[folder / name]() for name in names}
        except OSError as e:
            error = f"rank {self.world.rank}: {e}" if self.world.size > 1 else str(e)
        parts = self.world.gather([error, digests], self.world.slow)
        if failed := [part[0] for part in parts if part[0]]:
            raise OSError(failed[0])
        for _, digests in parts:
            for name, digest in digests.items():
                checksums.add(folder / name, digest)

    def _write_plain(self, aside: Path, plain: Transformer, progress: Progress) -> None:
        save_model(aside, merged(plain), self.plan.tokenizer, self.plan.data.end_ids)
        if progress.base_weights:
            (aside / "adapter").mkdir()
            save_adapter(aside / "adapter", plain, progress.base)
        write_card(aside, card_of(self.plan, progress), pointed(self.root / "last"), pointed(self.root / "best"))
        for file in aside.rglob("*.safetensors"):  # the library makes them 0600
            file.chmod((aside / "config.json").stat().st_mode & 0o777)
        write_text(aside / "train_state" / "progress.json", json_of(asdict(progress)))

    def _update_pointers(self, path: Path, progress: Progress) -> None:
        """Point `last` (and `best`) to a complete checkpoint."""
        if progress.best_step == progress.step:
            point(self.root / "best", path.name)
        point(self.root / "last", path.name)

    def _remove_old(self, path: Path) -> None:
        """Delete checkpoints that nothing points to any more; an error is only a warning."""
        keep, interval = {path, pointed(self.root / "best")}, self.plan.cfg.train.save_interval
        for step, old in step_directories(self.root).items():
            if old not in keep and not (interval and step % interval == 0):
                try:
                    shutil.rmtree(old)
                except OSError as e:
                    warn(f"the old checkpoint {old} could not be removed ({e}); training goes on")


def refuse_not_finite(model: Transformer) -> None:
    """Raise OSError naming the first parameter that is not finite: such a model cannot be continued."""
    for name, p in model.named_parameters():
        if not bool(torch.isfinite(p).all()):
            raise OSError(f"{name} is not finite; try a lower --learning_rate in another --out_dir")


def checkpoint_before(checkpoints: Path) -> str:
    """Names the checkpoint that is left if the latest could not be written."""
    before = pointed(checkpoints / "last")
    return f"the checkpoint before it, {before.name}, is still whole" if before else "there is none before it"


@torch.no_grad()
def snapshot(model: Transformer, world: World) -> Transformer | None:
    """A copy of `model` on the CPU, independent of training: on rank 0, None elsewhere. Shards are gathered."""
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
