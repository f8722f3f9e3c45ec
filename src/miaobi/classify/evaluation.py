"""How good a classifier is: accuracy, macro-F1, calibration, its worst errors; and what simpler ones reach."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from miaobi.classify.data import Part, Split
from miaobi.classify.head import softmax

BINS = 15
WORST = 10


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean nats of the true labels (N,) under logits (N, L)."""
    shifted = logits - logits.max(-1, keepdims=True)
    nats = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(len(labels)), labels]
    return float(nats.mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T in [1/8, 8] whose logits / T have the least log loss (temperature scaling, arXiv:1706.04599)."""
    from scipy.optimize import minimize_scalar

    limit = np.log(8)
    optimum = minimize_scalar(lambda t: log_loss(logits / np.exp(t), labels), bounds=(-limit, limit), method="bounded")
    return float(np.exp(optimum.x))


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error (arXiv:1706.04599, equation 3): mean |confidence - accuracy| over equal bins of the
    confidence, weighted by their size. probabilities: (N, L).
    """
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[bin_of == b].sum() - right[bin_of == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(labels))


def scores(predicted: np.ndarray, labels: np.ndarray, count: int) -> dict[str, Any]:
    """accuracy, macro_f1 (over labels that occur) and confusion (rows: true, columns: predicted) of `count` labels."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    every = list(range(count))
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "confusion": confusion_matrix(labels, predicted, labels=every).tolist(),
    }


def judged(logits: np.ndarray, labels: np.ndarray, names: list[str], texts: list[str]) -> dict[str, Any]:
    """`scores`, loss, calibration_error, and worst_errors: wrong answers the classifier was surest of, with text."""
    probabilities = softmax(logits)
    predicted = logits.argmax(-1)
    wrong = np.flatnonzero(predicted != labels)
    wrong = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:WORST]
    errors = [{"text": texts[i], "label": names[labels[i]], "predicted": names[predicted[i]],
               "probability": round(float(probabilities[i, predicted[i]]), 4)} for i in wrong]  # fmt: skip
    return {
        **scores(predicted, labels, len(names)),
        "loss": log_loss(logits, labels),
        "calibration_error": calibration_error(probabilities, labels),
        "worst_errors": errors,
    }


def baselines(split: Split, names: list[str], seed: int) -> list[dict[str, Any]]:
    """The commonest label, and TF-IDF of character 1-3-grams with a linear SVM (C = 0.5), on the same train and test.

    Returns name, seed, accuracy, macro_f1, confusion and seconds of each.
    """
    results = []
    for name, predict in ("majority", commonest), ("svm", support_vectors):
        started = time.perf_counter()
        predicted = predict(split.train, split.test)
        seconds = round(time.perf_counter() - started, 2)
        results.append({"name": name, "seed": seed, **scores(predicted, split.test.labels, len(names)),
                      "seconds": seconds})  # fmt: skip
    return results


def commonest(train: Part, test: Part) -> np.ndarray:
    """The label that most of train has, for everything."""
    return np.full(len(test.labels), np.bincount(train.labels).argmax())


def support_vectors(train: Part, test: Part) -> np.ndarray:
    """Predictions of the SVM. A train part without a single n-gram that occurs twice gets the commonest label."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    grams = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    try:
        return make_pipeline(grams, LinearSVC(C=0.5)).fit(train.texts, train.labels).predict(test.texts)
    except ValueError:
        return commonest(train, test)


def paired_interval(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Mean of the differences ours - theirs over the same splits, and its 95% interval by Student's t.

    One split gives no interval: (difference, nan, nan).
    """
    from scipy.stats import t

    gaps = np.array(ours) - np.array(theirs)
    if len(gaps) < 2:
        return float(gaps.mean()), float("nan"), float("nan")
    half = t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
    return float(gaps.mean()), float(gaps.mean() - half), float(gaps.mean() + half)
