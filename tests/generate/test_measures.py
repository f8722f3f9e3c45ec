"""Measures of what a model writes, against counts by hand."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaobi.generate import measures
from miaobi.generate.engine import Completion

TEXT = st.text("好你我", max_size=30)


@given(TEXT, st.integers(1, 4))
def test_the_commonest_sequence_is_counted_wherever_it_begins(text, n):
    counts = Counter(text[i : i + n] for i in range(len(text)) if len(text[i : i + n]) == n)
    assert measures.most_frequent(text, n) == max(counts.values(), default=0)


@given(st.lists(TEXT), st.integers(1, 3))
def test_distinct_is_different_ones_over_all(texts, n):
    grams = [text[i : i + n] for text in texts for i in range(len(text)) if len(text[i : i + n]) == n]
    assert measures.distinct(texts, n) == (len(set(grams)) / len(grams) if grams else 0)


@pytest.mark.parametrize(
    ("text", "does_loop", "does_repeat"),
    [
        ("你好呀，今天天气不错", False, False),
        ("哈哈哈哈哈哈哈哈", False, True),  # laughter is no loop; but it repeats its 4-gram
        ("你好你好你好", True, False),
        ("我不知道。我不知道！我不知道？", False, True),
        ("我不知道。我不知道！", False, False),
        ("", False, False),
    ],
)
def test_loops_and_repetitions(text, does_loop, does_repeat):
    assert (measures.loops(text), measures.repeats(text)) == (does_loop, does_repeat)
    assert measures.is_good(Completion(text, 1, "stop")) == (not does_loop and not does_repeat)
    assert not measures.is_good(Completion(text, 1, "length"))


def test_figures_of_some_texts():
    found = measures.figures(["好好", "今天天气很不错"], [True, False])
    assert (found["repetition"], found["stop_rate"], found["samples"], found["characters"]) == (0.0, 0.5, 2, 4.5)
    assert measures.figures(["你好你好你好你好你好"], [False])["repetition"] == 1.0
    assert measures.figures([], [])["stop_rate"] == 0
