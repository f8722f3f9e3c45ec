"""From typing `miaobi chat MODEL` to the first character of the first reply, with a model of 128M parameters.

    python -m benchmarks.chat_start

The model has random weights, the seed's shape (40 x 512, block 256) and a chit-chat tokenizer; no corpus is read. The
imports are timed in processes of their own.
"""

from __future__ import annotations

import dataclasses
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import machine, parse, report
from miaobi.corpus.template import SEP_TEMPLATE
from miaobi.corpus.tokenizer import PAD, SEP, Tokenizer
from miaobi.model.checkpoint import save_model
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer

IMPORTS = "import miaobi.cli, miaobi.generate.chat, miaobi.generate.terminal; print(flush=True)"


@dataclass(frozen=True)
class Args:
    """Command line."""

    runs: int = 5
    """Starts; the first one reads the files into the system's cache and is not counted."""
    device: str = "auto"
    json: bool = False
    """Print one line of JSON as well."""


def write_model(at: Path) -> int:
    """A model directory; its parameters."""
    counts = Counter(chr(c) for c in range(0x4E00, 0x4E00 + 5530)) + Counter(string.printable)
    trained = Tokenizer.train_char(counts, vocab_size=5791)
    config = {**trained.config, "chat_template": SEP_TEMPLATE, "eos_token": PAD, "sep_token": SEP}
    tokenizer = Tokenizer(trained.backend, config)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(family="gpt2", n_layer=40, n_head=8, n_embd=512, vocab_size=5791))
    at.mkdir()
    save_model(at, model, tokenizer, (tokenizer.sep_id, tokenizer.pad_id))
    return model.num_parameters()


def first_byte(model: Path, device: str) -> float:
    """Seconds until the reply begins."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "miaobi", "chat", str(model), f"--device={device}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write("你好\nexit\n".encode())
        process.stdin.flush()
        if not process.stdout.read(1):
            raise SystemExit("no reply came")
        seconds = time.perf_counter() - started
        process.kill()
    return seconds


def imports() -> float:
    """Seconds that a fresh interpreter takes for everything that chat imports."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    args = parse("chat_start", Args, __doc__)
    with tempfile.TemporaryDirectory() as work:
        parameters = write_model(Path(work) / "model")
        starts = [first_byte(Path(work) / "model", args.device) for _ in range(args.runs + 1)][1:]
    loading = [imports() for _ in range(args.runs + 1)][1:]
    rows = [[name, f"{statistics.median(times):.2f}", f"{min(times):.2f}-{max(times):.2f}"]
            for name, times in (("first character", starts), ("of which imports", loading))]  # fmt: skip
    report("chat_start", ["", "seconds, median", "spread"], rows, {
        "machine": machine(args.device), "settings": dataclasses.asdict(args), "parameters": parameters,
        "first_character": starts, "imports": loading,
    }, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
