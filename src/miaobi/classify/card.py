"""What the README of a classifier says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from miaobi.classify.config import ClassifyConfig
from miaobi.classify.finetune import Experiment
from miaobi.classify.head import Judge
from miaobi.errors import number_of
from miaobi.model.card import Card, Metric

METRICS = {
    "accuracy": ("accuracy", "test accuracy"),
    "macro_f1": ("f1", "test macro F1"),
    "calibration_error": ("expected_calibration_error", "test calibration error"),
}
"""Figure of a result -> the hub's id of it, and its name."""
SHOWN = ("protocol", "block_size", "long_texts", "max_epoch", "batch_size", "dropout", "class_weights", "learning_rate")
USAGE = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # this directory, or the name of this model on the hub
model = AutoModelForSequenceClassification.from_pretrained(".")"""


def card_of(experiment: Experiment, judge: Judge, row: dict[str, Any], identity: dict[str, Any]) -> Card:
    """The card of the classifier of one cell. row: its figures; identity: what they depend on."""
    cfg: ClassifyConfig = experiment.cfg
    loads = judge.classifier.pooling == "mask"
    base = cfg.base_model
    return Card(
        name=Path(cfg.out_dir).resolve().name,
        summary=f"A classifier 分类器 of Chinese texts into {', '.join(judge.labels[:20])}, trained with miaobi 妙笔.",
        task="text-classification",
        library="transformers" if loads else "miaobi",
        tags=(judge.classifier.model.cfg.family,),
        license=cfg.license,
        base_model=None if Path(base).exists() else base,
        data=Path(cfg.data).name,
        metrics=[Metric(*METRICS[name], float(row[name])) for name in METRICS if name in row],
        usage=USAGE if loads else "",
        facts={
            "base model": Path(base).name if Path(base).exists() else base,
            "base model (SHA-256 of its weights)": identity.get("base_sha256"),
            "texts": Path(cfg.data).name,
            "texts (SHA-256)": identity.get("data_sha256"),
            "trained on": f"{number_of(row['train_rows'], 'piece')} of text",
            "tested on": f"{number_of(row['test_units'], 'text')}",
            "seed": row["seed"],
            "pooling": row["pooling"],
            "trainable": row["trainable"],
            "use": None if loads else "miaobi classify predict THIS_DIRECTORY 房间很干净，下次还来",
        },
        settings={key: getattr(cfg, key) for key in SHOWN if getattr(cfg, key) is not None},
    )
