"""Where runs lie: other models keep their place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from miaobi.classify import ablation
from miaobi.classify.config import load_config
from miaobi.errors import UserError
from miaobi.model.checkpoint import load_model, model_directory

FAST = ("--device=cpu", "--dtype=float32", "--max_epoch=1", "--batch_size=32", "--baselines=False")


@pytest.fixture
def pretrained(trained: Callable[..., Path], tmp_path: Path) -> Path:
    """A run of `miaobi train` that may be spoiled."""
    return Path(shutil.copytree(trained("gpt2"), tmp_path / "pretrained", symlinks=True))


def files(run: Path) -> dict[str, bytes]:
    """Every file under a directory."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


# A language model's place


def test_a_language_models_run_is_refused(config: Callable, pretrained: Path, table: Path, tmp_path: Path):
    before = files(pretrained)
    tuned = model_directory(pretrained)
    for base in (pretrained, tuned, config().base_model):
        with pytest.raises(UserError, match=r"which a classifier would displace; choose another --out_dir"):
            ablation.train(config(base_model=base, out_dir=pretrained))
    with pytest.raises(UserError, match=r"holds .*, the model that is to be tuned"):
        ablation.train(config(base_model=tuned, out_dir=tuned))
    with pytest.raises(UserError, match="holds a model, "):
        ablation.train(config(out_dir=tuned))
    assert files(pretrained) == before


def test_a_run_that_has_no_checkpoint_yet_is_refused_too(config: Callable, pretrained: Path):
    shutil.rmtree(pretrained / "checkpoints")
    with pytest.raises(UserError, match="holds a run of `miaobi train`"):
        ablation.train(config(out_dir=pretrained))


def test_a_classifier_is_not_tuned_in_its_own_place(config: Callable, tmp_path: Path):
    ablation.train(config())
    for base in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "mask-full-1337"):
        with pytest.raises(UserError, match="the model that is to be tuned"):
            ablation.train(config(base_model=base, seed=7))


@pytest.mark.parametrize("flags", [[], ["--base_model=checkpoints"]])
def test_small_gpts_checkpoint_root_may_be_the_pretrainings_too(
    miaobi: Callable, pretrained: Path, table: Path, tmp_path: Path, monkeypatch, flags: list[str]
):
    monkeypatch.chdir(tmp_path)
    pretrained.rename("checkpoints")
    before, weights = files(Path("checkpoints")), load_model("checkpoints")[0].state_dict()
    for name, mask in (("sentimental.yaml", True), ("sentimental2.yaml", False)):
        Path(name).write_text(
            f"sentimental_data_path: {table}\nuse_mask: {mask}\nfrozen: False\ncheckpoint_root: ./checkpoints\n"
            f"base_model: {model_directory('checkpoints')}\n", encoding="utf-8",
        )  # fmt: skip
        first, again = (miaobi("classify", "train", name, *FAST, *flags, "--json") for _ in range(2))
        assert first.code == again.code == 0, first.err + again.err
        assert "the classifiers go into checkpoints/classify" in first.err
        assert json.loads(first.out)["run"] == "checkpoints/classify"
        assert "finished earlier" in again.err
    now = files(Path("checkpoints"))
    assert {name: now[name] for name in now if not name.startswith("classify")} == before
    assert all(torch.equal(weights[name], t) for name, t in load_model("checkpoints")[0].state_dict().items())
    answer = miaobi("classify", "predict", "checkpoints/classify", "皇马赢得比赛", "--device=cpu")
    assert answer.code == 0, answer.err
    cfg, _ = load_config(Path("checkpoints/classify/config.yaml"), [])
    assert cfg.out_dir == "checkpoints/classify"  # a run's own config.yaml leads back to it

    answer = miaobi("classify", "train", "sentimental.yaml", *FAST, "--out_dir=checkpoints")
    assert answer.code == 2
    assert "choose another --out_dir" in answer.err
