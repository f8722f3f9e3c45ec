"""Where a run lies: never in another model's place."""

from __future__ import annotations

import os
from pathlib import Path

from miaobi.classify.config import CHECKPOINT_ROOT, ClassifyConfig
from miaobi.console import log
from miaobi.errors import UserError
from miaobi.model.checkpoint import model_directory
from miaobi.overrides import Origin, read_yaml


def run_directory(cfg: ClassifyConfig, origin: Origin, base: str) -> Path:
    """`cfg.out_dir`; where that was given as small-gpt's checkpoint_root and a model lies there, `classify` in it.

    Raises UserError for another place that a model has: `best` would no longer be that model.
    """
    out = Path(cfg.out_dir)
    if origin.get("out_dir", "").endswith(CHECKPOINT_ROOT) and (found := occupant(out, base)):
        log(f"{CHECKPOINT_ROOT}={out} holds {found}: the classifiers go into {out / 'classify'}")
        out = out / "classify"
    if found := occupant(out, base):
        raise UserError(f"out_dir {out} holds {found}, which a classifier would displace; choose another --out_dir")
    return out


def occupant(out: Path, base: str) -> str:
    """The model that lies at `out`, in words; "" for none, or for classifiers of an earlier command."""
    tuned = model_directory(base).resolve()
    if tuned == out.resolve() or tuned.parent == (out / "checkpoints").resolve():
        return f"{base}, the model that is to be tuned"
    if (out / "config.json").is_file():
        return "a model"
    return "a run of `miaobi train`" if is_pretraining(out) else ""


def is_pretraining(out: Path) -> bool:
    """Whether `miaobi train` has a run at `out`, though it may have no checkpoint yet."""
    if os.path.lexists(out / "checkpoints" / "last"):  # classifiers have a `best` alone
        return True
    try:
        return "max_iters" in read_yaml(out / "config.yaml")[0]
    except UserError:  # there is none, or not one of ours
        return False
