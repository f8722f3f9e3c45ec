"""A run learns what it should, step by step, and says what goes wrong."""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from miaobi.corpus.dataset import IGNORE, batch, windows_per_epoch
from miaobi.corpus.prepared import PreparedData, TokenStream
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.model.checkpoint import load_model
from miaobi.settings import load_config, with_values
from miaobi.train import evaluate
from miaobi.train.loop import Run
from miaobi.train.setup import set_up
from miaobi.train.world import World


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(run: Path) -> bytes:
    return (pointed(run / "checkpoints" / "last") / "model.safetensors").read_bytes()


# --- one step ----------------------------------------------------------------------------------------------------


@pytest.fixture
def new_run(prepared, tmp_path):
    """A Run that has not started; without optimizers the gradients of a step stay to be looked at."""

    def make(**values: object) -> Run:
        given = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 8, "family": "gpt2",
                 "grad_clip": 0, "compile": False} | values  # fmt: skip
        cfg, _ = load_config(None, [(key, str(value)) for key, value in given.items()])
        cfg = with_values(cfg, {"data": str(prepared()), "out_dir": str(tmp_path / "run")})
        run = Run(set_up(cfg, {}, World(), torch.device("cpu"), torch.float32))
        run.plan.optimizers.clear()
        return run

    return make


def gradients(run: Run, step: int) -> tuple[float, dict[str, torch.Tensor]]:
    run.model.zero_grad(set_to_none=True)
    loss, _, _ = run.step(step)
    return loss.item(), {name: p.grad for name, p in run.model.named_parameters()}


def a_step_with_short_windows(run: Run) -> int:
    for step in range(200):
        _, targets = batch(run.plan.data.train, 16, 8, run.cfg.seed, step)
        if (targets == IGNORE).any():
            return step
    raise AssertionError


@pytest.mark.bf16
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_micro_batches_of_any_size_give_the_gradient_of_the_whole_batch(new_run, family):
    whole = new_run(family=family)
    step = a_step_with_short_windows(whole)
    x, y = (torch.from_numpy(a) for a in batch(whole.plan.data.train, 16, 8, whole.cfg.seed, step))
    loss, grads = gradients(whole, step)
    whole.model.zero_grad(set_to_none=True)
    expected = F.cross_entropy(whole.model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, p in whole.model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-6, rtol=1e-4)
    nanogpts = {"batch_size": 2, "gradient_accumulation_steps": 4}
    for settings in ({"micro_batch_size": 1}, {"micro_batch_size": 3}, nanogpts):
        part_loss, part = gradients(new_run(family=family, **settings), step)
        assert part_loss == pytest.approx(loss, rel=1e-5)
        for name in grads:
            torch.testing.assert_close(part[name], grads[name], atol=1e-6, rtol=1e-4)


def test_gradients_are_clipped_to_their_norm(new_run):
    _, free = gradients(new_run(), 0)
    norm = torch.cat([g.flatten() for g in free.values()]).norm().item()
    run = new_run(grad_clip=norm / 10)
    assert run.step(0)[1].item() == pytest.approx(norm, rel=1e-4)
    clipped = {name: p.grad for name, p in run.model.named_parameters()}
    for name in free:
        torch.testing.assert_close(clipped[name], free[name] / 10, atol=1e-7, rtol=1e-3)


def test_dropout_depends_on_seed_and_step_alone(new_run):
    run = new_run(dropout=0.3)
    run.model.train()
    first = run.step(5)[0].item()
    torch.manual_seed(99)
    run.step(8)
    assert run.step(5)[0].item() == first
    assert new_run(dropout=0.3, seed=2).step(5)[0].item() != first


def test_every_micro_batch_of_every_step_draws_its_own_dropout(new_run, monkeypatch):
    run, masks = new_run(dropout=0.3, micro_batch_size=2), []
    run.model.train()

    def draw(ids: torch.Tensor, *where: object) -> torch.Tensor:
        masks.append(tuple(torch.rand(3).tolist()))  # what dropout would be made of
        return hidden(ids, *where)

    hidden = run.model.hidden
    monkeypatch.setattr(run.model, "hidden", draw)
    for step in range(5):
        run.step(step)
    assert len(masks) == len(set(masks)) == 5 * 4


# --- a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_run_learns_and_writes_down_how(train, prepared, tmp_path, family):
    run = tmp_path / "run"
    result = train(data=prepared(), out_dir=run, family=family, max_iters=60, learning_rate=5e-3)
    assert set(result) >= {"run", "step", "train_loss", "val_loss", "val_bits_per_char", "best_step",
                           "tokens_per_second", "parameters", "trained_parameters", "stopped"}  # fmt: skip
    assert (result["step"], result["stopped"], result["run"]) == (60, "max_iters", str(run))
    vocabulary = PreparedData.open(prepared()).vocab_size
    assert result["val_loss"] < math.log(vocabulary) - 2
    logged = rows(run)
    assert [r["step"] for r in logged if "train_loss" in r] == list(range(5, 61, 5))
    assert [r["step"] for r in logged if "val_loss" in r] == list(range(10, 61, 10))
    losses = [r["val_loss"] for r in logged if "val_loss" in r]
    assert losses[-1] < losses[0] - 0.5
    assert result["parameters"] == load_model(run)[0].num_parameters()
    assert list(run.glob("events.out.tfevents*"))


@pytest.mark.bf16
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(train, prepared, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(data=prepared(), out_dir=tmp_path / name, seed=seed, dropout=0.2)
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_printed_samples_change_nothing(train, prepared, tmp_path):
    from miaobi.generate.chat import preview

    prompts = []

    def spy(model, tokenizer, *rest):
        prompts.append(rest)
        return preview(model, tokenizer, *rest)

    train(data=prepared(), out_dir=tmp_path / "quiet", dropout=0.2)
    assert not prompts
    train(data=prepared(), out_dir=tmp_path / "loud", dropout=0.2, sample_tokens=5, sample_start="皇马", preview=spy)
    assert prompts == [("皇马", 5, (Tokenizer.load(prepared()).eot_id,), False)] * 2
    assert weights(tmp_path / "quiet") == weights(tmp_path / "loud")


def test_no_evaluation_before_the_first_interval_and_none_dearer_than_the_training(
    train, prepared, tmp_path, monkeypatch
):
    calls, steps = [], []
    validation_nats, step = evaluate.validation_nats, Run.step
    monkeypatch.setattr(Run, "step", lambda self, n: (steps.append(n), step(self, n))[1])

    def spy(model, windows, *args):
        calls.append((len(steps), len(windows.inputs)))
        return validation_nats(model, windows, *args)

    monkeypatch.setattr(evaluate, "validation_nats", spy)
    train(data=prepared(), out_dir=tmp_path / "run", max_iters=7, eval_interval=5, eval_iters=1000)
    assert [at for at, _ in calls] == [5, 7]
    for at, windows in calls:
        assert 0 < windows * 32 <= at * 8 * 32


@pytest.mark.bf16
def test_an_evaluation_before_the_first_step_changes_nothing(train, prepared, tmp_path, capsys):
    for name, first in (("a", False), ("b", True)):
        train(data=prepared(), out_dir=tmp_path / name, eval_first=first, dropout=0.1)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert [r["step"] for r in rows(tmp_path / "b") if "val_loss" in r] == [0, 10, 20]
    assert "step 0: val loss" in capsys.readouterr().err
    vocabulary = PreparedData.open(prepared()).vocab_size
    assert rows(tmp_path / "b")[0]["val_loss"] == pytest.approx(math.log(vocabulary), abs=0.5)


def test_what_a_seeds_user_sees_while_it_trains(train, prepared, tmp_path, capsys):
    train(data=prepared(), out_dir=tmp_path / "run", dropout=0.3, eval_iters=8)
    said = capsys.readouterr().err
    assert re.search(r"step 5/20  loss \d\.\d+  [\d,]+ tok/s  [\d,]+ ms/step  mfu [\d.]+%  \d+ s left", said)
    assert re.search(r"step 20: train loss \d\.\d+ \(now \d\.\d+\), val loss", said)
    assert f"tensorboard --logdir={tmp_path / 'run'}" in said
    now = [r["train_eval_loss"] for r in rows(tmp_path / "run") if "train_eval_loss" in r]
    assert len(now) == 2, "of training text without dropout, beside the mean of the steps before"


def test_small_gpts_tensorboard_path_gets_the_curves(train, prepared, tmp_path, capsys):
    """And may be another one when the run goes on."""
    for steps, name in ((20, "board"), (30, "board"), (40, "other")):
        given = {"data": prepared(), "out_dir": tmp_path / "run", "max_iters": steps}
        train(**given, tensorboard_path=tmp_path / name)
    assert f"tensorboard --logdir={tmp_path / 'other'}" in capsys.readouterr().err
    found = {}
    for name in ("run", "board", "other"):
        board = EventAccumulator(str(tmp_path / name))
        board.Reload()
        found[name] = sorted((e.step, e.value) for e in board.Scalars("val_loss"))
    wanted = [(row["step"], pytest.approx(row["val_loss"])) for row in rows(tmp_path / "run") if "val_loss" in row]
    assert found["run"] == wanted
    assert found["board"] == wanted[:3]
    assert found["other"] == wanted[3:]


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize(
    ("part", "message"), [("val", "the data is empty"), ("train", "the data has fewer than two tokens")]
)
def test_a_part_without_text_is_refused(train, prepared, tmp_path, monkeypatch, part, message, tokens):
    monkeypatch.setattr(TokenStream, "__len__", lambda self: tokens if self.name == part else int(self.ends[-1]))
    with pytest.raises(UserError, match=message):
        train(data=prepared(), out_dir=tmp_path / "run")


def test_epochs_end_a_run(train, prepared, tmp_path):
    windows = windows_per_epoch(len(PreparedData.open(prepared()).train), 32)
    result = train(data=prepared(), out_dir=tmp_path / "run", max_epochs=1, max_iters=1000, eval_interval=100)
    assert result["step"] == windows // 8


def test_overfitting_is_a_warning_then_stops_the_run_and_the_best_model_is_kept(train, tmp_path, capsys):
    draw = random.Random(0)
    (tmp_path / "short.txt").write_text("".join(draw.choices("皇马赢得比赛冠军球迷转会期待", k=600)))
    settings = {"data": tmp_path / "short.txt", "split": "tail", "out_dir": tmp_path / "run", "n_embd": 64,
                "patience": 4, "max_iters": 190, "learning_rate": 0.01, "block_size": 16}  # fmt: skip
    result = train(**settings)
    said = capsys.readouterr().err
    assert "overfitting" in said
    assert result["stopped"] == "patience"
    assert result["step"] == result["best_step"] + 40 < 190
    assert result["train_loss"] < result["best_val_loss"] < result["val_loss"]
    assert pointed(tmp_path / "run" / "checkpoints" / "best").name == f"step-{result['best_step']}"
    again = train(**settings)
    assert (again["stopped"], again["step"]) == ("patience", result["step"])
    assert "finished (patience, step" in capsys.readouterr().err
    longer = train(**settings | {"max_iters": 200})
    assert result["step"] < longer["step"] <= 200, "a larger max_iters extends it, and patience begins anew"
    assert longer["best_step"] == result["best_step"]


@pytest.mark.parametrize("at", [10, 20], ids=["at an evaluation", "at the last step"])
def test_an_interruption_does_not_swallow_the_evaluation_of_its_step(train, prepared, tmp_path, monkeypatch, at):
    step = Run.step

    def interrupted_step(self, n):
        if n == at - 1:
            self.interrupt("interrupted")
        return step(self, n)

    settings = {"data": prepared(), "out_dir": tmp_path / "run"}
    monkeypatch.setattr(Run, "step", interrupted_step)
    assert train(**settings)["step"] == at
    monkeypatch.setattr(Run, "step", step)
    result = train(**settings)
    assert (result["step"], result["stopped"]) == (20, "max_iters")
    assert result["val_loss"] is not None
    assert [r["step"] for r in rows(tmp_path / "run") if "val_loss" in r] == [10, 20]


# --- data --------------------------------------------------------------------------------------------------------


def test_raw_text_is_prepared_once_into_the_run(train, corpus_file, tmp_path):
    settings = {"data": corpus_file, "out_dir": tmp_path / "run", "max_iters": 2}
    train(**settings)
    manifest = tmp_path / "run" / "data" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    train(**settings | {"max_iters": 4})
    assert manifest.stat().st_mtime_ns == before


def test_other_text_after_a_false_start_is_not_mistaken_for_the_first(train, corpus_file, tmp_path, monkeypatch):
    """Killed before its first checkpoint, a run has no configuration to keep; its data must follow --data."""
    go = Run.go
    monkeypatch.setattr(Run, "go", lambda *_: {})
    train(data=corpus_file, out_dir=tmp_path / "run")
    monkeypatch.setattr(Run, "go", go)
    (tmp_path / "other.txt").write_text("红楼梦里人。\n\n石头记中事！\n\n" * 200, encoding="utf-8")
    train(data=tmp_path / "other.txt", out_dir=tmp_path / "run", max_iters=1, dedup="none", block_size=8)
    _, tokenizer = load_model(tmp_path / "run", "last")
    assert tokenizer.token_to_id("楼") is not None
    assert tokenizer.token_to_id("皇") is None


def test_vocab_size_fixes_the_rows(train, prepared, tmp_path):
    needed = PreparedData.open(prepared()).vocab_size
    train(data=prepared(), out_dir=tmp_path / "run", max_iters=1, vocab_size=needed + 41)
    assert load_model(tmp_path / "run", "last")[0].cfg.vocab_size == needed + 41
    with pytest.raises(UserError, match="vocab_size"):
        train(data=prepared(), out_dir=tmp_path / "small", vocab_size=needed - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 100_000}, "less than one block"),
        ({"data": "no/such/text"}, "no/such/text"),
        ({"init_from": "no/such/model"}, "no/such/model"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_written(train, prepared, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(**{"data": prepared(), "out_dir": tmp_path / "run"} | changes)
    assert not (tmp_path / "run" / "checkpoints" / "last").exists()


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not(new_run):
    """SLURM tells every process, and torchrun passes its own SIGTERM on."""
    run = new_run()
    run.interrupt("terminated")
    run.interrupt("terminated")
    assert run.interrupted == "terminated"
    with pytest.raises(KeyboardInterrupt):
        run.interrupt("interrupted")
