"""What strangers write into config.json and its kin: any JSON gives a model or a reason, soon and in little memory."""

import json
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.generate.engine import LanguageModel
from miaobi.model import hf_config
from miaobi.model.checkpoint import load_model, model_directory, save_model
from miaobi.model.config import ModelConfig
from miaobi.model.generation import generation_settings, sampling_settings
from miaobi.model.transformer import Transformer

TOKENIZER = Tokenizer.train_char(Counter("皇马赢得比赛"))
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": TOKENIZER.vocab_size}
FAMILIES = ("gpt2", "qwen3", "llama", "qwen2")
END = TOKENIZER.eot_id
HUGE = [0, -1, 1 << 20, 1 << 30, 1 << 31, 1 << 62, 1 << 64, 10**40, 1e9, 1e308, 0.5, float("nan"), float("inf")]


def written(directory: Path, family: str = "gpt2") -> Path:
    directory.mkdir(exist_ok=True)
    save_model(directory, Transformer(ModelConfig(family=family, **SIZES)), TOKENIZER, (END,))
    return directory


def changed(file: Path, **values: object) -> None:
    """Write keys into a JSON file; one whose value is ... goes."""
    content = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}), encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_size_is_believed_before_the_weights_are_asked(family: str, tmp_path: Path):
    """4.3 GB, or an endless loop, before."""
    directory = written(tmp_path / "model", family)
    before = (directory / "config.json").read_text(encoding="utf-8")
    keys = [key for key, value in json.loads(before).items() if type(value) in (int, float)]
    assert len(keys) >= 6
    began, most = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for key in keys:
        for value in HUGE:
            (directory / "config.json").write_text(before, encoding="utf-8")
            changed(directory / "config.json", **{key: value})
            try:
                load_model(directory)
            except UserError as e:
                assert str(directory) in str(e)  # noqa: PT017
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most
    assert grown * (1 if sys.platform == "darwin" else 1024) < 1 << 30
    assert time.perf_counter() - began < 60


def test_a_context_of_the_far_future_is_cut_and_that_is_said(tmp_path: Path, capsys):
    directory = written(tmp_path / "model", "qwen3")
    changed(directory / "config.json", max_position_embeddings=1 << 30)
    model, _ = load_model(directory)
    assert model.cfg.block_size == hf_config.LONGEST_CONTEXT
    assert "1,073,741,824" in capsys.readouterr().err


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70_000) | st.sampled_from(HUGE) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    "model_type",
    "n_layer",
    "n_head",
    "n_embd",
    "n_inner",
    "n_positions",
    "vocab_size",
    "activation_function",
    "layer_norm_epsilon",
    "tie_word_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "rms_norm_eps",
    "attention_bias",
    "hidden_act",
    "layer_types",
    "eos_token_id",
    "bos_token_id",
    "quantization_config",
)
ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn", "longrope"]) | anything},
    optional=dict.fromkeys(
        (
            "factor",
            "rope_theta",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "truncate",
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
            "mscale",
            "mscale_all_dim",
        ),
        anything,
    ),
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), anything, max_size=3), rope=st.none() | ROPE)
def test_any_config_gives_a_model_or_a_reason(family: str, tmp_path: Path, changes: dict, rope: dict | None):
    directory = written(tmp_path / "model", family)
    if rope is not None:
        changes = changes | {"rope_parameters": rope}
    changed(directory / "config.json", **changes)
    try:
        model, _ = load_model(directory)
    except UserError as e:
        assert len(str(e)) < 900  # noqa: PT017
    else:
        assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, TOKENIZER.vocab_size)
        save_model(directory, model, TOKENIZER, model.end_ids)
        load_model(directory)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(
        st.sampled_from(
            (
                *KEYS,
                "temperature",
                "top_k",
                "top_p",
                "suppress_tokens",
                "pad_token_id",
                "forced_eos_token_id",
                "do_sample",
                "bad_words_ids",
            )
        ),
        anything,
        max_size=4,
    )
)
def test_any_generation_config_gives_a_model_or_a_reason(tmp_path: Path, changes: dict):
    directory = written(tmp_path / "model")
    changed(directory / "generation_config.json", **changes)
    model, _ = load_model(directory)
    assert all(0 <= id_ < TOKENIZER.vocab_size for id_ in model.end_ids)
    for value in sampling_settings(model.generation).values():
        assert 0 <= value < 1 << 31


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_any_bytes_give_a_model_or_a_reason(name: str, tmp_path: Path):
    directory = written(tmp_path / "model")
    if name.startswith("model"):
        (directory / "model.safetensors").rename(directory / "one.safetensors")
        (directory / name).write_text(json.dumps({"weight_map": {"transformer.wte.weight": "one.safetensors"}}))
        load_model(directory)
    good, draw = (directory / name).read_bytes(), random.Random(0)
    hostile = [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"eos_token_id": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b"\x00",
        b"",
        b'{"weight_map": ["x"]}',
        b'{"weight_map": {"x": 3}}',
        b'{"weight_map": {"x": "../../etc/passwd"}}',
        b'{"weight_map": {"x": ""}}',
        b'{"weight_map": {"x": "\\u0000"}}',
        b'{"weight_map": {}}',
        b"3",
        b"NaN",
        b'{"weight_map": {"x": "' + b"a" * 5000 + b'"}}',
        b'{"weight_map": {"another": "one.safetensors"}}',
    ]
    for _ in range(50):
        altered = bytearray(good)
        altered[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        hostile.append(bytes(altered))
    refused = 0
    for content in hostile:
        (directory / name).write_bytes(content)
        try:
            load_model(directory)
        except UserError as e:
            refused += 1
            assert len(str(e)) < 900  # noqa: PT017
    assert refused > 10


# --- ends, and tokens that the model does not have ---------------------------------------------------------------


def foreign() -> Tokenizer:
    """A hub tokenizer of five tokens with an end of its own, as BERT's or GPT-2's have."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "[SEP]": 2, "</s>": 3, "c": 4}, []))
    backend.add_special_tokens(["[SEP]", "</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


def five_tokens(directory: Path) -> Path:
    directory.mkdir()
    save_model(directory, Transformer(ModelConfig(family="gpt2", **SIZES | {"vocab_size": 5})), foreign(), (3,))
    changed(directory / "generation_config.json", eos_token_id=...)
    return directory


@pytest.mark.parametrize(
    ("stated", "ends", "said"),
    [
        (..., (3,), False),
        (None, (3,), False),
        (50256, (3,), True),
        (-1, (3,), True),
        (True, (3,), True),
        ("</s>", (3,), True),
        (10**40, (3,), True),
        ([2, 50256], (2,), True),
        ([], (3,), False),
        (2, (2,), False),
        ([2, 4], (2, 4), False),
        (1.0, (3,), True),
        ({}, (3,), True),
        ([[2]], (3,), True),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_that_is_silent_or_impossible_is_the_tokenizers(file, stated, ends, said, tmp_path: Path, capsys):
    directory = five_tokens(tmp_path / "model")
    changed(directory / "config.json", eos_token_id=..., bos_token_id=...)
    changed(directory / file, eos_token_id=stated)
    model, tokenizer = load_model(directory)
    assert model.end_ids == ends
    assert ("eos_token_id" in capsys.readouterr().err) == said
    for completion in LanguageModel(model, tokenizer).generate("ab", num_samples=2, max_new_tokens=30):
        assert "</s>" not in completion.text


def test_a_model_of_ours_that_saw_no_end_has_none(tmp_path: Path):
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", Transformer(ModelConfig(family="gpt2", **SIZES)), TOKENIZER, ())
    assert load_model(tmp_path / "model")[0].end_ids == ()


@pytest.mark.parametrize(
    "key", ["bos_token_id", "pad_token_id", "forced_eos_token_id", "suppress_tokens", "bad_words_ids"]
)
@pytest.mark.parametrize("value", [99, -1, True, "x", [0, 99], [[0], [99]], 10**40])
def test_other_ids_that_the_model_lacks_are_not_used(key, value, tmp_path: Path, capsys):
    directory = five_tokens(tmp_path / "model")
    changed(directory / "generation_config.json", **{key: value})
    model, _ = load_model(directory)
    assert model.generation[key] is None
    assert key in capsys.readouterr().err


def test_a_padding_token_beyond_the_embedding_is_common(tmp_path: Path):
    directory = five_tokens(tmp_path / "model")
    tokenizer = foreign()
    tokenizer.backend.add_special_tokens(["[PAD]"])
    tokenizer.config["pad_token"] = "[PAD]"
    tokenizer.save(directory)
    model, loaded = load_model(directory)
    assert loaded.vocab_size == 6 > model.cfg.vocab_size
    assert loaded.pad_id is None
    lm = LanguageModel(model, loaded)
    for text in ("ab", "[PAD]a"):
        assert max(loaded.encode(text), default=0) < 5
    assert all("[PAD]" not in c.text for c in lm.generate("ab", num_samples=4, max_new_tokens=20))
    tokenizer.config["chat_template"] = "{% for m in messages %}[PAD]{{ m.content }}{% endfor %}"
    tokenizer.save(directory)
    with pytest.raises(UserError, match=r"the chat template writes '\[PAD\]'"):
        load_model(directory)


@pytest.mark.parametrize("kind", ["ordinary", "added but not special"])
def test_text_never_turns_into_an_id_that_the_model_lacks(kind, tmp_path: Path):
    directory = five_tokens(tmp_path / "model")
    tokenizer = foreign()
    if kind == "ordinary":
        backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate("abcdef")}, []))
        tokenizer = Tokenizer(backend, {})
    else:
        tokenizer.backend.add_tokens(["word"])
    tokenizer.save(directory)
    with pytest.raises(UserError, match="they are not of one model"):
        load_model(directory)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        (
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "eos_token_id": 3},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        ),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        (None, {}),
        ({}, {}),
        ({"temperature": "hot", "top_p": 1.5, "top_k": -1, "repetition_penalty": 0, "min_p": None}, {}),
        ({"temperature": float("nan"), "top_k": 1e300, "top_p": True, "min_p": 1}, {}),
        ({"top_k": 50.0, "temperature": -0.5, "repetition_penalty": 1e9, "top_p": 10**400}, {}),
        ({"top_k": 0, "top_p": 1.0, "temperature": 0}, {"top_k": 0, "top_p": 1.0, "temperature": 0}),
        ({"do_sample": "no", "temperature": [0.7], "top_p": {"a": 1}, "top_k": "50"}, {}),
    ],
)
def test_how_the_makers_want_it_sampled(told, found, tmp_path: Path, capsys):
    """Each value that nothing can be sampled with is said, and none of the others."""
    (tmp_path / "config.json").write_text("{}")
    if told is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(told))
    assert sampling_settings(generation_settings(tmp_path, 5)) == found
    said = capsys.readouterr().err
    dropped = {key for key, value in (told or {}).items() if key not in found and value is not None}
    dropped -= {"eos_token_id"} | ({"do_sample", "temperature"} if told and told.get("do_sample") is False else set())
    assert said.count("not used") == len(dropped)
    for key in dropped:
        assert f"generation_config.json: {key} is " in said


def test_a_tuned_model_does_not_carry_nonsense_on(tmp_path: Path):
    """What its makers said rightly, and what transformers does with other settings, stays."""
    directory = five_tokens(tmp_path / "model")
    changed(directory / "generation_config.json", top_p=0, top_k=7, num_beams=4)
    model, tokenizer = load_model(directory)
    (tmp_path / "new").mkdir()
    save_model(tmp_path / "new", model, tokenizer, model.end_ids)
    written = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert (written.get("top_p"), written["top_k"], written["num_beams"]) == (None, 7, 4)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("cpt4000.pth", "miaobi convert small-gpt"),
        ("ckpt.pt", "convert nanogpt"),
        ("model.safetensors", "the directory that it lies in"),
    ],
)
def test_a_file_where_a_model_should_be(name, advice, tmp_path: Path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{name} is a file, not a model directory.*{advice}"):
        model_directory(tmp_path / name)
