"""Steps that are not finite are left out and named; three in a row send the run back; no broken model is saved."""

import json
from pathlib import Path

import pytest
import torch
from tests import processes
from tests.conftest import tiny

from miaobi.errors import UserError
from miaobi.files import pointed, read_json
from miaobi.model.checkpoint import load_model
from miaobi.train.layout import Objective
from miaobi.train.loop import Run


@pytest.fixture
def poison(monkeypatch):
    """`poison(steps, "loss" or "gradient", times)`: those steps (0-based) are not finite, the first `times`."""

    def begin(steps: set[int], what: str = "loss", times: int = 99) -> list[int]:
        forward, step, now, ran = Objective.forward, Run.step, [], []

        def noted(self, n):
            now[:] = [n]
            ran.append(n)
            return step(self, n)

        def broken(self, *args):
            loss = forward(self, *args)
            if now and now[0] in steps and ran.count(now[0]) <= times and self.training:
                if what == "loss":
                    return loss * float("nan")
                loss.register_hook(lambda g: g * float("inf"))
            return loss

        monkeypatch.setattr(Run, "step", noted)
        monkeypatch.setattr(Objective, "forward", broken)
        return ran

    return begin


def weights(run) -> dict[str, torch.Tensor]:
    return load_model(run, "last")[0].state_dict()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_and_named_with_its_documents(
    train, prepared, tmp_path, poison, capsys, what
):
    poison({12}, what)
    assert train(data=prepared(), out_dir=tmp_path / "run")["step"] == 20
    said = capsys.readouterr().err
    assert f"the {what} is not finite at step 13: the step is skipped. Its batch holds documents " in said
    assert said.count("not finite") == 1
    assert all(bool(p.isfinite().all()) for p in weights(tmp_path / "run").values())


def test_a_step_that_is_left_out_moves_nothing(train, prepared, tmp_path, poison):
    """The weights after it are those before it."""
    train(data=prepared(), out_dir=tmp_path / "short", max_iters=19, schedule="constant", warmup_iters=0)
    poison({19})
    train(data=prepared(), out_dir=tmp_path / "long", max_iters=20, schedule="constant", warmup_iters=0)
    before, after = weights(tmp_path / "short"), weights(tmp_path / "long")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_three_in_a_row_send_the_run_back_and_on_with_half_the_rate(train, prepared, tmp_path, poison, capsys, what):
    ran = poison({12, 13, 14}, what, times=1)
    assert train(data=prepared(), out_dir=tmp_path / "run")["step"] == 20
    said = capsys.readouterr().err
    assert f"the {what} is not finite at step 15: rolling back to" in said
    assert ran == [*range(15), *range(10, 20)]
    state = read_json(pointed(tmp_path / "run" / "checkpoints" / "last") / "train_state" / "progress.json")
    assert state["slowed"] == 0.5


def test_after_going_back_the_rates_are_half(train, prepared, tmp_path, poison):
    poison({12, 13, 14}, times=1)
    train(data=prepared(), out_dir=tmp_path / "run", max_iters=20, schedule="constant", log_interval=1)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    assert rates[20] == pytest.approx(rates[10] / 2)


def test_where_going_back_does_not_help_the_run_stops_with_the_cause_and_the_last_good_checkpoint(
    train, prepared, tmp_path, poison
):
    poison({12, 13, 14})
    with pytest.raises(UserError, match=r"step 15, even after a rollback.*last good checkpoint.*--learning_rate"):
        train(data=prepared(), out_dir=tmp_path / "run")
    assert pointed(tmp_path / "run" / "checkpoints" / "last").name == "step-10"
    assert all(bool(p.isfinite().all()) for p in weights(tmp_path / "run").values())


def test_scratch_on_the_command_line_does_not_move_the_run_aside_when_it_goes_back(train, prepared, tmp_path, poison):
    """It was obeyed when the command began."""
    train(data=prepared(), out_dir=tmp_path / "run")
    poison({12, 13, 14}, times=1)
    train(data=prepared(), out_dir=tmp_path / "run", init_from="scratch")
    assert [path.name for path in sorted(tmp_path.glob("run*"))] == ["run", "run.old-1"]


def test_two_in_a_row_three_times_over_are_no_reason_to_go_back(train, prepared, tmp_path, poison, capsys):
    poison({3, 4, 6, 7, 9, 10})
    assert train(data=prepared(), out_dir=tmp_path / "run", log_interval=1)["step"] == 20
    assert capsys.readouterr().err.count("is skipped") == 6


def test_a_run_killed_after_a_rollback_resumes_with_the_lower_rate(train, prepared, tmp_path, poison):
    ran = poison({12, 13, 14}, times=1)
    whole = {"data": prepared(), "max_iters": 30}
    train(out_dir=tmp_path / "whole", **whole)
    ran.clear()
    step = Run.step

    def killed(self, n):
        if n == 24:
            raise KeyboardInterrupt
        return step(self, n)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(out_dir=tmp_path / "cut", **whole)
    train(out_dir=tmp_path / "cut", **whole)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("parallel", "what"), [("ddp", "gradient"), ("ddp", "norm"), ("fsdp", "loss")])
def test_what_is_not_finite_on_one_of_two_ranks_moves_neither(prepared, tmp_path, parallel, what):
    """Step 4 is left out, its documents are named; steps 8 to 10 send both ranks back, and the run comes to its end."""
    program, out = Path(__file__).with_name("one_bad_rank.py"), tmp_path / "run"
    steady = {"schedule": "constant", "warmup_iters": 0, "log_interval": 1, "save_interval": 1, "max_iters": 12}
    words = [what, 1, "3,7,8,9", *tiny(data=prepared(), out_dir=out, parallel=parallel, **steady)]
    command = ["-c", program.read_text(encoding="utf-8"), *words]
    both = processes.ranks(2, of_rank={0: command, 1: command})
    said = "".join(rank.stderr for rank in both)
    assert not any(rank.returncode for rank in both), said[-4000:]
    named = "loss" if what == "loss" else "gradient"
    assert said.count(f"the {named} is not finite at step 4: the step is skipped. Its batch holds documents ") == 1
    assert said.count(f"the {named} is not finite at step 10: rolling back to") == 1
    checkpoints = {n: state(out / "checkpoints" / f"step-{n}") for n in (3, 4, 5, 7, 9, 12)}
    assert checkpoints[3] == checkpoints[4] != checkpoints[5]
    assert checkpoints[7] == checkpoints[9] != checkpoints[12]
    assert read_json(out / "checkpoints" / "step-12" / "train_state" / "progress.json")["slowed"] == 0.5


def state(checkpoint) -> dict[str, bytes]:
    """Weights and moments of a checkpoint of two ranks."""
    files = {path.name: path.read_bytes() for path in checkpoint.rglob("*.safetensors")}
    assert files.keys() == {"model.safetensors", "optimizer-0-of-2.safetensors", "optimizer-1-of-2.safetensors"}
    return files
