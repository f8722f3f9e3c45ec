"""The classifier against transformers, against itself without padding, and on the disk."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from miaobi.classify import head
from miaobi.classify.data import Reading
from miaobi.classify.head import Classifier, Judge, buckets
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.model.config import LoraConfig, ModelConfig
from miaobi.model.lora import adapters, add_lora
from miaobi.model.transformer import Transformer

TEXTS = ["皇马赢得比赛。", "输", "", "球迷，期待！" * 9, "国家队错过了转会，𠮷"]
CPU = torch.device("cpu")


def judge_of(family: str, pooling: str = "mask", long_texts: str = "chunks", **values: object) -> Judge:
    """Random weights, biases included, large enough that every position matters."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train_char(dict.fromkeys("皇马赢得比赛输球迷期待国家队错过转会，。！了", 1))
    heads = {} if family == "gpt2" else {"n_kv_head": 1}
    cfg = ModelConfig(family=family, n_layer=2, n_head=2, n_embd=16, block_size=24, vocab_size=tokenizer.vocab_size + 3,
                      bias=family == "gpt2", **heads, **values)  # fmt: skip
    model = Transformer(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    model.end_ids = (tokenizer.eot_id,)
    reading = Reading(24, long_texts, (), (tokenizer.eot_id,), tokenizer.pad_id)
    return Judge(Classifier(model, 3, pooling).eval(), tokenizer, reading, ["坏", "中", "好"], 1.7)


def logits_of(judge: Judge, texts: list[str]) -> np.ndarray:
    rows, owner = judge.reading.rows(texts, judge.tokenizer)
    return judge.logits([torch.from_numpy(row) for row in rows], owner, len(texts))


def naive(judge: Judge, text: str) -> np.ndarray:
    """One text at a time, with nothing but the model's own `hidden`."""
    found = []
    for row in judge.reading.cut(np.array(judge.tokenizer.encode(text), np.int64)):
        ids = row.tolist()
        if judge.classifier.pooling == "no_mask":
            ids += [judge.reading.pad_id] * (judge.reading.block_size - len(ids))
        states = judge.classifier.model.hidden(torch.tensor([ids]))[0]
        pooled = states.mean(0) if judge.classifier.pooling == "mean" else states[-1]
        found.append(judge.classifier.score.weight @ pooled)
    return torch.stack(found).mean(0).detach().double().numpy()


# Logits


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "llama"])
@pytest.mark.parametrize("pooling", ["mask", "no_mask", "mean"])
@pytest.mark.parametrize(("slack", "tokens", "batches"), [(0.0, 4096, 1), (0.9, 4096, None), (0.0, 1, 7)])
def test_texts_of_one_batch_are_judged_as_each_alone(monkeypatch, family, pooling, slack, tokens, batches):
    monkeypatch.setattr(head, "SLACK", slack)
    judge = judge_of(family, pooling)
    judge.micro_tokens = tokens
    rows = [torch.from_numpy(row) for row in judge.reading.rows(TEXTS, judge.tokenizer)[0]]
    assert len(rows) > len(TEXTS)  # one is longer than a block
    assert batches is None or len(judge.buckets(rows)) == batches
    np.testing.assert_allclose(logits_of(judge, TEXTS), [naive(judge, text) for text in TEXTS], atol=2e-5)


def test_poolings_read_different_states():
    found = [logits_of(judge_of("qwen3", pooling), TEXTS) for pooling in ("mask", "no_mask", "mean")]
    assert all(abs(a - b).max() > 0.01 for a, b in [found[:2], found[1:], found[::2]])


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("pooling", ["mask", "mean"])
def test_a_batch_may_enter_behind_the_frozen_layers(family: str, pooling: str):
    classifier = judge_of(family, pooling).classifier
    ids, lengths = torch.randint(0, 200, (3, 9)), torch.tensor([9, 4, 1])
    expected = classifier(ids, lengths)
    states = classifier.lower(ids)
    torch.testing.assert_close(classifier(states, lengths), expected)
    torch.testing.assert_close(classifier(classifier.pooled(states, lengths), lengths), expected)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 100), st.floats(0, 1))
def test_buckets_hold_every_row_once_within_the_budget(lengths: list[int], tokens: int, slack: float):
    found = buckets(np.array(lengths), tokens, slack)
    assert sorted(i for bucket in found for i in bucket) == list(range(len(lengths)))
    for bucket in found:
        inside = [lengths[i] for i in bucket]
        assert len(bucket) == 1 or len(bucket) * max(inside) <= tokens
        assert min(inside) >= slack * max(inside)


# The directory


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "llama"])
@pytest.mark.parametrize("tuned", ["full", "lora"])
def test_transformers_gives_equal_logits_for_mask_pooling(tmp_path: Path, family: str, tuned: str):
    judge = judge_of(family, long_texts="truncate", **({} if family == "gpt2" else {"tie_word_embeddings": False}))
    if tuned == "lora":
        add_lora(judge.classifier.model, LoraConfig(lora_rank=2))
        for _, module in adapters(judge.classifier.model):
            nn.init.normal_(module.lora_B, std=0.3)
    head.save(tmp_path, judge)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(theirs).__name__ == {"gpt2": "GPT2", "qwen3": "Qwen3", "llama": "Llama"}[family] + (
        "ForSequenceClassification"
    )
    assert theirs.config.id2label == {0: "坏", 1: "中", 2: "好"}
    assert theirs.config.pad_token_id == judge.reading.pad_id
    assert theirs.score.bias is None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = theirs.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    np.testing.assert_allclose(logits.numpy(), logits_of(judge, TEXTS), atol=2e-5)


@pytest.mark.parametrize("pooling", ["no_mask", "mean"])
def test_transformers_refuses_poolings_that_it_does_not_have(tmp_path: Path, pooling: str):
    head.save(tmp_path, judge_of("qwen3", pooling))
    with pytest.raises(ValueError, match="miaobi-classifier"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "llama"])
@pytest.mark.parametrize("pooling", ["mask", "no_mask", "mean"])
def test_a_saved_classifier_judges_as_before(tmp_path: Path, family: str, pooling: str):
    judge = judge_of(family, pooling)
    head.save(tmp_path, judge)
    again = head.load(tmp_path, CPU, torch.float32)
    np.testing.assert_allclose(again.probabilities(TEXTS), judge.probabilities(TEXTS), atol=1e-6)
    expected = torch.from_numpy(logits_of(judge, TEXTS) / 1.7).softmax(-1)
    np.testing.assert_allclose(again.probabilities(TEXTS), expected, atol=1e-5)
    assert again.labels == ["坏", "中", "好"]


def test_a_model_that_is_no_classifier_is_refused(trained):
    with pytest.raises(UserError, match=r"is no classifier of miaobi.*miaobi classify train"):
        head.load(trained("gpt2"), CPU, torch.float32)


def test_damaged_classifiers_are_refused(tmp_path: Path):
    head.save(tmp_path, judge_of("gpt2"))
    settings = json.loads((tmp_path / "classifier.json").read_text(encoding="utf-8"))
    (tmp_path / "classifier.json").write_text(json.dumps(settings | {"labels": ["一", "二"]}), encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        head.load(tmp_path, CPU, torch.float32)
    (tmp_path / "classifier.json").write_text(json.dumps({"labels": settings["labels"]}), encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        head.load(tmp_path, CPU, torch.float32)
    (tmp_path / "classifier.json").write_text(json.dumps(settings), encoding="utf-8")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short or altered"):
        head.load(tmp_path, CPU, torch.float32)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
SAVED = ("block_size", "long_texts", "before", "after", "pad_id", "pooling", "temperature", "labels")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("classifier")
    head.save(path, judge_of("gpt2"))
    return path


@settings(max_examples=150)
@given(key=st.sampled_from((*SAVED, "unheard of")), value=VALUES)
def test_any_value_in_classifier_json_judges_or_is_an_error_by_name(saved: Path, key: str, value: object):
    file = saved / "classifier.json"
    whole = file.read_text(encoding="utf-8")
    try:
        file.write_text(json.dumps(json.loads(whole) | {key: value}), encoding="utf-8")
        figures = head.load(saved, CPU, torch.float32).probabilities(TEXTS)
    except UserError as e:
        figures, said = None, str(e)
    else:
        said = ""
    finally:
        file.write_text(whole, encoding="utf-8")
    if figures is None:
        assert key in said or "is damaged" in said
    else:
        assert np.isfinite(figures).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [("pooling", "max"), ("long_texts", "cut"), ("temperature", 0.0), ("temperature", -1), ("temperature", math.nan),
     ("temperature", 1e-320),
     ("before", [10**6]), ("after", [-1]), ("pad_id", 10**6), ("pad_id", 1.0), ("block_size", 0), ("block_size", 10**6),
     ("labels", ["坏", "坏", "好"]), ("labels", "坏中好")],
)  # fmt: skip
def test_values_that_no_classifier_has_are_refused(saved: Path, key: str, value: object, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "c")
    file = tmp_path / "c" / "classifier.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {key: value}), encoding="utf-8")
    with pytest.raises(UserError, match=key):
        head.load(tmp_path / "c", CPU, torch.float32)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("factor", [3e38, -3e38])
def test_there_are_no_probabilities_of_numbers_that_are_not_finite(family: str, factor: float):
    judge = judge_of(family)
    with torch.no_grad():
        judge.classifier.score.weight.mul_(factor)
        judge.classifier.model.norm.weight.fill_(1e9)
    with pytest.raises(UserError, match="the logits of this model are not finite"):
        judge.probabilities(TEXTS)


def test_a_head_that_is_not_finite_is_refused(saved: Path, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "c", ignore=shutil.ignore_patterns("checksums.json"))
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    tensors["score.weight"][0, 0] = math.nan
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    with pytest.raises(UserError, match=r"score\.weight has numbers that are not finite"):
        head.load(tmp_path / "c", CPU, torch.float32)
