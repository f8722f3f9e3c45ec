"""What one GPU gives, in one short lease: speed, memory, sameness and recovery, without any data at hand.

    python -m benchmarks.gpu [--nanogpt DIR] [--minutes 9]

Each item runs in a process of its own, at most `--each` seconds, and prints a line of JSON at once; one that fails,
or takes too long, stops nothing. A table ends it. Text is drawn at random, weights too: no figure here depends on them.
`--device=cpu` with `--small` tries the whole of it without a GPU. What an item does stands in gpu_items.py.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine, parse, report
from miaobi.console import log
from miaobi.errors import UserError

BARS = {
    "seed job": "≥ 1.25x compiled nanoGPT; mfu ≥ 0.50 (4080), ≥ 0.35 (H100, H200)",
    "decode 1 stream": "≥ 800 tokens/s, ≥ 3x transformers' static cache",
    "decode 256 streams": "≥ 30,000 tokens/s",
}


@dataclass(frozen=True)
class Args:
    """Command line."""

    nanogpt: Path | None = None
    """A checkout of nanoGPT, for the seed's job."""
    minutes: float = 9.0
    """In all; no item begins after that."""
    each: float = 60.0
    """Seconds that one item may take."""
    only: tuple[str, ...] = ()
    """Items to run, by name; default all."""
    device: str = "cuda"
    """cuda, cuda:N, or cpu to try this program."""
    small: bool = False
    """Models of a few thousand parameters: tries the program, says nothing about the machine."""
    item: str | None = None
    """Run this one here, and print its figures: what the program starts for each."""
    json: bool = False
    """Print one line of JSON with everything as well."""


def run_item(name: str, args: Args, seconds: float) -> dict[str, Any]:
    """An item's figures from a process of its own; {"error": why} where it has none."""
    command = [sys.executable, "-m", "benchmarks.gpu", f"--item={name}", f"--device={args.device}",
               f"--small={args.small}", *([f"--nanogpt={args.nanogpt}"] if args.nanogpt else [])]  # fmt: skip
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = subprocess.run(command, stdout=out, stderr=err, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return {"error": f"not done after {seconds:.0f} s"}
        out.seek(0)
        err.seek(0)
        lines = out.read().splitlines()
        if code == 0 and lines:
            return {**json.loads(lines[-1]), "seconds": round(time.monotonic() - started, 1)}
        last = [line for line in err.read().splitlines() if line.strip()][-3:]
        return {"error": f"exit code {code}: " + " | ".join(last)}


def shown(value: Any) -> str:
    """A figure for the table."""
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 100 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    return str(value)


def main() -> None:
    """Run the items one by one, or the one that `--item` names."""
    from benchmarks.gpu_items import ITEMS, Bench

    args = parse("gpu", Args, __doc__)
    unknown = [name for name in (*args.only, *([args.item] if args.item else [])) if name not in ITEMS]
    if unknown:
        raise UserError(f"no item is called {', '.join(unknown)}; there are: {', '.join(ITEMS)}")
    if args.item:
        with tempfile.TemporaryDirectory() as work:
            found = ITEMS[args.item](Bench(args.device, args.small, args.nanogpt, Path(work)))
        print(json.dumps(found, ensure_ascii=False))
        return
    until = time.monotonic() + 60 * args.minutes
    found: dict[str, dict[str, Any]] = {}
    for name in args.only or ITEMS:
        left = until - time.monotonic()
        found[name] = run_item(name, args, min(args.each, left)) if left > 1 else {"error": "the time was over"}
        line = json.dumps({"item": name, **found[name]}, ensure_ascii=False)
        log(line)
        with Path("gpu.jsonl").open("a", encoding="utf-8") as file:  # kept whatever ends this program
            file.write(line + "\n")
    rows = [[name, shown(figures), BARS.get(name, "")] for name, figures in found.items()]
    where = machine(args.device) | {"gpu": found.get("environment", {}).get("card", args.device)}
    result = {"machine": where, "settings": dataclasses.asdict(args), "items": found}
    report("gpu", ["item", "figures", "bar"], rows, result, args.json)


if __name__ == "__main__":
    main()
