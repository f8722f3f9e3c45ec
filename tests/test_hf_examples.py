"""The examples for transformers, PEFT, TRL and lm-eval run on directories that miaobi made, and miaobi reads theirs."""

import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from miaobi.classify import head
from miaobi.classify.data import Reading
from miaobi.classify.head import Classifier, Judge
from miaobi.generate.engine import load

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = "皇马赢得比赛"


def main(name: str) -> Callable:
    """An example's own function."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.fixture(scope="module", params=["qwen3", "gpt2"])
def model(request: pytest.FixtureRequest, trained: Callable) -> Path:
    return trained(request.param) / "checkpoints" / "best"


@pytest.fixture(scope="module")
def modern(trained: Callable) -> Path:
    return trained("qwen3") / "checkpoints" / "best"


def greedy(path: Path) -> str:
    """What miaobi continues PROMPT with."""
    return load(path, "cpu", "float32").generate(PROMPT, num_samples=1, max_new_tokens=8, temperature=0)[0].text


def weights(path: Path) -> torch.Tensor:
    """All weights in a row, as miaobi reads them."""
    return torch.cat([p.detach().flatten() for p in load(path, "cpu", "float32").model.parameters()])


@pytest.mark.slow
def test_trainer_trains_on_and_miaobi_reads_what_it_saved(model: Path, corpus_file: Path, tmp_path: Path):
    loss = main("hf_trainer")(str(model), corpus_file, tmp_path / "out", steps=6, cpu=True)
    assert loss < math.log(100), "better than guessing: it began with trained weights"
    assert not torch.equal(weights(tmp_path / "out"), weights(model))
    assert greedy(tmp_path / "out").startswith(PROMPT)


@pytest.mark.slow
def test_what_peft_tuned_is_the_same_model_here(model: Path, corpus_file: Path, tmp_path: Path):
    from peft import AutoPeftModelForCausalLM

    main("peft_lora")(str(model), corpus_file, tmp_path / "out", steps=3, cpu=True)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter").eval()
    ours = load(tmp_path / "out", "cpu", "float32")
    assert not torch.equal(weights(tmp_path / "out"), weights(model))
    ids = torch.tensor([ours.tokenizer.encode(PROMPT)])
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(input_ids=ids).logits, atol=2e-4, rtol=0)


@pytest.mark.slow
def test_dpo_learns_which_side_is_preferred(modern: Path, tmp_path: Path):
    pairs = [{"prompt": "皇马", "chosen": "赢得比赛。", "rejected": "输掉联赛！"}] * 8
    lines = "\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)
    (tmp_path / "pairs.jsonl").write_text(lines, encoding="utf-8")
    assert main("trl_dpo")(str(modern), tmp_path / "pairs.jsonl", tmp_path / "out", steps=4, cpu=True) == 1.0
    assert greedy(tmp_path / "out").startswith(PROMPT)


@pytest.mark.slow
def test_grpo_is_rewarded_for_full_stops(modern: Path, tmp_path: Path):
    reward = main("trl_grpo")(str(modern), ["皇马", "曼联"], tmp_path / "out", steps=2, length=12, cpu=True)
    assert 0 <= reward <= 1
    assert greedy(tmp_path / "out").startswith(PROMPT)


@pytest.mark.slow
def test_lm_eval_scores_what_the_logits_say(modern: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lm_eval.__main__ import cli_evaluate

    text = "皇马赢得比赛。曼联输掉联赛！"
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    settings = {"model": "hf", "model_args": f"pretrained={modern},max_length=32,dtype=float32", "device": "cpu",
                "include_path": EXAMPLES / "lm_eval_tasks", "tasks": "own_text", "output_path": "found"}  # fmt: skip
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    cli_evaluate()
    (written,) = (tmp_path / "found").rglob("results_*.json")
    found = json.loads(written.read_text(encoding="utf-8"))["results"]["own_text"]["bits_per_byte,none"]
    lm = load(modern, "cpu", "float32")
    ids = lm.tokenizer.encode(text)
    logits = lm.logits(torch.tensor([[lm.tokenizer.eot_id, *ids[:-1]]]))[0].log_softmax(-1)
    nats = -logits[torch.arange(len(ids)), torch.tensor(ids)].sum().item()
    assert found == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)


@pytest.mark.slow
def test_pipelines_write_and_judge_as_miaobi_does(model: Path, tmp_path: Path):
    lm = load(model, "cpu", "float32")
    reading = Reading(lm.model.cfg.block_size, "truncate", (), tuple(lm.end_ids), lm.tokenizer.pad_id)
    torch.manual_seed(0)
    judge = Judge(Classifier(lm.model, 2, "mask").eval(), lm.tokenizer, reading, ["差评", "好评"])
    (tmp_path / "judge").mkdir()
    head.save(tmp_path / "judge", judge)
    text, said = main("pipelines")(str(model), PROMPT, str(tmp_path / "judge"), 8)
    assert text == greedy(model)
    rows, owner = judge.reading.rows([PROMPT], judge.tokenizer)
    logits = torch.tensor(judge.logits([torch.from_numpy(row) for row in rows], owner, 1))[0]
    assert said["label"] == judge.labels[int(logits.argmax())]
    assert said["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-4)
