"""How long compiling takes on this machine: what it took before, kept per machine from run to run."""

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

FIRST_GUESS = {"blocks": 20.0, "whole": 30.0, "autotuned": 120.0}
"""Seconds on two cores (docs/lab-notes.md), until this machine has compiled itself; of the whole objective, with or
without max_autotune, for each six layers."""
KEPT = 5
"""Earlier compilations of each kind, of which the longest counts: where Inductor finds its parts ready, one takes a
fraction of the time."""


def machine(device: torch.device) -> tuple:
    """What of this machine its speed depends on."""
    name = cpu_flags() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return name, torch.__version__, torch.get_num_threads()


def digest(*facts: object) -> str:
    """A short name for facts, for files."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def store(file: Path, value: dict[str, object]) -> None:
    """Write what is remembered; a home that cannot be written forgets, with a line of warning."""
    try:
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(value), encoding="utf-8")
        os.replace(temporary, file)
    except OSError as e:
        warn(f"{file} cannot be written ({e.strerror}); the next run measures again")


def memory_file(device: torch.device) -> Path:
    """Where the seconds of this machine are kept."""
    return private_cache() / f"compiling-{digest(*machine(device))}.json"


def earlier(device: torch.device) -> dict[str, list[float]]:
    """Seconds that the last compilations of each kind took here; {} where nothing can be read."""
    try:
        stored = json.loads(memory_file(device).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    sound = is_a(stored, dict[str, list[float]]) and all(took and min(took) > 0 for took in stored.values())
    return stored if sound else {}


def expected(device: torch.device, kind: str) -> float:
    """Seconds that compiling will take about. kind: a key of FIRST_GUESS."""
    return max(earlier(device).get(kind, [FIRST_GUESS[kind]]))


def remember(device: torch.device, kind: str, seconds: float) -> None:
    """Keep how long compiling took, for the next estimate."""
    known = earlier(device)
    store(memory_file(device), known | {kind: [*known.get(kind, []), seconds][-KEPT:]})
