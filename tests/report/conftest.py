"""A tiny run with samples, and copies of it that went otherwise."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import tiny

from miaobi.settings import load_config


@pytest.fixture(scope="session")
def sampled(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps on raw text, with a sample at both evaluations."""
    from miaobi.generate.chat import preview
    from miaobi.train.loop import train

    out = tmp_path_factory.mktemp("report") / "tiny run"
    flags = [*tiny(data=corpus_file, out_dir=out, sample_tokens=12), "--bigram_init=False"]
    train(*load_config(None, [tuple(flag[2:].split("=", 1)) for flag in flags]), preview)
    return out


@pytest.fixture
def altered(sampled: Path, tmp_path: Path) -> Callable[..., Path]:
    """`altered("name", metrics=[...], summary={...}, samples=[...])`: a copy of the run with other files."""

    def make(name: str = "copy", metrics=None, summary=None, samples=None) -> Path:
        run = tmp_path / name
        shutil.copytree(sampled, run, symlinks=True)
        for file, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
            if rows is not None:
                (run / file).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        if summary is not None:
            told = json.loads((run / "summary.json").read_text(encoding="utf-8"))
            (run / "summary.json").write_text(json.dumps(told | summary), encoding="utf-8")
        return run

    return make


def history(validation: Callable[[float], float], training: Callable[[float], float], steps: int = 1000) -> list[dict]:
    """metrics.jsonl of a run whose losses are functions of the share that is done; 2 bits/char a nat."""
    rows = []
    for step in range(10, steps + 1, 10):
        share = step / steps
        rows.append({"step": step, "train_loss": training(share), "learning_rate": 1e-3, "grad_norm": 1.0,
                     "tokens_per_second": 1000.0, "epoch": 4 * share})  # fmt: skip
        if step % (steps // 10) == 0:
            val = validation(share)
            rows.append(
                {"step": step, "val_loss": val, "val_bits_per_char": 2 * val, "train_eval_loss": training(share)}
            )
    return rows


def falling(share: float) -> float:
    return 3 + 2 * math.exp(-share)


def flat(share: float) -> float:
    return 3 + 2 * math.exp(-20 * share)


def overfitted(share: float) -> float:
    return 3 + (share - 0.4) ** 2
