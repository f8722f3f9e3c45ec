"""Tuning a MODEL: LoRA runs whose checkpoints are whole models, that go on exactly, and default rates of all kinds."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from miaobi.config import OptimConfig
from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.generate.engine import load
from miaobi.model.checkpoint import model_directory
from miaobi.train import loop
from miaobi.train.recipe import resolve_optim

X = torch.arange(20, 52)[None]


@pytest.fixture
def base(trained, tmp_path) -> Path:
    """A model directory of this test's own."""
    return Path(shutil.copytree(model_directory(trained("qwen3", "char")), tmp_path / "base"))


@pytest.fixture
def tune(train, prepared, base, tmp_path):
    """`tune(lora_rank=8)`: a short LoRA run from `base` in tmp_path/run; values replace or add settings."""

    def run(**values):
        settings = {"data": prepared(), "out_dir": tmp_path / "run", "init_from": base, "trainable": "lora",
                    "lora_rank": 4, "lora_dropout": 0.1, "max_iters": 20, "eval_interval": 10}  # fmt: skip
        for size in ("n_layer", "n_head", "n_embd", "block_size"):
            values.setdefault(size, {"n_layer": 2, "n_head": 2}.get(size, 32))
        return train(**settings | values)

    return run


def last(run: Path, file: str = "model.safetensors") -> bytes:
    return (pointed(run / "checkpoints" / "last") / file).read_bytes()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def logits(path: Path) -> torch.Tensor:
    return load(path, device="cpu", dtype="float32").logits(X)


# --- a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_lora_run_learns_and_its_checkpoint_is_a_whole_model_and_a_peft_adapter(
    train, trained, corpus_file, tmp_path, capsys, family
):
    text = "\n\n".join(document[::-1] for document in corpus_file.read_text(encoding="utf-8").split("\n\n"))
    (tmp_path / "backwards.txt").write_text(text, encoding="utf-8")
    kind = {"data": tmp_path / "backwards.txt", "family": family, "bias": family == "gpt2"}
    base = model_directory(trained(family, "char")).resolve()
    before = bytes_of(base)
    untuned = train(**kind, out_dir=tmp_path / "untuned", init_from=base, eval_only=True)
    result = train(**kind, out_dir=tmp_path / "run", init_from=trained(family, "char"), trainable="lora",
                   learning_rate=5e-3, max_iters=60)  # fmt: skip
    assert result["val_loss"] < untuned["val_loss"] - 0.02
    assert bytes_of(base) == before, "the base model is left alone"

    checkpoint = pointed(tmp_path / "run" / "checkpoints" / "last")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(X).logits, logits(checkpoint), atol=1e-4, rtol=1e-4)
    adapter = json.loads((checkpoint / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    on_base = transformers.AutoModelForCausalLM.from_pretrained(adapter["base_model_name_or_path"])
    assert Path(adapter["base_model_name_or_path"]) == base, "a directory that PEFT finds from anywhere"
    with_adapter = peft.PeftModel.from_pretrained(on_base, checkpoint / "adapter", is_trainable=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(with_adapter(X).logits, logits(checkpoint), atol=1e-4, rtol=1e-4)
    assert (logits(checkpoint) - logits(base)).abs().max() > 0.1

    assert result["trained_parameters"] == with_adapter.get_nb_trainable_parameters()[0]
    assert result["parameters"] == untuned["parameters"] == untuned["trained_parameters"]
    assert f"{result['trained_parameters']:,} trained (LoRA)" in capsys.readouterr().err
    tuned, original = load_file(checkpoint / "model.safetensors"), load_file(base / "model.safetensors")
    changed = {name for name, value in tuned.items() if not torch.equal(value, original[name])}
    matrices = {name for name in tuned if any(f".{i}." in name for i in range(2)) and tuned[name].ndim == 2}
    assert changed == matrices, "embeddings, norms and biases stay bit for bit"
    state = load_file(checkpoint / "train_state" / "optimizer-0-of-1.safetensors")
    kept = sum(tensor.numel() for name, tensor in state.items() if name.endswith("/exp_avg"))
    assert kept == result["trained_parameters"], "the optimizer remembers the adapters alone"


def test_the_printed_sample_comes_from_the_tuned_model(tune):
    seen = []

    def preview(model, *_):
        seen.append(model(X)[0, -1, :8].tolist())
        return "…"

    tune(preview=preview, sample_tokens=8, learning_rate=0.02)
    assert len(seen) == 2
    assert seen[0] != seen[1]


def test_targets_rank_and_alpha_reach_the_adapter(tune, tmp_path):
    tune(lora_targets="attention", lora_rank=2, lora_alpha=7, max_iters=2)
    path = pointed(tmp_path / "run" / "checkpoints" / "last") / "adapter"
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 7, 0.1)
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert {name.split(".")[6] for name in load_file(path / "adapter_model.safetensors")} == set(
        config["target_modules"]
    )


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_the_sft_config_teaches_any_model_to_answer(miaobi, trained, tmp_path, trainable):
    """configs/sft.yaml on records with messages: the assistant's turns get likelier than they were.

    Blocks this small cut some questions from their answers: pieces with nothing to learn, which take no room.
    """
    answers = {"谁赢得比赛": "皇马赢得比赛。", "谁输掉联赛": "曼联输掉联赛！", "球迷期待": "冠军，冠军！"}
    records = [
        {"messages": [{"role": "user", "content": q + "？" * n}, {"role": "assistant", "content": a}]}
        for n in range(20)
        for q, a in answers.items()
    ]
    data = tmp_path / "sft.jsonl"
    data.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    command = ["train", Path(__file__).parents[2] / "configs" / "sft.yaml", f"--data={data}", "--json",
               f"--init_from={trained('gpt2')}", f"--trainable={trainable}", "--batch_size=4", "--val_fraction=0.2",
               "--device=cpu", "--dtype=float32", "--learning_rate=5e-3", "--sample_tokens=0"]  # fmt: skip
    untuned = miaobi(*command, f"--out_dir={tmp_path / 'untuned'}", "--eval_only=True")
    tuned = miaobi(*command, f"--out_dir={tmp_path / 'run'}")
    assert (untuned.code, tuned.code) == (0, 0), untuned.err + tuned.err
    assert json.loads(tuned.out)["val_loss"] < json.loads(untuned.out)["val_loss"] - 0.03
    checkpoint = pointed(tmp_path / "run" / "checkpoints" / "last")
    assert (checkpoint / "adapter").exists() == (trainable == "lora")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(X).logits, logits(checkpoint), atol=1e-4, rtol=1e-4)


# --- going on ----------------------------------------------------------------------------------------------------


class KilledError(Exception):
    """Stands for kill -9 in the middle of a step; tests/train/test_resume.py has real ones."""


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch, run) -> None:
    original = loop.Run.step

    def dies(self, n):
        if n == step:
            raise KilledError
        return original(self, n)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "step", dies)
        with pytest.raises(KilledError):
            run()


@pytest.mark.parametrize(("block_size", "again"), [(32, {}), (32, {"init_from": "resume"}), (16, {})])
def test_a_killed_run_ends_in_the_same_weights_and_adapter(tune, tmp_path, monkeypatch, block_size, again):
    settings = {"max_iters": 30, "block_size": block_size}  # 16: less than the base model has
    tune(**settings, out_dir=tmp_path / "whole")
    killed_at(17, monkeypatch, lambda: tune(**settings))
    assert tune(**settings, **again)["step"] == 30
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert last(tmp_path / "run", file) == last(tmp_path / "whole", file)


def test_a_base_that_moved_is_found_where_init_from_says(tune, base, tmp_path, monkeypatch):
    tune(out_dir=tmp_path / "whole")
    killed_at(15, monkeypatch, tune)
    base.rename(tmp_path / "elsewhere")
    for settings in ({}, {"init_from": "resume"}):
        with pytest.raises(UserError, match=r"step-10 needs its base model.*no such directory.*--init_from"):
            tune(**settings)
    assert tune(init_from=tmp_path / "elsewhere")["step"] == 20
    assert last(tmp_path / "run") == last(tmp_path / "whole")


def test_a_base_that_changed_is_refused(tune, base, trained, monkeypatch):
    killed_at(15, monkeypatch, tune)
    other = load_file(base / "model.safetensors")
    other["model.norm.weight"][0] += 1e-6
    from safetensors.torch import save_file

    save_file(other, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is not what was written"):
        tune()
    (base / "checksums.json").unlink()  # as in a model of the hub
    with pytest.raises(UserError, match=r"weights of .*base are not those that .*step-10 tunes"):
        tune()


def test_resuming_elsewhere_needs_the_same_kind_of_adapter(tune, tmp_path):
    tune(max_iters=10)
    new = {"resume_from": tmp_path / "run", "out_dir": tmp_path / "new"}
    with pytest.raises(UserError, match="trainable=lora, now trainable=full"):
        tune(**new, trainable="full")
    with pytest.raises(UserError, match="lora_rank"):
        tune(**new, lora_rank=8)
    with pytest.raises(UserError, match=r"holds a run with lora_alpha=32\.0, now lora_alpha=8\.0"):
        tune(lora_alpha=8)
    assert tune(**new, init_from="scratch", max_iters=12)["step"] == 12, "the checkpoint knows its base"


def test_a_full_runs_checkpoint_is_not_taken_for_a_lora_runs(tune, tmp_path):
    tune(trainable="full", max_iters=10)
    with pytest.raises(UserError, match="trainable=full, now trainable=lora"):
        tune(out_dir=tmp_path / "new", resume_from=tmp_path / "run")


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_from": "scratch"}, "--init_from=MODEL"),
        ({"optimizer": "muon"}, "optimizer=muon"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"init_from": "no/such/model"}, "no/such/model"),
    ],
)
def test_settings_that_cannot_be_are_refused(tune, settings, message):
    with pytest.raises(UserError, match=message):
        tune(**settings)


@pytest.mark.parametrize(
    ("family", "tuning", "expected"),
    [
        ("qwen3", None, ("muon", "wsd", 3e-3)),
        ("gpt2", None, ("adamw", "cosine", 1e-3)),
        ("qwen3", "full", ("adamw", "cosine", 1e-4)),
        ("gpt2", "full", ("adamw", "cosine", 1e-4)),
        ("qwen3", "lora", ("adamw", "cosine", 1e-3)),
        ("gpt2", "lora", ("adamw", "cosine", 1e-3)),
    ],
)
def test_default_rates(family, tuning, expected):
    cfg = resolve_optim(OptimConfig(), family, 1000, tuning)
    assert (cfg.optimizer, cfg.schedule, cfg.learning_rate) == expected
    assert resolve_optim(OptimConfig(learning_rate=7e-5), family, 1000, tuning).learning_rate == 7e-5


@pytest.mark.parametrize(("trainable", "peak"), [("full", 1e-4), ("lora", 1e-3)])
def test_a_run_that_tunes_takes_the_rate_for_it_and_keeps_it(tune, tmp_path, trainable, peak, monkeypatch):
    killed_at(15, monkeypatch, lambda: tune(trainable=trainable, log_interval=1))
    tune(trainable=trainable, log_interval=1, init_from="resume")
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert len(rates) == 20
    assert max(rates) == pytest.approx(peak, rel=0.01)
    assert rates[1:] == sorted(rates[1:], reverse=True), "no jump where the run was taken up again"
