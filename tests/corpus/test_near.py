"""Near duplicates, against sets of shingles and rensa's own index."""

import multiprocessing
import random
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rensa import RMinHash, RMinHashDeduplicator

from miaobi.corpus import characters, near


def sketches(documents: list[str]) -> np.ndarray:
    return near.sketches(*characters.of_documents(documents))


def shingles(document: str) -> set[str]:
    text = "".join(document.split())
    return {text[i : i + near.SHINGLE] for i in range(max(1, len(text) - near.SHINGLE + 1))}


def similarity(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def test_near_duplicates():
    rng = np.random.default_rng(0)
    originals = ["".join(chr(c) for c in rng.integers(0x4E00, 0x5E00, 400)) for _ in range(50)]
    close = [text[:200] + "改" + text[201:] for text in originals]  # 5 of about 396 shingles differ
    related = [text[:120] + "".join(chr(c) for c in rng.integers(0x4E00, 0x5E00, 280)) for text in originals]
    first = near.first_of_their_kind(sketches(originals + close + related + [" " + originals[0]]), 0.8)
    assert first[:50].all()
    assert not first[50:100].any()
    assert first[100:150].all()
    assert not first[150]
    assert near.first_of_their_kind(sketches([""]), 1.0).all()
    assert near.first_of_their_kind(sketches([]), 0.5).shape == (0,)


def test_sketches_estimate_the_similarity_of_shingles():
    draw = random.Random(0)
    text = [chr(draw.randrange(0x4E00, 0x5E00)) for _ in range(600)] + list("😀 \n")
    documents = ["".join(text)]
    for share in (0.005, 0.02, 0.05, 0.1, 0.2) * 8:
        documents.append("".join(chr(draw.randrange(0x4E00, 0x5E00)) if draw.random() < share else c for c in text))
    found = sketches(documents)
    estimated = (found[1:] == found[0]).mean(axis=1)
    true = np.array([similarity(shingles(documents[0]), shingles(document)) for document in documents[1:]])
    assert np.abs(estimated - true).max() < 0.16  # 128 values: a standard deviation of at most 0.044
    assert abs((estimated - true).mean()) < 0.02
    assert true.min() < 0.4 < 0.9 < true.max()


@given(st.lists(st.text("一二三 \n\u3000\u200b😀", max_size=12), max_size=12), st.randoms())
def test_a_sketch_depends_on_the_shingles_alone(documents, draw):
    """Not on white space, nor on the neighbours; documents without a shingle in common share (almost) nothing."""
    found = sketches(documents)
    assert found.shape == (len(documents), near.N_PERMUTATIONS)
    for document, sketch in zip(documents, found, strict=True):
        spaced = "".join(c + draw.choice(["", " ", "\u3000", "\n"]) for c in document)
        assert (sketches([spaced])[0] == sketch).all()
    for i, one in enumerate(documents):
        for j, other in enumerate(documents[:i]):
            shares = similarity(shingles(one), shingles(other))
            same = (found[i] == found[j]).mean()
            assert (same == 1) == (shares == 1)
            assert same > 0 if shares > 0.3 else same < 0.6


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 1.0])
def test_the_search_is_rensas(threshold):
    draw = random.Random(1)
    alphabet = [chr(0x4E00 + i) for i in range(200)]
    documents = []
    for _ in range(600):
        if documents and draw.random() < 0.6:
            share = draw.choice([0, 0.005, 0.01, 0.03, 0.1])
            old = draw.choice(documents)
            documents.append("".join(draw.choice(alphabet) if draw.random() < share else c for c in old))
        else:
            documents.append("".join(draw.choices(alphabet, k=draw.choice([3, 30, 300]))))
    index = RMinHashDeduplicator(threshold, near.N_PERMUTATIONS, True, num_bands=near.bands_for(threshold))
    hashes, expected = [], []
    for i, document in enumerate(documents):
        sketch = RMinHash(near.N_PERMUTATIONS, 42)
        sketch.update(shingles(document))
        hashes.append(sketch.digest())
        expected.append(index.add(str(i), sketch))
    assert near.first_of_their_kind(np.array(hashes, np.uint32), threshold).tolist() == expected
    assert 100 < sum(expected) < 550


@pytest.mark.skipif(sys.platform != "linux", reason="fork")
def test_sketches_before_and_after_a_fork():
    """rensa's pool of threads would not survive it."""
    documents = [f"{i} " + "字" * 50 + str(i * i) for i in range(2000)]
    here = sketches(documents)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert (pool.apply_async(sketches, (documents,)).get(timeout=60) == here).all()
