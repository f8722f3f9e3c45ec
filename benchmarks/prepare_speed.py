"""Preparing a large text: `miaobi prepare`, nanoGPT's prepare.py and `tokenizers`, as whole processes, in turns.

    python -m benchmarks.prepare_speed --text FILE --nanogpt DIR --tokenizers

The input is one UTF-8 file made of the sentences of --text, dealt anew into numbered paragraphs for every repetition:
real Chinese of any length in which neither documents nor near-duplicates repeat. Modes of miaobi: `tail` does what
nanoGPT does (one stream, last tenth for validation), `default` also splits and deduplicates documents, `near` looks
for near-duplicates as well. nanoGPT's side is one process with one thread; so are miaobi's and tokenizers' unless
--workers says otherwise, and miaobi's characters/s are also given per worker.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import git_version, machine, parse, ratio, report, take_turns, version
from benchmarks.peers import copy_nanogpt
from miaobi.console import log
from miaobi.corpus.documents import read_documents

MODES = {"tail": ["--split=tail"], "default": [], "near": ["--dedup=near"]}
PEER = Path(__file__).with_name("tokenizers_prepare.py")
SAMPLE_EVERY = 0.2  # seconds between looks at memory


@dataclass(frozen=True)
class Args:
    """Command line."""

    text: tuple[Path, ...]
    """Text files to make the input of."""
    nanogpt: Path | None = None
    """A checkout of nanoGPT to compare with."""
    tokenizers: bool = False
    """Compare with Hugging Face tokenizers too (tokenizers_prepare.py)."""
    workers: int = 1
    """Processes of miaobi (0: one per core), and threads of tokenizers."""
    megabytes: float = 200.0
    """Size of the input."""
    modes: tuple[str, ...] = tuple(MODES)
    """Of tail, default, near."""
    pairs: int = 5
    """Turns of each side."""
    json: bool = False
    """Print one line of JSON as well."""


def build(texts: tuple[Path, ...], size: int, at: Path) -> int:
    """Write about `size` bytes to `at`; returns the characters written."""
    articles = read_documents([str(text) for text in texts])
    dealt = [re.findall(r"[^。！？\n]*(?:[。！？]\n?|\n)|[^。！？\n]+", article.strip()) for article in articles]
    sentences = [sentence for article in dealt for sentence in article]
    lengths = [len(article) for article in dealt if article]
    draw, written, characters = random.Random(0), 0, 0
    with at.open("w", encoding="utf-8", newline="") as file:
        for serial in itertools.count():
            number = serial % len(lengths)
            if number == 0:
                draw.shuffle(sentences)
                draw.shuffle(lengths)
                rest = iter(sentences)
            paragraph = f"{serial} {''.join(itertools.islice(rest, lengths[number])).strip()}\n\n"
            characters += file.write(paragraph)
            written += len(paragraph.encode())
            if written >= size:
                break
    return characters


class Memory(threading.Thread):
    """Watches a process and its children (Linux): `largest` is the high-water mark of the biggest of them, `together`
    the most that all held at once with shared pages counted once, both in MiB; 0 where /proc does not tell.

    (wait4's ru_maxrss would include this process: a child starts as its image.)
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.largest, self.together, self.over = pid, 0.0, 0.0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(SAMPLE_EVERY):
            sizes = [(kilobytes(p, "status", "VmHWM"), kilobytes(p, "smaps_rollup", "Pss")) for p in family(self.pid)]
            if sizes:
                self.largest = max(self.largest, max(peak for peak, _ in sizes) / 1024)
                self.together = max(self.together, sum(share for _, share in sizes) / 1024)


def kilobytes(pid: int, file: str, field: str) -> int:
    """A field of /proc/PID/FILE, 0 if the process is gone."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/{file}").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        lists = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        lists = []
    children = [int(child) for text in lists for child in text.split()]
    return [pid, *(member for child in children for member in family(child))]


def measure(command: list[str], env: dict[str, str], peaks: dict[str, float]) -> tuple[float, str]:
    """(seconds, stdout) of a whole process; raises the memory peaks in `peaks`. Exits where it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    memory = Memory(process.pid)
    memory.start()
    printed, _ = process.communicate()
    seconds = time.perf_counter() - start
    memory.over.set()
    memory.join()
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {' '.join(command)}")
    for key in ("largest", "together"):
        peaks[key] = max(peaks.get(key, 0.0), getattr(memory, key))
    return seconds, printed


def nanogpt_script(checkout: Path, text: Path, work: Path) -> list[str]:
    """Its character-level prepare.py beside our input.txt; it then downloads nothing, so `requests` may be empty."""
    place = copy_nanogpt(checkout, work / "nanoGPT") / "data" / "shakespeare_char"
    (place / "input.txt").unlink(missing_ok=True)
    (place / "input.txt").symlink_to(text)
    (place / "requests.py").write_text("")
    return [sys.executable, str(place / "prepare.py")]


def main() -> None:
    """Measure and print."""
    args = parse("prepare_speed", Args, __doc__)
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work, text = Path(folder), Path(folder) / "input.txt"
        characters = build(args.text, int(args.megabytes * 1e6), text)
        log(f"input: {text.stat().st_size / 1e6:,.1f} MB, {characters:,} characters")
        peaks: dict[str, dict[str, float]] = {name: {} for name in (*args.modes, "nanoGPT", "tokenizers")}
        workers = args.workers or machine()["cores"]

        def miaobi(mode: str) -> float:
            out = work / mode
            shutil.rmtree(out, ignore_errors=True)
            command = [sys.executable, "-m", "miaobi", "prepare", str(text), "--out", str(out), "--json"]
            seconds, printed = measure([*command, f"--workers={workers}", *MODES[mode]], {}, peaks[mode])
            told[mode] = json.loads(printed)
            return characters / seconds

        sides = {mode: (lambda mode=mode: miaobi(mode)) for mode in args.modes}
        homes: dict[str, Path] = {}
        if args.nanogpt:
            script = nanogpt_script(args.nanogpt, text, work)
            homes["nanoGPT"] = Path(script[1]).parent
            sides["nanoGPT"] = lambda: characters / measure(script, {"PYTHONUTF8": "1"}, peaks["nanoGPT"])[0]
        if args.tokenizers:
            homes["tokenizers"] = work / "tokenizers"
            homes["tokenizers"].mkdir()
            command = [sys.executable, str(PEER), str(text), str(homes["tokenizers"])]
            threads = {"TOKENIZERS_PARALLELISM": str(workers > 1).lower(), "RAYON_NUM_THREADS": str(workers)}
            sides["tokenizers"] = lambda: characters / measure(command, threads, peaks["tokenizers"])[0]
        rates = take_turns(sides, args.pairs)
        for peer, home in homes.items():
            told[peer] = {f"{s}_tokens": (home / f"{s}.bin").stat().st_size // 2 for s in ("train", "val")}
    ratios = {peer: {mode: ratio(rates[mode], rates[peer]) for mode in args.modes} for peer in homes}
    rows = []
    for name in rates:
        rate, peak = statistics.median(rates[name]), peaks[name]
        rows.append([name, rate / 1e6, rate / 1e6 / workers if name in args.modes else "", characters / rate,
                     *(of.get(name, "") for of in ratios.values()), f"{peak.get('largest', 0):,.0f}",
                     f"{peak.get('together', 0):,.0f}", told[name].get("duplicates_removed", "")])  # fmt: skip
    columns = ["side", "Mchar/s", "per worker", "seconds", *(f"/ {peer}" for peer in ratios),
               "MiB", "MiB, all", "removed"]  # fmt: skip
    report("prepare_speed", columns, rows, {
        "machine": machine(), "settings": dataclasses.asdict(args), "characters": characters,
        "nanogpt": git_version(args.nanogpt) if args.nanogpt else None, "tokenizers": version("tokenizers"),
        "workers": workers, "characters_per_second": rates, "ratios": ratios, "peak_mib": peaks, "reported": told,
    }, args.json)  # fmt: skip
    for peer in homes:
        if "tail" in told and told["tail"]["train_tokens"] != told[peer]["train_tokens"]:
            raise SystemExit(f"miaobi's tail cut and that of {peer} differ in length")


if __name__ == "__main__":
    main()
