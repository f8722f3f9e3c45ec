"""Settings that cannot work are refused with what to do instead."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaobi.config import OptimConfig, RunConfig, TrainConfig
from miaobi.corpus.config import PrepareConfig
from miaobi.errors import UserError
from miaobi.generate.config import SampleConfig


@pytest.mark.parametrize(
    ("section", "wrong"),
    [
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
    with pytest.raises(UserError, match=name):
        section(**required, **wrong)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("section", "name", "values"),
    [
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
