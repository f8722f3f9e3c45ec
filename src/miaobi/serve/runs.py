"""The runs below a directory, for the page: which there are, their curves and samples, live while one trains."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from miaobi.console import shown
from miaobi.errors import UserError
from miaobi.serve.errors import APIError
from miaobi.serve.sse import STILL_HERE, frame
from miaobi.settings import as_number, read_yaml
from miaobi.yaml_file import Mapping

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
MOST_RUNS = 1000
MOST_BYTES = 16 << 20
"""Of a file of metrics or samples, that are read at once."""
LOOK_EVERY = 1.0  # seconds between looks at a file that grows
TRAINING_FOR = 180.0  # seconds after which a run of which nothing was written is not training


def listing(root: Path) -> dict[str, Path]:
    """Name -> directory of every run in `root` and one level below, and `root` itself where it is one."""
    found: dict[str, Path] = {}
    if (root / METRICS).is_file():
        found[root.absolute().name] = root
    for folder in sorted(_folders(root)):
        for run in (folder, *sorted(_folders(folder))):
            if (run / METRICS).is_file() and len(found) < MOST_RUNS:
                found[run.relative_to(root).as_posix().replace("/", ".")] = run
    return found


def _folders(root: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []


def rows(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Whole lines of a .jsonl file from byte `start` on, and where the next begins. What is no JSON is left out."""
    if not path.is_file():  # a pipe or a device would keep the thread for ever
        return [], start
    try:
        with path.open("rb") as f:
            f.seek(start)
            data = f.read(MOST_BYTES)
    except OSError:
        return [], start
    whole = data[: data.rfind(b"\n") + 1]
    found = []
    for line in whole.splitlines():
        try:
            row = json.loads(line, parse_constant=finite, parse_float=finite)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            found.append(row)
    return found, start + len(whole)


def finite(word: str) -> float | None:
    """A number of a JSON file; None for NaN and for what is beyond a float: as JSON, no browser reads those."""
    number = float(word)
    return number if math.isfinite(number) else None


def summary(name: str, run: Path) -> dict[str, Any]:
    """One line of the list."""
    measured, _ = rows(run / METRICS)
    last = max((row["step"] for row in measured if type(row.get("step")) is int), default=0)
    planned = config_of(run).get("max_iters")
    planned = planned if isinstance(planned, int) else None
    values = [row["val_loss"] for row in measured if type(row.get("val_loss")) in (int, float)]
    updated = (run / METRICS).stat().st_mtime
    return {"name": name, "state": state_of(run, last, planned, updated), "step": last, "max_iters": planned,
            "best": min(values, default=None), "updated": updated}  # fmt: skip


def state_of(run: Path, step: int, planned: int | None, updated: float) -> str:
    """training, finished or stopped."""
    if planned is not None and step >= planned:
        return "finished"
    return "training" if time.time() - updated < TRAINING_FOR else "stopped"


def config_of(run: Path) -> dict[str, Any]:
    """The settings of a run as its config.yaml has them, {} where it has none that can be read."""
    try:
        return plain(read_yaml(run / "config.yaml")[0])
    except (UserError, OSError):
        return {}


def plain(value: Any) -> Any:
    """YAML's values as JSON has them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item, _ in value.entries}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if getattr(value, "quoted", False):
        return str(value)
    words = {"true": True, "false": False, "null": None, "~": None, "": None}
    if value.lower() in words:
        return words[value.lower()]
    number = as_number(value, float)
    if number is None or not math.isfinite(number):
        return str(value)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def beginning(card: Path) -> str:
    """As much of a README as the page shows."""
    with card.open(encoding="utf-8", errors="replace") as file:
        return file.read(100_000)


def run_named(root: Path | None, name: str) -> Path:
    """The run of a name in the list. Raises APIError."""
    run = listing(root).get(name) if root is not None else None
    if run is None:
        raise APIError(404, f"there is no run {shown(name[:80])!r}; GET /api/runs lists them", "run_not_found", "name")
    return run


def contents(name: str, run: Path, after: int) -> dict[str, Any]:
    """A run's settings, its rows of metrics behind step `after`, and its samples."""
    measured, _ = rows(run / METRICS)
    samples, _ = rows(run / SAMPLES)
    return {
        "name": name,
        "config": config_of(run),
        "metrics": [row for row in measured if not isinstance(row.get("step"), int) or row["step"] > after],
        "samples": samples,
    }


async def live_metrics(run: Path, is_stopping: Callable[[], bool]) -> AsyncIterator[bytes]:
    """New rows of metrics as they come, each an event."""
    file, quiet = run / METRICS, 0.0
    at = file.stat().st_size if file.exists() else 0
    yield STILL_HERE
    while not is_stopping():
        if file.exists() and file.stat().st_size < at:
            at = 0  # it was written anew
        new, at = await asyncio.to_thread(rows, file, at)
        if new:
            yield b"".join(frame(row) for row in new)
            quiet = 0.0
        elif quiet >= 15:
            yield STILL_HERE
            quiet = 0.0
        await asyncio.sleep(LOOK_EVERY)
        quiet += LOOK_EVERY
