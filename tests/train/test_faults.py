"""Faults injected into a run: it goes on where it can, and says what to do where it cannot."""

import errno
import resource
import time
from pathlib import Path

import pytest
import torch

from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.model.checkpoint import load_model
from miaobi.model.transformer import Block
from miaobi.train import saving
from miaobi.train.loop import Run
from miaobi.train.saving import Saver
from miaobi.train.watch import Metrics


def last(run: Path) -> str:
    return pointed(run / "checkpoints" / "last").name


def test_a_run_that_stops_over_losses_that_are_not_finite_names_the_checkpoint_still_being_written(
    train, prepared, tmp_path, monkeypatch
):
    step, write = Run.step, Saver._write

    def slowly(self, *args):
        time.sleep(2)  # a slow disk: step 10 is still being written when step 15 fails
        return write(self, *args)

    monkeypatch.setattr(Saver, "_write", slowly)

    def broken(self, n):
        loss, norm, tokens = step(self, n)
        return (loss * float("nan") if n >= 12 else loss), norm, tokens

    monkeypatch.setattr(Run, "step", broken)
    with pytest.raises(UserError, match=r"not finite at step 15.*checkpoints/last.*learning_rate"):
        train(data=prepared(), out_dir=tmp_path / "run")
    assert last(tmp_path / "run") == "step-10"
    model, _ = load_model(tmp_path / "run", "last")
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_rate_far_too_high_never_leaves_a_broken_checkpoint(train, prepared, tmp_path, family):
    with pytest.raises(UserError, match=r"not finite.*No checkpoint was written yet.*learning_rate"):
        train(data=prepared(), out_dir=tmp_path / "run", family=family, learning_rate=1e30, warmup_iters=0)
    assert pointed(tmp_path / "run" / "checkpoints" / "last") is None


def test_an_update_that_breaks_the_weights_at_an_evaluation_is_not_saved(train, prepared, tmp_path, monkeypatch):
    """The loss of a step is computed before its update: only the evaluation sees what the update did."""
    step = Run.step

    def poisoned(self, n):
        out = step(self, n)
        if n == 19:
            with torch.no_grad():
                self.model.wte.weight[0] = float("inf")
        return out

    monkeypatch.setattr(Run, "step", poisoned)
    with pytest.raises(UserError, match="not finite at step 20"):
        train(data=prepared(), out_dir=tmp_path / "run", max_iters=30)
    assert last(tmp_path / "run") == "step-10"


def test_a_full_disk_costs_a_checkpoint_not_the_run(train, prepared, tmp_path, monkeypatch, capsys):
    save_model, saved = saving.save_model, []

    def full_at_the_second(directory, *args):
        saved.append(directory)
        if len(saved) == 2:
            (directory / "half").write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_model(directory, *args)

    monkeypatch.setattr(saving, "save_model", full_at_the_second)
    result = train(data=prepared(), out_dir=tmp_path / "run", max_iters=25, eval_interval=10)
    assert result["step"] == 25
    said = capsys.readouterr().err
    assert "step 20 could not be written" in said
    assert "No space left" in said
    assert last(tmp_path / "run") == "step-25"
    assert not list((tmp_path / "run" / "checkpoints").glob("*20*"))
    load_model(tmp_path / "run", "best")


@pytest.fixture
def file_limit():
    """`file_limit(bytes)`: no file can grow beyond; every library meets the kernel's refusal in its own way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [30_000, 200_000], ids=["model.safetensors", "train_state"])
def test_a_disk_that_really_refuses_leaves_the_checkpoint_before_whole(
    train, prepared, tmp_path, file_limit, capsys, limit
):
    calls = []

    def preview(*_):
        calls.append(1)
        if len(calls) == 2:  # from the save at step 20 on
            file_limit(limit)
        return ""

    settings = {"data": prepared(), "out_dir": tmp_path / "run", "sample_tokens": 1, "max_iters": 30, "family": "gpt2"}
    with pytest.raises(UserError, match=r"step 30, could not be written; the checkpoint before it, step-10, is"):
        train(preview=preview, **settings)
    assert "step 20 could not be written" in capsys.readouterr().err
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["best", "last", "step-10"]
    assert (checkpoints / "step-10" / "model.safetensors").stat().st_size > 30_000
    assert (checkpoints / "step-10" / "train_state" / "optimizer-0-of-1.safetensors").stat().st_size > 200_000
    load_model(tmp_path / "run", "last")


@pytest.mark.parametrize("signalled", [False, True], ids=["", "interrupted"])
def test_a_run_whose_only_checkpoint_is_lost_does_not_end_well(
    train, prepared, tmp_path, monkeypatch, capsys, signalled
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "save_model", full)
    if signalled:
        step = Run.step
        monkeypatch.setattr(Run, "step", lambda run, n: run.interrupt("interrupted") or step(run, n))
    with pytest.raises(UserError, match=f"of step {1 if signalled else 10}, could not be written; there is none"):
        train(data=prepared(), out_dir=tmp_path / "run", max_iters=10)
    said = capsys.readouterr().err
    assert "No space left on device); there is none before it: free some space" in said
    assert "saved step" not in said


def test_after_a_lost_checkpoint_best_is_still_the_best_of_those_on_disk(train, prepared, tmp_path, monkeypatch):
    """Validation falls at every step here; the save of step 20 fails; steps 10 and 30 exist: best must be 30."""
    save_model, saved = saving.save_model, []
    losses = iter([5.0, 3.0, 4.0])
    monkeypatch.setattr(Run, "validation_loss", lambda _: next(losses))

    def full_at_the_second(directory, *args):
        saved.append(directory)
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_model(directory, *args)

    monkeypatch.setattr(saving, "save_model", full_at_the_second)
    train(data=prepared(), out_dir=tmp_path / "run", max_iters=30, eval_interval=10)
    assert pointed(tmp_path / "run" / "checkpoints" / "best").name == "step-30"


def test_a_log_that_cannot_be_written_does_not_end_the_run(train, prepared, tmp_path, monkeypatch):
    opened = Metrics.__init__

    def on_a_full_disk(self, *args):
        opened(self, *args)
        self.file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115 - closed by the run

    monkeypatch.setattr(Metrics, "__init__", on_a_full_disk)
    assert train(data=prepared(), out_dir=tmp_path / "run")["step"] == 20


def test_too_little_memory_is_explained_with_a_smaller_micro_batch(train, prepared, tmp_path, monkeypatch):
    def too_much(self, n):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Run, "step", too_much)
    with pytest.raises(UserError, match=r"out of memory.*8 x 32.*--micro_batch_size=4"):
        train(data=prepared(), out_dir=tmp_path / "run")


def test_a_compiler_that_fails_costs_one_line_of_warning(train, prepared, tmp_path, monkeypatch, capsys):
    def compile_(self, *args, **kwargs):
        def fail(*args, **kwargs):
            raise RuntimeError("no C++ compiler")

        self._compiled_call_impl = fail

    monkeypatch.setattr(Block, "compile", compile_)
    train(data=prepared(), out_dir=tmp_path / "compiled", compile=True, dropout=0.1)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    assert "torch.compile" in warnings[0]
    train(data=prepared(), out_dir=tmp_path / "eager", dropout=0.1)
    files = [pointed(tmp_path / n / "checkpoints" / "last") / "model.safetensors" for n in ("compiled", "eager")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("kind", ["symlinks", "directories"])
def test_a_run_works_where_symlinks_are_refused(train, prepared, tmp_path, monkeypatch, kind):
    if kind == "directories":

        def refuse(*_, **__):
            raise OSError("A required privilege is not held by the client")

        monkeypatch.setattr(Path, "symlink_to", refuse)
    settings = {"data": prepared(), "out_dir": tmp_path / "run", "max_iters": 20}
    train(**settings)
    assert train(**settings | {"max_iters": 30})["step"] == 30
    assert (tmp_path / "run" / "checkpoints" / "last").is_symlink() == (kind == "symlinks")
    load_model(tmp_path / "run", "best")
    load_model(tmp_path / "run", "last")
