"""Settings of `miaobi classify`, with small-gpt's own key names understood."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from miaobi.config import Optim, Where, check_license
from miaobi.errors import UserError
from miaobi.kinds import Location, Positional
from miaobi.model.config import LoraConfig
from miaobi.seeds import CLASSIFY, SENTIMENT
from miaobi.settings import Origin, collect, refuse_bytes

Pooling = Literal["mask", "no_mask", "mean"]
Trainable = Literal["full", "last_block", "head", "lora"]
LEARNING_RATES = {"full": 1e-4, "last_block": 5e-4, "head": 3e-3, "lora": 1e-3}
"""By what is trained: a linear probe takes the largest steps, LoRA ten times those of full tuning, as in `train`."""


@dataclass(frozen=True)
class ClassifyConfig(Where, Optim, LoraConfig):
    """Labels out of a pretrained model."""

    base_model: Location = ""
    """MODEL that is tuned: run or model directory, hub name, or a small-gpt .pth (see corpus)."""
    corpus: Location | None = None
    """For a .pth: the text that it was trained on, from which its vocabulary is rebuilt."""
    data: Location = ""
    """Labelled texts: .csv, .tsv, .jsonl, .json or .parquet, also .gz .xz .zst .zip of them."""
    without: Location | None = None
    """File whose texts are judged later: texts of data that share text with them are left out (`miaobi prepare
    --without`)."""
    text_column: str | None = None
    """Column or field with the text; default: the one called text, review, content or sentence."""
    label_column: str | None = None
    """Column or field with the label; default: the one called label, labels, sentiment or class."""
    skip_bad: bool = False
    """Leave out and count rows without a label, or that cannot be read, instead of stopping."""
    protocol: Literal["as-published", "corrected"] = "corrected"
    """corrected = duplicates removed, train/dev/test 80/10/10 by review with every label's share the same, dev chooses,
    accuracy per review. as-published = small-gpt's: reviews shuffled, cut into chunks, the last fifth of the chunks is
    the test part and also chooses; accuracy per chunk; a fresh head stays as it is when the rest is frozen."""
    train_fraction: float = 0.8
    """as-published: share of the chunks that is trained on."""
    pooling: Pooling = "mask"
    """Whose state is judged: mask = the last real token's; no_mask = the last position's, every text padded to
    block_size; mean = the mean of all real tokens'."""
    trainable: Trainable = "full"
    """full = everything; last_block = the last block, the last norm and the head; head = a linear probe; lora."""
    block_size: int | None = None
    """Tokens of a piece of text, with those that mark its ends; default: the model's."""
    long_texts: Literal["chunks", "truncate"] = "chunks"
    """Texts beyond block_size: cut into pieces whose logits are averaged, or only their beginning is read."""
    dropout: float = 0.1
    """Share of activations dropped in the part that is trained."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced = every label counts the same in the loss, however rare."""
    label_smoothing: float = 0.0
    """Share of the target that goes to all labels alike."""
    max_epoch: int = 5
    """Passes over the training part."""
    batch_size: int = 32
    """Pieces of text per step."""
    micro_tokens: int | None = None
    """Tokens that go through the model at once; less needs less memory and changes no result. Default 4,096 on a CPU,
    65,536 on a GPU."""
    learning_rate: float | None = None
    """Peak rate of AdamW; default 1e-4 (full), 5e-4 (last_block), 3e-3 (head), 1e-3 (lora)."""
    layer_decay: float = 1.0
    """Each layer down from the head learns at this share of the rate above it (ULMFiT, arXiv:1801.06146)."""
    min_lr: float | None = None
    """Rate at the end; default a tenth of learning_rate."""
    warmup_iters: int | None = None
    """Steps of linear warm-up; default 5% of all."""
    lr_decay_iters: int | None = None
    """Step at which the cosine ends; default the last."""
    eval_interval: int | None = None
    """Steps between evaluations; default half an epoch."""
    patience: int | None = None
    """Evaluations without improvement after which training stops, 0 = never; default 6 (as-published: 0)."""
    seeds: int = 1
    """How many splits (and heads, and orders) are trained: seed, seed + 1, ...; figures are their mean."""
    seed: int = 1337
    """The first of them."""
    baselines: bool = True
    """Also score the commonest label and a linear SVM on character n-grams, on the same splits."""
    license: str | None = None
    """License of the classifiers, for their cards, by the hub's id: apache-2.0, mit, cc-by-4.0, ..."""
    out_dir: Location = "classify_run"
    """Run directory."""
    tensorboard_path: Location | None = None
    """Directory that gets the TensorBoard events as well, of several classifiers one directory each; out_dir has them
    in any case."""

    def __post_init__(self) -> None:
        for name in ("max_epoch", "batch_size", "seeds", "block_size", "micro_tokens", "eval_interval"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.block_size is not None and self.block_size < 4:
            raise UserError(f"block_size is {self.block_size}; a piece of text needs at least 4 tokens")
        for name in ("train_fraction", "layer_decay"):
            if not 0.0 < getattr(self, name) <= 1.0 or (name == "train_fraction" and self.train_fraction == 1.0):
                raise UserError(f"{name} is {getattr(self, name)}; give a share above 0, such as 0.8")
        for name in ("dropout", "label_smoothing"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} is {getattr(self, name)}; give a number from 0 up to below 1")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise UserError(f"learning_rate is {self.learning_rate}; it must be positive and finite, such as 1e-3")
        for name in ("min_lr", "warmup_iters", "lr_decay_iters", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it cannot be negative")
        check_license(self.license)
        Optim.__post_init__(self)
        LoraConfig.__post_init__(self)


@dataclass(frozen=True)
class PredictConfig(Where):
    """Labels of new texts."""

    model: Positional[Location] = ""
    """Run of `miaobi classify train`, or the directory of a classifier. Default: the one that comes with miaobi."""
    input: Positional[str | None] = None
    """A text, a file (.csv .tsv .jsonl, else a text a line), or - for lines of standard input (the default). Where no
    MODEL stands before it: --input=TEXT."""
    text_column: str | None = None
    """Tables and JSON lines: the column with the text; default: the one called text, review, content or sentence."""
    label_column: str | None = None
    """Tables and JSON lines: the column with the true label; accuracy and macro-F1 are then printed at the end."""
    skip_bad: bool = False
    """Leave out and count rows that cannot be read instead of stopping."""
    batch_size: int = 2048
    """Texts that are read ahead, so that those of one length go through the model together."""
    micro_tokens: int | None = None
    """Tokens that go through the model at once. Default 4,096 on a CPU, 65,536 on a GPU."""

    def __post_init__(self) -> None:
        if (self.input or "").startswith("~/"):
            object.__setattr__(self, "input", os.path.expanduser(self.input))
        for name in ("batch_size", "micro_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")


CHECKPOINT_ROOT = "checkpoint_root"
"""small-gpt keeps all its checkpoints there, those of pretraining too."""


def load_config(path: Path | None, given: list[tuple[str, Any]]) -> tuple[ClassifyConfig, Origin]:
    """Defaults, then the file, then the command line's (key, value) pairs.

    Returns the configuration and where each value came from. Raises UserError for unknown keys and wrong types.
    """
    values, origin, written = collect(ClassifyConfig, CLASSIFY, "miaobi classify train", path, given)
    if "protocol" not in values and (seed_keys := sorted(written & SENTIMENT)):
        values["protocol"], origin["protocol"] = "as-published", f"small-gpt's way, because {seed_keys[0]} is given"
    names = [key for key in (*written, *(key for key, _ in given)) if CLASSIFY.aliases.get(key, key) == "out_dir"]
    if names and names[-1] == CHECKPOINT_ROOT:
        origin["out_dir"] += f", as {CHECKPOINT_ROOT}"
    refuse_bytes(values)
    return ClassifyConfig(**values), origin


def settings_of(cfg: ClassifyConfig) -> dict[str, Any]:
    """What decides the figures of a cell, besides its pooling, its trainable part and its seed."""
    elsewhere = {"pooling", "trainable", "seed", "seeds", "baselines", "out_dir", "device", "micro_tokens",
                 "tensorboard_path", "license"}  # fmt: skip
    return {key: value for key, value in dataclasses.asdict(cfg).items() if key not in elsewhere}
