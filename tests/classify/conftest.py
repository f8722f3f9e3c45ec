"""A table of labelled reviews, and cells that train on it in a second."""

from collections.abc import Callable
from pathlib import Path

import pytest
from review_tables import reviews, write

from miaobi.classify.config import load_config


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 120 reviews, some longer than the models' block of 32."""
    return write(tmp_path_factory.mktemp("reviews") / "reviews.csv", reviews(long=60))


@pytest.fixture
def config(table: Path, trained: Callable[..., Path], tmp_path: Path) -> Callable:
    """`config(pooling="mean")`: a cell that takes a second."""

    def make(family: str = "gpt2", tokenizer: str = "char", **values: object):
        given = {
            "base_model": trained(family, tokenizer), "data": table, "out_dir": tmp_path / "run", "device": "cpu",
            "dtype": "float32", "max_epoch": 1, "batch_size": 16, "learning_rate": 1e-2, "dropout": 0.0,
        } | values  # fmt: skip
        return load_config(None, [(key, str(value)) for key, value in given.items()])[0]

    return make
