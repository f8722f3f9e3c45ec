"""Chunked cross-entropy against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from miaobi.corpus.dataset import IGNORE
from miaobi.model import loss as module
from miaobi.model.loss import linear_cross_entropy


def case(rows: int, width: int, vocab: int, ignored: float, seed: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=g)
    targets[torch.rand(rows, generator=g) < ignored] = IGNORE
    return x, weight, targets


def reference(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x @ weight.T, targets, reduction="sum", ignore_index=IGNORE)


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 9),
    vocab=st.integers(1, 50),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    chunk=st.integers(1, 2000),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_loss_and_gradients_are_those_of_cross_entropy(rows, width, vocab, ignored, chunk, seed):
    x, weight, targets = case(rows, width, vocab, ignored, seed)
    expected = torch.autograd.grad(reference(x, weight, targets) * 0.37, (x, weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CPU_CHUNK", chunk)
        total = linear_cross_entropy(x, weight, targets)
        gradients = torch.autograd.grad(total * 0.37, (x, weight))
        with torch.no_grad():
            plain = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(total, reference(x, weight, targets), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(plain, total, atol=1e-4, rtol=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_batches_of_sequences_are_flattened():
    x, weight, targets = case(24, 5, 11, 0.2, 0)
    flat = linear_cross_entropy(x, weight, targets)
    torch.testing.assert_close(linear_cross_entropy(x.view(2, 12, 5), weight, targets.view(2, 12)), flat)


def test_nothing_to_score_costs_nothing():
    x, weight, targets = case(6, 4, 5, 1.0, 0)
    total = linear_cross_entropy(x, weight, targets)
    total.backward()
    assert total == 0
    assert (x.grad == 0).all()
    assert (weight.grad == 0).all()


def test_under_autocast_it_stays_near_float32_and_gradients_keep_their_types():
    x, weight, targets = case(64, 16, 40, 0.1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = linear_cross_entropy(x, weight, targets)
    total.backward()
    assert total.dtype == x.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(total, reference(x, weight, targets), rtol=2e-2, atol=0.5)
    exact = torch.autograd.grad(reference(x, weight, targets), (x, weight))
    for ours, theirs in zip((x.grad, weight.grad), exact, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_a_frozen_body_still_trains_the_head():
    x, weight, targets = case(10, 4, 7, 0.0, 1)
    linear_cross_entropy(x.detach(), weight, targets).backward()
    torch.testing.assert_close(weight.grad, torch.autograd.grad(reference(x, weight, targets), weight)[0])


def test_a_frozen_head_still_trains_the_body():
    x, weight, targets = case(10, 4, 7, 0.0, 1)
    linear_cross_entropy(x, weight.detach(), targets).backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(reference(x, weight, targets), x)[0])
