"""Real ranks on gloo: the same batches, the same loss, the same weights, whatever happens to them.

Where torchrun itself matters (restarts, signals, what it says), it starts them; elsewhere `processes.ranks`, in seconds
less.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import processes

from miaobi.config import ModelConfig, TrainConfig
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.dataset import IGNORE, Batch, TextWindows
from miaobi.corpus.packing import PackedDialogues
from miaobi.corpus.prepare import prepare
from miaobi.corpus.prepared import PreparedData
from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.model.checkpoint import load_model
from miaobi.model.transformer import Transformer
from miaobi.train.layout import fill, shard
from miaobi.train.rendezvous import join, rank_device
from miaobi.train.world import World, check_batch

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STEPS = 40


def flags(**values: object) -> list[str]:
    given = {
        "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8, "max_iters": STEPS,
        "eval_interval": 20, "eval_iters": 2, "log_interval": 1, "sample_tokens": 0, "device": "cpu",
        "dtype": "float32", "compile": False, "optimizer": "adamw", "schedule": "constant", "warmup_iters": 0,
    } | values  # fmt: skip
    return [f"--{key}={value}" for key, value in given.items()]


def torchrun(ranks: int, *options: str, **values: object) -> list[str]:
    return [*TORCHRUN, "--standalone", f"--nproc_per_node={ranks}", *options, "-m", "miaobi", "train", *flags(**values)]


def run(command: list[str], code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode == 0) == (code == 0), done.stderr[-4000:]
    return done


def together(size: int, **values: object) -> str:
    """Train on `size` ranks, which must succeed; what they said, all of them."""
    done = processes.ranks(size, *flags(**values))
    said = "".join(rank.stdout + rank.stderr for rank in done)
    assert [rank.returncode for rank in done] == [0] * size, said[-4000:]
    return said


def losses(out: Path) -> tuple[list[float], list[float]]:
    """Training loss of every step, and validation losses."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [r["train_loss"] for r in rows if "train_loss" in r], [r["val_loss"] for r in rows if "val_loss" in r]


def weights(out: Path) -> bytes:
    return (pointed(out / "checkpoints" / "last") / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    """`alone(optimizer="muon")`: the run of one process, once per setting."""
    from miaobi.settings import load_config
    from miaobi.train.loop import train as train_run

    known: dict[tuple, Path] = {}

    def get(**values: object) -> Path:
        key = tuple(sorted(values.items()))
        if key not in known:
            out = known[key] = tmp_path_factory.mktemp("alone") / "run"
            given = flags(data=prepared(), out_dir=out, **values)
            train_run(*load_config(None, [tuple(flag[2:].split("=", 1)) for flag in given]))
        return known[key]

    return get


# --- the work is shared, not changed -----------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), step=st.integers(0, 500))
def test_ranks_see_the_rows_of_the_same_batch_bit_for_bit(prepared, seed, step):
    windows = TextWindows(PreparedData.open(prepared()).train, 32)
    whole = windows.batch(8, seed, step)
    for size in (1, 2, 4, 8):
        parts = [windows.batch(8, seed, step, World(rank, size).rows(8)) for rank in range(size)]
        assert np.array_equal(np.concatenate([p.inputs for p in parts]), whole.inputs)
        assert np.array_equal(np.concatenate([p.targets for p in parts]), whole.targets)


def test_ranks_see_the_rows_of_the_same_batch_of_dialogues(tmp_path):
    (tmp_path / "chat.txt").write_text("你好\n再见\n\n早上好\n你也好\n今天去哪儿\n\n" * 40, encoding="utf-8")
    settings = PrepareConfig(out=tmp_path / "data", format="dialogue", dedup="none", workers=1)
    prepare([str(tmp_path / "chat.txt")], settings)
    packed = PackedDialogues(PreparedData.open(tmp_path / "data").train, 32, 0.3, None)
    for step in range(5):
        whole = packed.batch(8, 1, step)
        for size in (2, 4):
            parts = [packed.batch(8, 1, step, World(rank, size).rows(8)) for rank in range(size)]
            for name in Batch._fields:
                joined = np.concatenate([getattr(p, name) for p in parts])
                assert np.array_equal(joined, getattr(whole, name)), name


@given(windows=st.integers(1, 20), size=st.integers(1, 9))
def test_evaluation_windows_are_shared_out_equally_and_each_counts_once(windows, size):
    rows = np.arange(windows * 4).reshape(windows, 4)
    shares = [World(rank, size).share(Batch(rows, rows.copy())) for rank in range(size)]
    assert len({len(s.inputs) for s in shares}) == 1, "FSDP's forward passes are collective"
    targets = np.concatenate([s.targets for s in shares])
    assert sorted(targets[targets != IGNORE].tolist()) == rows.ravel().tolist()
    for share in shares:
        scored = share.targets != IGNORE
        assert np.array_equal(share.inputs[scored], share.targets[scored])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "values", "tolerance"),
    [
        (4, {"parallel": "ddp", "micro_batch_size": 1}, 1e-4),
        (2, {"parallel": "fsdp", "micro_batch_size": 2}, 1e-4),
        (4, {"parallel": "fsdp", "fsdp_shard_size": 2, "activation_checkpointing": True}, 1e-4),
        (2, {"parallel": "ddp", "optimizer": "muon"}, 0.03),
        (2, {"parallel": "fsdp", "optimizer": "muon"}, 0.03),
    ],
    ids=["ddp", "fsdp", "hsdp-recompute", "ddp-muon", "fsdp-muon"],
)
def test_several_ranks_learn_what_one_process_learns(prepared, alone, tmp_path, ranks, values, tolerance):
    out = tmp_path / "run"
    said = together(ranks, data=prepared(), out_dir=out, **values)
    one = alone(**{key: value for key, value in values.items() if key == "optimizer"})
    for mine, theirs in zip(losses(out), losses(one), strict=True):
        assert len(mine) == len(theirs) > 0
        assert np.abs(np.array(mine) - np.array(theirs)).max() < tolerance
    assert said.count("number of parameters") == 1, "only rank 0 speaks"
    assert said.count("next: miaobi sample") == 1
    load_model(out, "last")


STARTS = {
    "scratch": {"bigram_init": False},
    "bigram_init": {"bigram_init": True},
    "MODEL": {},
    "lora": {"trainable": "lora"},
}


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_every_start_is_the_same_on_any_number_of_ranks(prepared, trained, alone, tmp_path, start):
    """Losses of ten steps, fp32: what is done to fresh weights happens alone, under DDP and under FSDP."""
    values = STARTS[start] | {"max_iters": 10, "eval_interval": 5, "family": "qwen3"}
    if start in ("MODEL", "lora"):
        values["init_from"] = trained("qwen3")
    one = losses(alone(**values))
    for parallel in ("ddp", "fsdp") if start != "lora" else ("ddp",):  # fsdp refuses LoRA
        said = together(2, data=prepared(), out_dir=tmp_path / parallel, parallel=parallel, **values)
        assert ("from the bigrams of" in said) == (start == "bigram_init")
        for mine, theirs in zip(losses(tmp_path / parallel), one, strict=True):
            assert len(mine) == len(theirs) > 0
            assert np.abs(np.array(mine) - np.array(theirs)).max() < 1e-4


# --- checkpoints, restarts ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_resumes_on_other_ranks_and_in_another_layout(prepared, alone, tmp_path):
    """1 process -> 2 under DDP -> 2 under FSDP -> 1 again: the losses of the run that one process makes."""
    settings = {"data": prepared(), "out_dir": tmp_path / "run", "eval_interval": 10, "bigram_init": False}
    together(1, **settings, max_iters=10)
    together(2, **settings, max_iters=20, parallel="ddp")
    together(2, **settings, max_iters=30, parallel="fsdp")
    assert (
        pointed(tmp_path / "run" / "checkpoints" / "last") / "train_state" / "optimizer-1-of-2.safetensors"
    ).stat().st_size > 1000
    together(1, **settings, max_iters=STEPS)
    ours, one = losses(tmp_path / "run"), losses(alone(eval_interval=10))
    assert np.abs(np.array(ours[0]) - np.array(one[0])).max() < 1e-4
    assert np.abs(np.array(ours[1]) - np.array(one[1])).max() < 1e-4


def wait_for(out: Path, step: int, process: subprocess.Popen) -> None:
    give_up = time.monotonic() + 500
    log = out / "metrics.jsonl"
    while not (log.exists() and f'"step": {step},' in log.read_text(encoding="utf-8")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < give_up
        time.sleep(0.005)


def workers(parent: int) -> list[int]:
    """Processes that torchrun started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children]


@pytest.mark.slow
def test_killed_and_terminated_under_torchrun_the_run_ends_as_if_nothing_had_happened(prepared, tmp_path):
    """A worker that is killed is started again; a SIGTERM to torchrun saves at once, and the run goes on exactly."""
    settings = {"data": prepared(), "eval_interval": 20, "max_iters": 150, "dropout": 0.2}
    together(2, **settings, out_dir=tmp_path / "undisturbed")
    out = tmp_path / "run"
    # --init_from=scratch is repeated by torchrun with the rest of the command: it must not begin anew
    command = torchrun(2, "--max-restarts=2", **settings, out_dir=out, init_from="scratch")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(out, 25, process)
    os.kill(workers(process.pid)[-1], signal.SIGKILL)
    wait_for(out, 63, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "continuing from step" in err, err[-4000:]
    assert "terminated: saved step" in err, err[-4000:]
    assert 63 <= int(pointed(out / "checkpoints" / "last").name.removeprefix("step-")) < 150
    together(2, **settings, out_dir=out)
    assert weights(out) == weights(tmp_path / "undisturbed")
    assert losses(out) == losses(tmp_path / "undisturbed")


# --- bad input ---------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_divide_is_refused_with_those_that_would():
    with pytest.raises(
        UserError, match="batch of 32 cannot be divided equally among 3 processes; try --batch_size=30 or 33"
    ):
        check_batch(World(size=3), TrainConfig(batch_size=32))
    with pytest.raises(UserError, match="try --batch_size=4"):
        check_batch(World(size=4), TrainConfig(batch_size=2))
    check_batch(World(size=4), TrainConfig(batch_size=2, gradient_accumulation_steps=4))
    with pytest.raises(UserError, match="fsdp_shard_size=3"):
        check_batch(World(size=4), TrainConfig(batch_size=4, parallel="fsdp", fsdp_shard_size=3))


def test_more_processes_than_gpus_is_refused(monkeypatch):
    monkeypatch.setattr("miaobi.train.rendezvous.pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="rank 5 has no GPU of its own: this machine has 2"):
        rank_device("auto", World(rank=5, size=6, local_rank=2))


@pytest.mark.parametrize(("has_nccl", "backend"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_gpus_speak_gloo_where_there_is_no_nccl(monkeypatch, has_nccl, backend):
    """On Windows PyTorch comes without."""
    asked = []

    def refused(named, **_):
        asked.append(named)
        raise torch.distributed.DistError("nobody is there")

    monkeypatch.setattr("miaobi.train.rendezvous.pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(torch.distributed, "init_process_group", refused)
    with pytest.raises(UserError, match="cannot meet the other processes"):
        join(TrainConfig(parallel="fsdp"))
    assert asked == [backend]


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_shards_leave_states_and_angles_in_fp32_as_ddp_does(family):
    """Products are in bf16; what is added up from block to block is not."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with torch.device("meta"):
            model = Transformer(ModelConfig(family=family, n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=40))
        shard(model, World(), TrainConfig(parallel="fsdp"), torch.device("cpu"), torch.bfloat16)
        fill(model, None)
        seen: dict[str, set] = {"states": set(), "products": set()}

        def enters(_, given):
            seen["states"].update(t.dtype for t in given if t is not None)

        for block in model.blocks:
            block.register_forward_pre_hook(enters)
            block.mlp.up.register_forward_hook(lambda _, given, out: seen["products"].add(out.dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model.hidden(torch.zeros(1, 8, dtype=torch.long))
    finally:
        torch.distributed.destroy_process_group()
    assert seen == {"states": {torch.float32}, "products": {torch.bfloat16}}


def test_several_processes_with_parallel_none_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="parallel=none, but torchrun started 2 processes"):
        join(TrainConfig(parallel="none"))


def test_processes_that_torchrun_did_not_start_are_an_error(miaobi, prepared, tmp_path, monkeypatch):
    """Some schedulers set WORLD_SIZE for everything they start."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = miaobi("train", *flags(data=prepared(), out_dir=tmp_path / "run"))
    assert answer.code == 2
    assert "RANK expected" in answer.err
    assert "torchrun sets all of it" in answer.err
    assert not (tmp_path / "run").exists()
    assert miaobi("sample", tmp_path / "nothing").code == 2, "other verbs do not mind"


def test_a_port_in_use_is_an_error_that_names_it(miaobi, prepared, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for key, value in {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(key, str(value))
        answer = miaobi("train", *flags(data=prepared(), out_dir=tmp_path / "run"))
    assert answer.code == 2
    assert f"127.0.0.1:{port}" in answer.err
    assert "port" in answer.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["learning_rate", "data"])
def test_ranks_with_different_settings_are_named(prepared, tmp_path, key):
    other = {"learning_rate": "0.002", "data": prepared(val_fraction=0.2)}[key]
    settings = flags(data=prepared(), out_dir=tmp_path / "run")
    first, second = processes.ranks(2, *settings, of_rank={1: ["-m", "miaobi", "train", *settings, f"--{key}={other}"]})
    assert first.returncode == 2
    assert first.stderr.startswith("2 processes on 1 machine\nmiaobi: rank 0: rank 1 on ")
    assert f"{key} is {other}, rank 0 has" in first.stderr
    assert first.stderr.count("\n") == 2
    assert (second.returncode, second.stderr) == (-signal.SIGTERM, ""), "said once, and all end"


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_rank_costs_a_checkpoint_not_the_run(prepared, tmp_path):
    settings = flags(data=prepared(), out_dir=tmp_path / "run", parallel="fsdp", max_iters=20, eval_interval=10)
    full = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50 << 10,) * 2)\n"
            "from miaobi import cli; cli.main(['train', *sys.argv[1:]])")  # fmt: skip
    first, second = processes.ranks(2, *settings, of_rank={1: ["-c", full, *settings]})
    for step in (10, 20):
        assert f"warning: checkpoint of step {step} could not be written (rank 1: " in first.stderr
    assert first.stderr.count("warning: checkpoint") == 2
    assert "warning: checkpoint" not in second.stderr, "said by rank 0 alone"
    assert "miaobi: rank 0: the last checkpoint, of step 20, could not be written; there is none" in first.stderr
    assert first.returncode == 2
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == [], "nothing is left by halves"


@pytest.mark.slow
def test_the_rank_that_fails_speaks_first_and_all_end(prepared, tmp_path):
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\nfrom miaobi import cli\nfrom miaobi.errors import UserError\n"
        "from miaobi.train.loop import Run\n"
        "step = Run.step\n"
        "def fail(self, n):\n"
        "    if os.environ['RANK'] == '1' and n == 5:\n"
        "        raise UserError('something is wrong here')\n"
        "    return step(self, n)\n"
        "Run.step = fail\ncli.main(['train', *sys.argv[1:]])\n"
    )
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", str(script)]
    done = run([*command, *flags(data=prepared(), out_dir=tmp_path / "run")], code=1)
    messages = [line for line in done.stderr.splitlines() if line.startswith("miaobi: ")]
    assert messages[0] == "miaobi: rank 1: something is wrong here"
    assert "miaobi/cli.py" not in done.stderr, "torchrun's own traceback is enough"


@pytest.mark.slow
def test_a_shard_that_is_missing_is_an_error_that_says_where(prepared, tmp_path, train):
    out = tmp_path / "run"
    together(2, data=prepared(), out_dir=out, max_iters=5, eval_interval=5, parallel="fsdp")
    (pointed(out / "checkpoints" / "last") / "train_state" / "optimizer-1-of-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"optimizer-1-of-2\.safetensors is missing"):
        train(data=prepared(), out_dir=out, max_iters=10, eval_interval=5, log_interval=1, optimizer="adamw",
              schedule="constant", warmup_iters=0)  # fmt: skip


def test_a_checkpoint_of_another_optimizer_is_refused(prepared, tmp_path, train):
    train(data=prepared(), out_dir=tmp_path / "adamw", family="qwen3", optimizer="adamw")
    with pytest.raises(UserError, match="another model or optimizer"):
        train(data=prepared(), out_dir=tmp_path / "muon", family="qwen3", optimizer="muon",
              resume_from=tmp_path / "adamw")  # fmt: skip
