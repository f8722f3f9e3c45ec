"""Code points, their counts, and what is set aside, against Python's own strings."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miaobi.corpus import characters
from miaobi.corpus.characters import NONE, Aside

ANY = st.text(st.one_of(st.characters(), st.sampled_from("一\0\ud800\uffff\U00010000\U0010ffff")))


@given(ANY, st.integers(1, 5))
def test_points_and_counts(text, slice_size):
    points = characters.code_points(text)
    assert points.tolist() == list(map(ord, text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(characters, "_SLICE", slice_size)
        counts = characters.count_characters(points)
    assert {chr(c): int(counts[c]) for c in np.flatnonzero(counts)} == Counter(text)
    assert len(counts) == (65536 if max(text, default="a") < "\U00010000" else 0x110000)
    size = len(text.encode("utf-8", "surrogatepass"))
    assert characters.utf8_length(np.arange(len(counts)), counts) == size


@given(st.lists(ANY, max_size=4))
def test_documents_have_a_newline_behind_each(documents):
    points, lengths = characters.of_documents(documents)
    assert lengths.tolist() == list(map(len, documents))
    assert points.tolist() == [ord(c) for document in documents for c in document + "\n"]


@pytest.mark.parametrize("text", ["", "中文\n", "\uffff", "😀中文", "\0\0"])
def test_aside(tmp_path, text):
    """Several lie in one file, one behind the other."""
    points, lengths = characters.code_points(text), np.array([len(text)])
    asides = [Aside.put(tmp_path, points, lengths, NONE) for _ in range(3)]
    for aside in reversed(asides):
        assert aside.take().tolist() == points.tolist()
        assert characters.text_of(aside.take()) == text
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == 3 * len(text) * (4 if "😀" in text else 2)


def test_aside_of_16_bits_with_characters_beyond(tmp_path):
    points = np.array([0x4E00, 0xD801, 0xD7FF, 0xD800, 0xE000], np.uint16)
    aside = Aside.put(tmp_path, points, np.array([5]), np.array([0x1F600, 0x10FFFF], np.uint32))
    assert characters.text_of(aside.take()) == "一\U0010ffff\ud7ff😀\ue000"
