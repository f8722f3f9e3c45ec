"""Figures against scikit-learn, scipy and naive versions of them."""

import math

import numpy as np
import pytest
import torch
from review_tables import reviews
from scipy.stats import ttest_rel
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import f1_score
from sklearn.svm import LinearSVC

from miaobi.classify.data import Part, Split
from miaobi.classify.evaluation import (
    baselines,
    calibration_error,
    fit_temperature,
    judged,
    log_loss,
    paired_interval,
)


def part(rows: list[tuple[str, str]]) -> Part:
    return Part([text for _, text in rows], np.array([int(label) for label, _ in rows]), [], np.arange(len(rows)))


def test_log_loss_is_torchs_cross_entropy():
    logits, labels = np.random.default_rng(0).normal(0, 50, (40, 3)), np.arange(40) % 3
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)).item()
    assert log_loss(logits, labels) == pytest.approx(expected)


def test_temperature_finds_how_much_too_sure_the_logits_are():
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 2, (4000, 3))
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = np.array([draw.choice(3, p=p) for p in chances])
    assert fit_temperature(3 * logits, labels) == pytest.approx(3, rel=0.1)
    right = logits.argmax(-1)  # never wrong: no temperature is cold enough, the limit holds
    assert fit_temperature(logits, right) == pytest.approx(1 / 8, rel=0.01)


def test_calibration_error_is_that_of_the_paper():
    probabilities = np.array([[0.9, 0.1], [0.91, 0.09], [0.4, 0.6], [0.35, 0.65], [0.0, 1.0]])
    labels = np.array([0, 1, 1, 1, 1])
    # Fifteenths: 0.6 falls into the tenth, 0.65 with it; 0.9 and 0.91 into the fourteenth; 1.0 into the last.
    by_hand = 2 / 5 * abs(0.905 - 0.5) + 2 / 5 * abs(0.625 - 1.0) + 1 / 5 * 0.0
    assert calibration_error(probabilities, labels) == pytest.approx(by_hand)


def test_worst_errors_are_the_surest_wrong_answers_with_their_text():
    logits = np.array([[3.0, 0.0], [0.0, 4.0], [2.0, 0.0], [0.0, 1.0]])
    found = judged(logits, np.array([1, 1, 1, 0]), ["坏", "好"], ["甲", "乙", "丙", "丁"])
    assert [error["text"] for error in found["worst_errors"]] == ["甲", "丙", "丁"]
    first = found["worst_errors"][0]
    assert (first["label"], first["predicted"]) == ("好", "坏")
    assert first["probability"] == pytest.approx(1 / (1 + math.exp(-3)), abs=1e-4)
    assert found["accuracy"] == 0.25
    assert found["confusion"] == [[0, 1], [2, 1]]
    assert found["macro_f1"] == pytest.approx(f1_score([1, 1, 1, 0], [0, 1, 0, 1], average="macro"))


def test_baselines_are_the_commonest_label_and_the_svm():
    train, test = part(reviews(80)), part(reviews(60, seed=9)[40:])
    majority, svm = baselines(Split(train, test, test), ["0", "1"], 7)
    assert (majority["name"], svm["name"], svm["seed"]) == ("majority", "svm", 7)
    assert majority["accuracy"] == pytest.approx(float((test.labels == 1).mean()))
    grams = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=2, sublinear_tf=True)
    machine = LinearSVC(C=0.5).fit(grams.fit_transform(train.texts), train.labels)
    assert svm["accuracy"] == pytest.approx(machine.score(grams.transform(test.texts), test.labels))
    assert svm["accuracy"] > majority["accuracy"]


def test_the_svm_without_a_repeated_gram_answers_the_commonest_label():
    train = part([("1", "甲"), ("1", "乙"), ("0", "丙")])
    assert baselines(Split(train, train, train), ["0", "1"], 0)[1]["accuracy"] == pytest.approx(2 / 3)


def test_the_paired_interval_is_scipys():
    ours, theirs = [0.92, 0.93, 0.91, 0.94, 0.92], [0.90, 0.90, 0.89, 0.91, 0.88]
    mean, low, high = paired_interval(ours, theirs)
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert math.isnan(paired_interval([0.9], [0.8])[1])
