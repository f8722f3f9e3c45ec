"""The last stage of models/retrain.sh, on runs of seconds: what it writes, and what it refuses."""

import dataclasses
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from models.steps import preference, release
from tests.conftest import sports_text

from miaobi import released
from miaobi.classify import ablation, head
from miaobi.classify.config import load_config
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.errors import UserError
from miaobi.generate.engine import load

SCRIPT = Path(release.__file__).parents[1] / "retrain.sh"


@pytest.fixture(scope="module")
def work(trained: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What retrain.sh leaves, of three tiny runs."""
    from miaobi.settings import load_config as train_config
    from miaobi.train.loop import train

    place = tmp_path_factory.mktemp("work")
    (place / "hongloumeng.txt").write_text(sports_text(120), encoding="utf-8")
    said = "\n\n".join("\n".join(text.split("。")) for text in sports_text(120, seed=1).split("\n\n"))
    (place / "dgk_tv_subtitles.txt.xz").write_bytes(lzma.compress(said.encode()))
    prepare([str(place / "hongloumeng.txt")], PrepareConfig(out=place / "base_data", workers=1))
    prepare([str(place / "dgk_tv_subtitles.txt.xz")], PrepareConfig(
        out=place / "chat_data", format="dialogue", tokenizer=str(place / "base_data"), workers=1))  # fmt: skip
    common = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8, "max_iters": 10,
              "eval_interval": 10, "eval_iters": 1, "sample_tokens": 0, "device": "cpu", "compile": False}  # fmt: skip
    for name, more in {"base": {}, "chat": {"init_from": str(place / "base_run")}}.items():
        given = common | {"data": str(place / f"{name}_data"), "out_dir": str(place / f"{name}_run")} | more
        train(*train_config(None, [(key, str(value)) for key, value in given.items()]))
    lm = load(str(place / "chat_run"), "cpu", "float32")
    preference.save(place / "chat_preferred", lm.model, lm.tokenizer, lm.end_ids)
    row = dict.fromkeys([*preference.SHARES, "distinct_2", "characters"], 0.5)
    result = {"pairs": 12, "sampling": {}, "figures": {"before": row, "after": row | {"good": 0.75}}}
    (place / "chat_preferred" / preference.RESULT).write_text(json.dumps(result), encoding="utf-8")
    rows = [{"label": ("负面", "正面")[i % 2], "text": f"皇马{('输掉', '赢得')[i % 2]}比赛{i}"} for i in range(60)]
    (place / "sentiment.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = {"base_model": place / "base_run", "data": place / "sentiment.jsonl", "out_dir": place / "sentiment_run",
             "max_epoch": 1, "pooling": "mean", "device": "cpu", "dtype": "float32"}  # fmt: skip
    ablation.train(load_config(None, [(key, str(value)) for key, value in given.items()])[0])
    return place


@pytest.fixture(scope="module")
def family(work: Path) -> Path:
    """What it makes of them."""
    release.release(release.Args(work, str(work / "out"), samples=4))
    return work / "out"


def card(family: Path, name: str) -> str:
    return (family / name / "README.md").read_text(encoding="utf-8")


def test_three_models_that_answer_where_none_is_named(family: Path, monkeypatch: pytest.MonkeyPatch, miaobi: Callable):
    monkeypatch.setattr(released, "shipped", lambda kind, name: family / name)
    sampled = miaobi("sample", "--start=皇马", "--num_samples=1", "--max_new_tokens=3", "--json", "--device=cpu")
    assert json.loads(sampled.out)["samples"][0]["text"].startswith("皇马")
    judged = miaobi("classify", "predict", "--input=皇马赢得比赛", "--json", "--device=cpu")
    assert json.loads(judged.out)["predictions"][0]["label"] in ("正面", "负面")
    assert load(family / "chat").model.quantized == "int8"
    assert sorted(path.name for path in family.rglob("*.gguf")) == ["miaobi-base-q8_0.gguf", "miaobi-chat-q8_0.gguf"]


def test_whole_numbers_judge_as_the_weights_before_them(family: Path, work: Path):
    import torch

    texts = [f"皇马赢得比赛{i}" for i in range(20)]
    judges = [
        head.load(place, torch.device("cpu"), torch.float32) for place in (family / "sentiment", work / "sentiment_run")
    ]
    ours, theirs = (judge.probabilities(texts) for judge in judges)
    assert abs(ours - theirs).max() < 0.05


def test_cards_say_where_the_texts_are_from_and_what_was_measured(family: Path, work: Path):
    for name in released.NAMES:
        text = card(family, name)
        assert "license: cc-by-sa-4.0" in text
        assert re.search(
            r"\| hongloumeng\.txt \| 红楼梦, novel of the Qing \| public domain \| [\d,]+ \| 100% \|", text
        )
        assert "· Limits" in text
        assert "· Not for" in text
        assert str(work) not in text, "paths of the machine"
    assert "| seed | 1337 |" in card(family, "base")
    assert "dgk\\_tv\\_subtitles.txt.xz (" in card(family, "chat")
    assert "| after | 75.0% | 50.0% |" in card(family, "chat")
    assert "Quality of replies" not in card(family, "base")
    assert re.search(r"Of 4 texts that it wrote, the longest run .* has \d+ characters", card(family, "chat"))
    row = json.loads(next((work / "sentiment_run" / "checkpoints" / "best").glob("result.json")).read_text())["row"]
    assert f"| 这个模型 this model | {row['accuracy']:.1%} | {row['macro_f1']:.3f} |" in card(family, "sentiment")
    assert "linear SVM" in card(family, "sentiment")


def test_the_same_command_again_replaces_the_earlier_files(family: Path, work: Path):
    before = {path.name: path.read_bytes() for path in (family / "base").glob("*.safetensors")}
    (family / "base" / "left.txt").touch()
    release.write_quantized(release.Args(work, str(family)), "base")
    assert {path.name: path.read_bytes() for path in (family / "base").glob("*.safetensors")} == before
    assert not (family / "base" / "left.txt").exists()


def test_a_text_without_a_licence_is_not_released(work: Path, tmp_path: Path):
    shutil.copytree(work / "base_data", tmp_path / "base_data")
    shutil.copytree(work / "chat_data", tmp_path / "chat_data")
    file = tmp_path / "chat_data" / "manifest.json"
    file.write_text(file.read_text(encoding="utf-8").replace("dgk_tv_subtitles", "someones_diary"), encoding="utf-8")
    with pytest.raises(UserError, match=r"someones_diary\.txt\.xz has no line in models/sources\.csv"):
        release.release(release.Args(tmp_path, str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_left_out_and_then_refused(
    work: Path, family: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    args = dataclasses.replace(release.Args(work), out=str(family))
    release.write_gguf(args, "base")
    monkeypatch.setattr(release, "LARGEST", release.size(args.out))
    release.write_gguf(args, "base")
    assert (family / "base" / "miaobi-base-q8_0.gguf").exists()
    monkeypatch.setattr(release, "LARGEST", release.size(args.out) - 1)
    release.write_gguf(args, "base")
    assert not (family / "base" / "miaobi-base-q8_0.gguf").exists()
    assert "miaobi-base-q8_0.gguf is left out" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="a shell")
def test_the_script_is_sound_shell_and_names_what_it_needs(tmp_path: Path):
    shellcheck = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    without = {name: value for name, value in os.environ.items() if name != "DATA"}
    asked = subprocess.run(["sh", str(SCRIPT)], cwd=tmp_path, env=without, capture_output=True, text=True)
    assert asked.returncode != 0
    assert "DATA=texts models/retrain.sh" in asked.stderr


def test_every_text_that_the_script_prepares_has_a_licence():
    script = SCRIPT.read_text(encoding="utf-8")
    taken = {Path(name).name for name in re.findall(r'(?<!=)"\$DATA/([^"]+)"', script)}
    listed = {
        line.partition(",")[0] for line in (SCRIPT.parent / "sources.csv").read_text(encoding="utf-8").splitlines()
    }
    assert len(taken) == 10
    assert taken == listed - {"file"}
