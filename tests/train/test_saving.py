"""Checkpoints: what stands in them, what is noticed when it is altered, and what may fail without costing the run."""

import errno
import hashlib
import json
import shutil
import signal
import stat
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests import processes
from tests.conftest import tiny
from tests.processes import Process

from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.train import optimizer
from miaobi.train.loop import Run


def test_every_file_of_a_checkpoint_has_its_sha256(train, prepared, tmp_path):
    train(data=prepared(), out_dir=tmp_path / "run")
    step = pointed(tmp_path / "run" / "checkpoints" / "last")
    sums = json.loads((step / "checksums.json").read_text())["sha256"]
    files = {p.relative_to(step).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
             for p in step.rglob("*") if p.is_file() and p.name != "checksums.json"}  # fmt: skip
    assert sums == files
    assert {"model.safetensors", "train_state/optimizer-0-of-1.safetensors", "train_state/progress.json"} <= set(sums)


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory) -> Path:
    from miaobi.settings import load_config
    from miaobi.train.loop import train as train_run

    out = tmp_path_factory.mktemp("saving") / "run"
    flags = tiny(data=prepared(), out_dir=out)
    train_run(*load_config(None, [tuple(flag[2:].split("=", 1)) for flag in flags]))
    return out


@pytest.mark.parametrize("where", [0.001, 0.3, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "train_state/optimizer-0-of-1.safetensors", "train_state/progress.json",
     "train_state/optimizer.json", "config.json"],
)  # fmt: skip
def test_a_flipped_bit_is_noticed_on_resuming(train, prepared, finished, tmp_path, name, where):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    file = pointed(tmp_path / "run" / "checkpoints" / "last") / name
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 4
    file.write_bytes(content)
    with pytest.raises(UserError, match=Path(name).name.replace(".", r"\.")):
        train(data=prepared(), out_dir=tmp_path / "new", resume_from=tmp_path / "run", max_iters=30)


def test_how_a_model_is_sampled_may_be_edited(train, prepared, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    file = pointed(tmp_path / "run" / "checkpoints" / "last") / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.5}))
    assert train(data=prepared(), out_dir=tmp_path / "new", resume_from=tmp_path / "run", max_iters=21)["step"] == 21


def test_files_have_the_rights_of_their_neighbours(finished):
    step = pointed(finished / "checkpoints" / "last")
    assert len({stat.S_IMODE(p.stat().st_mode) for p in step.rglob("*") if p.is_file()}) == 1


@pytest.mark.parametrize("what", ["a stray file", "a stray step file", "a directory that cannot be removed"])
def test_clearing_up_never_costs_a_checkpoint(train, prepared, tmp_path, monkeypatch, capsys, what):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    if what == "a directory that cannot be removed":
        remove = shutil.rmtree

        def refuse(path, *args, **kwargs):
            if Path(path).name == "step-10" and not args and not kwargs:
                raise OSError(errno.ENOTEMPTY, "Directory not empty")  # NFS, of a file that is still open
            remove(path, *args, **kwargs)

        monkeypatch.setattr(shutil, "rmtree", refuse)
    else:
        (checkpoints / ("step-7" if "step" in what else ".DS_Store")).write_text("x")
    assert train(data=prepared(), out_dir=tmp_path / "run")["step"] == 20
    assert pointed(checkpoints / "last").name == "step-20"
    said = capsys.readouterr().err
    assert "could not be written" not in said
    assert ("step-10 could not be removed" in said) == (what == "a directory that cannot be removed")


@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_weights_that_are_not_finite_are_never_saved(train, prepared, tmp_path, monkeypatch, value):
    """Neither loss nor gradient of step 15 knows what its update did to the weights, and no evaluation follows."""
    step = Run.step

    def poisoned(self, n):
        out = step(self, n)
        if n == 14:
            with torch.no_grad():
                self.model.wte.weight[0] = float(value)
            self.interrupt("terminated")
        return out

    monkeypatch.setattr(Run, "step", poisoned)
    with pytest.raises(UserError, match="of step 15, could not be written; the checkpoint before it, step-10"):
        train(data=prepared(), out_dir=tmp_path / "run")
    assert pointed(tmp_path / "run" / "checkpoints" / "last").name == "step-10"


@pytest.mark.parametrize(
    ("family", "waiting", "value"),
    [("gpt2", True, "nan"), ("gpt2", False, "inf"), ("qwen3", True, "-inf"), ("qwen3", False, "nan")],
)
def test_gradients_that_are_not_finite_move_no_optimizer(
    train, prepared, tmp_path, monkeypatch, capsys, family, waiting, value
):
    """Also where nobody waits for the device to hear of it, as on a GPU."""
    monkeypatch.setattr(optimizer, "ASYNCHRONOUS", () if waiting else ("cpu",))
    runs = []
    init = Run.__init__

    def spied(self, plan, *started):
        init(self, plan, *started)
        runs.append(self)
        calls = []
        plan.model.wte.weight.register_hook(
            lambda g: calls.append(1) or (g.abs().add(1) * float(value) if len(calls) == 4 else g)
        )

    monkeypatch.setattr(Run, "__init__", spied)
    train(data=prepared(), out_dir=tmp_path / "run", family=family, log_interval=5)
    assert "gradient is not finite at step 4: the step is skipped" in capsys.readouterr().err
    model = runs[0].model
    assert all(torch.isfinite(p).all() for p in model.parameters())
    states = [s for o in runs[0].plan.optimizers for state in o.state.values() for s in state.values()]
    assert states
    assert all(torch.isfinite(s).all() for s in states)


# --- what is said never costs a run ------------------------------------------------------------------------------


NOBODY_READS = {
    "2>&1 | head -1": "head = subprocess.Popen(['head', '-1'], stdin=subprocess.PIPE)\n"
    "os.dup2(head.stdin.fileno(), 2); head.stdin.close()",
    "2>/dev/full": "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
    "2>&-": "os.close(2); sys.stderr = None",
}


@pytest.mark.slow
@pytest.mark.parametrize("stderr", NOBODY_READS)
def test_a_log_that_nobody_reads_costs_nothing(tmp_path, prepared, stderr):
    code = f"import os, subprocess, sys\n{NOBODY_READS[stderr]}\nfrom miaobi import cli; cli.main(sys.argv[1:])"
    done = processes.run(["-c", code, "train", *tiny(data=prepared(), out_dir=tmp_path / "run", log_interval=1)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "its stderr was elsewhere"
    assert pointed(tmp_path / "run" / "checkpoints" / "last").name == "step-20"


@pytest.mark.slow
def test_sixty_sigterms_back_to_back_save_once(tmp_path, prepared):
    flags = tiny(data=prepared(), out_dir=tmp_path / "run", log_interval=1, max_iters=100_000, eval_interval=100_000)
    process = Process(["-m", "miaobi", "train", *flags])
    while "step 20/" not in process.said():
        assert process.poll() is None, process.said()
        time.sleep(0.001)
    for _ in range(60):
        process.send_signal(signal.SIGTERM)
    done = process.wait(timeout=120)
    assert done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr
    assert pointed(tmp_path / "run" / "checkpoints" / "last") is not None


@pytest.mark.parametrize(
    ("parallel", "name"), [("ddp", "model.safetensors"), ("fsdp", "train_state/optimizer-1-of-2.safetensors")]
)
def test_two_ranks_refuse_a_flipped_bit_before_anything_is_written(prepared, tmp_path, parallel, name):
    out = tmp_path / "run"
    flags = {"data": prepared(), "out_dir": out, "parallel": parallel, "eval_interval": 2}
    assert [rank.returncode for rank in processes.ranks(2, *tiny(max_iters=2, **flags))] == [0, 0]
    step = pointed(out / "checkpoints" / "last")
    content = (step / name).read_bytes()
    (step / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = processes.ranks(2, *tiny(max_iters=4, **flags))
    assert not any(rank.returncode == 0 for rank in done)
    assert f"{Path(name).name} is not what was written" in done[0].stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused_by_name(train, prepared, finished, tmp_path, number):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    step = pointed(tmp_path / "run" / "checkpoints" / "last")
    (step / "checksums.json").unlink()  # of a run that somebody else has made
    file = step / "train_state" / "optimizer-0-of-1.safetensors"
    with safe_open(file, "pt") as opened:
        where, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][0, 0] = number
    save_file(tensors, file, where)
    with pytest.raises(UserError, match=f"{name} has numbers that are not finite"):
        train(data=prepared(), out_dir=tmp_path / "new", resume_from=tmp_path / "run", max_iters=30)
