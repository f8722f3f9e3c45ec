"""The forecast's formula against what it is to say, its fit against a law that is known."""

import dataclasses
import math

import numpy as np
import pytest

from miaobi.plan.forecast import RunSize, ScalingLaw, best_size

LAW = ScalingLaw(5.0, 0.3, 0.3, 1.0, 0.3, 6.0, 0.03, 1.2, 0.6, 0.7, 2.0, 0.7)


def test_within_the_first_pass_it_is_the_law_of_its_sources():
    """Chinchilla's three terms, and the overfitting term."""
    one = RunSize(2e6, 5e6)
    told = 5.0 + 0.3 * 2**-0.3 + 1.0 * 5**-0.3 + 0.03 * (2 / 5) ** 0.6
    assert LAW.bits(one, 1) == pytest.approx(told)


def test_repeated_tokens_are_worth_at_most_their_share():
    quiet = dataclasses.replace(LAW, overfit=0.0)
    endless = quiet.bits(RunSize(1e6, 1e6), 10_000)
    assert endless == pytest.approx(5.0 + 0.3 + 1.0 * (1 + 6.0) ** -0.3)
    assert quiet.bits(RunSize(1e6, 1e6), 2) > 5.0 + 0.3 + 1.0 * 2**-0.3, "the second pass is worth less than new text"


def test_the_lowest_point_comes_sooner_for_larger_models_and_later_with_decay():
    small, large = RunSize(3e5, 3e5), RunSize(1e7, 3e5)
    assert LAW.best(large) < LAW.best(small)
    assert LAW.best(dataclasses.replace(large, muon_weight_decay=1.0)) > LAW.best(large)
    assert LAW.best(dataclasses.replace(large, dropout=0.3)) > LAW.best(large)
    assert LAW.best(dataclasses.replace(large, averaged=True)) > LAW.best(large)
    assert LAW.best(RunSize(1e6, 1e12), most=4) == 4


def test_more_text_has_a_larger_best_model():
    few, many = (best_size(LAW, RunSize(1e6, tokens)) for tokens in (1e5, 1e7))
    assert few < many
    one = RunSize(1e6, 1e6)
    best = best_size(LAW, one)
    for other in (best / 4, best * 4):
        here, there = (dataclasses.replace(one, parameters=n) for n in (best, other))
        assert LAW.bits(here, LAW.best(here)) <= LAW.bits(there, LAW.best(there))


def test_curves_are_finite_everywhere():
    for n in (1e4, 1e9):
        for u in (1e3, 1e11):
            for epochs in (0.01, 1, 64):
                assert math.isfinite(LAW.bits(RunSize(n, u), epochs))


def test_the_fit_finds_the_lowest_pass_of_runs_it_has_not_seen():
    from benchmarks.forecast_fit import Curve, fitted, is_right, minima

    draw, runs = np.random.default_rng(0), []
    for n in (2e5, 5e5, 1e6, 3e6):
        for u in (2e4, 8e4, 3e5):
            for decay in (0.0, 1.0):
                setting, epochs = RunSize(n, u, decay), np.arange(1.0, 17.0)
                bits = np.array([LAW.bits(setting, e) for e in epochs]) + 0.005 * draw.standard_normal(16)
                runs.append(Curve(f"{n}-{u}", setting, epochs, bits))
    held = runs[::5]
    law = fitted([one for i, one in enumerate(runs) if i % 5])
    assert all(is_right(*minima(law, one)) for one in held)
