"""YAML and flags as nanoGPT's and small-gpt's users write them, and errors that name file, line and key."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miaobi.command_line import split, take_config
from miaobi.config import RunConfig
from miaobi.errors import UserError
from miaobi.seeds import TRAIN
from miaobi.settings import flatten, load_config, read_yaml, save_config, sections

SMALL_GPT_90M = """\
# data config
data_path: data/train.txt
train_percent: 0.8
# model config
block_size: 256
vocab_size: 7587
n_layer: 12
n_head: 12
n_embd: 768
dropout: 0.2
bias: True
compile: True
# training config
max_epoch : 1919810
tensorboard_path :  ./tensorboard
device: cuda
eval_freq: 500
eval_steps: 1000
train_batch: 80
test_batch: 8
grad_clip: 1.0
{extra}
# learning rate
lr : 3e-4
warmup_steps: 2000
decay_steps: 100000
min_lr: 6e-6


# AdamW optimizer
weight_decay : 1e-1
beta1: 0.9
beta2: 0.95
# checkpoint config
checkpoint_root: ./checkpoints
save_freq: 4000 # save when global_step % save_freq == 0
resume_from: NULL
# other config
seed :  114514"""

NANOGPT_TRAIN = {  # every key of nanoGPT's train.py, as its users would type it
    "out_dir": "out", "eval_interval": "2000", "log_interval": "1", "eval_iters": "200", "eval_only": "False",
    "always_save_checkpoint": "True", "init_from": "scratch", "wandb_log": "False", "wandb_project": "owt",
    "wandb_run_name": "gpt2", "dataset": "openwebtext", "gradient_accumulation_steps": "40", "batch_size": "12",
    "block_size": "1024", "n_layer": "12", "n_head": "12", "n_embd": "768", "dropout": "0.0", "bias": "False",
    "learning_rate": "6e-4", "max_iters": "600000", "weight_decay": "1e-1", "beta1": "0.9", "beta2": "0.95",
    "grad_clip": "1.0", "decay_lr": "True", "warmup_iters": "2000", "lr_decay_iters": "600000", "min_lr": "6e-5",
    "backend": "nccl", "device": "cuda", "dtype": "bfloat16", "compile": "True",
}  # fmt: skip


def yaml_file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def load(tmp_path: Path, text: str = "", **given: str) -> dict:
    cfg, _ = load_config(yaml_file(tmp_path / "c.yaml", text), list(given.items()))
    return flatten(cfg)


# --- the seeds' own files and flags ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        "",
        "ddp: True\nlocal_rank: -1\nworld_size: 2",
        "fsdp: True\nlocal_rank: -1\nworld_size: 2\nsharding_strategy: FULL_SHARD",
    ],
    ids=["train90M", "train90M_ddp", "train90M_fsdp"],
)
def test_small_gpts_yaml_runs_unchanged(tmp_path, capsys, extra):
    values = load(tmp_path, SMALL_GPT_90M.format(extra=extra))
    assert values["data"] == "data/train.txt"
    assert values["val_fraction"] == pytest.approx(0.2)
    assert (values["n_layer"], values["n_head"], values["n_embd"], values["block_size"]) == (12, 12, 768, 256)
    assert (values["vocab_size"], values["dropout"], values["bias"], values["compile"]) == (7587, 0.2, True, True)
    assert (values["max_epochs"], values["eval_interval"], values["eval_iters"]) == (1919810, 500, 1000)
    assert (values["batch_size"], values["gradient_accumulation_steps"]) == (80, None)
    assert (values["learning_rate"], values["min_lr"]) == (3e-4, 6e-6)
    assert (values["warmup_iters"], values["lr_decay_iters"]) == (2000, 100000)
    assert (values["out_dir"], values["save_interval"], values["resume_from"]) == ("./checkpoints", 4000, None)
    assert (values["seed"], values["weight_decay"], values["family"]) == (114514, 0.1, "gpt2")
    said = capsys.readouterr().err
    assert values["tensorboard_path"] == "./tensorboard"
    for key in ["test_batch", *(line.split(":")[0] for line in extra.splitlines())]:
        assert re.search(rf"\b{key}\b[^;]* \(", said), key
    assert said.count("\n") == said.count("not needed: ") == 1, "one line for all"


def test_of_several_ranks_the_first_one_says_what_is_not_needed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load(tmp_path, SMALL_GPT_90M.format(extra="ddp: True"))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "given", "place", "keys"),
    [("test_batch: 4\nddp: True\n", [], "{file}", "test_batch .*; ddp "),
     ("seed: 1\n", ["backend"], "command line", "backend "),
     ("test_batch: 4\n", ["backend", "local_rank"], "{file} and command line", "backend .*test_batch .*local_rank "),
     ("backend: gloo\n", ["backend"], "{file} and command line", "backend "),
     ("seed: 1\n", ["max_iters"], "", "")],
)  # fmt: skip
def test_what_is_not_needed_is_one_line_that_says_where_it_stands(tmp_path, capsys, text, given, place, keys):
    file = yaml_file(tmp_path / "c.yaml", text)
    load_config(file, [(key, "1") for key in given])
    said = capsys.readouterr().err
    assert said.count("\n") == bool(place)
    if place:
        assert re.fullmatch(rf"{re.escape(place.format(file=file))}: not needed: {keys}.*\n", said)


def test_small_gpts_epochs_are_not_cut_short_by_a_default(tmp_path):
    """Its files give max_epoch and nothing else: our default max_iters must not end the run before them."""
    from miaobi.train.recipe import total_steps

    cfg, _ = load_config(yaml_file(tmp_path / "c.yaml", SMALL_GPT_90M.format(extra="")), [("max_epoch", "30")])
    assert total_steps(cfg, windows=80_000) == 30 * 1000
    both, _ = load_config(tmp_path / "c.yaml", [("max_epoch", "30"), ("max_iters", "700")])
    assert total_steps(both, windows=80_000) == 700


def test_small_gpts_other_keys_are_explained(tmp_path, capsys):
    text = "sentimental_data_path: a.csv\nuse_mask: False\nfrozen: False\nbase_model: x.pth\n"
    load(tmp_path, text)
    assert (
        "sentimental_data_path, base_model, use_mask, frozen (a setting of `miaobi classify`)"
        in capsys.readouterr().err
    )


def test_every_key_of_nanogpts_train_py_is_understood(capsys):
    cfg, origin = load_config(None, list(NANOGPT_TRAIN.items()))
    values = flatten(cfg)
    said = capsys.readouterr().err
    for key in NANOGPT_TRAIN:
        assert key in values or key == "dataset" or f" {key} (" in said, key
    assert values["data"] == "data/openwebtext"
    assert cfg.train.global_batch == 480
    assert cfg.train.micro_batch == 12
    assert (values["learning_rate"], values["compile"], values["bias"]) == (6e-4, True, False)
    assert origin["learning_rate"] == "command line"


def test_the_seeds_train_line(tmp_path):
    """python train.py config/train_TH.py ... with .yaml for .py."""
    flags = ("--device=cuda --compile=False --eval_iters=200 --log_interval=10 --block_size=256 --batch_size=32 "
             "--n_layer=40 --n_head=8 --n_embd=512 --max_iters=30000 --lr_decay_iters=30000 --dropout=0.4")  # fmt: skip
    line = split(RunConfig, TRAIN, [str(Path(__file__).parents[1] / "configs/train_TH.yaml"), *flags.split()])
    cfg, _ = load_config(take_config(line.words), line.given)
    values = flatten(cfg)
    assert (values["family"], values["n_layer"], values["n_head"], values["n_embd"]) == ("gpt2", 40, 8, 512)
    assert (values["dropout"], values["bias"], values["block_size"]) == (0.4, False, 256)
    assert values["learning_rate"] == 2e-5
    assert values["min_lr"] < 2e-5
    assert (values["data"], values["out_dir"]) == ("data/TH", "TH_out")


def test_nanogpts_micro_batch_is_the_global_batch_where_nothing_is_accumulated():
    for sizes, expected in ((["32", None], (32, 32)), (["12", "5"], (60, 12))):
        pairs = [(k, v) for k, v in zip(("batch_size", "gradient_accumulation_steps"), sizes, strict=True) if v]
        train = load_config(None, pairs)[0].train
        assert (train.global_batch, train.micro_batch) == expected


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2e-5", "2E-5", "2.0e-05", ".00002", "0.00002"])
def test_numbers_are_yaml_1_2(tmp_path, text):
    assert load(tmp_path, f"learning_rate: {text}")["learning_rate"] == 2e-5
    assert load(tmp_path, "", learning_rate=text)["learning_rate"] == 2e-5


def test_whole_numbers_may_be_written_as_floats_and_never_rounded(tmp_path):
    assert load(tmp_path, "max_iters: 3e4")["max_iters"] == 30000
    with pytest.raises(UserError, match="whole number"):
        load(tmp_path, "max_iters: 2.5")


@pytest.mark.parametrize("text", ["None", "null", "NULL"])
@pytest.mark.parametrize("key", ["resume_from", "vocab_size", "min_lr", "wandb_run_name"])
def test_nothing_can_be_said_on_the_command_line(tmp_path, key, text):
    file = {"resume_from": "resume_from: runs/a", "vocab_size": "vocab_size: 500", "min_lr": "min_lr: 1e-5",
            "wandb_run_name": "wandb_run_name: x"}[key]  # fmt: skip
    assert load(tmp_path, file, **{key: text})[key] is None


def test_large_whole_numbers_keep_their_digits(tmp_path):
    assert load(tmp_path, "seed: 9007199254740993")["seed"] == 2**53 + 1
    assert load(tmp_path, "", seed="9007199254740993")["seed"] == 2**53 + 1


def test_the_command_line_wins_over_the_file_over_the_defaults(tmp_path):
    values = load(tmp_path, "model:\n  n_layer: 3\nseed: 5", seed="6")
    assert (values["n_layer"], values["seed"], values["n_head"]) == (3, 6, RunConfig().model.n_head)


def test_family_follows_the_keys(tmp_path):
    assert load(tmp_path, "n_layer: 3")["family"] == "qwen3"
    assert load(tmp_path, "bias: False")["family"] == "gpt2"
    assert load(tmp_path, "", train_batch="8")["family"] == "gpt2"
    assert load(tmp_path, "family: qwen3\ntrain_batch: 8")["family"] == "qwen3"


@pytest.mark.parametrize("key", ["out_dir", "data", "sample_start", "wandb_run_name", "field"])
@pytest.mark.parametrize(
    "text",
    ["20240101_001", "007", "1e3", "1.50", "0x1F", "2024-13-45", "2024-01-01", "12:30:00", "on", "off", "yes", "no",
     "True", "1_000", "+1", ".5", "0o17", "!!int abc", "!!str 12", "'null'", '"~a"', "=", "皇马 run", "a,b"],
)  # fmt: skip
def test_text_keeps_its_spelling(tmp_path, key, text):
    written = re.sub(r"^!!\w+ ", "", text).strip("'\"")
    assert load(tmp_path, f"{key}: {text}")[key] == written
    assert load(tmp_path, f"train: {{seed: 3}}\n{key}: {text} # a comment")[key] == written
    if text == written and not text.startswith("-"):
        assert load(tmp_path, "", **{key: text})[key] == written


@pytest.mark.parametrize("text", ["null", "Null", "NULL", "None"])
def test_a_word_for_nothing_is_text_where_there_is_always_text(tmp_path, text):
    assert load(tmp_path, f"out_dir: {text}")["out_dir"] == text
    assert load(tmp_path, f"wandb_run_name: {text}")["wandb_run_name"] is None
    assert load(tmp_path, f"wandb_run_name: '{text}'")["wandb_run_name"] == text


@pytest.mark.parametrize("key", ["out_dir", "data", "init_from", "resume_from", "mirror", "tokenizer"])
def test_home_is_expanded_in_files_and_flags_alike(tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for values in ({"text": f"{key}: ~/a b"}, {"text": f"train:\n  seed: 1\n{key}: '~/a b'"}, {key: "~/a b"}):
        assert load(tmp_path, **values)[key] == str(tmp_path / "home" / "a b")
    assert load(tmp_path, "sample_start: ~/a")["sample_start"] == "~/a", "no place"
    assert load(tmp_path, "", mirror="s3://a/~b")["mirror"] == "s3://a/~b"


@pytest.mark.parametrize("key", ["out_dir", "data", "resume_from", "init_from"])
def test_an_empty_place_is_an_error_by_name(tmp_path, key):
    for values in ({"text": f"{key}: ''"}, {key: ""}, {key: " "}):
        assert f"{key} is empty" in refusal(tmp_path, **{"text": "", **values})
    if key in ("out_dir", "init_from"):
        assert key in refusal(tmp_path, f"seed: 1\n{key}:\n")


# --- mistakes ----------------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, text: str, **given: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, **given)
    return str(caught.value)


def test_a_mistyped_key_suggests_the_right_one_with_file_and_line(tmp_path):
    message = refusal(tmp_path, "seed: 1\nmodel:\n  n_layers: 3\n")
    assert "c.yaml, line 3" in message
    assert "'n_layers'" in message
    assert "Did you mean n_layer?" in message
    assert "Did you mean max_iters?" in refusal(tmp_path, "", max_iter="3")
    assert "Did you mean" not in refusal(tmp_path, "", xyzzy="3")


@pytest.mark.parametrize(
    ("text", "expectation"),
    [
        ("n_layer: many", "a whole number"),
        ("n_layer: [1, 2]", "a whole number"),
        ("n_layer: True", "a whole number"),
        ("n_layer: null", "a whole number"),
        ("dropout: high", "a number"),
        ("bias: 1", "True or False"),
        ("family: mamba", "'gpt2', 'qwen3', 'llama'"),
        ("compile: sometimes", "'auto' or True or False"),
        ("out_dir: {a: 1}", "text"),
    ],
)
def test_a_wrong_type_names_key_line_and_expectation(tmp_path, text, expectation):
    message = refusal(tmp_path, f"seed: 1\n{text}\n")
    assert "c.yaml, line 2" in message
    assert text.split(":")[0] in message
    assert expectation in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "line 1"),
        ("a: 1\n b: 2: 3", "line 2"),
        ("- seed\n- 1", "key: value"),
        ("seed: 1\nseed: 2", "seed"),
        ("seed: 1\nn_layer: 3\x07", "line 2: not valid YAML: U+0007"),
        ("seed: 1\n5: 3", "line 2: unknown key '5'"),
        ("model:\n  n_layer: 1\nn_layer: 2", "given twice"),
        ("lr: 1e-3\nlearning_rate: 2e-3", "learning_rate"),
        ("seed: 1\nmodel: 3", "line 2"),
    ],
)
def test_broken_files_are_errors_for_the_user(tmp_path, text, words):
    message = refusal(tmp_path, text)
    assert words in message
    assert "c.yaml" in message


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    yaml_file(tmp_path / "train_TH.yaml", "seed: 1")
    with pytest.raises(UserError, match=r"Did you mean train_TH\.yaml\?"):
        load_config(tmp_path / "train_HT.yaml", [])
    with pytest.raises(UserError, match="nowhere"):
        load_config(tmp_path / "nowhere" / "c.yaml", [])


def test_a_directory_or_a_gbk_file_is_not_a_configuration(tmp_path):
    (tmp_path / "gbk.yaml").write_bytes("out_dir: 皇马".encode("gbk"))
    with pytest.raises(UserError, match="UTF-8"):
        load_config(tmp_path / "gbk.yaml", [])
    with pytest.raises(UserError, match=str(tmp_path)):
        load_config(tmp_path, [])


def test_validation_errors_of_the_sections_come_through(tmp_path):
    assert "not divisible by n_head" in refusal(tmp_path, "n_embd: 100\nn_head: 7")


def test_keys_that_come_by_a_merge_count_and_are_named_with_their_mapping(tmp_path):
    file = yaml_file(tmp_path / "c.yaml", "model:\n  <<: {n_layer: 3, n_embd: 48}\n  n_head: 2\n")
    cfg, origin = load_config(file, [])
    assert (cfg.model.n_layer, cfg.model.n_embd, cfg.model.n_head) == (3, 48, 2)
    assert origin["n_head"].endswith("c.yaml, line 3")
    cfg, _ = load_config(yaml_file(tmp_path / "c.yaml", "model: {<<: {n_layer: 2}, n_head: 2}"), [])
    assert (cfg.model.n_layer, cfg.model.n_head) == (2, 2)
    with pytest.raises(UserError, match=r"c\.yaml, line 1: unknown key 'n_layers'"):
        load_config(yaml_file(tmp_path / "c.yaml", "model: {<<: {n_layers: 2}}"), [])


@pytest.mark.parametrize("text", ["train:\n", "train:\n  # max_iters: 5\nmodel:\n  n_layer: 3\n", "data:\n"])
def test_a_section_whose_keys_are_all_commented_out_is_empty(tmp_path, text):
    cfg, _ = load_config(yaml_file(tmp_path / "c.yaml", text), [])
    assert cfg.train == RunConfig().train


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n_layer: " + "9" * 5000, "a whole number of at most 64 bits"),
        ("seed: 0x" + "f" * 5000, "a whole number"),
        ("learning_rate: " + "9" * 5000, "positive and finite"),
        ("learning_rate: x" + "9" * 5000, "a number"),
        ("x" * 900 + ": 1", "unknown key"),
        ("<<: 3", "a mapping"),
        ("a: &a [1]\n<<: *a", "a mapping"),
        ("<<: [1, 2]", "a mapping"),
        ("data: !!python/object:os.system [a]", "text"),
        ("out_dir: !mine a", "leave out !mine"),
        ("? [a, b]\n: 1", "a key is a word"),
        ('out_dir: "a\\0b"', "NUL"),
        (f"out_dir: {'妙' * 86}", "too long"),
        (f"out_dir: a/{'b' * 256}/c", "too long"),
        (f"out_dir: {'a/' * 2048}", "too long"),
        ('out_dir: "a\\ud800"', "half a character"),
        ("out_dir: " + "[" * 900, "nested too deeply"),
        ("out_dir: " + "[" * 200 + "]" * 200, "a list"),
        ("a: &a {<<: *a, x: 1}", "unknown key 'a'"),
        ("%YAML 3.0\n---\nseed: 1", "c.yaml"),
        ("seed: 1\n---\nseed: 2", "c.yaml"),
        ("- seed", "key: value"),
    ],
)
def test_strange_files_end_in_a_short_error(tmp_path, text, words):
    message = refusal(tmp_path, text)
    assert words in message
    assert len(message) < 600 + len(str(tmp_path))


def test_aliases_of_aliases_do_not_grow(tmp_path):
    bomb = ["l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    bomb += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert len(refusal(tmp_path, "\n".join([*bomb, "out_dir: *l11"]))) < 600 + len(str(tmp_path))
    merges = ["m0: &m0 {seed: 3}"]
    merges += [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    assert len(refusal(tmp_path, "\n".join([*merges, "model: *m11"]))) < 600 + len(str(tmp_path))


YAML_PARTS = [
    "seed: 1\n", "model:\n", "  n_layer: 3\n", "&a ", "*a", "<<: ", "{", "}", "[", "]", ",", "!!int ", "!!set ", "? ",
    "- ", "!!binary ", "!!timestamp ", "out_dir: ", "|\n", ">-\n  x\n", "'", '"', "#", "\t", "---\n", "...",
    "%TAG ! x\n", "\\u", "2024-13-45", "0x", "1e999", ".nan", "~", "null", "\r", "\x85", "9" * 400, "😀", "@", "`",
]  # fmt: skip
CONTENTS = st.lists(st.sampled_from(YAML_PARTS), max_size=12).map(lambda parts: "".join(parts).encode())


@given(st.binary(max_size=60) | CONTENTS)
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_settings_or_an_error_for_the_user(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    message = ""
    try:
        load_config(path, [])
    except UserError as e:
        message = str(e)
    assert len(message) < 600 + 2 * len(str(tmp_path))


# --- config.yaml -------------------------------------------------------------------------------------------------


def test_keys_are_unique_across_sections():
    default = RunConfig()
    total = sum(len(vars(getattr(default, s))) for s in vars(default))
    assert len(sections()) == total


def test_the_saved_configuration_says_where_each_value_came_from(tmp_path):
    source = yaml_file(tmp_path / "mine.yaml", "data: d\n\nlr: 2e-5\n")
    cfg, origin = load_config(source, [("n_layer", "3")])
    save_config(tmp_path / "config.yaml", cfg, origin)
    lines = {line.split(":")[0].strip(): line for line in (tmp_path / "config.yaml").read_text().splitlines()}
    assert "# command line" in lines["n_layer"]
    assert "mine.yaml, line 3" in lines["learning_rate"]
    assert "# default" in lines["n_head"]
    assert "# auto" in lines["family"]


NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12) | st.sampled_from(
    [
        "null",
        "None",
        "True",
        "1e-3",
        "007",
        "2024-01-01",
        "# no",
        "a: b",
        "- x",
        "'",
        '"',
        "\n",
        "第一\n第二\n",
        "  ",
        "😀",
        "~",
        "{}",
        "@",
        "\t",
    ]
)


@given(
    text=NAMES,
    learning_rate=st.none() | st.floats(1e-12, 1e6),
    dropout=st.floats(0, 0.999),
    seed=st.integers(-(2**60), 2**60),
    compile_=st.sampled_from(["auto", True, False]),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_saved_configuration_reads_back_equal(tmp_path, text, learning_rate, dropout, seed, compile_):
    from miaobi.settings import with_values

    values = {"sample_start": text, "learning_rate": learning_rate, "dropout": dropout, "seed": seed,
              "compile": compile_, "family": "qwen3", "wandb_project": text, "wandb_run_name": text}  # fmt: skip
    cfg = with_values(RunConfig(), values)
    save_config(tmp_path / "config.yaml", cfg, {"seed": "command line"})
    again, _ = load_config(None, list(read_yaml(tmp_path / "config.yaml")[0].items()))
    assert again == cfg


def test_a_crash_while_writing_leaves_the_old_configuration(tmp_path, monkeypatch):
    """config.yaml is written again whenever a run goes on: a kill there must not make the run unusable."""
    from ruamel.yaml import YAML

    cfg, origin = load_config(None, [("n_layer", "3")])
    save_config(tmp_path / "config.yaml", cfg, origin)

    def dies(self, data, stream=None, **kwargs):
        stream.write("data:\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(YAML, "dump", dies)
    with pytest.raises(KeyboardInterrupt):
        save_config(tmp_path / "config.yaml", cfg, origin)
    again, _ = load_config(None, list(read_yaml(tmp_path / "config.yaml")[0].items()))
    assert again == cfg
