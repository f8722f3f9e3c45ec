"""Seconds to nanoGPT's final quality: how much sooner miaobi's default recipe is as good on the same text.

    python -m benchmarks.time_to_quality --data TEXT --nanogpt DIR --results ttq.json --plot ttq.png

nanoGPT trains once with its own scripts, as in quality_race, and its model is scored on the whole validation part;
--results keeps that, so that the next call does without. Then sides take turns: a few steps of nanoGPT, for its speed
at that moment, and a whole run of `miaobi train` of a planned number of steps, whose last checkpoint must score no
worse on the whole validation part. Parameters are as many; nats are told per character, as the tokenizers differ.

The clock runs from the beginning of the first step to the end of the last, evaluations and checkpoints excluded on both
sides; what miaobi counts before its first step (bigram_init) is added to its time. The cold total is that of
everything: nanoGPT's prepare.py and train.py, and `miaobi train` on the raw text, with imports, preparation, evaluation
and checkpoints.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine, parse, ratio, report
from benchmarks.quality_race import Race, call, flags, prepare_nanogpt, run_nanogpt, train_nanogpt
from miaobi.console import log

COUNTED = re.compile(r"bigrams of [\d,]+ tokens in ([\d.]+) s")  # what `miaobi train` says of bigram_init


@dataclass(frozen=True)
class Args(Race):
    """Command line."""

    pairs: int = 5
    """Runs of miaobi, each with a seed of its own, and each after `speed_steps` of nanoGPT."""
    speed_steps: int = 10
    """Steps of nanoGPT before each run."""
    tokenizer: str = "bpe"
    """miaobi's: bpe or char."""
    vocab_size: int | None = 4652
    """miaobi's: 4652 makes as many parameters as nanoGPT has with the sports news."""
    our_batch: int = 4
    """Sequences per step of miaobi."""
    our_steps: int = 64
    """Steps of miaobi; all else is its default."""

    @property
    def shared(self) -> dict[str, Any]:
        """What both sides are told; a line for each step, and evaluations as small as they can be."""
        return super().shared | {"eval_iters": 1, "log_interval": 1}


def seconds_of(curve: list[list[float]]) -> float:
    """Seconds from the beginning of the first step to the end of the last, by the times of the log's lines.

    The first line is written when its step is done, so that one step's time is added. Raises ValueError for fewer than
    two lines.
    """
    if len(curve) < 2:
        raise ValueError("two steps at least are needed to tell their time")
    (first, *_), (last, *_) = curve[0], curve[-1]
    return (last - first) * len(curve) / (len(curve) - 1)


def from_first_step(curve: list[list[float]], before: float = 0.0, scale: float = 1.0) -> list[list[float]]:
    """`curve` on the clock that `seconds_of` reads, `before` seconds later, its losses times `scale`."""
    step = seconds_of(curve) / len(curve)
    return [[round(at - curve[0][0] + step + before, 3), n, loss * scale] for at, n, loss in curve]


def nanogpt_whole(args: Args, copy: Path, prepared: float) -> dict[str, Any]:
    """nanoGPT's whole run: what is kept in results."""
    side = run_nanogpt(args, copy)
    steps = [point for point in side["curve"] if point[1] < args.steps]  # the last comes after an evaluation
    return side | {"cold": side["seconds"] + prepared, "curve": from_first_step(steps),
                   "seconds": seconds_of(steps), "machine": machine(args.device)}  # fmt: skip


def nanogpt_speed(args: Args, copy: Path) -> float:
    """Seconds of as many steps as its whole run has, from a few steps."""
    changes = {"max_iters": args.speed_steps, "eval_interval": 10 * args.steps, "out_dir": "speed"}
    curve = train_nanogpt(args, copy, **changes)[0]["curve"]
    return seconds_of(curve) / len(curve) * args.steps


def run_miaobi(args: Args, work: Path, seed: int) -> dict[str, Any]:
    """`miaobi train` on the raw text, as a user types it, and `miaobi eval` of its last checkpoint."""
    out = work / f"seed-{seed}"
    own = {"family": "qwen3", "tokenizer": args.tokenizer, "split": "tail", "sample_tokens": 0, "seed": seed}
    steps = {"batch_size": args.our_batch, "max_iters": args.our_steps, "eval_interval": args.our_steps}
    vocabulary = {} if args.vocab_size is None else {"vocab_size": args.vocab_size}
    command = flags(own | args.shared | steps | vocabulary)
    miaobi = [sys.executable, "-m", "miaobi"]
    run = call([*miaobi, "train", f"--data={args.data}", f"--out_dir={out}", *command, "--json"])
    score = ["--stride=block", "--checkpoint=last", f"--device={args.device}"]
    scored = call([*miaobi, "eval", str(out), str(out / "data"), *score, "--json"])
    counted = [float(found[1]) for line in run["lines"] if (found := COUNTED.search(line))]
    before, per_char = sum(counted), scored["tokens"] / scored["characters"]
    return {"nats_per_char": scored["loss"] * per_char, "parameters": run["parameters"],
            "characters": scored["characters"], "seconds": seconds_of(run["curve"]) + before, "counting": before,
            "cold": run["seconds"], "tokens": args.our_steps * args.our_batch * args.block_size, "seed": seed,
            "curve": from_first_step(run["curve"], before, per_char),
            "command": " ".join(["miaobi train", "--data=TEXT", *command])}  # fmt: skip


def draw(nanogpt: dict[str, Any], runs: list[dict[str, Any]], path: Path) -> None:
    """Training loss against seconds, and the score on the whole validation part where each run ends."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name, sides, color in (("nanoGPT", [nanogpt], "tab:orange"), ("miaobi", runs, "tab:blue")):
        for i, side in enumerate(sides):
            seconds, _, losses = zip(*side["curve"], strict=True)
            smooth = [statistics.mean(losses[max(0, at - 4) : at + 1]) for at in range(len(losses))]
            axes.plot(seconds, smooth, color=color, alpha=0.6, lw=1, label=None if i else f"{name}, training")
            axes.plot(side["seconds"], side["nats_per_char"], "o", color=color,
                      label=None if i else f"{name}, whole validation part: {side['nats_per_char']:.3f}")  # fmt: skip
    axes.axhline(nanogpt["nats_per_char"], color="gray", ls=":", lw=1)
    axes.set(xscale="log", xlabel="seconds since the first step began (miaobi's counting included)",
             ylabel="nats per character")  # fmt: skip
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> None:
    """Measure, compare and print. Exits with 1 where a run of miaobi scores worse than nanoGPT."""
    args = parse("time_to_quality", Args, __doc__)
    if args.nanogpt is None:
        sys.exit("time_to_quality needs --nanogpt DIR: its speed is measured beside every run")
    sides = args.earlier()
    runs: list[dict[str, Any]] = []
    speeds: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        copy, prepared = prepare_nanogpt(args, work)
        if "nanogpt" not in sides:
            log("nanoGPT, its whole run")
            sides["nanogpt"] = nanogpt_whole(args, copy, prepared)
            args.keep(sides)
        peer = sides["nanogpt"]
        for number in range(args.pairs):
            log(f"pair {number + 1}/{args.pairs}")
            speeds.append(nanogpt_speed(args, copy))
            runs.append(run_miaobi(args, work, seed=1337 + number))
            run = runs[-1]  # said at once: a benchmark that is cut off has then told what it found
            log(f"nanoGPT {speeds[-1]:.0f} s; miaobi {run['seconds']:.1f} s, cold {run['cold']:.1f} s, "
                f"{run['nats_per_char']:.4f} nats/char, seed {run['seed']}")  # fmt: skip
    sides["miaobi"] = runs[0] | {"machine": machine(args.device)}
    args.keep(sides)
    sooner = ratio(speeds, [run["seconds"] for run in runs])
    # the cold total of nanoGPT is of another hour: told at the speed of each pair
    cold = ratio([peer["cold"] * speed / peer["seconds"] for speed in speeds], [run["cold"] for run in runs])
    rows = [["nanoGPT, whole run", f"{peer['nats_per_char']:.4f}", f"{peer['parameters']:,}",
             f"{args.steps * args.batch_size * args.block_size:,}", peer["seconds"], peer["cold"]]]  # fmt: skip
    for speed, run in zip(speeds, runs, strict=True):
        rows.append([f"nanoGPT, {args.speed_steps} steps", "", "", "", speed, ""])
        rows.append([f"miaobi, seed {run['seed']}", f"{run['nats_per_char']:.4f}", f"{run['parameters']:,}",
                     f"{run['tokens']:,}", run["seconds"], run["cold"]])  # fmt: skip
    rows.append(["nanoGPT / miaobi, pair by pair", "", "", "", str(sooner), str(cold)])
    columns = ["side", "nats/char", "parameters", "tokens", "seconds", "cold total"]
    result = {"machine": machine(args.device), "nanogpt": peer, "nanogpt_seconds": speeds, "runs": runs,
              "sooner": sooner, "sooner_cold": cold}  # fmt: skip
    report("time_to_quality", columns, rows, result, args.json)
    if args.plot:
        draw(peer, runs, args.plot)
    if len({side["characters"] for side in [peer, *runs]}) > 1:
        raise SystemExit("the sides did not score the same characters")
    if worse := [run["seed"] for run in runs if run["nats_per_char"] > peer["nats_per_char"]]:
        raise SystemExit(f"not as good as nanoGPT with seeds {worse}: give more --our_steps")


if __name__ == "__main__":
    main()
