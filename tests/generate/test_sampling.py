"""Filters against transformers' processors; draws against the distribution they should follow."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from miaobi.errors import UserError
from miaobi.generate.config import SampleConfig
from miaobi.generate.sampling import (
    Drawing,
    Kind,
    drawn,
    filter_logits,
    next_token,
    penalize_repeats,
    token_keys,
    uniform,
)

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


# --- drawn by numbers alone, as a card does it ---------------------------------------------------------------------


def splitmix64(x: int) -> int:
    """The last part of it, as published."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_the_keys_of_tokens_are_the_published_generators_numbers():
    expected = [splitmix64((n + 1) * 0x9E3779B97F4A7C15 % 2**64) for n in range(1000)]
    assert [x % 2**64 for x in token_keys(1000, torch.device("cpu")).tolist()] == expected


@pytest.mark.parametrize("seed", [0, 1, 2**61 + 12345])
@pytest.mark.parametrize("along", ["seeds", "counts", "tokens"])
def test_variates_are_uniform_and_independent_along_each_number(along, seed):
    """Kolmogorov's distance, and correlations with the neighbours (also of those far from the middle, which are what
    wins a race), within what chance gives of so many.
    """
    n = 100_000
    zero, numbers, keys = torch.zeros(1, dtype=torch.long), torch.arange(n), token_keys(n, torch.device("cpu"))
    start = torch.tensor([seed])
    one = {"seeds": lambda: uniform(start + numbers, zero.expand(n), keys[:1].expand(n, 1)).flatten(),
           "counts": lambda: uniform(start.expand(n), numbers, keys[:1].expand(n, 1)).flatten(),
           "tokens": lambda: uniform(start, zero, keys[None]).flatten()}[along]().double()  # fmt: skip
    assert 0 < one.min() < one.max() < 1
    assert (one.sort().values - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / n**0.5  # chance's own: 0.1%
    for shape in (lambda u: u, lambda u: (-u.log()).log(), lambda u: (u > 0.99).double()):
        for lag in (1, 2, 3, 64, 257):
            values = shape(one)
            assert torch.corrcoef(torch.stack((values[:-lag], values[lag:])))[0, 1].abs() < 4.5 / n**0.5


def test_variates_of_two_tokens_are_independent_over_the_steps_of_a_text():
    n, tokens = 4000, 60
    keys = token_keys(tokens, torch.device("cpu")).expand(n, -1)
    u = uniform(torch.full((n,), 99), torch.arange(n), keys).double()
    for values in (u, (-u.log()).log(), (u > 0.95).double()):
        correlations = torch.corrcoef(values.T) - torch.eye(tokens)
        assert correlations.abs().max() < 5 / n**0.5


@given(st.integers(0, 10**6), st.sampled_from([0.3, 0.8, 1.7]), st.integers(0, 60), st.integers(20, 100),
       st.sampled_from([0.0, 0.05]), st.sampled_from([1.0, 1.3]), st.booleans())  # fmt: skip
def test_rows_of_any_settings_are_drawn_as_one_by_one(seed, temperature, k, percent, min_p, penalty, alone):
    """The race of what `filter_logits` leaves, by the same variates; beside rows of other settings or alone."""
    logits, seen = random_logits(seed), random_logits(seed + 1) > 2
    settings = {"temperature": temperature, "top_k": k, "top_p": percent / 100, "min_p": min_p,
                "repetition_penalty": penalty}  # fmt: skip
    others = [{"temperature": 0.0, "top_k": 1, "top_p": 0.5, "min_p": 0.5, "repetition_penalty": 2.0},
              {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}]  # fmt: skip
    sides = [settings] * 4 if alone else [settings, *others, settings]
    rows = [Drawing(seed + n, 3 * n, **side) for n, side in enumerate(sides)]
    keys = token_keys(40, torch.device("cpu"))
    got = drawn(logits, seen, *Drawing.numbers(rows, 40), keys, Kind.of(rows, 40)).tolist()
    for n, (row, side) in enumerate(zip(rows, sides, strict=True)):
        cfg = SampleConfig(**side)
        mine = penalize_repeats(logits[n : n + 1], seen[n : n + 1], cfg.repetition_penalty)
        if cfg.temperature == 0:
            assert got[n] == mine.argmax(-1)
            continue
        p = filter_logits(mine, cfg).softmax(-1)
        variates = -uniform(torch.tensor([row.seed]), torch.tensor([row.count]), keys[None]).log()
        assert got[n] == (p / variates).argmax(-1)


@given(st.integers(0, 10**6), st.sampled_from([1.0, 1.3]))
def test_rows_that_all_take_the_likeliest_token(seed, penalty):
    logits, seen = random_logits(seed), random_logits(seed + 1) > 2
    rows = [Drawing(n, 0, 0.0, n, 0.5, 0.5, penalty) for n in range(4)]
    kind = Kind.of(rows, 40)
    assert kind == (1, False, penalty != 1.0, False)
    got = drawn(logits, seen, *Drawing.numbers(rows, 40), token_keys(40, torch.device("cpu")), kind)
    assert torch.equal(got, penalize_repeats(logits, seen, penalty).argmax(-1))


def test_tokens_that_are_alike_do_not_make_a_text_depend_on_its_company():
    """As logits in bf16 are: beside rows that keep more tokens, and beside some that take the likeliest."""
    vocab, draw = 500, torch.Generator().manual_seed(0)
    logits = torch.randint(-6, 6, (1, vocab), generator=draw).float()
    one = [Drawing(3, count, 1.0, 40, 1.0, 0.0, 1.0) for count in range(300)]
    sides = [[], [Drawing(0, 0, 1.0, 0, 1.0, 0.0, 1.0)], [Drawing(0, 0, 0.0, 0, 1.0, 0.0, 1.0)]]
    keys, texts = token_keys(vocab, torch.device("cpu")), []
    for side in sides:
        rows = one + side
        seen = torch.zeros(len(rows), vocab, dtype=torch.bool)
        got = drawn(logits.expand(len(rows), -1), seen, *Drawing.numbers(rows, vocab), keys, Kind.of(rows, vocab))
        texts.append(got[: len(one)].tolist())
    assert texts[0] == texts[1] == texts[2]
    assert {logits[0, token].item() for token in texts[0]} == {5.0}  # 40 of them, and a few more
    greedy = drawn(logits.expand(301, -1), seen, *Drawing.numbers(rows, vocab), keys, Kind.of(rows, vocab))[-1]
    assert greedy == logits.argmax()


def test_what_is_drawn_by_numbers_follows_the_probabilities():
    n, logits = 20_000, torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf]])
    rows = [Drawing(7, count, 0.8, 0, 1.0, 0.0, 1.0) for count in range(n)]
    keys, seen = token_keys(6, torch.device("cpu")), torch.zeros(n, 6, dtype=torch.bool)
    got = drawn(logits.expand(n, -1), seen, *Drawing.numbers(rows, 6), keys, Kind.of(rows, 6))
    expected = n * (logits[0] / 0.8).softmax(-1)
    found = torch.bincount(got, minlength=6)
    assert found[5] == 0
    chi2 = ((found - expected)[:5] ** 2 / expected[:5]).sum()
    assert chi2 < 18.5  # 0.1% of chance's own are above, with four degrees of freedom
