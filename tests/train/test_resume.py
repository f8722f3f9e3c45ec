"""Real processes killed or interrupted, then the same command again: bit for bit the weights of a run left alone."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from tests import processes
from tests.processes import Process

from miaobi.corpus.dataset import windows_per_epoch
from miaobi.corpus.prepared import PreparedData
from miaobi.files import pointed

STEPS, BATCH, BLOCK = 60, 8, 32
RUNS = {
    "gpt2": {"optimizer": "adamw", "bias": True, "micro_batch_size": 3},
    "qwen3": {"optimizer": "muon"},
    "lora": {"family": "qwen3", "trainable": "lora", "lora_dropout": 0.2},
}


def weights(run: Path, name: str = "last") -> bytes:
    return (pointed(run / "checkpoints" / name) / "model.safetensors").read_bytes()


def curve(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(r["step"], r["val_loss"]) for r in rows if "val_loss" in r]


@pytest.fixture(scope="module")
def settings(prepared, trained):
    """Settings of a run with dropout that passes the seam of its first epoch between two checkpoints."""
    data = prepared()
    seam = windows_per_epoch(len(PreparedData.open(data).train), BLOCK) / BATCH
    assert 20 < seam < 30
    assert seam % 1, "the seam lies inside a batch"

    def get(family: str, out: Path) -> dict[str, object]:
        return {"data": data, "out_dir": out, "family": family, "dropout": 0.2, "max_iters": STEPS, "eval_interval": 20,
                "log_interval": 1, "batch_size": BATCH, "block_size": BLOCK, **RUNS[family],
                **({"init_from": trained("qwen3")} if family == "lora" else {})}  # fmt: skip

    return get


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    """`undisturbed("gpt2")`: the same run, left alone; once per family."""
    from miaobi.settings import load_config
    from miaobi.train.loop import train as train_run

    known: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in known:
            out = known[family] = tmp_path_factory.mktemp("undisturbed") / family
            train_run(*load_config(None, [tuple(f[2:].split("=", 1)) for f in flags(settings(family, out))]))
        return known[family]

    return get


def flags(values: dict[str, object]) -> list[str]:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "eval_iters": 2, "sample_tokens": 0, "device": "cpu",
             "dtype": "float32", "compile": False}  # fmt: skip
    return [f"--{key}={value}" for key, value in (sizes | values).items()]


def start_and_signal(arguments: list[str], run: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    """`python -m miaobi train ...`, sent a signal once it has logged `step`: (exit code, stderr)."""
    process = Process(["-m", "miaobi", "train", *arguments])
    log, give_up = run / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and f'"step": {step},' in log.read_text(encoding="utf-8")):
        assert process.poll() is None, process.said()
        assert time.monotonic() < give_up, "the run does not get there"
        time.sleep(0.001)
    process.send_signal(number)
    done = process.wait(timeout=120)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", RUNS)
def test_kill_minus_9_then_the_same_command_ends_in_the_same_weights(settings, undisturbed, train, tmp_path, family):
    run = tmp_path / "run"
    code, _ = start_and_signal(flags(settings(family, run)), run, 33, signal.SIGKILL)
    assert code == -signal.SIGKILL
    reached = int(pointed(run / "checkpoints" / "last").name.removeprefix("step-"))
    assert 0 < reached < STEPS
    assert train(**settings(family, run))["step"] == STEPS
    for name in ("last", "best"):
        assert weights(run, name) == weights(undisturbed(family), name)
    assert curve(run) == curve(undisturbed(family))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "number", "code", "word"),
    [("gpt2", signal.SIGINT, 130, "interrupted"), ("qwen3", signal.SIGTERM, 143, "terminated")],
)
def test_ctrl_c_saves_says_how_to_go_on_and_going_on_is_exact(
    settings, undisturbed, train, tmp_path, family, number, code, word
):
    run = tmp_path / "run"
    returned, err = start_and_signal(flags(settings(family, run)), run, 33, number)
    assert returned == code
    assert f"{word}: saved step" in err
    assert "same command again" in err
    assert "Traceback" not in err
    stopped_at = int(pointed(run / "checkpoints" / "last").name.removeprefix("step-"))
    assert 33 <= stopped_at < STEPS
    assert train(**settings(family, run))["step"] == STEPS
    assert weights(run) == weights(undisturbed(family))
    assert curve(run) == curve(undisturbed(family))


# One process forks a child per point; each child dies by SIGKILL in the middle of a
# call that only kill -9 or a power cut would interrupt.
DRIVER = """
import os, shutil, signal, sys
from pathlib import Path
import torch, torch._dynamo, torch.utils.tensorboard
from miaobi import cli
from miaobi.model import checkpoint
from miaobi.train import loop, optimizer_state, saving

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def kill_in(place):
    calls = []
    def at(n, original, partly=None):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == n:
                if partly:
                    partly(*args)
                die()
            return original(*args, **kwargs)
        return call
    def half(directory, *args):
        for file in sorted(Path(directory).rglob("*"))[:2]:
            if file.is_file():
                file.unlink()
    def saved(run, *args):  # else a slow disk would have nothing to go on from
        run.saver.thread.join()
    if place == "a step":
        loop.Run.step = at(33, loop.Run.step, saved)
    elif place == "the first step":
        loop.Run.step = at(1, loop.Run.step)
    elif place == "an evaluation":
        loop.Run.evaluate = at(2, loop.Run.evaluate, saved)
    elif place == "saving the model":
        saving.save_model = at(2, saving.save_model, lambda d, *a: (d / "model.safetensors").write_bytes(b"half"))
    elif place == "saving the optimizer":
        optimizer_state.save_file = at(2, optimizer_state.save_file, lambda t, path, *a: path.write_bytes(b"half"))
    elif place == "renaming":
        Path.rename = at(2, Path.rename)
    elif place == "pointing at best":
        saving.point = at(3, saving.point)
    elif place == "pointing at last":
        saving.point = at(4, saving.point)
    elif place == "removing the old":
        remove, die_removing = shutil.rmtree, at(1, shutil.rmtree, half)
        shutil.rmtree = lambda path, *a, **k: (die_removing if Path(path).name == "step-20" else remove)(path, *a, **k)

for place in sys.argv[1].split(","):
    child = os.fork()
    if child == 0:
        kill_in(place)
        cli.main(["train", *[a.replace("PLACE", place.replace(" ", "-")) for a in sys.argv[2:]]])
        os._exit(3)
    print(place, os.WTERMSIG(os.waitpid(child, 0)[1]), sep="=", flush=True)
"""
PLACES = ["the first step", "a step", "an evaluation", "saving the model", "saving the optimizer", "renaming",
          "pointing at best", "pointing at last", "removing the old"]  # fmt: skip


@pytest.fixture(scope="module")
def killed(settings, tmp_path_factory) -> Path:
    """A directory of runs, each killed at its place."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = flags(settings("qwen3", folder / "PLACE"))
    done = processes.run(["-c", DRIVER, ",".join(PLACES), *arguments])
    for place in PLACES:
        assert f"{place}={int(signal.SIGKILL)}" in done.stdout.splitlines(), done.stdout + done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_at_any_moment_can_be_resumed(killed, settings, undisturbed, train, place):
    run = killed / place.replace(" ", "-")
    if place == "the first step":
        assert pointed(run / "checkpoints" / "last") is None
    else:
        from miaobi.model.checkpoint import load_model

        load_model(run, "last")
        load_model(run, "best")
    assert train(**settings("qwen3", run))["step"] == STEPS
    for name in ("last", "best"):
        assert weights(run, name) == weights(undisturbed("qwen3"), name)
    assert curve(run) == curve(undisturbed("qwen3"))
    left = sorted(os.listdir(run / "checkpoints"))
    assert left == sorted({"best", "last", *(pointed(run / "checkpoints" / n).name for n in ("best", "last"))})
