"""No warning of a library reaches a user: every verb runs with them as errors, and stderr is searched for the rest."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LOUD = "error::UserWarning,error::FutureWarning,error::RuntimeWarning,error::ResourceWarning:miaobi"
"""As errors, in a process of its own: those that Python shows to a user (others it shows to nobody by default)."""
OF_A_LIBRARY = re.compile(
    r"Warning:|warnings?\.warn|^\[[WE]\d{3,}|^[WE]\d{4} |\bWARNING\b|Traceback|deprecated|^.*\.py:\d+: ", re.MULTILINE
)
"""What libraries print: Python's warnings, torch's C++ and Python loggers, tracebacks."""


def run(*arguments: object, stdin: str = "", cwd: Path | None = None) -> str:
    """A command as a user types it, in a process of its own; returns stdout. It must succeed and be silent but for
    what miaobi itself says.
    """
    env = os.environ | {"PYTHONWARNINGS": LOUD, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-m", "miaobi", *map(str, arguments)], input=stdin, capture_output=True,
                          encoding="utf-8", env=env, cwd=cwd, timeout=500)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert OF_A_LIBRARY.findall(done.stderr) == [], done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "/usr/lib/torch/nn.py:12: UserWarning: Mismatch dtype between input and weight",
        "[W1130 06:51:16.123 NNPACK.cpp:61] Could not initialize NNPACK!",
        "W1130 06:51:16.123000 77 torch/_dynamo/convert_frame.py:9] hit config.recompile_limit",
        "WARNING:root:something",
        "Traceback (most recent call last):",
    ],
)
def test_what_libraries_print_is_found(line: str):
    assert OF_A_LIBRARY.search(f"step 1/2  loss 3.2\n{line}\n")


def test_what_miaobi_says_is_not_mistaken_for_it():
    said = "warning: this CPU has no bfloat16 arithmetic and would crawl; using float32\nstep 1/2  loss 3.2  9 tok/s\n"
    assert not OF_A_LIBRARY.search(said)


def auto(*without: str, **values: object) -> list[str]:
    """Flags of a tiny run that takes the precision of the machine."""
    flags = {
        "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8, "max_iters": 4,
        "eval_interval": 2, "eval_iters": 2, "sample_tokens": 0, "compile": False,
    } | values  # fmt: skip
    return [f"--{key}={value}" for key, value in flags.items() if not key.startswith(without)]


@pytest.mark.slow
@pytest.mark.bf16
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_train_sample_and_eval_are_silent(corpus_file: Path, tmp_path: Path, family: str):
    flags = {"data": corpus_file, "out_dir": tmp_path / "run", "family": family, "sample_tokens": 8, "dropout": 0.1}
    for steps in (4, 6):  # the second goes on
        run("train", *auto(**flags, max_iters=steps))
    assert run("sample", tmp_path / "run", "--start=皇马", "--num_samples=2", "--max_new_tokens=8").startswith("皇马")
    run("eval", tmp_path / "run", corpus_file)
    tuned = tmp_path / "tuned"
    run("train", *auto("n_", "block_size", data=corpus_file, out_dir=tuned), f"--init_from={tmp_path / 'run'}",
        "--lora_rank=4")  # fmt: skip
    run("sample", tuned, "--start=皇马", "--max_new_tokens=8", "--stream=False")


@pytest.mark.slow
@pytest.mark.bf16
def test_chat_is_silent(tmp_path: Path):
    talk = tmp_path / "chat.txt"
    talk.write_text("你好\n你好！\n\n再见\n下次见。\n\n早上好\n早！\n\n" * 40, encoding="utf-8")
    run("prepare", talk, "--out", tmp_path / "data", "--format=dialogue", "--dedup=none")
    run("train", *auto(data=tmp_path / "data", out_dir=tmp_path / "run", sample_tokens=8))
    run("chat", tmp_path / "run", "--max_new_tokens=8", stdin="你好\nflush\n再见\nexit\n")


@pytest.mark.slow
@pytest.mark.bf16
def test_classify_is_silent(trained, tmp_path: Path):
    rows = [f"{label},{text}{i}" for i in range(40) for label, text in (("好", "皇马赢得比赛"), ("坏", "曼联输掉联赛"))]
    (tmp_path / "reviews.csv").write_text("\n".join(["label,text", *rows]) + "\n", encoding="utf-8")
    for protocol in ("corrected", "as-published"):
        out = tmp_path / protocol
        run("classify", "train", f"--base_model={trained('qwen3')}", f"--data={tmp_path / 'reviews.csv'}",
            f"--out_dir={out}", "--max_epoch=1", f"--protocol={protocol}", "--block_size=16")  # fmt: skip
        run("classify", "predict", out, "皇马赢得比赛")
    run("classify", "ablate", f"--base_model={trained('qwen3')}", f"--data={tmp_path / 'reviews.csv'}",
        f"--out_dir={tmp_path / 'grid'}", "--max_epoch=1", "--block_size=16")  # fmt: skip


@pytest.mark.slow
@pytest.mark.bf16
def test_the_demo_is_silent(tmp_path: Path):
    run("demo", "--quick", cwd=tmp_path)
