"""Commands killed with kill -9 at random moments, continued by the same command: do they end in the same bytes?

    python -m benchmarks.survive --data TEXT

In turns: training is killed at any moment; while a checkpoint is being written; one of two processes under `torchrun
--max-restarts` is killed, with DDP and with FSDP, every other time while a checkpoint is being written; and `prepare`
at any moment. Weights and prepared files are compared byte for byte with those of the same command left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import machine, parse, report
from miaobi.console import log
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.files import pointed

KINDS = {  # what is killed -> its processes, its flags
    "any moment": (1, {}),
    "while saving": (1, {}),
    "one of 2 ranks, ddp": (2, {"parallel": "ddp"}),
    "one of 2 ranks, fsdp": (2, {"parallel": "fsdp"}),
    "prepare": (0, {}),
}
PATIENT = "keep_alive_max_attempt=400,join_timeout=3600,read_timeout=3600"
"""torchrun takes itself for lost after 15 seconds without a turn on the processor; others may need it that long."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3",
            f"--rdzv-conf={PATIENT}")  # fmt: skip
SETTINGS = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 8, "dropout": 0.1,
            "eval_interval": 20, "save_interval": 10, "log_interval": 5, "eval_iters": 2, "sample_tokens": 0,
            "device": "cpu", "dtype": "float32", "compile": False, "comm_timeout": 1800}  # fmt: skip
PATIENCE = 3600  # seconds after which a run is taken to be stuck: other programs may leave it little of the machine


@dataclass(frozen=True)
class Args:
    """Command line."""

    data: Path
    """Text to train on."""
    runs: int = 30
    """Runs that are killed."""
    steps: int = 100
    """Optimizer steps of a run."""
    characters: int = 200_000
    """How much of the text is used."""
    seed: int = 1
    """Seed of the moments."""
    json: bool = False
    """Print one line of JSON as well."""


class Command:
    """A training command that can be started again and again."""

    def __init__(self, out: Path, data: Path, steps: int, ranks: int, flags: dict[str, str]) -> None:
        settings = SETTINGS | {"data": data, "out_dir": out, "max_iters": steps} | flags
        launcher = TORCHRUN if ranks > 1 else ()
        self.words = [sys.executable, *launcher, "-m", "miaobi", "train", *(f"--{k}={v}" for k, v in settings.items())]
        self.out, self.ranks, self.said = out, ranks, out.with_suffix(".log")

    def start(self) -> subprocess.Popen:
        """Start it, or go on where it was; what it says is added to OUT.log."""
        with self.said.open("a") as said:
            return subprocess.Popen(self.words, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def victim(self, process: subprocess.Popen, draw: random.Random) -> int | None:
        """The process to kill: the only one, or any of torchrun's workers; None if they have ended."""
        if self.ranks == 1:
            return process.pid if process.poll() is None else None
        workers = []
        with contextlib.suppress(OSError):  # one that ends while it is looked at
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                if b"LOCAL_RANK=" in Path(f"/proc/{child}/environ").read_bytes():
                    workers.append(int(child))
        return draw.choice(workers) if workers else None

    def reached(self) -> int:
        """Step of the last checkpoint, 0 without one."""
        last = pointed(self.out / "checkpoints" / "last")
        return int(last.name.removeprefix("step-")) if last else 0

    def weights(self) -> str:
        """Digest of the weights in `last` and `best`."""
        files = [pointed(self.out / "checkpoints" / name) / "model.safetensors" for name in ("last", "best")]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    def until(self, there: Callable[[], bool], process: subprocess.Popen) -> bool:
        """Whether `there` became true while the process ran."""
        give_up = time.monotonic() + PATIENCE
        while not there():
            if process.poll() is not None:
                return False
            if time.monotonic() > give_up:
                process.kill()
                raise SystemExit(f"the run is stuck; see what it said:\n{self.said.read_text()[-3000:]}")
            time.sleep(0.002)
        return True

    def finish(self) -> None:
        """Run it to its end. Raises SystemExit where it fails."""
        self.ends(self.start())

    def ends(self, process: subprocess.Popen) -> None:
        """Wait for the end. Raises SystemExit where it fails."""
        self.until(lambda: False, process)
        if process.returncode:
            raise SystemExit(f"exit code {process.returncode}; the run said:\n{self.said.read_text()[-3000:]}")

    def training(self) -> bool:
        """Whether it has taken its first steps."""
        return (self.out / "metrics.jsonl").exists() and (self.out / "metrics.jsonl").stat().st_size > 0

    def saving(self) -> bool:
        """Whether a checkpoint is being written aside."""
        return any((self.out / "checkpoints").glob(".*"))


class Preparing(Command):
    """`miaobi prepare`, with two workers."""

    def __init__(self, out: Path, text: Path) -> None:
        self.words = [sys.executable, "-m", "miaobi", "prepare", str(text), f"--out={out}", "--workers=2"]
        self.out, self.ranks, self.said = out, 1, out.with_suffix(".log")

    def reached(self) -> int:
        """Whether the data were there."""
        return int((self.out / "manifest.json").exists())

    def weights(self) -> str:
        """Digest of all files; whatever else was left beside them counts too."""
        files = sorted(self.out.iterdir()) + sorted(self.out.parent.glob(f".{self.out.name}.*"))
        return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()

    def training(self) -> bool:
        """Whether it has begun to write."""
        return any(self.out.parent.glob(f".{self.out.name}.*"))


def left_alone(command: Command) -> tuple[str, float]:
    """(weights, seconds from its first steps to its end) of an undisturbed run."""
    process = command.start()
    command.until(command.training, process)
    began = time.monotonic()
    command.ends(process)
    return command.weights(), time.monotonic() - began


def killed(command: Command, seconds: float, in_save: bool, draw: random.Random) -> tuple[float, int]:
    """Kill a run once and bring it to its end: (seconds after its first steps, step of the checkpoint it had).

    The step is -1 for a run that ended before it could be killed.
    """
    process = command.start()
    if not command.until(command.training, process):
        raise SystemExit(f"the run ended before it began:\n{command.said.read_text()[-3000:]}")
    began = time.monotonic()
    moment = began + draw.uniform(0, 0.9 * seconds)
    command.until(lambda: time.monotonic() > moment, process)
    if in_save and command.until(command.saving, process):
        time.sleep(draw.uniform(0, 0.02))
    if (victim := command.victim(process, draw)) is None:  # faster than the one left alone
        process.wait()
        return time.monotonic() - began, -1
    os.kill(victim, signal.SIGKILL)
    after, reached = time.monotonic() - began, command.reached()
    if command.ranks == 1:
        process.wait()
        command.finish()
    else:  # torchrun starts the processes again
        command.ends(process)
    return after, reached


def main() -> None:
    """Kill, continue, compare and print."""
    args = parse("survive", Args, __doc__)
    draw, rows, results, number = random.Random(args.seed), [], [], 0
    with tempfile.TemporaryDirectory() as work:
        text, data = Path(work) / "text.txt", Path(work) / "data"

        def command(kind: str, name: str) -> Command:
            ranks, flags = KINDS[kind]
            return (
                Command(Path(work) / name, data, args.steps, ranks, flags)
                if ranks
                else Preparing(Path(work) / name, text)
            )

        text.write_text(args.data.read_text(encoding="utf-8")[: args.characters], encoding="utf-8")
        prepare([str(text)], PrepareConfig(out=data, workers=1))
        started = time.monotonic()
        alone = {kind: left_alone(command(kind, f"alone-{i}")) for i, kind in enumerate(KINDS)}
        log("left alone: " + ", ".join(f"{kind} {seconds:.1f} s" for kind, (_, seconds) in alone.items()))
        while len(results) < args.runs:
            kind = list(KINDS)[len(results) % len(KINDS)]
            in_save = kind == "while saving" or (KINDS[kind][0] == 2 and len(results) // len(KINDS) % 2 == 0)
            run, number = command(kind, f"run-{number}"), number + 1
            after, reached = killed(run, alone[kind][1], in_save, draw)
            if reached < 0:
                continue
            same = run.weights() == alone[kind][0]
            end = "the same" if same else "ANOTHER"
            log(f"{len(results) + 1}/{args.runs}  {kind}: killed {after:.2f} s into training, {end} end")
            rows.append([kind, f"{after:.2f}", reached, "yes" if same else "NO"])
            results.append({"kind": kind, "in_save": in_save, "seconds": after, "checkpoint": reached, "same": same})
    same = sum(result["same"] for result in results)
    columns = ["killed", "seconds after it began to write", "last checkpoint then", "same bytes at the end"]
    report("survive", columns, rows, {
        "machine": machine(), "settings": dataclasses.asdict(args), "killed": results, "same": same,
        "minutes": (time.monotonic() - started) / 60,
    }, args.json)  # fmt: skip
    log(f"{same} of {len(results)} commands killed with kill -9 ended bit-identical to one left alone")
    if same < len(results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
