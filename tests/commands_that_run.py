"""The commands of READMEs and documentation, run as they are printed, on small stand-ins for what a reader has."""

import json
import pickle
import re
import signal
import subprocess
import time
from pathlib import Path
from urllib.request import urlopen

import torch
from originals import NANOGPT, SMALL_GPT, Original, chat_text, naive_vocabulary
from tests.processes import Process

from miaobi.corpus.template import CHATML_TEMPLATE
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.demo import chatterbot, peoples_daily
from miaobi.model.checkpoint import save_model
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer

ROOT = Path(__file__).parents[1]
SMALLER = {  # appended to the documents' lines, so that they take a second
    "train": "--max_iters=2 --eval_interval=2 --eval_iters=1 --n_layer=1 --n_head=2 --n_embd=32 --batch_size=2 "
    "--block_size=32 --device=cpu --dtype=float32 --sample_tokens=8",
    "sample": "--max_new_tokens=8 --device=cpu",
    "eval": "--device=cpu",
    "plan": "--n_layer=1 --n_head=2 --n_embd=32 --batch_size=2 --block_size=32",
    "demo": "--quick",
    "chat": "--max_new_tokens=8 --device=cpu",
    "serve": "--device=cpu --port=0",
    "classify": "--device=cpu",
    "classify train": "--max_epoch=1 --seeds=1 --block_size=32",
    "classify ablate": "--max_epoch=1 --seeds=1 --block_size=32",
}
SMALLER_DEMO = """
from miaobi import cli, demo
demo.QUICK.update(max_iters=2, eval_interval=2)
demo.QUICK_CHAT.update(max_iters=2, eval_interval=2)
cli.main()
"""
REVIEWS = [f"{label},第{i}间房{said}" for label, said in ((1, "很好"), (0, "太吵")) for i in range(24)]
TYPED = "你好\nexit\n"  # to every chat

SMALL_GPT_YAML = """\
data_path: data/train.txt
train_percent: 0.8
block_size: 32
vocab_size: 400
n_layer: 2
n_head: 2
n_embd: 32
dropout: 0.2
bias: True
device: cuda
train_batch: 80
lr: 3e-4
decay_steps: 100000
checkpoint_root: ./checkpoints
resume_from: {resume_from}
seed: 114514
"""


def furnish(place: Path) -> None:
    """What a reader of the documents has: configs, texts, and what nanoGPT and small-gpt left behind."""
    (place / "configs").mkdir()
    for config in ROOT.glob("configs/*.yaml"):
        (place / "configs" / config.name).write_bytes(config.read_bytes())
    text = "\n\n".join(peoples_daily()[:40])  # about 24,000 characters
    (place / "input.txt").write_text(text, encoding="utf-8")
    dialogues = chatterbot()
    (place / "chat.txt").write_text("\n\n".join(map("\n".join, dialogues)) + "\n", encoding="utf-8")
    shapes = [
        lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
        lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
        lambda q, a: {"instruction": q, "input": "", "output": a},
    ]
    records = [json.dumps(shapes[i % 3](*said[:2]), ensure_ascii=False) for i, said in enumerate(dialogues)]
    (place / "sft.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    (place / "reviews.csv").write_text("\n".join(["label,review", *REVIEWS]) + "\n", encoding="utf-8")
    (place / "data" / "TH").mkdir(parents=True)
    (place / "data" / "TH" / "input.txt").write_bytes(text.encode("gbk"))
    leave_checkpoints(place)
    leave_hub_model(place / "Qwen" / "Qwen3-0.6B")


def leave_checkpoints(place: Path) -> None:
    """nanoGPT's out/ckpt.pt and meta.pkl; small-gpt's data/train.txt, YAML files and checkpoint."""
    characters = sorted(set((place / "input.txt").read_text(encoding="utf-8")))
    (place / "out").mkdir()
    torch.save(Original.random(NANOGPT, False, len(characters)).nanogpt(), place / "out" / "ckpt.pt")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters))}
    (place / "data" / "TH" / "meta.pkl").write_bytes(pickle.dumps(meta))
    (place / "data" / "train.txt").write_text(chat_text(), encoding="utf-8")
    pretrained = place / "checkpoints" / "pretrained"
    pretrained.mkdir(parents=True)
    original = Original.random(SMALL_GPT, True, len(naive_vocabulary(chat_text())), std=0.02)
    torch.save(original.small_gpt("_orig_mod."), pretrained / "cpt300M.pth")
    (place / "config").mkdir()
    for name, resume_from in (("train90M", ""), ("chat300M", "checkpoints/pretrained/cpt300M.pth")):
        text = SMALL_GPT_YAML.format(resume_from=resume_from)
        (place / "config" / f"{name}.yaml").write_text(text, encoding="utf-8")


def leave_hub_model(directory: Path) -> None:
    """A model under the name of one of the hub's: what exists here is not looked for there."""
    tokenizer = Tokenizer.train_char(dict.fromkeys("你好\nassistantuser", 1))
    tokenizer.config["chat_template"] = CHATML_TEMPLATE
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": tokenizer.vocab_size}
    directory.mkdir(parents=True)
    save_model(directory, Transformer(ModelConfig(family="qwen3", **sizes)), tokenizer, (tokenizer.eot_id,))


def smaller(words: list[str]) -> list[str]:
    """Flags that make a command take seconds: those of its verb, and those of its kind."""
    return [*SMALLER.get(words[0], "").split(), *SMALLER.get(" ".join(words[:2]), "").split()]


def run(words: list[str], place: Path) -> subprocess.CompletedProcess:
    """`miaobi WORDS` made small, to its end; a server until its page was seen and Ctrl-C pressed."""
    start = ["-c", SMALLER_DEMO] if words[0] == "demo" else ["-m", "miaobi"]
    process = Process([*start, *words, *smaller(words)], cwd=place, input=TYPED)
    if words[0] == "serve":
        while not (ready := re.search(r"^ready: (http://\S+)", process.said(), re.MULTILINE)):
            assert process.poll() is None, process.said()
            time.sleep(0.02)
        with urlopen(ready[1]) as page:
            assert "妙笔" in page.read().decode()
        process.send_signal(signal.SIGINT)
    return process.wait()
