"""What a message shows of a value from a file: enough to know it again, never more work or room than a line's."""

import time

import torch
from hypothesis import given
from hypothesis import strategies as st

from miaobi.errors import BRIEF, LONGEST, UserError, brief, names_listed

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
)


@given(plain)
def test_it_is_a_line_of_some_length(value):
    text = brief(value)
    assert len(text) <= BRIEF
    assert "\n" not in text


def test_small_values_are_their_repr():
    for value in (None, True, 3, -2.5, "皇马", [1, "a"], {"n_layer": 6}, {}, [], (1,), float("nan")):
        assert brief(value) == repr(value)


def test_it_takes_no_time_whatever_the_value():
    bomb: list = ["x"]
    for _ in range(64):
        bomb = [bomb, bomb]
    mapping = {"a": "b"}
    for _ in range(64):
        mapping = {"x": mapping, "y": mapping}
    endless: list = []
    endless.append(endless)
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    values = (bomb, mapping, endless, deep, 10**100_000, "x" * 10**8, b"x" * 10**8, list(range(10**6)),
              torch.zeros(1000), [torch.zeros(1000)])  # fmt: skip
    began = time.perf_counter()
    for value in values:
        assert len(brief(value)) <= BRIEF
    assert time.perf_counter() - began < 1
    while deep:
        deep = deep.pop()  # its own end would be as deep


def test_an_object_is_not_asked_for_its_repr():
    class Loud:
        def __repr__(self) -> str:
            raise AssertionError("asked")

    class Number(int):
        __repr__ = Loud.__repr__

    class Word(str):
        __str__ = __repr__ = Loud.__repr__

    assert brief([Loud(), Number(3), Word("x")]) == "[<Loud>, 3, 'x']"


def test_names_of_others_are_listed_in_bounds():
    assert names_listed([]) == "none"
    assert names_listed(["a", 3, None]) == "a, 3, None"
    assert names_listed(["x" * 5000]) == "x" * 77 + "..."
    assert names_listed(map(str, range(1000))).endswith("18, 19 and 980 more")


def test_no_message_is_a_page():
    error = UserError("a" * 10**6 + "what to do")
    assert len(str(error)) <= LONGEST
    assert str(error).startswith("aaa")
    assert str(error).endswith("what to do")
    assert str(UserError("x" * LONGEST)) == "x" * LONGEST
