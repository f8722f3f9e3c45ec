"""What nanoGPT's and small-gpt's users type: their names for our settings, and the settings that we do not need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Names:
    """Other projects' names for the settings of a verb."""

    aliases: dict[str, str] = field(default_factory=dict)
    """Their name -> ours."""
    translated: dict[str, tuple[type, Callable[[Any], Any]]] = field(default_factory=dict)
    """Aliases whose value means something else there: the type of theirs, and a function from theirs to ours."""
    no_longer: dict[str, str] = field(default_factory=dict)
    """Settings that mean nothing here, and why."""


LAUNCHED = "torchrun starts the processes; --parallel=ddp or fsdp says how they share the work"
CLASSIFIES = "a setting of `miaobi classify`"
SHAPE = "the shape comes with base_model"

TRAIN = Names(
    aliases={
        "lr": "learning_rate",
        "warmup_steps": "warmup_iters",
        "decay_steps": "lr_decay_iters",
        "train_batch": "batch_size",
        "eval_freq": "eval_interval",
        "eval_steps": "eval_iters",
        "save_freq": "save_interval",
        "checkpoint_root": "out_dir",
        "data_path": "data",
        "dataset": "data",
        "max_epoch": "max_epochs",
        "train_percent": "val_fraction",
    },
    translated={
        "dataset": (str, "data/{}".format),  # nanoGPT looks there
        "train_percent": (float, lambda share: round(1.0 - share, 6)),
    },
    no_longer={
        "always_save_checkpoint": "best and last are always kept",
        "backend": "nccl on GPUs, gloo on CPUs",
        "test_batch": "results do not depend on it",
        "ddp": LAUNCHED,
        "fsdp": LAUNCHED,
        "local_rank": LAUNCHED,
        "world_size": LAUNCHED,
        "sharding_strategy": "--parallel=fsdp shards; --fsdp_shard_size within one machine",
        "sentimental_data_path": CLASSIFIES,
        "base_model": CLASSIFIES,
        "use_mask": CLASSIFIES,
        "frozen": CLASSIFIES,
    },
)
"""nanoGPT's train.py, and small-gpt's YAML files for pretraining."""

CLASSIFY = Names(
    aliases={
        "sentimental_data_path": "data",
        "data_path": "corpus",
        "train_percent": "train_fraction",
        "train_batch": "batch_size",
        "lr": "learning_rate",
        "warmup_steps": "warmup_iters",
        "decay_steps": "lr_decay_iters",
        "eval_freq": "eval_interval",
        "checkpoint_root": "out_dir",
        "use_mask": "pooling",
        "frozen": "trainable",
    },
    translated={
        "use_mask": (bool, lambda yes: "mask" if yes else "no_mask"),
        "frozen": (bool, lambda yes: "last_block" if yes else "full"),
    },
    no_longer={
        **dict.fromkeys(("vocab_size", "n_layer", "n_head", "n_embd", "bias"), SHAPE),
        "compile": "texts of every length would be compiled anew",
        "test_batch": "results do not depend on it",
        "save_freq": "the best model is kept",
        "resume_from": "the same command again goes on with what is unfinished",
    },
)
"""small-gpt's YAML files for sentiment."""

MODEL = Names(aliases={"out_dir": "model"})
"""Wherever a MODEL is asked for, --out_dir=RUN names it as in nanoGPT's sample.py."""

SAMPLE = Names(
    aliases=MODEL.aliases,
    no_longer={
        "init_from": "the MODEL argument says where weights come from",
        "compile": "decoding does not wait for a compiler",
    },
)
"""nanoGPT's sample.py."""

OURS = Names()
"""Of verbs that no other project has."""

PRETRAINING = {"train_batch", "data_path", "decay_steps", "train_percent", "checkpoint_root"}
"""A configuration with one of these is small-gpt's."""
SENTIMENT = {"sentimental_data_path", "use_mask", "frozen", "train_percent"}
"""A configuration of `miaobi classify` with one of these is small-gpt's."""

SHIPPED = {  # a seed's configuration, without _ddp, _fsdp or a number -> ours that stands for it
    "train_TH": "train_TH.yaml",
    "train90M": "chat-90m.yaml",
    "train300M": "chat-300m.yaml",
    "chat300M": "chat-300m.yaml",
    "sentimental": "sentiment.yaml",
}


def shipped_for(name: str) -> str | None:
    """The configuration of ours that stands for a seed's of this file name; None if none does."""
    stem = name.rpartition(".")[0].removesuffix("_ddp").removesuffix("_fsdp")
    return SHIPPED.get(stem) or SHIPPED.get(stem.rstrip("0123456789"))
