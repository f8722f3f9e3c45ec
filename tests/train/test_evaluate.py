"""Every token scored once, and sums against naive ones."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from miaobi.corpus.dataset import IGNORE, TextWindows
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer
from miaobi.train.evaluate import evaluate, sliding, validation_nats

BLOCK, V = 8, 40


def random_model(dropout: float = 0.0) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(family="gpt2", n_layer=1, n_head=2, n_embd=16, block_size=BLOCK, vocab_size=V,
                                    dropout=dropout))  # fmt: skip
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.3)
    return model.eval()


def random_tokens(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, V, n)


class Stream:
    """Tokens in memory."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


@st.composite
def length_block_stride(draw: st.DrawFn) -> tuple[int, int, int]:
    block = draw(st.integers(1, 12))
    return draw(st.integers(1, 120)), block, draw(st.integers(1, block))


@given(length_block_stride())
def test_every_token_after_the_first_is_scored_once_with_enough_context(case):
    n, block, stride = case
    times = Counter()
    for number, (inputs, targets) in enumerate(sliding(np.arange(n), block, stride)):
        assert inputs.shape == targets.shape == (min(block, n - 1),)
        scored = targets != IGNORE
        assert (targets[scored] == inputs[scored] + 1).all()
        first = int(np.argmax(scored))
        assert (np.diff(inputs[: first + 1]) == 1).all(), "the context is the text right before"
        if number:
            assert first >= min(block - stride, targets[scored][0] - 1)
        times.update(targets[scored].tolist())
    assert times == Counter(range(1, n))


@given(st.integers(1, 12), st.integers(1, 12))
def test_a_stride_of_one_block_gives_nanogpts_windows(block, count):
    tokens = np.arange(count * block + 1)
    windows = list(sliding(tokens, block, block))
    np.testing.assert_array_equal([x for x, _ in windows], tokens[:-1].reshape(count, block))
    np.testing.assert_array_equal([y for _, y in windows], tokens[1:].reshape(count, block))


@pytest.mark.bf16
@torch.no_grad()
@pytest.mark.parametrize("n", [2, 3, BLOCK, BLOCK + 1, BLOCK + 2, 61])
@pytest.mark.parametrize("stride", [1, 4, BLOCK])
def test_figures_are_those_of_a_naive_sum(n, stride):
    model, tokens = random_model(), random_tokens(n)
    total, done = 0.0, 1
    while done < n:
        end = min(n, done + (BLOCK if done == 1 else stride))
        window = torch.from_numpy(tokens[max(0, end - 1 - BLOCK) : end])
        log_p = model(window[None, :-1])[0].log_softmax(-1)
        total -= sum(log_p[-i, window[-i]].item() for i in range(1, end - done + 1))
        done = end
    result = evaluate(model, tokens, characters=3 * n, text_bytes=7 * n, stride=stride, dtype=torch.float32)
    assert result["tokens"] == n - 1
    assert result["loss"] == pytest.approx(total / (n - 1), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / (n - 1)), rel=1e-4)
    assert result["bits_per_char"] == pytest.approx(total / math.log(2) / (3 * n), rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / (7 * n), rel=1e-5)
    assert result["characters"] == 3 * n


def test_the_stride_decides_how_much_context_a_token_has():
    model = random_model()
    losses = {evaluate(model, random_tokens(200), 200, 200, stride, torch.float32)["loss"] for stride in (1, 4, 8)}
    assert len(losses) == 3


@torch.no_grad()
@pytest.mark.parametrize(("n", "windows"), [(30, 100), (200, 5), (9, 3), (5, 2), (200, 1)])
def test_validation_nats_are_the_sum_over_its_windows(n, windows):
    model, stream = random_model(dropout=0.5), Stream(random_tokens(n))
    fixed = TextWindows(stream, BLOCK).fixed(windows)
    inputs, targets = torch.from_numpy(fixed.inputs), torch.from_numpy(fixed.targets)
    expected = F.cross_entropy(
        model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    ).item()
    for batch_size in (1, 3, 64):
        model.train()
        assert validation_nats(model, fixed, batch_size, torch.float32) == pytest.approx(expected, rel=1e-5)
        assert model.training, "the mode is restored"
