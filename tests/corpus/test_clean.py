"""Duplicates, normalising, cutting and the split rule, against naive versions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from miaobi.corpus import clean


@given(st.lists(st.sampled_from(["一", "二 ", " 二", "三\n", "三", "", "四" * 50]), max_size=40))
def test_first_occurrences_like_a_set(documents):
    digests, sizes = clean.content_digests(documents)
    seen: set[str] = set()
    naive = [not (d.strip() in seen or seen.add(d.strip())) for d in documents]
    assert clean.first_occurrences(digests).tolist() == naive
    assert sizes.tolist() == [len(d.encode()) for d in documents]


def test_split_depends_on_content_only():
    documents = [f"文章{i}" for i in range(5000)]
    digests, _ = clean.content_digests(documents)
    val = clean.is_validation(digests, 0.1)
    assert 400 < val.sum() < 600
    order = np.random.default_rng(0).permutation(len(documents))
    assert (clean.is_validation(digests[order], 0.1) == val[order]).all()
    assert (val <= clean.is_validation(digests, 0.2)).all()  # a larger share keeps what was there
    spaced, _ = clean.content_digests([f"  {d}\n" for d in documents])
    assert (clean.is_validation(spaced, 0.1) == val).all()


def test_normalize_and_simplify():
    assert clean.normalize_text("ＡＢＣ１２３，漢字") == "ＡＢＣ１２３，漢字"
    assert clean.normalize_text("ＡＢＣ１２３漢字", "nfkc") == "ABC123漢字"
    assert clean.normalize_text("頭髮發財，龍\n馬\x00😀", simplify=True) == "头发发财，龙\n马\x00😀"


@given(st.lists(st.integers(0, 9000), max_size=12), st.booleans())
def test_cut_keeps_all_text(lengths, sentences):
    text = "\n".join(("他说。好" if sentences else "好") * (n // (4 if sentences else 1)) for n in lengths)
    pieces = clean.cut_document(text)
    if len(text) > 1.5 * clean.PIECE_CHARACTERS:
        assert "".join(pieces).replace("\n", "") == text.replace("\n", "")
        assert all(len(p) <= 3.5 * clean.PIECE_CHARACTERS for p in pieces)
    else:
        assert pieces == [text]


def test_cut_at_paragraph_ends():
    paragraphs = [f"第{i}段" + "字" * 300 for i in range(100)]
    pieces = clean.cut_document("\n".join(paragraphs))
    assert [line for piece in pieces for line in piece.split("\n")] == paragraphs
    assert all(3000 < len(piece) < 7000 for piece in pieces)
