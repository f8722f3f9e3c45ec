"""Checkpoints: what stands in them, what is noticed when it is altered, and what may fail without costing the run."""

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny

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


def test_weights_that_are_not_finite_are_never_saved(train, prepared, tmp_path, monkeypatch):
    """Neither loss nor gradient of step 15 knows what its update did to the weights, and no evaluation follows."""
    step = Run.step

    def poisoned(self, n):
        out = step(self, n)
        if n == 14:
            with torch.no_grad():
                self.model.wte.weight[0] = float("nan")
            self.interrupt("terminated")
        return out

    monkeypatch.setattr(Run, "step", poisoned)
    with pytest.raises(UserError, match="of step 15, could not be written; the checkpoint before it, step-10"):
        train(data=prepared(), out_dir=tmp_path / "run")
    assert pointed(tmp_path / "run" / "checkpoints" / "last").name == "step-10"


@pytest.mark.parametrize("waiting", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_gradients_that_are_not_finite_move_no_optimizer(train, prepared, tmp_path, monkeypatch, family, waiting):
    """Also where nobody waits for the device to hear of it, as on a GPU."""
    monkeypatch.setattr(optimizer, "WITHOUT_WAITING", () if waiting else ("cpu",))
    runs = []
    init = Run.__init__

    def spied(self, plan):
        init(self, plan)
        runs.append(self)
        calls = []
        plan.model.wte.weight.register_hook(lambda g: calls.append(1) or (g * float("nan") if len(calls) == 4 else g))

    monkeypatch.setattr(Run, "__init__", spied)
    with pytest.raises(UserError, match="gradient is not finite at step 4"):
        train(data=prepared(), out_dir=tmp_path / "run", family=family, log_interval=5)
    model = runs[0].model
    assert all(torch.isfinite(p).all() for p in model.parameters())
    states = [s for o in runs[0].plan.optimizers for state in o.state.values() for s in state.values()]
    assert states
    assert all(torch.isfinite(s).all() for s in states)


# --- what is said never costs a run ------------------------------------------------------------------------------


def spoken(tmp_path: Path, data: Path, shell: str, **values: object) -> subprocess.CompletedProcess:
    flags = " ".join(tiny(data=data, out_dir=tmp_path / "run", log_interval=1, **values))
    command = shell.replace("TRAIN", f"{sys.executable} -m miaobi train {flags}")
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["TRAIN 2>&1 >/dev/null | head -1", "TRAIN 2>/dev/full", "TRAIN 2>&-"],
                         ids=["head", "full", "closed"])  # fmt: skip
def test_a_log_that_nobody_reads_costs_nothing(tmp_path, prepared, shell):
    done = spoken(tmp_path, prepared(), shell)
    assert done.returncode == 0, done.stdout + done.stderr
    assert pointed(tmp_path / "run" / "checkpoints" / "last").name == "step-20"


@pytest.mark.slow
def test_sixty_sigterms_back_to_back_save_once(tmp_path, prepared):
    flags = tiny(data=prepared(), out_dir=tmp_path / "run", log_interval=1, max_iters=100_000, eval_interval=100_000)
    process = subprocess.Popen([sys.executable, "-m", "miaobi", "train", *flags], stderr=subprocess.PIPE, text=True)
    while "step 20/" not in process.stderr.readline():
        assert process.poll() is None
    for _ in range(60):
        if process.poll() is None:
            os.kill(process.pid, 15)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert pointed(tmp_path / "run" / "checkpoints" / "last") is not None
