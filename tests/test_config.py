"""Settings that cannot work are refused with what to do instead."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaobi.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from miaobi.corpus.config import PrepareConfig
from miaobi.errors import UserError
from miaobi.generate.config import SampleConfig


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
        (ModelConfig, {"n_layer": 0}),
        (ModelConfig, {"block_size": -1}),
        (ModelConfig, {"n_head": 4, "n_kv_head": 3}),
        (ModelConfig, {"dropout": 1.0}),
        (ModelConfig, {"dropout": -0.1}),
        (ModelConfig, {"vocab_size": 0}),
        (ModelConfig, {"family": "qwen3", "bias": True}),
        (ModelConfig, {"family": "qwen3", "head_dim": 7}),
        (OptimConfig, {"learning_rate": 0.0}),
        (OptimConfig, {"learning_rate": float("nan")}),
        (OptimConfig, {"learning_rate": float("inf")}),
        (OptimConfig, {"muon_learning_rate": -1.0}),
        (OptimConfig, {"min_lr": -1e-5}),
        (OptimConfig, {"beta2": 1.0}),
        (OptimConfig, {"decay_fraction": 0.0}),
        (OptimConfig, {"grad_clip": -1.0}),
        (TrainConfig, {"batch_size": 0}),
        (TrainConfig, {"max_iters": 0}),
        (TrainConfig, {"eval_interval": 0}),
        (TrainConfig, {"gradient_accumulation_steps": 0}),
        (TrainConfig, {"patience": -1}),
        (PrepareConfig, {"val_fraction": 1.0}),
        (PrepareConfig, {"near_threshold": 0.0}),
        (PrepareConfig, {"workers": -1}),
        (PrepareConfig, {"min_frequency": 0}),
    ],
)
def test_impossible_values_are_refused_by_name(section, wrong):
    required = {"out": "x"} if section is PrepareConfig else {}
    name = list(wrong)[-1]
    with pytest.raises(UserError, match="head width" if name == "head_dim" else name):
        section(**required, **wrong)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("section", "name", "values"),
    [
        (ModelConfig, "intermediate_size", [-5, 0]),
        (ModelConfig, "head_dim", [-8, 0]),
        (ModelConfig, "rope_theta", [-1.0, 0.0, NAN, INF]),
        (ModelConfig, "norm_eps", [-1.0, NAN, INF]),
        (ModelConfig, "rope_factor", [NAN]),
        (OptimConfig, "weight_decay", [-0.1, NAN, INF]),
        (OptimConfig, "min_lr", [NAN]),
        (OptimConfig, "grad_clip", [NAN]),
        (TrainConfig, "seed", [2**64, -(2**63) - 1]),
        (SampleConfig, "seed", [2**63]),
    ],
)
def test_numbers_with_which_nothing_can_be_computed_are_refused_by_name(section, name, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{name} (is|\\()"):
            section(**{name: value})


@given(st.integers(1, 40), st.integers(1, 900))
def test_a_width_that_heads_do_not_divide_comes_with_one_that_they_do(n_head, n_embd):
    if n_embd % n_head == 0:
        assert ModelConfig(n_head=n_head, n_embd=n_embd).n_embd == n_embd
        return
    with pytest.raises(UserError, match=r"not divisible by n_head") as caught:
        ModelConfig(n_head=n_head, n_embd=n_embd)
    better = int(re.search(r"try n_embd=(\d+)", str(caught.value)).group(1))
    assert ModelConfig(n_head=n_head, n_embd=better)


def test_an_explicit_head_width_frees_the_other_two():
    assert ModelConfig(family="qwen3", n_head=6, n_embd=64, head_dim=16).head_dim == 16


def test_the_gpt2_family_has_no_head_width_of_its_own():
    """GPT2LMHeadModel computes n_embd / n_head: another width would train and then not load."""
    with pytest.raises(UserError, match="head_dim"):
        ModelConfig(family="gpt2", n_head=4, n_embd=64, head_dim=8)


def test_the_gpt2_family_has_no_grouped_heads():
    with pytest.raises(UserError, match="n_kv_head"):
        ModelConfig(family="gpt2", n_head=4, n_embd=64, n_kv_head=2)


@given(st.integers(1, 64), st.none() | st.integers(1, 8), st.none() | st.integers(1, 600))
def test_micro_batches_never_exceed_the_global_batch(batch_size, accumulation, micro):
    train = TrainConfig(batch_size=batch_size, gradient_accumulation_steps=accumulation, micro_batch_size=micro)
    assert train.global_batch == batch_size * (accumulation or 1)
    assert 1 <= train.micro_batch <= train.global_batch
    if accumulation and not micro:
        assert train.micro_batch == batch_size


def test_every_setting_is_explained():
    """The attribute docstrings are the command line's help."""
    import ast
    import inspect

    for section in (PrepareConfig, *(type(getattr(RunConfig(), f.name)) for f in dataclasses.fields(RunConfig))):
        body = ast.parse(inspect.getsource(section)).body[0].body
        for attribute, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(attribute, ast.AnnAssign):
                explained = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert explained, f"{section.__name__}.{attribute.target.id} has no help"
