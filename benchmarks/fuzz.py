"""Every format's reader, fed with files that are nearly right: whatever they hold, a result or a clear error comes out.

    python -m benchmarks.fuzz --minutes 10

Valid files are changed at random with their structure in view (`mutations`) and read by the code that reads them in a
command (`fuzz_models`, `fuzz_texts`), in a process of its own, so that one that dies is seen too. A case that ends in
anything but a result or a UserError, runs longer than ten seconds, takes a gigabyte, or has an error as long as a page,
is kept in --keep with what it raised. The same --seed gives the same cases.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import fuzz_models, fuzz_texts
from benchmarks.common import machine, parse, report
from benchmarks.fuzz_models import Format, sentences, written
from miaobi import console
from miaobi.console import log
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.errors import UserError

SLOW = 10.0
"""Seconds of processor time that no case may take."""
STUCK = 600.0
"""Seconds after which a case that neither computes nor answers is ended."""
GROWTH = 1 << 30
"""Bytes that the process may grow by for one case."""
LONGEST = 4000
"""Characters of an error: more is a value that was not shortened."""
BATCH = 200
"""Cases of one process."""


@dataclass(frozen=True)
class Args:
    """Command line."""

    minutes: float = 10.0
    """Time for all formats together, shared out evenly."""
    formats: str = ""
    """Only formats whose name has this in it."""
    keep: Path = Path("fuzz-failures")
    """Directory for what failed: the file, and what was raised."""
    seed: int = 1
    """Seed of the cases."""
    json: bool = False
    """Print one line of JSON as well."""


@dataclass
class Tally:
    """What became of the cases of one format."""

    cases: int = 0
    results: int = 0
    user_errors: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """What went wrong -> how often."""
    slowest: float = 0.0
    """Seconds of processor time."""
    growth: int = 0
    """Bytes that one case took at most."""


def formats(work: Path) -> list[Format]:
    """Make one of everything in `work`; the formats, each with the file in it that is to be changed."""
    text, data = written(work / "text.txt", "\n\n".join(sentences(60))), work / "data"
    prepare([str(text)], PrepareConfig(out=data, workers=1))
    return [
        *fuzz_models.models(work, data), *fuzz_models.runs(work, data), *fuzz_texts.other_projects(work),
        *fuzz_texts.labelled(work, work / "model"), *fuzz_texts.sources(work), *fuzz_texts.settings_of_commands(work),
    ]  # fmt: skip


def case(format: Format, valid: bytes, seed: int) -> bytes:
    """The file of one case."""
    return format.mutate(random.Random(seed), valid)


def outcome(format: Format) -> str:
    """ "" for a result, "UserError" for a clear one, else what was raised and where."""
    try:
        format.read()
    except UserError as e:
        text = str(e)
        return "UserError" if len(text) <= LONGEST else f"an error of {len(text):,} characters\n{text[:500]}"
    except BaseException as e:  # a panic of tokenizers' is one
        ours = [f for f in traceback.extract_tb(e.__traceback__) if "miaobi" in f.filename] or [None]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours[-1] else "?"
        return f"{type(e).__name__} in {where}\n{traceback.format_exc()}"
    return ""


def serve(format: Format, valid: bytes, first: int, until: float, pipe: int) -> None:
    """In a process of its own: cases from `first` on, one JSON line each, until it is time or the batch is through."""
    console.quiet()
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries in other languages print there
    for seed in range(first, first + BATCH):
        if time.monotonic() > until:
            break
        format.file.write_bytes(case(format, valid, seed))
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
        before, began = peak(), time.process_time()
        what = outcome(format)
        seconds, growth = time.process_time() - began, peak() - before
        if seconds > SLOW and not what.startswith("an error"):
            what = f"{seconds:.0f} seconds\n"
        if growth > GROWTH:
            what = f"{growth >> 20:,} MiB\n{what}"
        os.write(pipe, (json.dumps([seed, what[:5000], seconds, growth]) + "\n").encode())
    format.file.write_bytes(valid)


def peak() -> int:
    """Bytes that this process had in memory at most."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def fuzz(format: Format, seconds: float, seed: int, keep: Path) -> Tally:
    """Feed one format for so long."""
    valid, tally, next_seed = format.file.read_bytes(), Tally(), seed * 1_000_000
    before = outcome_in_fork(format)
    if before != ("" if format.is_taken else "UserError"):
        raise SystemExit(f"{format.name}: the valid file is not read: {before}")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            try:
                os.close(reader)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                serve(format, valid, next_seed, until, writer)
            finally:
                os._exit(0)
        os.close(writer)
        text, answered, computed = b"", time.monotonic(), 0.0
        while True:
            ready, _, _ = select.select([reader], [], [], 1.0)
            if not ready:
                if seconds_of(child) - computed > 3 * SLOW or time.monotonic() - answered > STUCK:
                    os.kill(child, signal.SIGKILL)
                continue
            if not (piece := os.read(reader, 1 << 16)):
                break
            text, answered, computed = text + piece, time.monotonic(), seconds_of(child)
            *lines, text = text.split(b"\n")
            for line in lines:
                number, what, took, growth = json.loads(line)
                next_seed = number + 1
                note(tally, format, valid, number, what, took, growth, keep)
        os.close(reader)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            how = (
                "stuck"
                if time.monotonic() - answered > STUCK
                else f"died of {signal.Signals(os.WTERMSIG(status)).name}"
            )
            note(tally, format, valid, next_seed, f"{how}\n", STUCK if how == "stuck" else 0.0, 0, keep)
            next_seed += 1
    format.file.write_bytes(valid)
    return tally


def seconds_of(process: int) -> float:
    """Processor time that a process has taken: it is said to hang by that, however busy or frozen the machine is."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def outcome_in_fork(format: Format) -> str:
    """What becomes of the valid file, said by a process of its own: locks and libraries begin as in the cases."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        console.quiet()
        os.write(writer, outcome(format)[:3000].encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as said:
        text = said.read().decode()
    return text if os.waitpid(child, 0)[1] == 0 else f"it died\n{text}"


def note(
    tally: Tally, format: Format, valid: bytes, seed: int, what: str, seconds: float, growth: int, keep: Path
) -> None:
    """Count a case; the first of each kind of failure is kept."""
    tally.cases += 1
    tally.slowest, tally.growth = max(tally.slowest, seconds), max(tally.growth, growth)
    if not what:
        tally.results += 1
    elif what == "UserError":
        tally.user_errors += 1
    else:
        kind = re.sub(r"\d[\d,]*(?= (seconds|MiB|characters))", "N", what.partition("\n")[0])
        tally.failures[kind] = tally.failures.get(kind, 0) + 1
        if tally.failures[kind] == 1:
            name = re.sub(r"\W+", "-", format.name) + "-" + hashlib.sha256(kind.encode()).hexdigest()[:6]
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{name}{format.file.suffix}").write_bytes(case(format, valid, seed))
            (keep / f"{name}.why").write_text(f"{format.name}, --seed case {seed}\n{what}", encoding="utf-8")


def main() -> None:
    """Feed all formats, print a table; exit code 1 where anything failed."""
    args = parse("fuzz", Args, __doc__)
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    keep, rows, tallies = args.keep.resolve(), [], {}
    with tempfile.TemporaryDirectory() as work:
        console.quiet()
        chosen = [f for f in formats(Path(work)) if args.formats in f.name]
        console.console.quiet = False
        for format in chosen:
            tallies[format.name] = tally = fuzz(format, 60 * args.minutes / len(chosen), args.seed, keep)
            bad = sum(tally.failures.values())
            rows.append(
                [
                    format.name,
                    tally.cases,
                    tally.results,
                    tally.user_errors,
                    bad,
                    f"{tally.slowest:.2f}",
                    tally.growth >> 20,
                ]
            )
            log(
                "  ".join(map(str, rows[-1]))
                + "".join(f"\n    {count} x {what}" for what, count in tally.failures.items())
            )
    total = {key: sum(getattr(t, key) for t in tallies.values()) for key in ("cases", "results", "user_errors")}
    failed = sum(sum(t.failures.values()) for t in tallies.values())
    columns = ["format", "cases", "results", "UserErrors", "failures", "slowest, s of CPU", "most memory, MiB"]
    report("fuzz", columns, rows, {
        "machine": machine(), "settings": dataclasses.asdict(args), **total, "failures": failed,
        "formats": {name: dataclasses.asdict(tally) for name, tally in tallies.items()},
    }, args.json)  # fmt: skip
    log(f"{total['cases']:,} cases, {failed} failures" + (f"; see {keep}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
