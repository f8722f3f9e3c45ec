"""How many sequences go through the model at once: what fits, and fewer where memory runs out."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from miaobi.errors import UserError
from miaobi.files import pointed, read_json
from miaobi.model.checkpoint import load_model
from miaobi.train import micro
from miaobi.train.layout import Objective
from miaobi.train.loop import Run
from miaobi.train.micro import equal_pieces, find_micro_batch, largest_that_fits
from miaobi.train.run_directory import Progress
from miaobi.train.world import World

FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def small_memory(monkeypatch):
    """`small_memory(rows)`: passes of more sequences run out of memory; returns the sizes that were tried."""

    def begin(rows: int, error: Exception = FULL) -> list[int]:
        forward, tried = Objective.forward, []

        def limited(self, ids, *rest):
            tried.append(len(ids))
            if len(ids) > rows:
                raise error
            return forward(self, ids, *rest)

        monkeypatch.setattr(Objective, "forward", limited)
        return tried

    return begin


def weights(run) -> dict[str, torch.Tensor]:
    return load_model(run, "last")[0].state_dict()


@pytest.mark.parametrize("error", [FULL, RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_lowers_the_micro_batch_and_loses_no_step(
    train, prepared, tmp_path, small_memory, capsys, error
):
    """The same steps as a run that was told the smaller micro-batch, bit for bit."""
    train(data=prepared(), out_dir=tmp_path / "told", micro_batch_size=2)
    tried = small_memory(3, error)
    assert train(data=prepared(), out_dir=tmp_path / "run")["step"] == 20
    said = capsys.readouterr().err
    for before, after in ((8, 4), (4, 2)):
        assert f"out of memory with micro-batches of {before} sequences: the step is repeated" in said
        assert f"the run continues, with micro-batches of {after}\n" in said
    assert tried.count(8) == tried.count(4) == 1
    one, other = weights(tmp_path / "told"), weights(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_keeps_its_smaller_micro_batch(train, prepared, tmp_path, small_memory, monkeypatch):
    tried = small_memory(2)
    train(data=prepared(), out_dir=tmp_path / "run", max_iters=10)
    state = read_json(pointed(tmp_path / "run" / "checkpoints" / "last") / "train_state" / "progress.json")
    assert state["micro"] == 2
    tried.clear()
    train(data=prepared(), out_dir=tmp_path / "run", max_iters=20)
    assert max(tried) == 2


def test_memory_that_does_not_hold_one_sequence_ends_the_run_with_advice(train, prepared, tmp_path, small_memory):
    small_memory(0)
    with pytest.raises(UserError, match=r"out of memory.*--activation_checkpointing=True"):
        train(data=prepared(), out_dir=tmp_path / "run")


def test_memory_that_runs_out_in_the_middle_of_a_step_leaves_no_gradient_of_it(train, prepared, tmp_path, monkeypatch):
    train(data=prepared(), out_dir=tmp_path / "told", micro_batch_size=2, max_iters=10)
    forward, count = Objective.forward, [0]

    def second_fails(self, ids, *rest):
        count[0] += self.training
        if count[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, ids, *rest)

    monkeypatch.setattr(Objective, "forward", second_fails)
    train(data=prepared(), out_dir=tmp_path / "run", micro_batch_size=4, max_iters=10)
    one, other = weights(tmp_path / "told"), weights(tmp_path / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_error_is_no_reason_to_lower_anything(train, prepared, tmp_path, monkeypatch):
    def broken(self, *_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Run, "gradients", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(data=prepared(), out_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("peaks", "free", "asked", "expected"),
    [
        ({1: 300, 3: 500}, 1000, 64, 8),
        ({1: 300, 3: 500}, 1000, 4, 4),
        ({1: 300, 3: 500}, 250, 64, 1),
        ({1: 300, 3: 300}, 1000, 64, 64),
    ],
)
def test_what_fits_is_a_line_through_two_probes(peaks, free, asked, expected):
    assert largest_that_fits(peaks, free, asked) == expected


@pytest.mark.parametrize(("rows", "most", "expected"), [(32, 32, 32), (32, 20, 16), (10, 4, 4), (7, 1, 1), (9, 5, 5)])
def test_pieces_are_about_equal(rows, most, expected):
    assert equal_pieces(rows, most) == expected


def test_a_gpu_is_probed_twice_and_its_largest_micro_batch_is_logged_and_saved(monkeypatch, capsys):
    """As on a GPU: what it says about its memory is made up, the passes are counted."""
    ran = []
    plan = SimpleNamespace(
        progress=Progress(), micro=64, device=torch.device("cuda"), world=World(), optimizers=[],
        cfg=SimpleNamespace(train=SimpleNamespace(micro_batch_size=None)), model=torch.nn.Linear(1000, 1000),
    )  # fmt: skip
    used = {1: 3 << 30, 3: 5 << 30}
    monkeypatch.setattr(micro, "reset_peak_memory", lambda _: None)
    monkeypatch.setattr(micro, "peak_memory", lambda _: used[ran[-1]])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (15 << 30, 16 << 30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1 << 30)
    monkeypatch.setattr(micro, "replace", lambda plan, **new: SimpleNamespace(**{**vars(plan), **new}))

    def work(micro):
        return SimpleNamespace(time_pass=lambda _: ran.append(micro))

    found = find_micro_batch(plan, work, "bfloat16")
    assert ran == [1, 3]
    assert found.micro == found.progress.micro == 11  # 12 would fit: six pieces of 11, of 64
    assert "micro-batches of 11 sequences, 64 would not fit" in capsys.readouterr().err
    assert find_micro_batch(plan, work, "bfloat16").micro == 11
    assert ran == [1, 3], "a run that has begun keeps its micro-batch"
    assert dataclasses.is_dataclass(plan.progress)
