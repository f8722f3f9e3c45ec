"""Every token scored once, and sums against naive ones."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from miaobi.corpus.dataset import IGNORE, TextWindows
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer
from miaobi.train.evaluate import ForwardGraph, evaluate, sliding, to_device, validation_nats
from miaobi.train.layout import Objective, no_recompilation

BLOCK, V = 8, 40


def random_model(dropout: float = 0.0, layers: int = 1) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(family="gpt2", n_layer=layers, n_head=2, n_embd=16, block_size=BLOCK, vocab_size=V,
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


class Compiler:
    """A backend of torch.compile that counts its graphs, and computes them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, _):
        self.graphs += 1
        return graph.forward


def trained(objective: Objective, windows, rows: int) -> float:
    """Nats of some windows, forward and backward, as the loop computes them."""
    objective.train()
    with no_recompilation(objective):
        loss = objective(*to_device(windows, slice(rows), torch.device("cpu")))
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("part", ["blocks", "whole"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_evaluation_takes_one_graph_of_its_own_and_leaves_trainings_alone(part, dropout):
    """One more for all layers (or for the whole), at its first batch: none for a last batch that is smaller, none for
    other weights in their place, none when training goes on.
    """
    torch.compiler.reset()
    model, compiler = random_model(dropout, 2), Compiler()
    objective, graph = Objective(model), ForwardGraph(Objective(model))
    windows = TextWindows(Stream(random_tokens(200)), BLOCK).fixed(7)
    expected = validation_nats(model, windows, 4, torch.float32)
    if part == "blocks":
        for block in model.blocks:
            block.compile(backend=compiler, dynamic=False)
    else:
        objective.whole = torch.compile(objective.after_embedding, backend=compiler, dynamic=False)
    objective.train()(*to_device(windows, slice(4), torch.device("cpu"))).backward()
    before, graph.objective = compiler.graphs, objective
    assert before == 1
    for _ in range(3):
        assert validation_nats(model, windows, 4, torch.float32, graph) == pytest.approx(expected, rel=1e-5)
        assert model.training
        assert objective.training
        assert compiler.graphs == 2 * before
        torch.manual_seed(0)
        first = trained(objective, windows, 4)
        torch.manual_seed(0)
        assert trained(objective, windows, 4) == first
        for p in model.parameters():
            p.data = p.data.clone()  # as averaged weights take the place of others
    assert compiler.graphs == 2 * before
    assert graph.ready
    torch.compiler.reset()


def test_an_evaluation_that_cannot_be_compiled_is_done_without_and_says_so_once(capsys):
    torch.compiler.reset()
    model, asked = random_model(), []

    def refuses(graph, _):
        asked.append(graph)
        if len(asked) == 1:
            return graph.forward
        raise RuntimeError("ptxas fatal")

    windows = TextWindows(Stream(random_tokens(200)), BLOCK).fixed(7)
    expected = validation_nats(model, windows, 4, torch.float32)
    model.blocks[0].compile(backend=refuses, dynamic=False)
    objective = Objective(model)
    objective.train()(*to_device(windows, slice(4), torch.device("cpu"))).backward()
    graph = ForwardGraph(objective)
    for _ in range(2):
        assert validation_nats(model, windows, 4, torch.float32, graph) == pytest.approx(expected, rel=1e-6)
    assert len(asked) == 2
    assert capsys.readouterr().err.count("torch.compile fails for the evaluation") == 1
    torch.compiler.reset()


@pytest.mark.parametrize(("device", "compiled", "windows", "expected"), [
    ("cuda", True, 6400, True), ("cuda", True, 400, True), ("cuda", True, 399, False), ("cuda", False, 6400, False),
    ("cpu", True, 6400, False),
])  # fmt: skip
def test_who_compiles_an_evaluation(device, compiled, windows, expected):
    """On a card, where training is compiled and as much is evaluated as pays: 8,000 windows are trained on between."""
    model = random_model()
    if compiled:
        model.blocks[0].compile(backend="eager")
    cfg = SimpleNamespace(train=SimpleNamespace(global_batch=32, eval_interval=250))
    plan = SimpleNamespace(cfg=cfg, device=torch.device(device), train_windows=None,
                           val_windows=SimpleNamespace(inputs=range(windows)))  # fmt: skip
    assert (ForwardGraph.of(plan, Objective(model)) is not None) == expected
