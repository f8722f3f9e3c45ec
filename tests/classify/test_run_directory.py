"""Where runs lie: other models keep their place, and cells of other data, weights or settings are never mixed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from review_tables import reviews, write
from safetensors.torch import load_file, save_file

from miaobi.classify import ablation
from miaobi.classify.config import load_config
from miaobi.classify.run_directory import BASELINE, ROW, read_result
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


# Cells


def test_cells_of_other_texts_or_labels_are_refused(config: Callable, tmp_path: Path):
    rows = reviews(60)
    path = write(tmp_path / "mine.csv", rows)
    first = ablation.train(config(data=path, baselines=False))
    other = {"labels": [*rows[:-1], ("10"[int(rows[-1][0])], rows[-1][1])], "texts": [*rows[1:], ("1", "皇马")]}
    for changed in other.values():
        write(path, changed)
        with pytest.raises(UserError, match=r"holds mask-full-1337 of other texts or labels than .*mine\.csv has now"):
            ablation.train(config(data=path, baselines=False, seeds=2))
    write(path, rows)
    again = ablation.train(config(data=path, baselines=False, seeds=2))
    assert again["rows"][0] == first["rows"][0]


@pytest.mark.parametrize("content", ["", "{", "5", "{}", '{"settings": {}}', '{"settings": 5, "row": {}}'])
def test_what_is_no_result_is_trained_anew(config: Callable, content: str):
    first = ablation.train(config(baselines=False))
    (result,) = Path(first["run"]).glob("checkpoints/mask-full-1337/result.json")
    result.write_text(content, encoding="utf-8")
    again = ablation.train(config(baselines=False))
    assert again["rows"][0]["accuracy"] == first["rows"][0]["accuracy"]
    assert json.loads(result.read_text(encoding="utf-8"))["row"] == again["rows"][0]


WRONG = (None, "x", [], {}, True, float("nan"), float("inf"), 10**400, 2**64, 0.5)


@pytest.mark.parametrize(("key", "kinds"), [("row", ROW), ("rows", BASELINE)])
def test_a_result_with_any_figure_of_a_wrong_kind_is_none(tmp_path: Path, capsys, key: str, kinds: dict):
    whole = {name: {str: "a", int: 3, float: 0.5}[kind] for name, kind in kinds.items()} | {"worst_errors": [1]}
    path = tmp_path / ("a-a-3/result.json" if key == "row" else "3.json")
    path.parent.mkdir(exist_ok=True)

    def read(row: object) -> object:
        path.write_text(json.dumps({"settings": {}, key: row if key == "row" else [row]}), encoding="utf-8")
        return read_result(path, key)

    assert read(whole) is not None
    spoilt = [{k: v for k, v in whole.items() if k != name} for name in kinds] + [None, [], 5]
    spoilt += [whole | {name: value} for name, kind in kinds.items() for value in WRONG
               if not (kind is float and value in (0.5, 2**64)) and not (kind is str and value == "x")]  # fmt: skip
    spoilt += [whole | {"seed": 4}]  # another's, which would name other files
    spoilt += [whole | {name: value} for name in ("pooling", "trainable") if name in kinds
               for value in ("x", "../a", "a\0", "\ud800")]  # fmt: skip
    for row in spoilt:
        assert read(row) is None, row
    for text in ("[" * 100_000, "9" * 10_000, '{"settings": {}, "row": {}, "rows": []}', "\ud800"):
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        assert read_result(path, key) is None
    assert "computed anew" in capsys.readouterr().err


def test_cells_of_other_weights_are_refused(config: Callable, pretrained: Path):
    ablation.train(config(base_model=pretrained, baselines=False))
    weights = model_directory(pretrained) / "model.safetensors"
    tensors = load_file(weights)
    tensors["transformer.h.0.mlp.c_fc.weight"][0, 0] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"holds mask-full-1337 of other weights than .*pretrained has now"):
        ablation.train(config(base_model=pretrained, baselines=False))


def test_cells_of_an_older_version_that_noted_neither_go_on(config: Callable, tmp_path: Path, capsys):
    first = ablation.train(config())
    for path in (tmp_path / "run" / "checkpoints" / "mask-full-1337" / "result.json",
                 tmp_path / "run" / "baselines" / "1337.json"):  # fmt: skip
        saved = json.loads(path.read_text(encoding="utf-8"))
        assert len(saved["settings"].pop("data_sha256")) == len(saved["settings"].pop("base_sha256")) == 64
        path.write_text(json.dumps(saved), encoding="utf-8")
    assert ablation.train(config()) == first  # the baselines' seconds included
    assert "finished earlier" in capsys.readouterr().err


def test_all_cells_are_looked_at_before_anything_is_written(config: Callable, tmp_path: Path):
    ablation.train(config(seed=2, baselines=False))
    before = files(tmp_path / "run")
    with pytest.raises(UserError, match="holds mask-full-2 with max_epoch=1, now max_epoch=2"):
        ablation.train(config(seed=1, seeds=2, max_epoch=2, baselines=False))  # the first of them is new
    assert files(tmp_path / "run") == before


def test_train_does_not_replace_ablates_cells_of_other_settings(config: Callable, tmp_path: Path):
    ablation.ablate(config(baselines=False))
    before = files(tmp_path / "run")
    with pytest.raises(UserError, match="holds mask-full-1337 with max_epoch=1, now max_epoch=2"):
        ablation.train(config(baselines=False, max_epoch=2))
    assert files(tmp_path / "run") == before
