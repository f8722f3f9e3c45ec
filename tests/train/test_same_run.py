"""A command that continues a run changes what it names, and nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.settings import flatten, load_config
from miaobi.train.loop import train as train_run
from miaobi.train.same_run import LOCATION

SHARED = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "max_iters": 6,
          "eval_interval": 3, "eval_iters": 1, "log_interval": 3, "sample_tokens": 0, "device": "cpu",
          "dtype": "float32", "compile": False}  # fmt: skip
RUNS = {
    "qwen3": {"n_kv_head": 1, "rope_theta": 5e4, "dropout": 0.1, "license": "mit"},
    "gpt2": {"family": "gpt2", "bias": True, "activation": "gelu_new", "lr_decay_iters": 6},
    "small-gpt": {"decay_steps": 6, "lr": 1e-3, "warmup_steps": 1, "seed": 7},
    "llama": {"family": "llama", "learning_rate": 2e-3, "average_weights": True, "weight_decay": 0.2, "min_lr": 1e-5},
}


def command(**given: object) -> dict:
    """`miaobi train --key=value ...`, of these keys alone."""
    return train_run(*load_config(None, [(key, str(value)) for key, value in given.items()]))


def kept(run: Path) -> dict[str, object]:
    """The settings that a run has saved, and what it is without regard to where it lies."""
    return flatten(load_config(run / "config.yaml", [])[0]) | {"out_dir": ""}


def weights(run: Path) -> bytes:
    return (pointed(run / "checkpoints" / "last") / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def runs(prepared, tmp_path_factory) -> Callable[[str], Path]:
    """`runs("gpt2")`: a run of 6 steps; copy it before changing it."""
    known: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in known:
            known[kind] = tmp_path_factory.mktemp("same") / "run"
            command(data=prepared(), out_dir=known[kind], **SHARED | RUNS[kind])
        return known[kind]

    return get


@pytest.fixture
def copy(runs, tmp_path) -> Callable[[str, str], Path]:
    """`copy("gpt2", "name")`: that run, to be changed."""
    return lambda kind, name="run": Path(shutil.copytree(runs(kind), tmp_path / name, symlinks=True))


@pytest.mark.parametrize("kind", RUNS)
def test_max_iters_alone_extends_a_run_as_its_whole_command_does(kind, copy, prepared, capsys):
    bare, whole = copy(kind, "bare"), copy(kind, "whole")
    assert command(out_dir=bare, max_iters=9)["step"] == 9
    said = capsys.readouterr().err
    assert said.count(f"{bare} continues with its saved settings: ") == 1
    assert "n_layer=1" in said
    command(data=prepared(), out_dir=whole, **SHARED | RUNS[kind] | {"max_iters": 9})
    assert "saved settings" not in capsys.readouterr().err, "every key was given"
    assert weights(bare) == weights(whole)
    follows = {"lr_decay_iters": None}  # max_iters, whether 6 was written or nothing
    assert kept(bare) | follows == kept(whole) | follows
    assert command(out_dir=bare)["stopped"] == "max_iters"
    assert command(out_dir=bare, max_iters=11)["step"] == 11


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [("qwen3", "decay_steps", 6), ("qwen3", "train_batch", 4), ("qwen3", "train_percent", 0.9),
     ("qwen3", "bias", False), ("qwen3", "data_path", ...), ("qwen3", "dropout", 0.1), ("llama", "lr", 2e-3),
     ("llama", "decay_steps", 6),
     ("gpt2", "family", "gpt2"), ("gpt2", "warmup_steps", "null"), ("small-gpt", "max_iters", 6)],
)  # fmt: skip
def test_a_key_that_says_what_the_run_has_changes_nothing(kind, key, value, copy, prepared):
    """A seed's key alone made family=gpt2, format=dialogue, split=tail of what the run never had."""
    run = copy(kind)
    before = kept(run), weights(run)
    assert command(out_dir=run, **{key: prepared() if value is ... else value})["stopped"] == "max_iters"
    after = kept(run), weights(run)
    assert after[0] | {"lr_decay_iters": None} == before[0] | {"lr_decay_iters": None}, "6 steps either way"
    assert after[1] == before[1]


@pytest.mark.parametrize(
    ("kind", "key", "value", "named"),
    [("qwen3", "decay_steps", 4, "lr_decay_iters"), ("qwen3", "family", "gpt2", "family"),
     ("qwen3", "bias", "True", "bias"), ("qwen3", "train_batch", 8, "batch_size"), ("qwen3", "n_layer", 2, "n_layer"),
     ("qwen3", "max_epoch", 2, "max_epochs"),
     ("llama", "n_kv_head", 1, "n_kv_head"), ("gpt2", "head_dim", 8, "head_dim"), ("gpt2", "dropout", 0.5, "dropout"),
     ("small-gpt", "lr", 1, "learning_rate"), ("small-gpt", "seed", 1337, "seed"),
     ("small-gpt", "max_iters", 5, "max_iters")],
)  # fmt: skip
def test_the_one_key_that_was_changed_is_the_one_that_is_named(kind, key, value, named, copy):
    """Also where the value is everybody's default, or does not go with the run's other settings."""
    run = copy(kind)
    before = (run / "config.yaml").read_bytes(), weights(run)
    with pytest.raises(UserError, match=rf"holds a run with {named}=.*, now {named}="):
        command(out_dir=run, **{key: value})
    assert ((run / "config.yaml").read_bytes(), weights(run)) == before


def test_a_run_that_starts_over_inherits_nothing(copy, prepared):
    run = copy("qwen3")
    command(data=prepared(), out_dir=run, init_from="scratch", **SHARED)
    new = kept(run)
    assert (new["dropout"], new["n_kv_head"], new["license"]) == (0.0, None, None)


def test_the_runs_own_file_and_max_iters_extend_it(copy):
    run = copy("qwen3")
    cfg = load_config(run / "config.yaml", [("max_iters", "8"), ("out_dir", str(run))])
    assert train_run(*cfg)["step"] == 8
    assert kept(run)["license"] == "mit"


def test_a_run_that_only_the_mirror_has_resumes_with_its_settings(prepared, tmp_path):
    run = {"out_dir": tmp_path / "run", "mirror": tmp_path / "far"}
    command(data=prepared(), **run, **SHARED | RUNS["qwen3"])
    shutil.rmtree(tmp_path / "run")
    assert command(**run, max_iters=9)["step"] == 9
    assert kept(tmp_path / "run")["n_kv_head"] == 1
    shutil.rmtree(tmp_path / "far")
    assert command(out_dir=tmp_path / "run", max_iters=12)["step"] == 12, "its mirror is its own setting too"
    assert (tmp_path / "far" / "step-12").is_dir()


def test_a_run_of_adapters_resumes_with_its_base_model(copy, prepared, tmp_path):
    base, run = copy("llama", "base"), tmp_path / "tuned"
    command(data=prepared(), out_dir=run, init_from=base, trainable="lora", lora_rank=2, **SHARED | {"max_iters": 3})
    assert command(out_dir=run, max_iters=6)["step"] == 6
    assert (kept(run)["trainable"], kept(run)["lora_rank"]) == ("lora", 2)


@pytest.mark.parametrize("key", ["mirror", "tensorboard_path"])
def test_a_copy_does_not_write_to_what_the_first_one_writes_to(key, prepared, tmp_path, capsys):
    """Unless it is named; the run itself goes on with it, wherever it is entered from."""
    run, other = tmp_path / "run", tmp_path / "copy"
    command(data=prepared(), out_dir=run, **SHARED | RUNS["qwen3"] | {key: tmp_path / "far"})
    shutil.copytree(run, other, symlinks=True)
    capsys.readouterr()
    command(out_dir=other, max_iters=9)
    assert f"give --{key}={tmp_path / 'far'} if it shall" in capsys.readouterr().err
    assert kept(other)[key] is None
    command(out_dir=run, max_iters=9)
    assert kept(run)[key] == str(tmp_path / "far")


@pytest.mark.parametrize("key", ["mirror", "tensorboard_path"])
@pytest.mark.parametrize("with_place", [False, True])
def test_a_run_that_somebody_sent_writes_nothing_elsewhere(key, with_place, copy, tmp_path, monkeypatch, capsys):
    """Its config.yaml can say the very name that it will be given, and where that is to be copied to."""
    far = tmp_path / "far"
    copy("qwen3", "made")
    command(out_dir=tmp_path / "made", max_iters=7, **{key: far})
    shutil.rmtree(far)
    shutil.copytree(tmp_path / "made", tmp_path / "run", symlinks=True)  # as tar unpacks it
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace(str(tmp_path / "made"), "run"), encoding="utf-8")
    if not with_place:
        (tmp_path / "run" / LOCATION).unlink()
    monkeypatch.chdir(tmp_path)
    command(out_dir="run", max_iters=9)
    assert not far.exists()
    assert f"give --{key}={far} if it shall" in capsys.readouterr().err
