"""One cell: what moves and what stays, exact gradients, caches, early stopping, and that it learns."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from miaobi.classify import finetune as room
from miaobi.classify.base import prepare_base
from miaobi.classify.config import ClassifyConfig
from miaobi.classify.data import Labelled, read_labelled
from miaobi.classify.finetune import Cell, Experiment, Finetuning, build, finetune, keep_head, row_weights
from miaobi.classify.head import Judge, save
from miaobi.errors import UserError
from miaobi.model.checkpoint import load_model

CPU = torch.device("cpu")


def started(cfg: ClassifyConfig, seed: int = 1) -> Finetuning:
    """A cell about to train."""
    data = read_labelled(cfg)
    model, tokenizer, reading = prepare_base(cfg, cfg.base_model, seed)
    split = room.make_split(data, cfg, seed, reading, tokenizer)
    cell = Cell(cfg.pooling, cfg.trainable, seed)
    classifier = build(cfg, cell, model, len(data.names))
    return Finetuning(cfg, cell, Judge(classifier, tokenizer, reading, data.names), split)


def experiment(cfg: ClassifyConfig, data: Labelled | None = None) -> Experiment:
    return Experiment(cfg, cfg.base_model, data or read_labelled(cfg), CPU, torch.float32)


def run(cfg: ClassifyConfig, seed: int = 1, **given) -> dict:
    cell = Cell(cfg.pooling, cfg.trainable, seed)
    return finetune(experiment(cfg), cell, **given)[2]


def weights(run: Finetuning) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.classifier.named_parameters()}


# What moves

LAST = ("model.blocks.1.", "model.norm.")


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize(
    ("protocol", "trainable", "moves"),
    [
        ("corrected", "full", ("model.", "score.")),
        ("corrected", "last_block", (*LAST, "score.")),
        ("corrected", "head", ("score.",)),
        ("as-published", "full", ("model.", "score.")),
        ("as-published", "last_block", LAST),  # the fresh head stays random, as in small-gpt
        ("as-published", "head", ("score.",)),
    ],
)
def test_just_what_is_trainable_moves(config: Callable, family: str, protocol: str, trainable: str, moves: tuple):
    run = started(config(family, protocol=protocol, trainable=trainable, weight_decay=0.5))
    before = weights(run)
    for chosen in list(run.order())[:2]:
        run.classifier.train()
        run.step(chosen)
    for name, p in weights(run).items():
        assert torch.equal(p, before[name]) != name.startswith(moves), name


def test_lora_moves_adapters_and_head_alone(config: Callable):
    run = started(config("qwen3", trainable="lora"))
    before = weights(run)
    run.classifier.train()
    run.step(next(run.order()))
    moved = {name for name, p in weights(run).items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name or name == "score.weight"}


def test_the_rate_falls_layer_by_layer_below_the_head(config: Callable):
    run = started(config(layer_decay=0.5, learning_rate=1.0))
    rates = {id(p): g["peak_lr"] for g in run.optimizer.param_groups for p in g["params"]}
    decays = {id(p): g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    found = {name: rates[id(p)] for name, p in run.classifier.named_parameters()}
    expected = {"score": 1.0, "model.norm": 0.5, "model.blocks.1": 0.5, "model.blocks.0": 0.25, "model.w": 0.125}
    for name, value in found.items():
        assert value == next(rate for start, rate in expected.items() if name.startswith(start)), name
    assert all((decays[id(p)] > 0) == (p.ndim >= 2) for p in run.classifier.parameters())


# Gradients


@pytest.mark.parametrize("pooling", ["mask", "no_mask"])
def test_a_step_has_the_gradient_of_the_whole_batch(config: Callable, pooling: str):
    run = started(config("gpt2", pooling=pooling, label_smoothing=0.1, class_weights="balanced"))
    run.judge.micro_tokens = 100
    chosen = next(run.order())
    train, c = run.split.train, run.classifier
    owner = train.owner[chosen]
    share = [len(train.labels) / (2 * (train.labels == train.labels[i]).sum()) / (train.owner == i).sum()
             for i in owner]  # fmt: skip
    logits = []
    for i in chosen:  # one row after another
        ids = train.rows[i].tolist() + [run.judge.reading.pad_id] * (0 if pooling == "mask" else 32)
        logits.append(c.score(c.model.hidden(torch.tensor([ids[: 10**9 if pooling == "mask" else 32]]))[0, -1]))
    nats = F.cross_entropy(torch.stack(logits), torch.tensor(train.labels[owner]), reduction="none",
                           label_smoothing=0.1)  # fmt: skip
    expected = (nats * torch.tensor(share)).sum() / sum(share)
    gradients = dict(zip(dict(c.named_parameters()), torch.autograd.grad(expected, c.parameters()), strict=True))
    seen = {}
    run.optimizer.step = lambda: seen.update({n: p.grad.clone() for n, p in c.named_parameters()})
    run.optim = room.dataclasses.replace(run.optim, grad_clip=0.0)
    run.cfg = room.dataclasses.replace(run.cfg, grad_clip=0.0)
    loss = run.step(chosen)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert len(run.judge.buckets([run.rows(train)[i] for i in chosen])) > 2
    for name, gradient in gradients.items():
        torch.testing.assert_close(seen[name], gradient.float(), atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("pooling", ["mask", "no_mask", "mean"])
@pytest.mark.parametrize("trainable", ["last_block", "head"])
def test_states_of_frozen_layers_are_kept_and_change_nothing(config: Callable, monkeypatch, pooling: str, trainable):
    cfg = config("qwen3", pooling=pooling, trainable=trainable, max_epoch=2)
    kept = run(cfg)
    fresh, called = [], room.Finetuning.frozen
    monkeypatch.setattr(room.Finetuning, "frozen", lambda self, ids: fresh.append(1) or called(self, ids))
    monkeypatch.setattr(room, "CACHE_BYTES", 0)
    anew = run(cfg)
    assert not fresh
    assert kept["loss"] == pytest.approx(anew["loss"], abs=1e-4)
    assert kept["accuracy"] == anew["accuracy"]


@pytest.mark.parametrize("trainable", ["last_block", "head"])
def test_splits_share_the_states_of_texts_they_have_in_common(config: Callable, monkeypatch, trainable: str):
    cfg, made = config("qwen3", trainable=trainable), []
    frozen = Judge.run
    monkeypatch.setattr(Judge, "run", lambda self, stage, rows: made.append(len(rows)) or frozen(self, stage, rows))
    states: dict = {}
    for seed in (1, 2):
        run = started(cfg, seed)
        run.states = states
        parts = (run.split.train, run.split.dev, run.split.test)
        for part in parts:
            shared = run.rows(part)
            run.inputs.clear()
            run.states = {}
            for a, b in zip(shared, run.rows(part), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
            run.states = states
    rows = sum(len(part.rows) for part in parts)
    assert sum(made) == 3 * rows, "the second split needed nothing new: the others are those made for comparison"
    monkeypatch.setattr(room, "CACHE_BYTES", run.state_bytes([torch.from_numpy(row) for row in run.split.dev.rows]))
    run.inputs.clear()
    assert len(run.rows(run.split.dev)) == len(run.split.dev.rows) == len(states), "no more than fits is kept"


def test_every_text_weighs_the_same_and_every_label_if_balanced(config: Callable):
    part = started(config()).split.train
    weights = row_weights(part, 2, "none")
    np.testing.assert_allclose(np.bincount(part.owner, weights), 1.0)
    balanced = np.bincount(part.labels, np.bincount(part.owner, row_weights(part, 2, "balanced")))
    assert balanced[0] == pytest.approx(balanced[1])


def test_each_epoch_is_a_permutation_of_its_own(config: Callable):
    run = started(config(max_epoch=2))
    steps = list(run.order())
    half = len(steps) // 2
    first, second = (np.concatenate(part) for part in (steps[:half], steps[half:]))
    assert sorted(first) == sorted(second) == list(range(len(run.split.train.rows)))
    assert first.tolist() != second.tolist()
    assert all(np.array_equal(a, b) for a, b in zip(steps, started(config(max_epoch=2)).order(), strict=True))


# Runs


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("protocol", ["as-published", "corrected"])
def test_it_learns_what_the_reviews_say(config: Callable, family: str, protocol: str):
    result = run(config(family, protocol=protocol, max_epoch=6))
    assert result["accuracy"] >= 0.9
    assert result["macro_f1"] >= 0.9
    assert (result["test_units"] == 12) == (protocol == "corrected")  # a tenth of the reviews; a fifth of the chunks


def test_the_same_seed_gives_the_same_figures_and_another_does_not(config: Callable):
    cfg = config(dropout=0.2)
    first, again, other = run(cfg), run(cfg), run(cfg, seed=2)
    timeless = {"seconds", "peak_memory_mb"}
    assert {k: v for k, v in first.items() if k not in timeless} == {
        k: v for k, v in again.items() if k not in timeless
    }
    assert first["loss"] != other["loss"]


def test_dropout_acts_in_the_trained_part_alone(config: Callable):
    full, last = (started(config(dropout=0.5, trainable=t)).classifier for t in ("full", "last_block"))
    for classifier, noisy in (full, True), (last, False):
        classifier.train()
        ids = torch.randint(0, 50, (2, 8))
        assert torch.equal(classifier.lower(ids), classifier.lower(ids)) != noisy
        states, lengths = classifier.lower(ids), torch.tensor([8, 8])
        assert not torch.equal(classifier.pooled(states, lengths), classifier.pooled(states, lengths))


def test_training_stops_when_dev_gets_no_better_and_keeps_the_best(config: Callable, monkeypatch):
    scripted = iter([0.5, 0.3, 0.4, 0.6, 0.7, 0.8])
    monkeypatch.setattr(room, "log_loss", lambda *_: next(scripted))
    monkeypatch.setattr(Finetuning, "logits", lambda self, part: np.eye(2)[1 - part.labels])  # always wrong
    run = started(config(max_epoch=9, eval_interval=1, patience=2))
    snapshots = []
    step = run.step
    run.step = lambda chosen: (step(chosen), snapshots.append(weights(run)))[0]
    run.go(None, lambda: False)
    assert (run.progress.step, run.progress.best_step) == (4, 2)
    assert all(torch.equal(p, snapshots[1][name]) for name, p in weights(run).items())


def test_a_loss_that_is_not_finite_stops_the_run(config: Callable):
    cfg = config()
    run_ = started(cfg)
    with torch.no_grad():
        run_.classifier.score.weight.fill_(math.inf)
    with pytest.raises(UserError, match="the loss is not finite at step 1"):
        run_.step(next(run_.order()))


# Bases


def test_two_tokens_are_added_as_small_gpt_adds_them(config: Callable):
    cfg = config("gpt2", protocol="as-published")
    plain, theirs = load_model(cfg.base_model)
    model, tokenizer, reading = prepare_base(cfg, cfg.base_model, 1)
    V = theirs.vocab_size
    assert (reading.before, reading.after) == ((V,), (V + 1,))
    assert [tokenizer.token_to_id(mark) for mark in ("<start>", "<extract>")] == [V, V + 1]
    assert tokenizer.encode("<start>皇马<extract>") == theirs.encode("<start>皇马<extract>")  # text stays text
    torch.testing.assert_close(model.wte.weight[:V], plain.wte.weight[:V])
    assert model.wte.weight[V : V + 2].std() > 0.5  # torch's own embeddings, not the model's 0.02
    assert model.cfg.vocab_size == V + 2


def test_corrected_ends_texts_as_pretraining_did(config: Callable):
    cfg = config("qwen3")
    _, tokenizer, reading = prepare_base(cfg, cfg.base_model, 1)
    assert (reading.before, reading.after, reading.pad_id) == ((), (tokenizer.eot_id,), tokenizer.pad_id)


def test_a_block_longer_than_the_models_is_refused(config: Callable):
    with pytest.raises(UserError, match=r"block_size is 64, but .* reads 32 tokens"):
        run(config(block_size=64))


def test_three_classes_and_a_shorter_block(config: Callable):
    cfg = config(block_size=8, max_epoch=1)
    data = read_labelled(cfg)
    three = Labelled(data.texts, np.arange(len(data.texts)) % 3, ["a", "b", "c"])
    judge, split, result = finetune(experiment(cfg, three), Cell("mask", "full", 1))
    assert max(map(len, split.train.rows)) == 8
    assert np.array(result["confusion"]).shape == (3, 3)
    assert np.array(result["confusion"]).sum() == len(split.test.labels)
    assert judge.probabilities(["皇马"]).shape == (1, 3)


TEXTS = ["皇马赢得比赛", "曼联输掉联赛，球迷输掉冠军。" * 5]


@pytest.mark.parametrize("pooling", ["mask", "no_mask", "mean"])
def test_a_classifier_goes_on_where_it_stopped(config: Callable, tmp_path, pooling: str):
    cfg = config("qwen3", pooling=pooling)
    first, _, _ = finetune(experiment(cfg), Cell(pooling, "full", 1))
    save(tmp_path, first)
    again = config(pooling=pooling, base_model=tmp_path)
    model, tokenizer, reading = prepare_base(again, str(tmp_path), 2)
    assert reading == first.reading
    classifier = build(again, Cell(pooling, "full", 2), model, 2)
    keep_head(classifier, str(tmp_path), first.labels)
    second = Judge(classifier, tokenizer, reading, first.labels, first.temperature)
    np.testing.assert_allclose(second.probabilities(TEXTS), first.probabilities(TEXTS), atol=1e-5)

    started = classifier.score.weight.detach().clone()
    keep_head(classifier, config("qwen3").base_model, first.labels)  # a language model has none
    assert torch.equal(classifier.score.weight, started)
    fresh = build(again, Cell(pooling, "full", 2), model, 2)
    before = fresh.score.weight.detach().clone()
    keep_head(fresh, str(tmp_path), ["差", "好"])  # other labels: its rows would mean something else
    assert torch.equal(fresh.score.weight, before)


def test_a_classifier_trained_on_other_reviews_starts_better(config: Callable, tmp_path):
    cfg = config("qwen3", max_epoch=4)
    first, _, result = finetune(experiment(cfg), Cell("mask", "full", 1))
    assert result["accuracy"] > 0.8
    save(tmp_path, first)
    slow = {"learning_rate": 1e-6, "max_epoch": 1}
    assert run(config(base_model=tmp_path, **slow), 2)["accuracy"] > 0.8
    published = run(config(base_model=tmp_path, protocol="as-published", trainable="head", **slow), 2)
    assert published["accuracy"] < 0.8, "that protocol's head is a fresh one"
