"""The smallest model directory."""

from collections import Counter
from pathlib import Path

import pytest

from miaobi.corpus.tokenizer import Tokenizer
from miaobi.model.checkpoint import save_model
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer

TOKENIZER = Tokenizer.train_char(Counter("皇马赢得比赛"))
CFG = ModelConfig(family="gpt2", n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=TOKENIZER.vocab_size)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory."""
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", Transformer(CFG), TOKENIZER, (TOKENIZER.eot_id,))
    return tmp_path / "model"
