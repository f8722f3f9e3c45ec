"""The words of a command, apart: what is a setting, what is a positional word, what belongs to which."""

from pathlib import Path

import pytest

from miaobi import seeds
from miaobi.command_line import place_words, split, take_config
from miaobi.config import RunConfig
from miaobi.corpus.config import PrepareConfig
from miaobi.errors import UserError
from miaobi.generate.config import SampleRequest
from miaobi.settings import find_config, load
from miaobi.train.config import EvalConfig


def sample(*words: str) -> SampleRequest:
    line = split(SampleRequest, seeds.SAMPLE, list(words))
    return load(SampleRequest, seeds.SAMPLE, "sample", place_words(SampleRequest, seeds.SAMPLE, line))[0]


def prepare(line: str) -> PrepareConfig:
    found = split(PrepareConfig, seeds.OURS, line.split())
    return load(PrepareConfig, seeds.OURS, "prepare", place_words(PrepareConfig, seeds.OURS, found))[0]


def refusal(read, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        read(*words)
    return str(caught.value)


def test_train_flags_take_both_spellings():
    line = split(RunConfig, seeds.TRAIN, ["--n_layer=3", "--n-head", "2", "c.yaml", "--sample_start=a=b"])
    assert line.given == [("n_layer", "3"), ("n_head", "2"), ("sample_start", "a=b")]
    assert line.words == ["c.yaml"]
    with pytest.raises(UserError, match="one CONFIG at most"):
        take_config(["a.yaml", "b.yaml"])


@pytest.mark.parametrize(
    ("line", "simplify", "skip_bad", "sources"),
    [
        ("--simplify a.txt --out o", True, False, ("a.txt",)),
        ("--simplify False a.txt --skip_bad True --out o", False, True, ("a.txt",)),
        ("a.txt --simplify=false --skip-bad b.txt --out o", False, True, ("a.txt", "b.txt")),
        ("--out o --simplify --skip_bad -- --odd.txt", True, True, ("--odd.txt",)),
    ],
)
def test_a_switch_may_be_bare_and_takes_true_or_false_alone(line, simplify, skip_bad, sources):
    cfg = prepare(line)
    assert (cfg.simplify, cfg.skip_bad, cfg.sources) == (simplify, skip_bad, sources)


def test_a_switch_of_three_positions_takes_its_word():
    for word, rest in (("auto", []), ("False", []), ("c.yaml", ["c.yaml"])):
        line = split(RunConfig, seeds.TRAIN, ["--compile", word])
        assert line.words == rest
        assert line.given == [("compile", "True" if rest else word)]


@pytest.mark.parametrize(
    ("words", "stop"),
    [
        (["--stop", "。", "out"], ("。",)),
        (["--stop=。", "--stop", "！", "out"], ("。", "！")),
        (["out", "--stop", "。", "！", "--seed=1"], ("。", "！")),
        (["out", "--stop=a", "--stop=--", "--stop="], ("a", "--", "")),
        (["out", "--stop", "-", "--stop", "-1"], ("-", "-1")),
        (["--out_dir=out", "--stop", "。", "！"], ("。", "！")),
    ],
)
def test_a_list_never_takes_the_model(words, stop):
    cfg = sample(*words)
    assert (cfg.model, cfg.stop) == ("out", stop)


def test_numbers_of_a_list_may_follow_each_other():
    for line in ("a b --weights 1 0.3 --out o", "--weights 1 0.3 a b --out o", "a b --weights=1 --weights=0.3 --out o"):
        assert (prepare(line).weights, prepare(line).sources) == ((1.0, 0.3), ("a", "b"))


@pytest.mark.parametrize("words", [["--compile", "False"], ["--init_from", "resume"], ["--compile=False"]])
def test_what_is_not_needed_takes_its_value_along(words):
    assert sample(*words, "out").model == "out"
    assert sample("out", *words).model == "out"


def test_a_model_is_given_once():
    assert sample("--out_dir=a").model == "a"
    assert "two models: a and --out_dir=b" in refusal(sample, "a", "--out_dir=b")
    assert "'b' is one word too many" in refusal(sample, "a", "b")
    assert sample().model == "", "the one that comes with miaobi"
    line = split(EvalConfig, seeds.MODEL, ["--out-dir", "run", "x.txt", "y.txt"])
    cfg, _ = load(EvalConfig, seeds.MODEL, "eval", place_words(EvalConfig, seeds.MODEL, line))
    assert (cfg.model, cfg.data) == ("run", ("x.txt", "y.txt"))


def test_negative_numbers_are_values_and_words():
    assert sample("out", "--seed", "-3").seed == -3
    assert sample("out", "--start", "-皇马").start == "-皇马"
    assert "two dashes" in refusal(sample, "out", "-seed=3")


def test_a_key_needs_its_value():
    assert "--n_layer needs a value" in refusal(split, RunConfig, seeds.TRAIN, ["--n_layer"])
    assert "--start needs a value" in refusal(split, SampleRequest, seeds.SAMPLE, ["--start", "--seed=1"])


@pytest.mark.parametrize("words", [["--outdir=x"], ["--outdir", "x"], ["--out_dri=x"], ["--n_layers"]])
def test_a_mistyped_key_suggests_the_right_one(miaobi, words):
    answer = miaobi("train", *words)
    assert answer.code == 2
    right = "n_layer" if "layer" in words[0] else "out_dir"
    assert f"Did you mean {right}?" in answer.err


def test_json_and_help_are_flags_of_every_verb_and_not_values():
    line = split(SampleRequest, seeds.SAMPLE, ["out", "--json", "--start", "-h", "--seed=1"])
    assert (line.as_json, line.asks_help, line.given) == (True, False, [("start", "-h"), ("seed", "1")])
    assert split(SampleRequest, seeds.SAMPLE, ["out", "-h"]).asks_help


@pytest.mark.parametrize("name", ["out", "sources", "tokenizer"])
def test_home_is_expanded_in_every_place(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = prepare("~/a.txt ~/b/*.txt --out=~/o --tokenizer=~/t")
    expected = {"out": tmp_path / "o", "sources": (f"{tmp_path}/a.txt", f"{tmp_path}/b/*.txt"),
                "tokenizer": f"{tmp_path}/t"}  # fmt: skip
    assert getattr(cfg, name) == expected[name]


@pytest.mark.parametrize("line", ["a.txt --out=", "a.txt --out o --tokenizer="])
def test_an_unset_variable_is_told_by_name(line):
    assert f"{line.split('--')[-1][:-1]} is empty" in refusal(prepare, line)


def test_a_shipped_configuration_is_found_by_its_seeds_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert find_config("config/train_TH.yaml").is_file()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "train_TH.yaml").write_text("seed: 1")
    assert find_config("config/train_TH.yaml") == Path("config/train_TH.yaml"), "the user's own file comes first"


@pytest.mark.parametrize(
    ("missing", "ours"),
    [
        ("config/train90M.yaml", "configs/chat-90m.yaml"),
        ("train300M_ddp.yaml", "configs/chat-300m.yaml"),
        ("config/train90M_fsdp.yaml", "configs/chat-90m.yaml"),
        ("config/sentimental2.yaml", "configs/sentiment.yaml"),
        ("config/train_TH.py", "configs/train_TH.yaml"),
    ],
)
def test_a_missing_configuration_of_a_seed_names_ours(missing, ours):
    assert ours in refusal(find_config, missing)
    assert find_config(ours).is_file()
