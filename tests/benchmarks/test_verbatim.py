"""The longest run of characters that texts share with a corpus, against trying every run."""

from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from benchmarks import verbatim
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.corpus.prepared import PreparedData
from miaobi.errors import UserError
from miaobi.generate.engine import load

FEW = st.text("甲乙丙\n𠮷", max_size=50)


def runs(text: str) -> set[str]:
    return {text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)}


@hypothesis.given(texts=st.lists(FEW, max_size=4), corpus=st.lists(FEW, max_size=4), piece=st.sampled_from([4, 7, 64]))
def test_the_longest_run_is_that_of_trying_all(texts: list[str], corpus: list[str], piece: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verbatim, "PIECE", piece)  # runs that lie across two pieces are found too
        length, run = verbatim.longest(texts, corpus)
    known = set().union(*map(runs, corpus))
    best = max((len(r) for text in texts for r in runs(text) if r in known), default=0)
    assert length == len(run) == best
    assert not run or any(run in text for text in texts)
    assert not run or run in known


@hypothesis.given(texts=st.lists(FEW, max_size=4), corpus=st.lists(FEW, max_size=3), length=st.integers(1, 6))
def test_which_texts_share_a_run_of_a_length(texts: list[str], corpus: list[str], length: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verbatim, "PIECE", 16)
        found = verbatim.shared(texts, corpus, length)
    known = {r for text in corpus for r in runs(text) if len(r) == length}
    assert found.keys() == {i for i, text in enumerate(texts) if runs(text) & known}
    assert all(run in known and run in texts[i] for i, run in found.items())


def test_a_corpus_is_all_of_its_training_documents_with_an_end_behind_each(prepared):
    data = PreparedData.open(prepared())
    text = "".join(verbatim.documents(data.train, data.tokenizer))
    assert text.count(verbatim.END) == data.train.documents
    assert len(text) - text.count(verbatim.END) == data.train.characters


def test_prompts_are_beginnings_of_validation_documents_and_the_openings_of_dialogues(prepared, tmp_path: Path):
    data = PreparedData.open(prepared())
    found = verbatim.prompts(data, 5)
    texts = "".join(verbatim.documents(data.val, data.tokenizer)).split(verbatim.END)
    assert found == [text[: verbatim.PROMPT] for text in texts[:5]]
    with pytest.raises(UserError, match=f"--samples={data.val.documents} at most"):
        verbatim.prompts(data, data.val.documents + 1)

    said = "".join(f"你好{c}\n我很好{c}\n再见{c}\n\n" for c in "甲乙丙丁戊己庚辛壬癸子丑寅卯辰巳午未申酉")
    (tmp_path / "talk.txt").write_text(said, encoding="utf-8")
    prepare([str(tmp_path / "talk.txt")], PrepareConfig(out=tmp_path / "talk", format="dialogue", workers=1))
    openings = verbatim.prompts(PreparedData.open(tmp_path / "talk"), 2)
    assert len(openings) == 2
    assert all(opening.startswith("你好") and len(opening) == 3 for opening in openings)


def test_what_a_model_wrote_is_measured_without_the_prompts(prepared, trained):
    data = PreparedData.open(prepared())
    args = verbatim.Args("", samples=8, max_new_tokens=20)
    texts = verbatim.write(load(trained("qwen3"), "cpu"), data, args)
    found = verbatim.measure(texts, verbatim.corpus_of([data]))
    assert found["samples"] == 8
    assert found["characters"] <= 8 * 20
    assert found["searched"] == data.train.characters + data.train.documents
    assert 1 <= found["longest"] == len(found["longest_text"]) <= 20
    assert (found["shares"][10] > 0) == (found["longest"] >= 10)
    assert found["shares"][30] == 0
