"""Filters against transformers' processors; draws against the distribution they should follow."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from miaobi.errors import UserError
from miaobi.generate.config import SampleConfig
from miaobi.generate.sampling import filter_logits, next_token, penalize_repeats

FREE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
NO_IDS = torch.zeros(1, 1, dtype=torch.long)


def random_logits(seed: int, rows: int = 4, vocab: int = 40) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.equal(ours.isinf(), theirs.isinf())
    torch.testing.assert_close(ours, theirs)


@given(st.integers(0, 10**6), st.integers(1, 60))
def test_top_k(seed, k):
    logits = random_logits(seed)
    same(filter_logits(logits, SampleConfig(**FREE | {"top_k": k})), hf.TopKLogitsWarper(k)(NO_IDS, logits))


@given(st.integers(0, 10**6), st.integers(1, 99))
def test_top_p(seed, percent):
    logits, p = random_logits(seed), percent / 100
    same(filter_logits(logits, SampleConfig(**FREE | {"top_p": p})), hf.TopPLogitsWarper(p)(NO_IDS, logits))


@given(st.integers(0, 10**6), st.integers(1, 99))
def test_min_p(seed, percent):
    logits, p = random_logits(seed), percent / 100
    same(filter_logits(logits, SampleConfig(**FREE | {"min_p": p})), hf.MinPLogitsWarper(p)(NO_IDS, logits))


@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.8, 1.7]), st.integers(1, 30), st.integers(20, 99))
def test_all_filters_in_transformers_order(seed, temperature, k, percent):
    logits, p = random_logits(seed), percent / 100
    cfg = SampleConfig(temperature=temperature, top_k=k, top_p=p, min_p=0.05)
    expected = logits
    for warper in (hf.TemperatureLogitsWarper(temperature), hf.TopKLogitsWarper(k), hf.TopPLogitsWarper(p),
                   hf.MinPLogitsWarper(0.05)):  # fmt: skip
        expected = warper(NO_IDS, expected)
    same(filter_logits(logits, cfg), expected)


@given(st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 1.3, 5.0]), st.lists(st.integers(0, 39), max_size=20))
def test_repetition_penalty(seed, penalty, history):
    logits = random_logits(seed)
    ids = torch.tensor([history] * 4, dtype=torch.long).view(4, len(history))
    seen = torch.zeros(4, 40, dtype=torch.bool).scatter_(1, ids, True)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits) if history else logits
    same(penalize_repeats(logits, seen, penalty), expected)


def test_a_penalty_above_one_makes_every_repeated_token_less_likely():
    logits = torch.tensor([[3.0, -3.0, 0.5, -0.5]])
    penalised = penalize_repeats(logits, torch.ones(1, 4, dtype=torch.bool), 1.5)
    assert (penalised < logits).all(), "dividing negative logits would have raised them"


@given(st.integers(0, 10**6), st.integers(1, 50), st.integers(1, 100), st.integers(0, 99))
def test_the_likeliest_token_always_stays(seed, k, top_percent, min_percent):
    logits = random_logits(seed)
    cfg = SampleConfig(top_k=k, top_p=top_percent / 100, min_p=min_percent / 100)
    kept = filter_logits(logits, cfg)
    assert torch.isfinite(kept.gather(1, logits.argmax(-1, keepdim=True))).all()


def test_temperature_zero_is_greedy_whatever_the_filters():
    logits = random_logits(0, rows=16)
    token = next_token(logits, SampleConfig(temperature=0, top_k=3, top_p=0.2), [torch.Generator()] * len(logits))
    assert torch.equal(token, logits.argmax(-1))


def test_a_temperature_next_to_zero_is_zero():
    """Divided by it logits would overflow, and the softmax of infinities is no number."""
    for temperature in (1e-6, 1e-40, 5e-324):
        assert SampleConfig(temperature=temperature) == SampleConfig(temperature=0.0)
    logits = random_logits(0, rows=16)
    coldest = next_token(logits, SampleConfig(temperature=2e-5), [torch.Generator()] * len(logits))
    assert torch.equal(coldest, logits.argmax(-1))


@pytest.mark.parametrize(
    "settings", [FREE, FREE | {"temperature": 0.5}, FREE | {"temperature": 2.0}, FREE | {"top_k": 4}, {"top_p": 0.7}]
)
def test_draws_follow_the_filtered_softmax(settings):
    """Pearson's chi-square of 40,000 draws stays below the 1 in 100,000 point of its distribution (df <= 9)."""
    cfg, n = SampleConfig(**settings), 40_000
    logits = random_logits(7, rows=1, vocab=10) / 2
    p = filter_logits(logits, cfg).softmax(-1)[0].double()
    drawn = next_token(logits.expand(n, -1), cfg, [torch.Generator().manual_seed(0)] * n)
    counts = torch.bincount(drawn, minlength=10).double()
    assert (counts[p == 0] == 0).all()
    kept = p > 0
    chi2 = ((counts[kept] - n * p[kept]) ** 2 / (n * p[kept])).sum()
    assert chi2 < 40
    assert kept.sum() > 1


def test_rows_are_drawn_independently():
    logits = torch.zeros(2, 5).expand(2, 5)
    generator = torch.Generator().manual_seed(0)
    cfg = SampleConfig(**FREE)
    pairs = torch.stack([next_token(logits, cfg, [generator] * len(logits)) for _ in range(2000)])
    agreement = (pairs[:, 0] == pairs[:, 1]).double().mean()
    assert abs(agreement - 0.2) < 0.05


def test_half_precision_logits_are_drawn_in_float32():
    logits = torch.zeros(20_000, 3, dtype=torch.bfloat16)
    logits[:, 2] = -10.0  # 4.5e-5 of the probability: lost if the race ran in bf16
    drawn = next_token(logits, SampleConfig(**FREE), [torch.Generator().manual_seed(1)] * len(logits))
    assert abs((drawn == 0).double().mean() - 0.5) < 0.02
    assert (drawn == 2).sum() < 20


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.0}, {"min_p": -0.1},
     {"repetition_penalty": 0.0}, {"num_samples": 0}, {"max_new_tokens": 0}, {"temperature": float("nan")},
     {"temperature": float("inf")}, {"top_p": float("nan")}, {"min_p": float("nan")}, {"seed": 2**63},
     {"repetition_penalty": float("nan")}, {"repetition_penalty": float("inf")}, {"repetition_penalty": 1e-40}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SampleConfig(**wrong)


def test_the_largest_seed_has_samples_behind_it():
    for seed in (-(2**63), 2**63 - 1):
        torch.Generator().manual_seed(SampleConfig(seed=seed).seed + 10**6)
