"""Averaged weights: what they are, that training does not notice them, that the better ones are kept."""

from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

from miaobi.errors import UserError
from miaobi.files import pointed, read_json
from miaobi.model.checkpoint import load_model
from miaobi.train.average import FILE
from miaobi.train.loop import Run

LONG = {"max_iters": 60, "eval_interval": 20, "log_interval": 20}  # twice the text and more


def weights(run, which: str = "last") -> dict[str, torch.Tensor]:
    return load_model(run, which)[0].state_dict()


def state(run) -> dict:
    return read_json(pointed(run / "checkpoints" / "last") / "train_state" / "progress.json")


@pytest.fixture
def losses(monkeypatch):
    """`losses(own, averaged)`: what evaluations find; the average is the second one that is scored."""

    def begin(*found: float) -> None:
        told = iter(found)
        monkeypatch.setattr(Run, "validation_loss", lambda _: next(told))

    return begin


def test_the_average_is_over_all_steps_by_their_number(train, prepared, tmp_path, losses, monkeypatch):
    """Against a sum over the weights that every step left."""
    step, seen = Run.step, []

    def noted(self, n):
        out = step(self, n)
        seen.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        return out

    monkeypatch.setattr(Run, "step", noted)
    losses(3.0, 2.0)
    train(data=prepared(), out_dir=tmp_path / "run", max_iters=30, eval_interval=30, average_weights=True)
    averaged = weights(tmp_path / "run")
    count = [t * t - (t - 1) * (t - 1) for t in range(1, 31)]  # what t^1 is in closed form, for this recursion
    for name, value in averaged.items():
        expected = sum(k * one[name].double() for k, one in zip(count, seen, strict=True)) / sum(count)
        rows = 301 if name == "wte.weight" else len(value)  # the rows that pad the vocabulary are not saved
        assert torch.allclose(value.double()[:rows], expected[:rows], atol=1e-5), name


def test_training_does_not_notice(train, prepared, tmp_path, losses):
    losses(*[2.0, 3.0] * 3)  # its own weights are better, every time
    train(data=prepared(), out_dir=tmp_path / "with", average_weights=True, **LONG)
    losses(*[2.0] * 3)
    train(data=prepared(), out_dir=tmp_path / "without", average_weights=False, **LONG)
    one, other = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("iters", "expected"), [(20, False), (60, True)], ids=["once", "twice"])
def test_it_is_on_by_itself_where_text_is_repeated(train, prepared, tmp_path, iters, expected):
    train(data=prepared(), out_dir=tmp_path / "run", **LONG | {"max_iters": iters})
    assert state(tmp_path / "run")["averaging"] is expected
    assert (pointed(tmp_path / "run" / "checkpoints" / "last") / "train_state" / FILE).exists() is expected


@pytest.mark.parametrize("better", ["own", "averaged"])
def test_a_run_that_is_cut_ends_as_one_that_was_not(train, prepared, tmp_path, better):
    """Bit for bit, whichever of the two the checkpoint showed."""
    found = (3.0, 2.0) if better == "averaged" else (2.0, 3.0)
    settings = {"data": prepared(), "average_weights": True, **LONG}

    def run(out) -> None:
        told = iter(found * 9)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "validation_loss", lambda _: next(told))
            train(out_dir=out, **settings)

    run(tmp_path / "whole")
    step = Run.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", lambda self, n: (n == 33 and self.interrupt("terminated")) or step(self, n))
        run(tmp_path / "cut")
    run(tmp_path / "cut")
    for which in ("last", "best"):
        one, other = weights(tmp_path / "whole", which), weights(tmp_path / "cut", which)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_better_of_the_two_is_the_model(train, prepared, tmp_path, losses, capsys):
    losses(5.0, 6.0, 4.0, 3.0, 3.5, 3.6)
    result = train(data=prepared(), out_dir=tmp_path / "run", average_weights=True, **LONG)
    assert result["best_val_loss"] == 3.0
    assert result["best_step"] == 40
    assert [("averaged" in line) for line in capsys.readouterr().err.splitlines() if line.startswith("step ")
            and "val loss" in line] == [False, True, False]  # fmt: skip


def test_a_damaged_average_is_named(train, prepared, tmp_path, monkeypatch):
    settings = {"data": prepared(), "out_dir": tmp_path / "run", "average_weights": True, **LONG}
    train(**settings)
    monkeypatch.setattr("miaobi.train.run_directory.verifying", lambda *_: nullcontext())
    file = pointed(tmp_path / "run" / "checkpoints" / "last") / "train_state" / FILE
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{FILE} cannot be read"):
        train(**settings | {"max_iters": 80})


def test_an_average_that_is_not_finite_is_refused(train, prepared, tmp_path):
    settings = {"data": prepared(), "out_dir": tmp_path / "run", "average_weights": True, **LONG}
    train(**settings)
    step = pointed(tmp_path / "run" / "checkpoints" / "last")
    (step / "checksums.json").unlink()
    tensors = load_file(step / "train_state" / FILE)
    next(iter(tensors.values())).view(-1)[0] = torch.inf
    save_file(tensors, step / "train_state" / FILE)
    with pytest.raises(UserError, match="not finite"):
        train(**settings | {"max_iters": 80})


def test_adapters_are_not_averaged(train, trained, prepared, tmp_path):
    with pytest.raises(UserError, match="average_weights needs whole weights"):
        train(data=prepared(), out_dir=tmp_path / "run", init_from=trained(), trainable="lora", average_weights=True)
