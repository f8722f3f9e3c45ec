"""The weights averaged along a run: where text is repeated, the average goes on getting better when the weights do not.

Weights of step t count as t^POWER, so that the average is always over about the second half of the run, however long
it is (Karras et al. 2024, arXiv:2312.02696, section 3.1). It changes nothing in training. At an evaluation both are
scored, and the better of the two is the model of the checkpoint; the other one lies in train_state/.
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
"""Passes over the text from which on a run averages by itself."""
FILE = "other_weights.safetensors"


def decide(cfg: TrainConfig, epochs: float, is_tuned: bool, in_shards: bool = False) -> bool:
    """Whether a new run averages its weights. Raises UserError where that is asked for and cannot be."""
    if cfg.average_weights is True and (in_shards or cfg.trainable == "lora"):
        raise UserError("average_weights needs whole weights, all of which are trained; leave it out, or use "
                        "--trainable=full without --parallel=fsdp")  # fmt: skip
    if cfg.average_weights != "auto":
        return bool(cfg.average_weights)
    return epochs >= REPEATED and not is_tuned and not in_shards


class Average:
    """The average of a model's weights, beside them on the same device.

    `progress.averaged` says which of the two the checkpoint shows.
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
        """That of a run, as far as it has come; None where there is none, or the run is only looked at."""
        if checkpoint is None:
            progress.averaging = decide(cfg, epochs, bool(progress.base), is_sharded(model))
        if not progress.averaging or cfg.eval_only:
            return None
        average = cls(model, progress)
        if checkpoint is not None:
            average.load(checkpoint / "train_state")
        return average

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take the weights in, after `steps` steps of the run."""
        keep = (1.0 - 1.0 / steps) ** (1.0 + POWER)
        torch._foreach_lerp_(self.values, [p.detach() for p in self.weights], 1.0 - keep)

    @contextmanager
    def shown(self, averaged: bool | None = None) -> Iterator[None]:
        """The model with the averaged weights, or with its own. averaged: default, what the checkpoint shows."""
        averaged = self.progress.averaged if averaged is None else averaged
        if averaged:
            self._exchange()
        try:
            yield
        finally:
            if averaged:
                self._exchange()

    def better(self, own: float, score: Callable[[], float]) -> float:
        """The lower of the weights' own validation loss and that of the average, which the checkpoint then shows."""
        with self.shown(True):
            averaged = score()
        self.progress.averaged = averaged < own
        return min(own, averaged)

    def _exchange(self) -> None:
        for i, p in enumerate(self.weights):
            p.data, self.values[i] = self.values[i], p.data

    def hidden(self) -> dict[str, Tensor]:
        """A copy on the CPU of what the checkpoint does not show."""
        there = self.weights if self.progress.averaged else self.values
        return {name: p.detach().to("cpu", copy=True) for name, p in zip(self.names, there, strict=True)}

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Go on from a checkpoint's train_state, whose model was read already. Raises UserError for a damaged file."""
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
