"""A tiny model that learned a few replies by heart, so that what a chat prints is known."""

import random
from pathlib import Path

import pytest

from miaobi.settings import load_config

BLOCK = 64
COUNTING = "一二三四五六七八九十"  # never ends: something to interrupt
REPLIES = {"你好": "你好呀", "你是谁": "我叫妙笔", "再见": "下次再聊", "我叫小明": "幸会"}
FORGOTTEN, REMEMBERED = "我不知道", "你叫小明"  # to 我叫什么, before and after 我叫小明


def dialogue(draw: random.Random) -> list[str]:
    """A few exchanges; seldom with a name, so that a window that begins after it misleads little."""
    asked = [draw.choice(["我叫什么", "我叫什么", "你好", "你是谁", "再见"]) for _ in range(draw.randint(1, 6))]
    if draw.random() < 0.3:
        asked[draw.randrange(len(asked))] = "我叫小明"
    said: list[str] = []
    for text in asked:
        said += [text, REPLIES.get(text, REMEMBERED if "我叫小明" in said else FORGOTTEN)]
    return [*said, "数数", COUNTING * 20] if draw.random() < 0.2 else said


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on dialogues; it answers REPLIES, and 我叫什么 from what was said before."""
    from miaobi.train.loop import train

    place = tmp_path_factory.mktemp("talker")
    draw = random.Random(0)
    text = "\n\n".join("\n".join(dialogue(draw)) for _ in range(1000))
    (place / "dialogues.txt").write_text(text + "\n", encoding="utf-8")
    settings = {
        "data": place / "dialogues.txt", "format": "dialogue", "dedup": "none", "packing": "stream",
        "out_dir": place / "run", "n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": BLOCK, "batch_size": 8,
        "max_iters": 240, "eval_interval": 240, "eval_iters": 2, "sample_tokens": 0, "device": "cpu",
        "dtype": "float32", "compile": False,
    }  # fmt: skip
    train(*load_config(None, [(key, str(value)) for key, value in settings.items()]))
    return place / "run"
