"""The directory of a run of cells: never one that holds another model, or cells of other settings, texts or weights."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from miaobi.classify.config import CHECKPOINT_ROOT, ClassifyConfig, settings_of
from miaobi.classify.data import Labelled
from miaobi.classify.finetune import Cell
from miaobi.console import log, warn_once
from miaobi.errors import UserError, brief
from miaobi.files import is_a, read_json
from miaobi.model.checkpoint import model_directory
from miaobi.model.tensors import read_tensors
from miaobi.settings import Origin, read_yaml

RESULT = "result.json"
ROW = {"pooling": str, "trainable": str, "seed": int, "accuracy": float, "macro_f1": float, "calibration_error": float,
       "dev_accuracy": float, "seconds": float, "trained_parameters": int, "peak_memory_mb": int}  # fmt: skip
BASELINE = {"name": str, "seed": int, "accuracy": float, "macro_f1": float, "seconds": float}
"""What is asked of a cell's row and of a baseline's; they hold more."""
CONTENTS = {"data_sha256": ("texts or labels", "data"), "base_sha256": ("weights", "base_model")}
"""Fingerprint -> what it is of, and the setting that names where that lies."""


def run_directory(cfg: ClassifyConfig, origin: Origin, base: str) -> Path:
    """`cfg.out_dir`; where that was given as small-gpt's checkpoint_root and a model lies there, `classify` in it.

    Raises UserError for any other directory that holds a model: `best` would no longer be that model.
    """
    out = Path(cfg.out_dir)
    if origin.get("out_dir", "").endswith(CHECKPOINT_ROOT) and (owner := occupant(out, base)):
        log(f"{CHECKPOINT_ROOT}={out} holds {owner}: the classifiers go into {out / 'classify'}")
        out = out / "classify"
    if owner := occupant(out, base):
        raise UserError(f"out_dir {out} holds {owner}, which a classifier would displace; choose another --out_dir")
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


def identity(cfg: ClassifyConfig, data: Labelled, base: str) -> dict[str, Any]:
    """What decides the figures of a cell besides its row and column: settings, and SHA-256 of what they name.

    Raises UserError for a base without weights.
    """
    content = json.dumps([data.texts, data.labels.tolist(), data.names])  # ASCII, so that half a character passes
    directory, weights = model_directory(base), hashlib.sha256()
    try:
        for name, tensor in sorted(read_tensors(directory).items()):
            weights.update(name.encode())
            weights.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    except UserError as e:
        raise UserError(f"{directory}: {e}") from e
    return settings_of(cfg) | {
        "data_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "base_sha256": weights.hexdigest(),
    }


def refuse_others(out: Path, cells: list[Cell], now: dict[str, Any]) -> None:
    """Raise UserError for the first of `cells` that an earlier command trained as something else than `now`."""
    for cell in cells:
        path = out / "checkpoints" / cell.name
        saved = read_result(path / RESULT)
        if saved is None or (key := changed(saved["settings"], now)) is None:
            continue
        how = f"with {key}={brief(saved['settings'][key])}, now {key}={now.get(key)}"
        if key in CONTENTS:
            what, where = CONTENTS[key]
            how = f"of other {what} than {now[where]} has now"
        raise UserError(f"{out} holds {cell.name} {how}: take another --out_dir, or remove {path} to train it anew")


def changed(was: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first key that is not what it was. One that `was` lacks, coming from an older version, may be anything."""
    return next((key for key, value in was.items() if now.get(key) != value), None)


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell whose figures these are."""
    return Cell(row["pooling"], row["trainable"], row["seed"])


def read_result(path: Path, key: str = "row") -> dict[str, Any] | None:
    """What a cell (`row`) or the baselines of a split (`rows`) left behind, with their `settings`; None where there is
    nothing, or nothing whole, or another's, which is said: what a row says of itself names files, too.
    """
    try:
        result = read_json(path)
    except UserError as e:
        warn_once(f"{e}: what it tells is computed anew")
        return None
    if not result:
        return None
    rows, asked = ([result.get("row")], ROW) if key == "row" else (result.get("rows"), BASELINE)
    kinds = isinstance(result.get("settings"), dict) and is_a(rows, list[dict]) and bool(rows)
    if kinds and all(name in row and is_a(row[name], kind) for row in rows for name, kind in asked.items()):
        places = {str(row["seed"]) if key == "rows" else cell_of(row).name for row in rows}
        if places == {path.stem if key == "rows" else path.resolve().parent.name} or path.parent.name == "best":
            return result
    warn_once(f"{path} does not hold the figures of a classifier; they are computed anew")
    return None
