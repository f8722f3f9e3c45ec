"""A model that starts from counted pairs predicts them, is used where runs are short, and trains like any other."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from miaobi.config import OptimConfig
from miaobi.corpus.prepared import PreparedData
from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.model.checkpoint import load_model
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer
from miaobi.settings import load_config
from miaobi.train import bigrams
from miaobi.train.recipe import resolve_optim

V = 60
SHAPE = ModelConfig(family="qwen3", n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=V)


def chain(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A Markov chain of V states, each with six likely successors; and its transition probabilities (V, V)."""
    draw = np.random.RandomState(seed)
    transitions = np.full((V, V), 0.1 / V)
    for row in transitions:
        row[draw.choice(V, 6, replace=False)] += 0.9 * draw.dirichlet(np.ones(6))
    tokens = [0]
    for _ in range(length - 1):
        tokens.append(draw.choice(V, p=transitions[tokens[-1]]))
    return np.array(tokens), transitions


@pytest.fixture(scope="module")
def counted() -> tuple[np.ndarray, np.ndarray]:
    return chain(30_000)


def started(tokens: np.ndarray, shape: ModelConfig = SHAPE) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(shape)
    bigrams.start_from_bigrams(model, tokens)
    return model.eval()


@torch.no_grad()
def nats(model: Transformer, tokens: np.ndarray) -> float:
    ids = torch.from_numpy(tokens[: 32 * 60 + 1])
    x, y = ids[:-1].view(-1, 32), ids[1:].view(-1, 32)
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_it_predicts_new_text_nearly_as_well_as_the_chain_itself(counted, family):
    tokens, transitions = counted
    fresh = tokens[-5_000:]
    model = started(tokens[:-5_000], dataclasses.replace(SHAPE, family=family))
    p = np.bincount(tokens, minlength=V) / len(tokens)
    unigram, best = -np.log(p[fresh]).mean(), -np.log(transitions[fresh[:-1], fresh[1:]]).mean()
    assert nats(model, fresh) < best + 0.25 * (unigram - best)
    torch.manual_seed(0)
    assert nats(Transformer(dataclasses.replace(SHAPE, family=family)), fresh) > unigram - 0.1


@torch.no_grad()
def test_the_logits_are_those_of_the_factors(counted):
    """What norms, gates and the residual stream make of the factors is their product, whatever came before."""
    tokens, _ = counted
    model = started(tokens)
    log_p, before, after = bigrams.factorise(tokens, V, bigrams.factor_rank(SHAPE))
    own = torch.cat((before, after), dim=1).norm(dim=1)
    assert own.max() < bigrams.LONGEST * 8 * 0.9  # no row was shortened, so that the two must agree
    expected = F.log_softmax(log_p + before @ after.T, dim=-1)
    ids = torch.randint(V, (4, 32), generator=torch.Generator().manual_seed(1))
    found = F.log_softmax(model(ids), dim=-1)
    kl = (expected[ids].exp() * (expected[ids] - found)).sum(-1).mean()
    assert kl < 0.05 * (expected.exp() * (expected - log_p)).sum(-1).mean()  # norms bend the factors a little
    assert torch.allclose(found[0, 5], model(ids[:1, 5:6]).log_softmax(-1)[0, 0], atol=1e-4)


def test_a_long_stream_is_counted_in_pieces_from_all_of_it(prepared):
    stream = PreparedData.open(prepared()).train
    whole = bigrams.sample(stream, len(stream))
    assert np.array_equal(whole, stream.read(0, len(stream)))
    part = bigrams.sample(stream, len(stream) // 4)
    piece = len(stream) // 4 // 64
    assert len(part) == 64 * piece
    assert np.array_equal(part[:piece], whole[:piece])
    assert np.array_equal(part[-piece:], whole[len(whole) - piece :])


def decided(prepared, **values: object) -> bool:
    given = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "batch_size": 4, "max_iters": 10} | values
    cfg, _ = load_config(None, [(key, str(value)) for key, value in given.items()])
    data = PreparedData.open(prepared())
    return bigrams.wanted(cfg, dataclasses.replace(cfg.model, vocab_size=data.vocab_size), data)


def test_short_runs_start_from_bigrams(prepared):
    assert decided(prepared)
    assert not decided(prepared, max_iters=2000)
    assert decided(prepared, max_iters=2000, bigram_init=True)
    assert not decided(prepared, bigram_init=False)
    assert decided(prepared, parallel="fsdp"), "the same start on any number of ranks"
    assert not decided(prepared, family="gpt2")
    assert not decided(prepared, tie_word_embeddings=False)
    for family in ({"family": "gpt2"}, {"tie_word_embeddings": False}):
        with pytest.raises(UserError, match="leave bigram_init out"):
            decided(prepared, bigram_init=True, **family)


def test_rates_after_bigrams_are_lower_unless_they_are_set():
    usual, lower = (resolve_optim(OptimConfig(), "qwen3", 100, bigrams=b) for b in (False, True))
    assert (usual.learning_rate, usual.muon_learning_rate) == (3e-3, 0.02)
    assert lower.learning_rate < usual.learning_rate
    assert lower.muon_learning_rate < usual.muon_learning_rate
    told = resolve_optim(OptimConfig(learning_rate=2e-3, muon_learning_rate=0.03), "qwen3", 100, bigrams=True)
    assert (told.learning_rate, told.muon_learning_rate) == (2e-3, 0.03)


def test_a_run_starts_below_the_unigrams_and_goes_on_from_its_checkpoint(prepared, train, tmp_path):
    """One step leaves the loss where counting put it; the run's second part keeps the rates of the first."""
    data = PreparedData.open(prepared())
    p = np.bincount(data.train.read(0, len(data.train)), minlength=data.vocab_size) / len(data.train)
    unigram = -(p[p > 0] * np.log(p[p > 0])).sum()
    common = {"data": prepared(), "n_embd": 64, "bigram_init": True, "log_interval": 1, "eval_interval": 2}
    first = train(out_dir=tmp_path / "a", max_iters=2, **common)
    assert first["train_loss"] < unigram - 1.0
    whole = train(out_dir=tmp_path / "b", max_iters=4, **common)
    train(out_dir=tmp_path / "a", max_iters=4, **common)
    rates = [json.loads(line).get("learning_rate") for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert max(rate for rate in rates if rate is not None) < 3e-3
    assert whole["val_loss"] < unigram - 1.0
    model, _ = load_model(pointed(tmp_path / "a" / "checkpoints" / "last"))
    assert model.cfg.family == "qwen3"


def test_an_extended_run_takes_the_usual_rates(prepared, train, tmp_path):
    """Ten steps for a look, then the real run: it must not stay with the rates of a short one."""
    settings = {"data": prepared(), "out_dir": tmp_path / "run", "n_embd": 64, "log_interval": 1, "warmup_iters": 0}
    train(**settings, max_iters=10, schedule="constant")
    train(**settings, max_iters=80, schedule="constant")
    log = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = {row["step"]: row["learning_rate"] for row in map(json.loads, log) if "learning_rate" in row}
    assert rates[10] == pytest.approx(1e-3)
    assert rates[80] == pytest.approx(3e-3)
