"""How long compiling takes on this machine: estimated from earlier runs, which are cached per machine."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from miaobi.cache import private_cache
from miaobi.console import warn
from miaobi.device import cpu_flags
from miaobi.files import is_a

INITIAL_ESTIMATE = {"blocks": 20.0, "whole": 30.0, "autotuned": 120.0}
"""Seconds on two cores (docs/lab-notes.md), used until this machine has compiled something; for the whole objective,
with or without max_autotune, per six layers."""
MAX_KEPT = 5
"""Latest compilations of each kind that are kept. The longest is the estimate: with a warm Inductor cache one takes
only a fraction of the time."""


def machine_facts(device: torch.device) -> tuple:
    """What the speed of this machine depends on."""
    name = cpu_flags() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return name, torch.__version__, torch.get_num_threads()


def short_digest(*facts: object) -> str:
    """A short hash of some facts, for file names."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def write_cache(file: Path, value: dict[str, object]) -> None:
    """Write a cache file; a directory that cannot be written costs a warning."""
    try:
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(value), encoding="utf-8")
        os.replace(temporary, file)
    except OSError as e:
        warn(f"{file} cannot be written ({e.strerror}); the next run measures again")


def cache_file(device: torch.device) -> Path:
    """Where this machine's compile times are cached."""
    return private_cache() / f"compiling-{short_digest(*machine_facts(device))}.json"


def past_seconds(device: torch.device) -> dict[str, list[float]]:
    """Seconds of the latest compilations of each kind; {} if there is nothing that can be read."""
    try:
        stored = json.loads(cache_file(device).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    sound = is_a(stored, dict[str, list[float]]) and all(took and min(took) > 0 for took in stored.values())
    return stored if sound else {}


def expected_seconds(device: torch.device, kind: str) -> float:
    """Estimated seconds of a compilation. kind: a key of INITIAL_ESTIMATE."""
    return max(past_seconds(device).get(kind, [INITIAL_ESTIMATE[kind]]))


def remember(device: torch.device, kind: str, seconds: float) -> None:
    """Cache how long a compilation took, for the next estimate."""
    known = past_seconds(device)
    write_cache(cache_file(device), known | {kind: [*known.get(kind, []), seconds][-MAX_KEPT:]})
