"""LoRA against PEFT: adapters go both ways with equal logits, and a merged model needs neither of the two."""

import copy
import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.model.checkpoint import load_model, save_model
from miaobi.model.config import LoraConfig, ModelConfig
from miaobi.model.lora import LoRALinear, adapter_parameters, add_lora, load_adapter, merged, save_adapter
from miaobi.model.transformer import Transformer

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 290}
MODELS = {
    "gpt2": ModelConfig(family="gpt2", bias=True, **SIZES),
    "qwen3": ModelConfig(family="qwen3", n_kv_head=2, head_dim=16, tie_word_embeddings=False, **SIZES),
    "llama": ModelConfig(family="llama", n_kv_head=1, **SIZES),
}
MODULES = {  # what PEFT's users write for these models; (?:...) tells GPT-2's two c_proj apart
    ("gpt2", "all"): ["c_attn", "c_fc", "c_proj"],
    ("gpt2", "attention"): r".*\.attn\.c_(attn|proj)",
    ("qwen3", "all"): ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ("qwen3", "attention"): ["q_proj", "k_proj", "v_proj", "o_proj"],
    ("llama", "all"): ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
EVERY_KIND = pytest.mark.parametrize(("family", "targets"), MODULES)
X = torch.randint(0, SIZES["vocab_size"], (3, 16), generator=torch.Generator().manual_seed(0))


def randomize(parameters, seed: int, std: float = 0.2) -> None:
    torch.manual_seed(seed)
    for p in parameters:
        torch.nn.init.normal_(p.data, std=std)


@pytest.fixture
def base(family: str, tmp_path: Path) -> tuple[Transformer, Path]:
    """A random model, and the directory it is saved in."""
    model, tokenizer, path = Transformer(MODELS[family]).eval(), Tokenizer.train_char({}), tmp_path / "base"
    randomize(model.parameters(), 0)
    path.mkdir()
    save_model(path, model, tokenizer, (tokenizer.eot_id,))
    return model, path


def adapted(model: Transformer, **settings) -> Transformer:
    """A copy of `model` with adapters that change it."""
    cfg = LoraConfig(**{"lora_rank": 4, "lora_alpha": 6} | settings)
    model = copy.deepcopy(model)
    add_lora(model, cfg)
    randomize((p for p in model.parameters() if p.requires_grad), 1)
    return model


def in_peft(base: Path, adapter: Path, **settings) -> peft.PeftModel:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(theirs, adapter, **settings).eval()


def made_by_peft(base: Path, modules: list[str] | str, **settings) -> peft.PeftModel:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    conv1d = "GPT2" in type(theirs).__name__
    cfg = peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": modules,
                             "fan_in_fan_out": conv1d} | settings)  # fmt: skip
    return peft.get_peft_model(theirs, cfg)


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() > 0.1)


# --- in memory ---------------------------------------------------------------------------------------------------


@EVERY_KIND
@torch.no_grad()
def test_new_adapters_change_nothing_and_are_as_many_as_pefts(base, family, targets):
    model, path = base
    ours, before = copy.deepcopy(model), model(X)
    add_lora(ours, LoraConfig(lora_rank=4, lora_targets=targets, lora_dropout=0.5))
    assert torch.equal(ours(X), before)
    assert torch.equal(ours.train()(X), before), "dropout is on the adapters' way only"
    theirs = made_by_peft(path, MODULES[family, targets])
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert trained == adapter_parameters(ours) == theirs.get_nb_trainable_parameters()[0]
    assert merged(model) is model, "a plain model has nothing to merge"


@pytest.mark.parametrize("family", MODELS)
def test_a_starts_as_pefts_does(base, family):
    ours, theirs = copy.deepcopy(base[0]), made_by_peft(base[1], MODULES[family, "all"], r=64)
    add_lora(ours, LoraConfig(lora_rank=64))
    mine = ours.blocks[0].mlp.down.lora_A
    name = "transformer.h.0.mlp.c_proj" if family == "gpt2" else "model.layers.0.mlp.down_proj"
    reference = theirs.base_model.model.get_submodule(name).lora_A["default"].weight
    assert mine.shape == reference.shape
    assert mine.std().item() == pytest.approx(reference.std().item(), rel=0.1)
    assert mine.abs().max().item() == pytest.approx(reference.abs().max().item(), rel=0.05)


@EVERY_KIND
def test_training_moves_the_adapters_alone(base, family, targets):
    model = copy.deepcopy(base[0])
    add_lora(model, LoraConfig(lora_rank=4, lora_targets=targets))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):  # in the first step B = 0 keeps the gradient from A
        torch.nn.functional.cross_entropy(model(X)[:, :-1].flatten(0, 1), X[:, 1:].flatten()).backward()
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".lora_" in name}
    assert {name.split(".", 2)[2] for name, m in model.named_modules() if isinstance(m, LoRALinear)} == (
        {"attn.qkv", "attn.proj"} | ({"mlp.up", "mlp.down"} if targets == "all" else set())
    )


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_adapter_dropout_is_seeded_and_for_training_only(base, family):
    model = adapted(base[0], lora_dropout=0.5)
    quiet = model(X)
    assert torch.equal(model(X), quiet)
    model.train()
    noisy = [(torch.manual_seed(seed), model(X))[1] for seed in (1, 1, 2)]
    assert torch.equal(noisy[0], noisy[1])
    assert differ(noisy[0], noisy[2])
    assert differ(noisy[0], quiet)


@EVERY_KIND
@torch.no_grad()
def test_a_merged_model_computes_the_same_and_the_live_one_is_left_alone(base, family, targets, tmp_path):
    model = adapted(base[0], lora_targets=targets)
    state, logits, model.end_ids = copy.deepcopy(model.state_dict()), model(X), (7, 9)
    assert differ(logits, base[0](X))
    plain = merged(model)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in base[0].named_parameters()]
    torch.testing.assert_close(plain(X), logits, atol=1e-4, rtol=1e-4)
    assert plain.end_ids == model.end_ids == (7, 9)
    assert plain.wte.weight.data_ptr() == model.wte.weight.data_ptr(), "shared, not copied"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    (tmp_path / "merged").mkdir()
    save_model(tmp_path / "merged", plain, load_model(base[1])[1], (0,))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(theirs(X).logits, logits, atol=1e-4, rtol=1e-4)


# --- adapter directories -----------------------------------------------------------------------------------------


@EVERY_KIND
@torch.no_grad()
@pytest.mark.filterwarnings("error:Found missing adapter keys")
@pytest.mark.filterwarnings("error:fan_in_fan_out is set to")  # PEFT would put it right, and say so
def test_peft_computes_our_logits(base, family, targets, tmp_path):
    model = adapted(base[0], lora_targets=targets, lora_alpha=5.5)
    save_adapter(tmp_path, model, str(base[1]))
    theirs = in_peft(base[1], tmp_path)
    assert differ(model(X), base[0](X))
    torch.testing.assert_close(theirs(X).logits, model(X), atol=1e-4, rtol=1e-4)
    cfg = theirs.peft_config["default"]
    assert (cfg.peft_type, cfg.task_type, cfg.r, cfg.lora_alpha) == ("LORA", "CAUSAL_LM", 4, 5.5)
    assert (cfg.base_model_name_or_path, cfg.fan_in_fan_out) == (str(base[1]), family == "gpt2")
    merged_by_peft = theirs.merge_and_unload()
    torch.testing.assert_close(merged_by_peft(X).logits, merged(model)(X), atol=1e-4, rtol=1e-4)
    # PEFT wraps what was trained and nothing else: GPT-2's mlp.c_proj stays alone where attention is the target.
    wraps = in_peft(base[1], tmp_path, is_trainable=True).get_nb_trainable_parameters()[0]
    assert wraps == adapter_parameters(model)


@EVERY_KIND
@torch.no_grad()
def test_an_adapter_comes_back_bit_for_bit(base, family, targets, tmp_path):
    model = adapted(base[0], lora_targets=targets, lora_dropout=0.1)
    save_adapter(tmp_path, model, "somewhere")
    into_plain, into_adapted = copy.deepcopy(base[0]), copy.deepcopy(base[0])
    add_lora(into_adapted, LoraConfig(lora_rank=4, lora_alpha=6, lora_targets=targets, lora_dropout=0.1))
    for again in (into_plain, into_adapted):
        load_adapter(tmp_path, again)
        assert again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
        assert again.blocks[0].attn.qkv.scaling == 1.5
        assert again.blocks[0].attn.qkv.dropout == 0.1


PARTIAL = {
    "gpt2": ["c_attn"],
    "qwen3": ["q_proj", "v_proj"],
    "llama": ["v_proj", "up_proj"],
}  # what PEFT adapts by default


@pytest.mark.parametrize("modules", ["all", "partial", "one layer"])
@pytest.mark.parametrize("family", MODELS)
def test_an_adapter_that_peft_trained_computes_the_same_here(base, family, modules, tmp_path):
    wanted = PARTIAL[family] if modules == "partial" else MODULES[family, "all"]
    theirs = made_by_peft(base[1], wanted, layers_to_transform=[1] if modules == "one layer" else None)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        theirs(X, labels=X).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base[0])
    load_adapter(tmp_path / "theirs", ours)
    with torch.no_grad():
        expected = theirs.eval()(X).logits
        assert differ(expected, base[0](X))
        torch.testing.assert_close(ours(X), expected, atol=1e-4, rtol=1e-4)

    # Trained on here and saved again, what PEFT had left alone is still left alone.
    ours(X).logsumexp(-1).sum().backward()
    torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.01).step()
    (tmp_path / "again").mkdir()
    save_adapter(tmp_path / "again", ours, str(base[1]))
    with torch.no_grad():
        torch.testing.assert_close(in_peft(base[1], tmp_path / "again")(X).logits, ours(X), atol=1e-4, rtol=1e-4)
        if family == "qwen3" and modules == "partial":
            _, k, _ = (merged(ours).blocks[0].attn.qkv.weight - base[0].blocks[0].attn.qkv.weight).split([64, 32, 32])
            assert not k.any()


# --- adapters that do not fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 48}, "shape .*another model or rank"),
        ({"n_layer": 1}, "no place for.*another model"),
        ({"family": "gpt2", "n_kv_head": None, "head_dim": None}, "no place for.*another model"),
    ],
)
@pytest.mark.parametrize("family", ["qwen3"])
def test_an_adapter_of_another_model_is_refused(base, changes, message, tmp_path):
    save_adapter(tmp_path, adapted(base[0]), "base")
    with pytest.raises(UserError, match=message):
        load_adapter(tmp_path, Transformer(dataclasses.replace(MODELS["qwen3"], **changes)))


@pytest.mark.parametrize("family", MODELS)
def test_other_settings_than_the_adapters_are_refused(base, family, tmp_path):
    save_adapter(tmp_path, adapted(base[0], lora_targets="attention"), "base")
    for settings, message in (({"lora_rank": 8}, "lora_rank"), ({"lora_targets": "all"}, "lora_targets")):
        model = adapted(base[0], **{"lora_targets": "attention"} | settings)
        with pytest.raises(UserError, match=message):
            load_adapter(tmp_path, model)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 3}},
        {"init_lora_weights": "olora"},
    ],
)
@pytest.mark.parametrize("family", ["qwen3"])
def test_lora_that_does_more_is_refused_by_name(base, settings, tmp_path):
    made_by_peft(base[1], MODULES["qwen3", "all"], **settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"{next(iter(settings))}=.*merge_and_unload"):
        load_adapter(tmp_path / "adapter", base[0])


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", None),
        ("adapter_model.safetensors", None),
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b'{"lora_alpha": 6}'),
        ("adapter_config.json", b'{"r": "four", "lora_alpha": 6}'),
        ("adapter_config.json", b'{"r": 1000000000, "lora_alpha": 6}'),
        ("adapter_config.json", b'{"r": true, "lora_alpha": 6}'),
        ("adapter_config.json", b'{"r": 4, "lora_alpha": [6]}'),
        ("adapter_config.json", b"[" * 100_000),
        ("adapter_model.safetensors", b"half"),
    ],
)
@pytest.mark.parametrize("family", ["gpt2"])
def test_damaged_adapters_are_named(base, file, content, tmp_path):
    save_adapter(tmp_path, adapted(base[0]), "base")
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match="is not a PEFT adapter"):
        load_adapter(tmp_path, base[0])


@pytest.mark.parametrize("family", ["qwen3"])
def test_an_adapter_that_lost_a_tensor_is_not_taken_for_a_whole_one(base, tmp_path):
    model = adapted(base[0])
    save_adapter(tmp_path, model, "base")
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 4
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"k_proj\.lora_B"):
        load_adapter(tmp_path, model)
    with pytest.raises(UserError, match=r"k_proj\.lora_B"):
        load_adapter(tmp_path, copy.deepcopy(base[0]))


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
@pytest.mark.parametrize("family", ["qwen3"])
def test_an_adapter_that_is_not_finite_is_refused(base, number, tmp_path):
    save_adapter(tmp_path, adapted(base[0]), "base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[-1] = number
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="not finite"):
        load_adapter(tmp_path, base[0])
