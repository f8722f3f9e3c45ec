"""What this machine's CPU gives, in one table: training, memory, a busy neighbour, decoding, the demo.

    python -m benchmarks.cpu --data TEXT [--nanogpt DIR] [--llama_python PYTHON]

Runs the other benchmarks one by one, with few turns each, and stops beginning new ones after `--minutes`. What is left
out for want of a peer or of time is named. `--json` is what to send from another machine.
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

from benchmarks.common import Ratio, machine, parse, report
from miaobi.console import log
from miaobi.device import cpu_flags

UNITS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
LARGE = ("--n_layer", "40", "--n_head", "8", "--n_embd", "512", "--batch_size", "8", "--steps", "1", "--warmup", "1")


@dataclass(frozen=True)
class Args:
    """Command line."""

    data: Path
    """Text, or a directory made by miaobi prepare."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT to compare with."""
    llama_python: str | None = None
    """The interpreter that has llama-cpp-python and gguf."""
    pairs: int = 3
    minutes: float = 15.0
    """In all; what has begun is stopped then."""
    demo: bool = True
    """Time `miaobi demo` from command to end."""
    json: bool = False
    """Print one line of JSON as well."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    peer: str
    ours: float
    theirs: float | None
    ratio: str
    bar: str


def run(name: str, flags: list[str], until: float) -> dict[str, Any] | str:
    """The JSON of another benchmark, or why there is none."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags, "--json"]
    log(" ".join(command[2:]))
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "the time was over"
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else f"exit code {done.returncode}"


def training_rows(what: str, told: dict[str, Any], bars: dict[str, str]) -> list[Row]:
    """Speed against each peer, and memory beside it."""
    middle = {side: sorted(rates)[len(rates) // 2] for side, rates in told["tokens_per_second"].items()}
    dtype = told["sides"]["miaobi"]["dtype"]
    rows = [
        Row(f"{what}, tokens/s, {dtype}", f"{side} ({told['sides'][side]['dtype']})", middle["miaobi"], middle[side],
            str(Ratio(**given)), bars.get(side, ""))
        for side, given in told["ratios"].items()
    ]  # fmt: skip
    peaks = told["peak_mib"]
    peer = next((side for side in peaks if side != "miaobi"), "")
    share = f"{peaks['miaobi'] / peaks[peer]:.2f}" if peer else ""
    return [*rows, Row(f"{what}, peak MiB", peer, peaks["miaobi"], peaks.get(peer), share, "")]


def busy_rows(told: dict[str, Any]) -> list[Row]:
    """Beside a busy core, of each model."""
    return [
        Row(f"{name}, tokens/s beside a busy core", "quiet", sorted(m["busy"])[len(m["busy"]) // 2],
            sorted(m["quiet"])[len(m["quiet"]) // 2], str(Ratio(**m["ratio"])), "≥ 0.45")
        for name, m in told["models"].items()
    ]  # fmt: skip


def decode_rows(told: dict[str, Any]) -> list[Row]:
    """One stream and sixteen, as far as `decode_speed` measured them."""
    bars = {"llama.cpp bf16": "≥ 1.0", "llama.cpp q8_0": "≥ 1.2"}
    return [
        Row(f"decoding: {key}", "", 0.0, None, str(Ratio(**given)), bars.get(key, ""))
        for key, given in told.get("ratios", {}).items()
        if isinstance(given, dict) and set(given) == {"pairs", "median", "low", "high"}
    ]


def demo_row(until: float) -> Row | str:
    """Seconds of `miaobi demo` from command to end."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as at:
        command = [sys.executable, "-m", "miaobi", "demo"]
        log("miaobi demo")
        try:
            done = subprocess.run(command, cwd=at, stdout=sys.stderr, timeout=max(1.0, until - started))
        except subprocess.TimeoutExpired:
            return "the time was over"
    took = time.monotonic() - started
    return f"exit code {done.returncode}" if done.returncode else Row("demo, seconds", "", took, None, "", "≤ 150")


def main() -> None:
    """Measure and print."""
    args = parse("cpu", Args, __doc__)
    until = time.monotonic() + 60 * args.minutes
    has_bf16 = machine()["bf16"]
    common = ["--data", str(args.data), "--device", "cpu", "--pairs", str(args.pairs)]
    peer = ["--nanogpt", str(args.nanogpt)] if args.nanogpt else []
    small = [*common, *peer, "--transformers_fast", "--no_transformers", "--steps", "2"]
    bars = {
        "nanoGPT": "≥ 4.0" if has_bf16 else "≥ 1.2",
        "nanoGPT, tuned": "≥ 1.05" if has_bf16 else "",
        "transformers, compiled": "≥ 1.3" if has_bf16 else "≥ 1.15",
    }
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    details: dict[str, Any] = {}

    def add(what: str, found: dict[str, Any] | str, make: Any) -> None:
        if isinstance(found, str):
            left_out[what] = found
        else:
            details[what] = found
            rows.extend(make(found))

    tuned = ["--nanogpt_tuned"] if args.nanogpt else []
    add("gpt2 6x384", run("train_speed", [*small, *tuned], until), lambda t: training_rows("gpt2 6x384", t, bars))
    add("busy core", run("busy_core", ["--data", str(args.data)], until), busy_rows)
    if args.demo:
        found = demo_row(until)
        if isinstance(found, str):
            left_out["demo"] = found
        else:
            rows.append(found)
    if args.nanogpt:
        large = run("train_speed", [*common, *peer, "--no_transformers", *LARGE], until)
        floor = {"nanoGPT": "≥ 3.5" if has_bf16 else ""}
        add("128.84M, batch 8", large, lambda t: training_rows("128.84M, batch 8", t, floor))
    else:
        left_out["nanoGPT"] = "no --nanogpt"
    if args.llama_python:
        flags = ["--llama_python", args.llama_python, "--pairs", str(args.pairs)]
        add("decoding", run("decode_speed", flags, until), decode_rows)
    else:
        left_out["decoding against llama.cpp"] = "no --llama_python"
    flags = cpu_flags().split()
    units = [unit for unit in UNITS if unit in flags]
    table = [[r.what, r.peer, r.ours, "" if r.theirs is None else r.theirs, r.ratio, r.bar] for r in rows]
    report("cpu", ["what", "against", "miaobi", "peer", "ratio (spread)", "bar"], table, {
        "machine": machine() | {"units": units}, "settings": dataclasses.asdict(args),
        "rows": [dataclasses.asdict(r) for r in rows], "left_out": left_out, "details": details,
    }, args.json)  # fmt: skip
    print(f"units of this CPU: {', '.join(units) or 'unknown'}", file=sys.stderr)
    for what, why in left_out.items():
        print(f"left out: {what} ({why})", file=sys.stderr)


if __name__ == "__main__":
    main()
