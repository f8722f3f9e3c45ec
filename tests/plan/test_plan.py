"""`miaobi plan`: the numbers of the run that `miaobi train` would make of the same words."""

import json
import re

import pytest
from tests.conftest import tiny

from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer
from miaobi.plan.cards import CARDS, find_card
from miaobi.plan.forecast import GUESSING
from miaobi.plan.plan import parameters_of


@pytest.fixture
def plan(miaobi):
    """`plan(data=..., gpu=...)`: the JSON of a tiny plan."""

    def run(**values: object) -> dict:
        answer = miaobi("plan", *tiny(**values), "--json")
        assert answer.code == 0, answer.err
        return json.loads(answer.out)

    return run


@pytest.mark.parametrize("shape", [
    {"family": "gpt2"}, {"family": "gpt2", "bias": True, "tie_word_embeddings": False}, {"family": "qwen3"},
    {"family": "qwen3", "n_kv_head": 1, "tie_word_embeddings": False}, {"family": "qwen2"},
])  # fmt: skip
def test_parameters_by_part_add_up_to_those_of_the_model(shape):
    cfg = ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 100} | shape)
    parts, model = parameters_of(cfg), Transformer(cfg)
    assert sum(count for name, count in parts.items() if name != "positions") == model.num_parameters()
    assert parts["attention"] == sum(p.numel() for b in model.blocks for n, p in b.attn.named_parameters()
                                     if "norm" not in n)  # fmt: skip
    assert parts["mlp"] == sum(p.numel() for b in model.blocks for p in b.mlp.parameters())


@pytest.mark.parametrize("raw", [False, True], ids=["prepared", "raw text"])
def test_it_is_the_run_that_train_makes(plan, train, prepared, corpus_file, tmp_path, capsys, raw):
    data = corpus_file if raw else prepared()
    told = plan(data=data, max_epochs=2, max_iters=10**6, eval_interval=5)
    result = train(data=data, max_epochs=2, max_iters=10**6, eval_interval=5, out_dir=tmp_path / "run")
    assert told["run"]["steps"] == result["step"]
    assert told["parameters"]["total"] == result["parameters"]
    tokens = re.search(r"([\d,]+) training tokens", capsys.readouterr().err)[1]
    assert told["text"]["train_tokens"] == int(tokens.replace(",", ""))
    assert told["run"]["epochs"] == pytest.approx(2, abs=0.1)
    assert told["run"]["tokens_per_parameter"] == pytest.approx(result["step"] * 8 * 32 / result["parameters"])


def test_nothing_is_written(plan, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan(data=prepared())
    assert list(tmp_path.iterdir()) == []


def test_a_named_card_decides_memory_precision_power_and_cost(plan, prepared):
    told = plan(data=prepared(), gpu="NVIDIA GeForce RTX 4080", price_per_hour=3.6, dtype="auto")
    assert told["device"] == {"name": "RTX 4080", "dtype": "bfloat16", "memory": 16 << 30}
    hours = told["time"]["seconds"] / 3600
    assert told["cost"] == pytest.approx(3.6 * hours)
    assert told["energy_kwh"] == pytest.approx(0.320 * hours)
    assert 14 << 30 < told["memory"]["free"] < 16 << 30
    assert told["memory"]["largest_micro_batch"] == 8
    assert plan(data=prepared(), gpu="T4", dtype="auto")["device"]["dtype"] == "float16"


def test_on_a_cpu_memory_is_that_of_the_whole_process(plan, prepared):
    memory = plan(data=prepared())["memory"]
    parts = ("peak", "fragments", "process", "average", "checkpoint")
    assert memory["run"] == sum(memory[part] for part in parts) + memory["average"]  # which a checkpoint holds, too
    assert memory["fragments"] > 0
    on_gpu = plan(data=prepared(), gpu="T4")["memory"]
    assert on_gpu["run"] == on_gpu["peak"] + on_gpu["average"]
    assert on_gpu["process"] == on_gpu["fragments"] == 0


def test_power_and_price_of_this_machine_can_be_given(plan, prepared):
    told = plan(data=prepared(), watts=100)
    assert told["energy_kwh"] == pytest.approx(0.1 * told["time"]["seconds"] / 3600)
    assert told["cost"] is None
    assert plan(data=prepared())["energy_kwh"] is None


@pytest.mark.parametrize("name", ["4090", "rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090", "GeForce-4090"])
def test_a_card_has_many_names(name):
    assert find_card(name).name == "RTX 4090"


def test_every_card_is_found_by_its_own_name_and_has_sane_figures():
    for card in CARDS:
        assert find_card(card.name) is card
        assert 1e12 < card.flops < 1e16
        assert 4 << 30 <= card.memory <= 256 << 30
        assert 50 <= card.watts <= 1500


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu=RTX 9999"], "known are RTX 5090"),
        (["--gpu=T4", "--measure"], "leave one out"),
        (["--price_per_hour=-1"], "price_per_hour is -1"),
        (["--watts=nan"], "watts is nan"),
        (["--n_layers=3"], "Did you mean n_layer?"),
        (["--data=no/such/text"], "no/such/text"),
        (["--price_per_hour=cheap"], "a number"),
    ],
)
def test_mistakes_are_explained(miaobi, prepared, arguments, words):
    data = [] if any("data" in a for a in arguments) else [f"--data={prepared()}"]
    answer = miaobi("plan", *data, *arguments)
    assert answer.code == 2
    assert words in answer.err
    assert not answer.out


def test_the_text_output_says_the_same(miaobi, prepared):
    out = miaobi("plan", *tiny(data=prepared(), gpu="RTX 4080", price_per_hour=2)).out
    for words in ("parameters", "passes over the text", "micro-batches of up to 8 fit", "costs", "RTX 4080"):
        assert words in out


def test_measuring_runs_the_steps_of_the_run_and_keeps_nothing(plan, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = plan(data=prepared(), measure=True, max_iters=500)
    assert "20 steps measured" in told["time"]["basis"]
    time = told["time"]
    assert time["seconds"] == pytest.approx(time["start"] + 500 * time["step"] + 50 * time["evaluation"])
    assert told["memory"]["measured"] > told["memory"]["process"] / 2, "the whole process"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_too_long_is_advised_where_its_validation_turns(miaobi, prepared):
    answer = miaobi("plan", *tiny(data=prepared(), max_iters=3000, n_embd=128), "--json")
    told = json.loads(answer.out)["forecast"]
    assert told["best_epoch"] < 100 < json.loads(answer.out)["run"]["epochs"]
    assert told["curve"][-1][0] == pytest.approx(json.loads(answer.out)["run"]["epochs"])
    assert told["bits_at_best"] < told["bits_at_end"]
    words = " ".join(told["advice"])
    assert "the validation loss turns after about" in words
    assert "was fitted to" in words, "the advice always says what the forecast was fitted to"


def test_no_forecast_is_worse_than_a_guess(miaobi, prepared):
    """The formula grows without bound; 195,607 bits per character is nothing that a run could have."""
    flags = tiny(data=prepared(), max_iters=10**7, n_embd=128)
    curve = json.loads(miaobi("plan", *flags, "--json").out)["forecast"]["curve"]
    assert max(bits for _, bits in curve) == GUESSING
    out = miaobi("plan", *flags).out
    first = next(passes for passes, bits in curve if bits == GUESSING)
    assert f"more than 16 after {first:,.0f} passes (bits/char)" in out


def test_a_run_unlike_those_measured_gets_a_warning(miaobi, prepared):
    answer = miaobi("plan", *tiny(data=prepared(), n_embd=1024, n_layer=4), "--json")
    told = json.loads(answer.out)["forecast"]
    assert not told["inside"]
    assert "outside the range that was measured" in told["advice"][0]
