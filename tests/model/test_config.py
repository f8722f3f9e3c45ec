"""Sizes that no model can have are refused with what to do instead."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaobi.errors import UserError
from miaobi.model.config import ModelConfig


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_layer": 0},
        {"block_size": -1},
        {"n_head": 4, "n_kv_head": 3},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"vocab_size": 0},
        {"family": "qwen3", "bias": True},
        {"family": "qwen3", "head_dim": 7},
    ],
)
def test_impossible_values_are_refused_by_name(wrong):
    name = list(wrong)[-1]
    with pytest.raises(UserError, match="head width" if name == "head_dim" else name):
        ModelConfig(**wrong)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("intermediate_size", [-5, 0]),
        ("head_dim", [-8, 0]),
        ("rope_theta", [-1.0, 0.0, NAN, INF]),
        ("norm_eps", [-1.0, NAN, INF]),
        ("rope_factor", [NAN]),
    ],
)
def test_numbers_with_which_nothing_can_be_computed_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"^{name} (is|\\()"):
            ModelConfig(**{name: value})


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
