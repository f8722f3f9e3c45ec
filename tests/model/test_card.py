"""Cards that the hub's own library reads, whatever is written in them, and that never replace a person's words."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.model.card import CARD, Card, Metric, edited, render, write_card

CARD_OF = Card("run", "A model.", metrics=[Metric("bits_per_character", "bits", 5.0)], data="text", samples=["中国"])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}", encoding="utf-8")
    return tmp_path / "model"


@given(text=st.text(max_size=60), sample=st.text(max_size=200))
def test_any_text_stays_text_and_the_metadata_stay_whole(tmp_path_factory, text: str, sample: str):
    place = tmp_path_factory.getbasetemp() / "any"
    place.mkdir(exist_ok=True)
    (place / "tokenizer.json").write_text("{}", encoding="utf-8")
    metrics = [Metric("accuracy", "accuracy", 0.5)]
    written = render(
        Card(text or "x", text, data=text or "x", metrics=metrics, facts={text: text}, samples=[sample]), place
    )
    found = ModelCard(written)
    assert found.data.language == "zh"
    assert found.data.eval_results[0].metric_value == 0.5
    assert "\n# " in found.text
    fences = [line for line in found.text.split("\n") if line.startswith("```")]
    assert len(fences) >= 2


@pytest.mark.parametrize("sample", ["```\n# owned\n```", "````", "a\n---\nlicense: mit", "\x1b[31m\u202e", "\ud800"])
def test_a_sample_cannot_leave_its_block(directory: Path, sample: str):
    text = render(Card("run", "", samples=[sample]), directory)
    lines = text.split("\n")
    opening = next(line for line in lines if line.endswith("text") and line.startswith("```"))
    closing = opening.removesuffix("text")
    inside = lines[lines.index(opening) + 1 : len(lines) - 1 - lines[::-1].index(closing)]
    assert closing not in inside
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert ModelCard(text).data.license is None


@pytest.mark.parametrize("cell", ["a | b", "<img src=x>", "[x](javascript:1)", "line\nbreak", "`code`"])
def test_a_value_cannot_leave_its_cell(directory: Path, cell: str):
    text = render(Card("run", "", facts={"key": cell}), directory)
    (line,) = [line for line in text.split("\n") if line.startswith("| key |")]
    assert line.replace("\\|", "").count("|") == 3
    assert "<img" not in text.replace("\\<", "")


def test_a_card_that_a_person_edited_is_kept_and_this_is_said(directory: Path, tmp_path: Path, capsys):
    write_card(directory, CARD_OF)
    assert edited(directory / CARD) is None
    new = tmp_path / "new"
    new.mkdir()
    (new / "tokenizer.json").write_text("{}", encoding="utf-8")
    write_card(new, CARD_OF, directory)
    assert capsys.readouterr().err == ""
    theirs = (directory / CARD).read_text(encoding="utf-8").replace("A model.", "My model.")
    (directory / CARD).write_text(theirs, encoding="utf-8")
    write_card(new, CARD_OF, None, directory)
    assert (new / CARD).read_text(encoding="utf-8") == theirs
    assert "was edited: it is kept" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"mine", b"", b"\xff\xfe", "我的".encode("gbk")])
def test_a_card_of_anybody_else_is_edited(directory: Path, content: bytes):
    (directory / CARD).write_bytes(content)
    assert edited(directory / CARD) == content


def test_line_ends_of_windows_are_no_edit(directory: Path):
    write_card(directory, CARD_OF)
    (directory / CARD).write_bytes((directory / CARD).read_bytes().replace(b"\n", b"\r\n"))
    assert edited(directory / CARD) is None


def test_a_checkpoint_has_a_card_with_its_figures(train, prepared, tmp_path: Path):
    out = tmp_path / "my_run"
    result = train(data=prepared(), out_dir=out, license="cc-by-4.0")
    card = ModelCard.load(pointed(out / "checkpoints" / "last") / CARD)
    assert (card.data.language, card.data.library_name, card.data.pipeline_tag) == (
        "zh",
        "transformers",
        "text-generation",
    )
    assert card.data.license == "cc-by-4.0"
    assert card.data.model_name == "my_run"
    figures = {found.metric_type: found.metric_value for found in card.data.eval_results}
    assert figures["bits_per_character"] == pytest.approx(result["val_bits_per_char"], abs=1e-5)
    assert figures["loss"] == pytest.approx(result["val_loss"], abs=1e-5)
    for fact in ("seed | 1337", "torch 2", "n\\_layer | 2", "git "):
        assert fact in card.text, fact
    assert str(tmp_path) not in card.content  # nor any other path of this machine


def test_the_words_of_a_person_go_on_with_the_run(train, prepared, tmp_path: Path):
    out = tmp_path / "run"
    train(data=prepared(), out_dir=out)
    (pointed(out / "checkpoints" / "last") / CARD).write_text("我的模型", encoding="utf-8")
    train(data=prepared(), out_dir=out, max_iters=40)
    assert pointed(out / "checkpoints" / "last").name == "step-40"
    assert (out / "checkpoints" / "last" / CARD).read_text(encoding="utf-8") == "我的模型"


@pytest.mark.parametrize("license", ["MIT", "Apache 2.0", "", "-x", "a" * 80, "x\ny"])
def test_a_license_that_the_hub_does_not_know_is_refused(train, prepared, tmp_path: Path, license: str):
    with pytest.raises(UserError, match="license"):
        train(data=prepared(), out_dir=tmp_path / "run", license=license)


def test_a_license_given_later_is_no_other_run(train, prepared, tmp_path: Path):
    train(data=prepared(), out_dir=tmp_path / "run")
    assert train(data=prepared(), out_dir=tmp_path / "run", license="mit")["step"] == 20
