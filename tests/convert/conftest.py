"""Checkpoints of small-gpt and nanoGPT as files, made by an implementation of their formats in originals.py."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from originals import SMALL_GPT, Original, chat_text, naive_vocabulary


@dataclass
class Trained:
    """A checkpoint file of a model that knows its corpus."""

    original: Original
    path: Path
    corpus: Path
    vocabulary: list[str]


@pytest.fixture(scope="session")
def small_gpt(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trained by the original's own forward until it knows the dialogues; small-gpt's padding included."""
    folder = tmp_path_factory.mktemp("small-gpt")
    text = chat_text()
    corpus = folder / "train.txt"
    corpus.write_text(text, encoding="utf-8")
    vocabulary = naive_vocabulary(text)
    ids = {token: id_ for id_, token in enumerate(vocabulary)}
    rows = [[ids["<sep>" if c == "\n" else c] for c in dialogue] for dialogue in text.strip().split("\n\n")]
    model = Original.random(SMALL_GPT, True, len(vocabulary), std=0.05)
    del model.state["lm_head.weight"]
    parameters = {name: tensor.requires_grad_() for name, tensor in model.state.items()}
    model.state["lm_head.weight"] = model.state["transformer.wte.weight"]
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for step in range(150):
        row = torch.tensor([*rows[step % len(rows)], 2, 2])
        loss = torch.nn.functional.cross_entropy(model.logits(row[:-1]), row[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.state = {name: tensor.detach() for name, tensor in model.state.items()}
    torch.save(model.small_gpt("_orig_mod."), folder / "cpt4000.pth")
    return Trained(model, folder / "cpt4000.pth", corpus, vocabulary)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[dict, str], Path]:
    """`saved(checkpoint, "cpt.pth")`: the file."""

    def save(checkpoint: dict, name: str) -> Path:
        torch.save(checkpoint, tmp_path / name)
        return tmp_path / name

    return save


class Bomb:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    """A file at `bomb.path` would tell that it went off."""
    assert pickle.loads(pickle.dumps(Bomb(tmp_path / "works"))) is None
    assert (tmp_path / "works").exists(), "a bomb that cannot go off proves nothing"
    return Bomb(tmp_path / "executed")
