"""No warning of a library reaches a user: every verb runs with them as errors, and stderr is searched for the rest."""

import pkgutil
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests import processes

import miaobi

LOUD = """
import warnings
for category in (UserWarning, FutureWarning, RuntimeWarning):
    warnings.simplefilter("error", category)
warnings.filterwarnings("error", category=ResourceWarning, module="miaobi")
"""
"""As errors: those that Python shows to a user (others it shows to nobody by default)."""
VERB = f"{LOUD}\nimport runpy, sys\nsys.argv[0] = 'miaobi'\nrunpy.run_module('miaobi', run_name='__main__')"
OF_A_LIBRARY = re.compile(
    r"Warning:|warnings?\.warn|^\[[WE]\d{3,}|^[WE]\d{4} |\bWARNING\b|Traceback|deprecated|^.*\.py:\d+: ", re.MULTILINE
)
"""What libraries print: Python's warnings, torch's C++ and Python loggers, tracebacks."""


def run(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess:
    """A command as a user types it, in a process of its own. It must succeed and be silent but for what miaobi itself
    says.
    """
    done = processes.run(["-c", VERB, *arguments], input=stdin)
    assert done.returncode == 0, done.stderr
    assert OF_A_LIBRARY.findall(done.stderr) == [], done.stderr
    return done


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


def test_importing_is_silent():
    """In a fresh Python; the commands below run where everything is imported already."""
    names = [module.name for module in pkgutil.walk_packages(miaobi.__path__, "miaobi.")]
    assert {"miaobi.train.loop", "miaobi.classify.predict", "miaobi.demo"} <= set(names)
    code = f"{LOUD}\nimport importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    without = {"miaobi.train.symmetric_kernel"} if find_spec("triton") is None else set()  # for GPUs alone
    wanted = [name for name in names if not name.endswith("__main__") and name not in without]
    done = subprocess.run([sys.executable, "-c", code, *wanted], capture_output=True, text=True, timeout=500)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_warning_in_a_command_is_found(tmp_path: Path):
    """The net below has no hole: a process like theirs ends with an error, and what a library prints is seen."""
    loud = processes.run(["-c", f"{LOUD}\nwarnings.warn('of a library', UserWarning)"])
    assert loud.returncode == 1
    assert OF_A_LIBRARY.search(loud.stderr)
    assert OF_A_LIBRARY.search(processes.run(["-c", "import os; os.write(2, b'[W1130 06:51:16.1 x.cpp:1] y')"]).stderr)


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
    sampled = run("sample", tmp_path / "run", "--start=皇马", "--num_samples=2", "--max_new_tokens=8")
    assert sampled.stdout.startswith("皇马")
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
