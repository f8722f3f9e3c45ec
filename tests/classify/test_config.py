"""small-gpt's YAML files and ours, read as `miaobi classify` reads them."""

from pathlib import Path

import pytest

from miaobi.classify.config import ClassifyConfig, load_config, settings_of
from miaobi.errors import UserError
from miaobi.settings import load_config as load_run_config
from miaobi.settings import shipped_config

SMALL_GPT = """\
data_path: data/train.txt
sentimental_data_path: data/ChnSentiCorp_htl_all.csv
train_percent: 0.8
block_size: 256
vocab_size: 7587
n_layer: 26
n_head: 15
n_embd: 960
dropout: 0.05
bias: True
compile: True
use_mask: {mask}
max_epoch : 20
tensorboard_path :  ./tensorboard/any&name
device: cuda
eval_freq: 100
frozen: {frozen}
train_batch: 24
test_batch: 8
grad_clip: 1.0
lr : 5e-5
warmup_steps: 100
decay_steps: 5000
min_lr: 6e-6
weight_decay : 1e-1
beta1: 0.9
beta2: 0.95
checkpoint_root: ./checkpoints
save_freq: 1919810
base_model: checkpoints/pretrained/cpt300M.pth
resume_from: NULL
seed :  114514
"""


@pytest.mark.parametrize(
    ("mask", "frozen", "pooling", "trainable"),
    [("True", "False", "mask", "full"), ("True", "True", "mask", "last_block"), ("False", "False", "no_mask", "full")],
)
def test_small_gpts_files_mean_what_they_meant(tmp_path: Path, mask: str, frozen: str, pooling: str, trainable: str):
    path = tmp_path / "sentimental.yaml"
    path.write_text(SMALL_GPT.format(mask=mask, frozen=frozen), encoding="utf-8")
    cfg, origin = load_config(path, [])
    assert cfg == ClassifyConfig(
        base_model="checkpoints/pretrained/cpt300M.pth", corpus="data/train.txt", data="data/ChnSentiCorp_htl_all.csv",
        protocol="as-published", train_fraction=0.8, pooling=pooling, trainable=trainable, block_size=256, dropout=0.05,
        max_epoch=20, batch_size=24, learning_rate=5e-5, min_lr=6e-6, warmup_iters=100, lr_decay_iters=5000,
        weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0, eval_interval=100, out_dir="./checkpoints",
        device="cuda", seed=114514, tensorboard_path="./tensorboard/any&name",
    )  # fmt: skip
    assert origin["protocol"].startswith("small-gpt's way")
    assert load_config(path, [("protocol", "corrected")])[0].protocol == "corrected"


def test_without_small_gpts_keys_the_protocol_is_the_corrected_one():
    assert load_config(None, [("data", "x.csv"), ("lr", "1e-3")])[0] == ClassifyConfig(data="x.csv", learning_rate=1e-3)


def test_the_shipped_configurations_are_read():
    cfg, _ = load_config(shipped_config("sentiment.yaml"), [("base_model", "out")])
    assert (cfg.base_model, cfg.protocol) == ("out", "corrected")
    base, _ = load_run_config(shipped_config("sentiment-base.yaml"), [])
    middle, _ = load_config(shipped_config("sentiment-middle.yaml"), [])
    assert (middle.base_model, middle.pooling, middle.long_texts) == (base.train.out_dir, cfg.pooling, "truncate")
    assert base.model.block_size >= middle.block_size


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("poling", "mask", "unknown key 'poling'. Did you mean pooling?"),
        ("pooling", "max", "it must be 'mask', 'no_mask', 'mean'"),
        ("use_mask", "maybe", "it must be True or False"),
        ("seeds", "0", "seeds is 0; it must be at least 1"),
        ("block_size", "3", "needs at least 4 tokens"),
        ("train_fraction", "1.0", "give a share above 0"),
        ("layer_decay", "1.5", "give a share above 0"),
        ("label_smoothing", "1", "from 0 up to below 1"),
        ("learning_rate", "0", "positive and finite"),
        ("patience", "-1", "cannot be negative"),
        ("lora_rank", "0", "lora_rank is 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(key: str, value: str, message: str):
    with pytest.raises(UserError) as e:
        load_config(None, [(key, value)])
    assert message in str(e.value)


def test_two_names_of_one_key_are_refused(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("use_mask: True\npooling: mean\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"line 2: pooling means pooling, which was given at .*line 1; keep one"):
        load_config(path, [])


def test_cells_share_settings_whatever_their_place_in_the_grid():
    a = ClassifyConfig(pooling="mask", trainable="head", seed=1, seeds=5, out_dir="a", device="cpu")
    assert settings_of(a) == settings_of(ClassifyConfig())
    assert settings_of(a) != settings_of(ClassifyConfig(max_epoch=6))
