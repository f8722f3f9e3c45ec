"""Average of the weights along a run: on repeated text it keeps improving after the weights themselves stop to.

Weights of step t have weight t^POWER, so the average is always over about the second half of the run, however long it
is (Karras et al. 2024, arXiv:2312.02696, section 3.1). Training is not affected. At each evaluation both are scored,
and the better one becomes the model of the checkpoint; the other is saved in train_state/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from miaobi.config import TrainConfig
from miaobi.errors import UserError
from miaobi.model.families import refuse_unusable
from miaobi.model.transformer import Transformer
from miaobi.train.layout import is_sharded
from miaobi.train.run_directory import Progress

POWER = 1.0
REPEATED = 2.0
"""With average_weights=auto, runs of this many passes over the text are averaged."""
FILE = "other_weights.safetensors"


def is_averaged(cfg: TrainConfig, epochs: float, is_tuned: bool, in_shards: bool = False) -> bool:
    """Whether a new run averages its weights. Raises UserError if that was asked for and is not possible."""
    if cfg.average_weights is True and (in_shards or cfg.trainable == "lora"):
        raise UserError("average_weights needs whole weights, all of which are trained; leave it out, or use "
                        "--trainable=full without --parallel=fsdp")  # fmt: skip
    if cfg.average_weights != "auto":
        return bool(cfg.average_weights)
    return epochs >= REPEATED and not is_tuned and not in_shards


class Average:
    """The average of a model's weights, on the same device.

    `progress.averaged` says whether the checkpoint has the average or the weights themselves as its model.
    """

    def __init__(self, model: Transformer, progress: Progress) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.weights = list(model.parameters())
        self.values = [p.detach().clone() for p in self.weights]
        self.progress = progress

    @classmethod
    def of(
        cls, cfg: TrainConfig, checkpoint: Path | None, model: Transformer, progress: Progress, epochs: float
    ) -> Average | None:
        """The average of a run at its current step; None if it has none, or for eval_only."""
        if checkpoint is None:
            progress.averaging = is_averaged(cfg, epochs, bool(progress.base), is_sharded(model))
        if not progress.averaging or cfg.eval_only:
            return None
        average = cls(model, progress)
        if checkpoint is not None:
            average.load(checkpoint / "train_state")
        return average

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Add the weights after `steps` steps to the average."""
        keep = (1.0 - 1.0 / steps) ** (1.0 + POWER)
        torch._foreach_lerp_(self.values, [p.detach() for p in self.weights], 1.0 - keep)

    @contextmanager
    def using_better(self, averaged: bool | None = None) -> Iterator[None]:
        """Within the body the model has the weights that the checkpoint has as its model. averaged: overrides that
        choice.
        """
        averaged = self.progress.averaged if averaged is None else averaged
        if averaged:
            self._exchange()
        try:
            yield
        finally:
            if averaged:
                self._exchange()

    def lower_loss(self, own: float, score: Callable[[], float]) -> float:
        """The lower validation loss of weights and average; sets which of the two the checkpoint has as its model."""
        with self.using_better(True):
            averaged = score()
        self.progress.averaged = averaged < own
        return min(own, averaged)

    def _exchange(self) -> None:
        for i, p in enumerate(self.weights):
            p.data, self.values[i] = self.values[i], p.data

    def copy_of_other(self) -> dict[str, Tensor]:
        """A copy on the CPU of the weights that are not the checkpoint's model."""
        there = self.weights if self.progress.averaged else self.values
        return {name: p.detach().to("cpu", copy=True) for name, p in zip(self.names, there, strict=True)}

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Restore from a checkpoint's train_state; its model is loaded already. Raises UserError for a damaged file."""
        try:
            found = load_file(directory / FILE)
            refuse_unusable(str(directory / FILE), found)
            for i, (name, p) in enumerate(zip(self.names, self.weights, strict=True)):
                if self.progress.averaged:
                    self.values[i].copy_(p)
                    p.copy_(found[name])
                else:
                    self.values[i].copy_(found[name])
        except (OSError, SafetensorError, KeyError, RuntimeError) as e:
            raise UserError(f"{directory / FILE} cannot be read ({str(e)[:200]}); it was cut short or altered: "
                            "continue from another with --resume_from=RUN/checkpoints/step-N") from e  # fmt: skip
