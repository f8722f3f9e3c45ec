"""Our weights in transformers' models and theirs in ours: the same logits, both ways."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.generate.config import SampleConfig
from miaobi.generate.engine import load
from miaobi.model.checkpoint import load_model, save_model
from miaobi.model.config import ModelConfig
from miaobi.model.hf_config import hf_config
from miaobi.model.transformer import Transformer

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 290}
CONFIGS = {
    "gpt2": ModelConfig(family="gpt2", **SIZES),
    "gpt2-bias": ModelConfig(family="gpt2", bias=True, **SIZES),
    "gpt2-tanh-untied-narrow": ModelConfig(
        family="gpt2", activation="gelu_new", tie_word_embeddings=False, intermediate_size=48, norm_eps=1e-3, **SIZES
    ),
    "qwen3": ModelConfig(family="qwen3", **SIZES),
    "qwen3-grouped": ModelConfig(family="qwen3", n_kv_head=2, rope_theta=5e5, norm_eps=1e-3, **SIZES),
    "qwen3-untied-wide-heads": ModelConfig(
        family="qwen3", n_kv_head=1, head_dim=16, tie_word_embeddings=False, intermediate_size=40, **SIZES
    ),
    "llama": ModelConfig(family="llama", n_kv_head=2, tie_word_embeddings=False, **SIZES),
    "llama-linear": ModelConfig(family="llama", rope_type="linear", rope_factor=4.0, **SIZES),
    "llama-stretched": ModelConfig(
        family="llama", head_dim=16, rope_type="llama3", rope_factor=8.0, rope_low_freq_factor=0.5,
        rope_high_freq_factor=2.0, rope_original_context=8, **SIZES
    ),
    "qwen2": ModelConfig(family="qwen2", n_kv_head=2, **SIZES),
    "qwen2-dynamic": ModelConfig(family="qwen2", rope_type="dynamic", rope_factor=3.0, **SIZES),
    "qwen3-yarn": ModelConfig(
        family="qwen3", rope_type="yarn", rope_factor=4.0, rope_original_context=4, rope_beta_fast=2.0,
        rope_truncate=False, rope_attention_factor=1.3, **SIZES
    ),
}  # fmt: skip
TOKENIZER = Tokenizer.train_char(Counter("皇马赢得比赛的冠军和转会球迷们期待国家队错过点球主教练谈到"))
X = torch.randint(0, SIZES["vocab_size"], (3, 16), generator=torch.Generator().manual_seed(0))


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter, biases and norms included, away from where it is born."""
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.2)
    return model.eval()


def as_pickles(directory: Path) -> None:
    """Rewrite a directory's safetensors as the pytorch_model.bin that older transformers wrote."""
    from safetensors.torch import load_file

    for file in directory.glob("model*.safetensors"):
        torch.save(load_file(file), directory / f"pytorch_{file.stem}.bin")
        file.unlink()
    index = directory / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text(encoding="utf-8").replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (directory / "pytorch_model.bin.index.json").write_text(text, encoding="utf-8")
        index.unlink()


@pytest.fixture(params=CONFIGS)
def ours(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Transformer, Path]:
    """A random model and the directory it was saved in."""
    model = random_weights(Transformer(CONFIGS[request.param]))
    save_model(tmp_path, model, TOKENIZER, (TOKENIZER.eot_id,))
    return model, tmp_path


@torch.no_grad()
def test_transformers_computes_our_logits(ours):
    model, path = ours
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(theirs).__name__ == json.loads((path / "config.json").read_text())["architectures"][0]
    torch.testing.assert_close(theirs.eval()(X).logits, model(X), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_loading_gives_the_same_model_back(ours):
    model, path = ours
    again, tokenizer = load_model(path)
    torch.testing.assert_close(again.eval()(X), model(X), atol=0, rtol=0)
    assert tokenizer.encode("皇马😀") == TOKENIZER.encode("皇马😀")
    assert again.num_parameters() == model.num_parameters()
    assert hf_config(again.cfg, (TOKENIZER.eot_id,)) == json.loads((path / "config.json").read_text(encoding="utf-8"))


def test_the_traps_of_the_formats_are_written_out(tmp_path):
    for name in ("gpt2", "qwen3-grouped"):
        (tmp_path / name).mkdir()
        save_model(tmp_path / name, random_weights(Transformer(CONFIGS[name])), TOKENIZER, (0,))
    gpt2, qwen3 = (
        json.loads((tmp_path / n / "config.json").read_text(encoding="utf-8")) for n in ("gpt2", "qwen3-grouped")
    )
    assert gpt2["activation_function"] == "gelu", "the seeds' GELU is the exact one"
    assert gpt2["tie_word_embeddings"] is qwen3["tie_word_embeddings"] is True
    assert qwen3["head_dim"] == 8
    assert qwen3["rope_theta"] == qwen3["rope_parameters"]["rope_theta"] == 5e5
    assert gpt2["vocab_size"] == qwen3["vocab_size"] == 290, "padding to 64 is internal"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    biases = {name: p for name, p in theirs.named_parameters() if name.endswith(".bias")}
    assert len(biases) == 2 * 6 + 1
    assert all((p == 0).all() for p in biases.values())


LLAMA = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32,
    "intermediate_size": 56, "max_position_embeddings": 96, "vocab_size": 301,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 12}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e2, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
HUB = {
    "gpt2": transformers.GPT2Config(
        n_layer=2, n_head=4, n_embd=32, n_positions=16, vocab_size=301, bos_token_id=0, eos_token_id=0
    ),
    "gpt2-untied": transformers.GPT2Config(
        n_layer=2, n_head=4, n_embd=32, n_positions=16, vocab_size=301, n_inner=40, activation_function="gelu",
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    ),
    "qwen3": transformers.Qwen3Config(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=56,
        head_dim=16, max_position_embeddings=16, vocab_size=301, tie_word_embeddings=False,
    ),
    "qwen3-tied-far": transformers.Qwen3Config(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, hidden_size=32, intermediate_size=56,
        head_dim=8, max_position_embeddings=16, vocab_size=301, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "llama": transformers.LlamaConfig(**LLAMA),
    "llama-tied-ungrouped": transformers.LlamaConfig(
        **LLAMA | {"num_key_value_heads": 4}, tie_word_embeddings=True, head_dim=16, rms_norm_eps=1e-3
    ),
    "llama-linear": transformers.LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "gpt2-tanh": transformers.GPT2Config(
        n_layer=2, n_head=4, n_embd=32, n_positions=16, vocab_size=301, activation_function="gelu_pytorch_tanh",
    ),
    "gpt2-fast": transformers.GPT2Config(
        n_layer=2, n_head=4, n_embd=32, n_positions=16, vocab_size=301, activation_function="gelu_fast",
    ),
    "qwen2": transformers.Qwen2Config(**LLAMA),
    "qwen2-tied-yarn": transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True, rope_parameters=YARN),
    "llama-dynamic": transformers.LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    ),
    "qwen3-yarn-own-words": transformers.Qwen3Config(
        **LLAMA, head_dim=16, rope_parameters=YARN | {"beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}
    ),
    "llama-yarn-longer": transformers.LlamaConfig(**LLAMA, rope_parameters=YARN | {"attention_factor": 1.7}),
    "llama-yarn-mscale": transformers.LlamaConfig(
        **LLAMA, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}
    ),
    "llama-3": transformers.LlamaConfig(**LLAMA, rope_parameters=LLAMA3_ROPE),
    "qwen3-linear": transformers.Qwen3Config(
        **LLAMA, head_dim=8, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
}  # fmt: skip


@pytest.mark.parametrize("shards", ["10GB", "20KB"])
@pytest.mark.parametrize("kind", HUB)
@torch.no_grad()
def test_models_saved_by_transformers_compute_the_same_here(tmp_path, kind, shards):
    theirs = random_weights(transformers.AutoModelForCausalLM.from_config(HUB[kind]))
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    TOKENIZER.save(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    model, _ = load_model(tmp_path)
    context = torch.randint(0, 301, (2, model.cfg.block_size), generator=torch.Generator().manual_seed(1))
    for ids in (X, context):  # the longest context: far beyond original_max_position_embeddings
        torch.testing.assert_close(model.eval()(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "kind", ["llama-linear", "llama-dynamic", "qwen2-tied-yarn", "llama-yarn-mscale", "llama-3", "gpt2-tanh"]
)
def test_greedy_text_of_stretched_angles_is_that_of_transformers(tmp_path, kind):
    """Token by token through the cache, to the end of a context far beyond original_max_position_embeddings."""
    theirs = random_weights(transformers.AutoModelForCausalLM.from_config(HUB[kind]))
    theirs.generation_config.eos_token_id = None
    theirs.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    ids = TOKENIZER.encode("皇马赢得比赛")
    lm = load(tmp_path, "cpu", "float32")
    lm.end_ids = lm.barred = ()
    count = lm.model.cfg.block_size - len(ids)
    expected = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=count, pad_token_id=0)[0].tolist()
    cfg = SampleConfig(temperature=0.0, max_new_tokens=count)
    assert [*ids, *lm.tokens("皇马赢得比赛", cfg)] == expected


@pytest.mark.parametrize("rope_type", ["linear", "llama3"])
@torch.no_grad()
def test_the_older_spelling_of_stretched_angles_is_read(tmp_path, rope_type):
    """transformers 4 wrote rope_scaling and rope_theta, and before that `type` for `rope_type`."""
    rope = {k: v for k, v in LLAMA3_ROPE.items() if rope_type == "llama3" or k in ("rope_theta", "factor")}
    rope["rope_type"] = rope_type
    theirs = random_weights(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, rope_parameters=rope)))
    theirs.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    old = config.pop("rope_parameters")
    config |= {"rope_theta": old.pop("rope_theta"), "rope_scaling": {"type": old.pop("rope_type"), **old}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model, _ = load_model(tmp_path)
    torch.testing.assert_close(model.eval()(X), theirs.eval()(X).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "llama-3"])
@pytest.mark.parametrize("shards", ["10GB", "20KB"])
@torch.no_grad()
def test_pytorch_model_bin_whole_and_in_shards(tmp_path, name, shards):
    theirs = random_weights(transformers.AutoModelForCausalLM.from_config(HUB[name]))
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    TOKENIZER.save(tmp_path)
    as_pickles(tmp_path)
    assert (tmp_path / "pytorch_model.bin.index.json").exists() == (shards == "20KB")
    model, _ = load_model(tmp_path)
    torch.testing.assert_close(model.eval()(X), theirs(X).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_half_precision_weights_of_the_hub_are_read_as_float32(tmp_path):
    theirs = random_weights(transformers.AutoModelForCausalLM.from_config(HUB["qwen3"])).bfloat16()
    theirs.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    model, _ = load_model(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(model.eval()(X), theirs(X).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_bare_body_of_an_old_gpt2_file_is_understood(tmp_path):
    """openai-community/gpt2 on the hub has no `transformer.` prefix and carries its causal masks."""
    from safetensors.torch import load_file, save_file

    theirs = random_weights(transformers.AutoModelForCausalLM.from_config(HUB["gpt2"]))
    theirs.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.removeprefix("transformer."): t for name, t in tensors.items() if name != "lm_head.weight"}
    for i in range(2):
        old[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    model, _ = load_model(tmp_path)
    torch.testing.assert_close(model.eval()(X), theirs(X).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"model_type": "bert"}, "'bert' is not one of .*GPT2LMHeadModel, Qwen3ForCausalLM, LlamaForCausalLM"),
        ("gpt2", {"model_type": None}, "model_type"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights"),
        ("gpt2", {"activation_function": "relu"}, "relu"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4}}, "longrope"),
        ("qwen3", {"rope_parameters": None, "rope_scaling": {"type": "mrope", "factor": 2.0}}, "mrope"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "several kinds of layers"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}}, "above 1"),
        ("qwen3", {"tie_word_embeddings": "yes"}, "must be true or false"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen3", {"rope_parameters": {"rope_type": "linear"}}, "has no key 'factor'"),
        ("qwen3", {"num_attention_heads": "four"}, "num_attention_heads='four', a value of the wrong kind"),
        ("gpt2", {"vocab_size": None}, "vocab_size=None, a value of the wrong kind; it must be a whole number"),
        ("gpt2", {"n_inner": "64"}, "n_inner='64', a value of the wrong kind"),
        ("gpt2", {"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon='1e-5', a value of the wrong kind"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6', a value of the wrong kind; it must be a number"),
        ("llama", {"rope_parameters": None, "rope_scaling": None, "rope_theta": "x"}, "rope_theta='x', a value of"),
        ("qwen3", {"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x', a value of the wrong kind"),
        ("qwen3", {"rope_parameters": ["linear"]}, "a value of the wrong kind; it must be an object"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused_by_name(tmp_path, name, changes, message):
    save_model(tmp_path, Transformer(CONFIGS[name]), TOKENIZER, (0,))
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | changes
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["gpt2-bias", "qwen3", "llama"])
def test_tensors_that_do_not_fit_the_config_are_named(tmp_path, name):
    from safetensors.torch import load_file, save_file

    save_model(tmp_path, random_weights(Transformer(CONFIGS[name])), TOKENIZER, (0,))
    whole = load_file(tmp_path / "model.safetensors")
    for key in whole:
        save_file({k: t for k, t in whole.items() if k != key}, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError):
            load_model(tmp_path)
    wrong = [whole | {k: whole[k][:-1].contiguous()} for k in whole if k.endswith(("fc.weight", "_proj.weight"))]
    assert len(wrong) >= 4
    for broken, message in [(whole | {"extra.weight": torch.ones(3)}, "extra.weight"), *((b, "shape") for b in wrong)]:
        save_file(broken, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=message):
            load_model(tmp_path)
