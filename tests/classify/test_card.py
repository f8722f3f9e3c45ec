"""The card of a classifier: its figures, and how it is loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from miaobi.classify import ablation


@pytest.mark.parametrize(("pooling", "library"), [("mask", "transformers"), ("mean", "miaobi")])
def test_a_classifier_has_a_card_with_its_figures(config: Callable, tmp_path: Path, pooling: str, library: str):
    result = ablation.train(config(pooling=pooling, license="apache-2.0", baselines=False))
    card = ModelCard.load(tmp_path / "run" / "checkpoints" / "best" / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-classification", library)
    assert card.data.license == "apache-2.0"
    figures = {found.metric_type: found.metric_value for found in card.data.eval_results}
    assert figures["accuracy"] == pytest.approx(result["rows"][0]["accuracy"], abs=1e-6)
    assert f"pooling | {pooling}" in card.text
    assert ("AutoModelForSequenceClassification" in card.text) == (library == "transformers")
    assert str(tmp_path) not in card.content
