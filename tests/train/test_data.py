"""A run knows its text by content: what changed is said by name, and no other text is learned in silence."""

import gzip
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import miaobi
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.settings import load_config
from miaobi.train.loop import Run

ONE, OTHER = "红楼梦里人。\n\n石头记中事！\n\n", "前锋赢得冠军。\n\n门将错过比赛！\n\n"


@pytest.fixture
def start(train, tmp_path):
    """`start(text)`: train on a file or folder into tmp_path/run."""

    def run(data: Path, **values: object) -> dict:
        settings = {"out_dir": tmp_path / "run", "dedup": "none", "block_size": 8, "max_iters": 1}
        return train(data=data, **settings | values)

    return run


@pytest.fixture
def killed_before_a_checkpoint(monkeypatch, start):
    """The same, killed when its data is prepared and nothing is trained."""

    def run(data: Path, **values: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Run, "go", lambda *_: {})
            start(data, **values)

    return run


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text * 200, encoding="utf-8")
    return path


def vocabulary(tmp_path: Path) -> str:
    return (tmp_path / "run" / "data" / "tokenizer.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", ["another file", "edited", "edited, same size", "a file more", "a file less"])
def test_before_anything_is_trained_the_data_follows_the_text(
    start, killed_before_a_checkpoint, tmp_path, capsys, change
):
    folder = tmp_path / "text"
    data = write(folder / "a.txt", ONE)
    if change == "a file less":
        write(folder / "b.txt", OTHER)
    whole = change.startswith("a file")
    killed_before_a_checkpoint(folder if whole else data)
    if change == "another file":
        data = write(tmp_path / "b.txt", OTHER)
    elif change == "edited":
        write(data, OTHER)
    elif change == "edited, same size":
        stat = data.stat()
        data.write_text((ONE * 200).replace("红", "青"), encoding="utf-8")
        os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "a file more":
        write(folder / "b.txt", OTHER)
    else:
        (folder / "b.txt").unlink()
    capsys.readouterr()
    start(folder if whole else data)
    said = capsys.readouterr().err
    name = "b.txt" if change in ("another file", "a file more", "a file less") else "a.txt"
    assert "prepared again" in said
    assert name in said
    expected = {"edited, same size": "青", "a file less": "红"}.get(change, "锋")
    assert expected in vocabulary(tmp_path)
    assert ("锋" in vocabulary(tmp_path)) == (expected == "锋")


@pytest.mark.parametrize("change", ["edited", "another file", "a file more"])
def test_once_training_has_begun_another_text_is_refused_by_name(start, tmp_path, change):
    folder = tmp_path / "text"
    data = write(folder / "a.txt", ONE)
    start(folder)
    before = vocabulary(tmp_path)
    if change == "edited":
        write(data, OTHER)
    elif change == "another file":
        data.rename(folder / "z.txt")
        write(folder / "z.txt", OTHER)
    else:
        write(folder / "b.txt", OTHER)
    name = {"edited": "a.txt has changed", "another file": "a.txt is no longer", "a file more": "b.txt is new"}[change]
    with pytest.raises(UserError, match=rf"learned from another text: .*{name}.*--init_from=scratch"):
        start(folder, max_iters=2)
    assert vocabulary(tmp_path) == before
    start(folder, init_from="scratch")
    assert "锋" in vocabulary(tmp_path)


def test_the_same_text_elsewhere_or_touched_is_the_same_text(start, tmp_path):
    data = write(tmp_path / "text" / "a.txt", ONE)
    start(data.parent)
    os.utime(data, (1, 1))
    assert start(data.parent, max_iters=2)["step"] == 2
    data.rename(data.with_name("renamed.txt"))
    assert start(data.parent, max_iters=3)["step"] == 3


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize("change", ["moved", "spelled otherwise", "a glob", "in another order", "contents swapped",
                                    "one of two edited", "packed", "one of two"])  # fmt: skip
def test_neither_names_nor_places_make_a_text_another_one(start, tmp_path, monkeypatch, change):
    folder = tmp_path / "text"
    data = [write(folder / "a.txt", ONE), write(folder / "b.txt", OTHER)]
    start(folder)
    now, same = folder, change in ("moved", "spelled otherwise", "a glob")
    if change == "moved":
        now = folder.rename(tmp_path / "elsewhere")
    elif change == "spelled otherwise":
        monkeypatch.chdir(tmp_path)
        now = "./text/../text/"
    elif change == "a glob":
        now = folder / "*.txt"
    elif change == "in another order":
        data[0].rename(folder / "c.txt")
    elif change == "contents swapped":
        swap(*data)
    elif change == "one of two edited":
        data[1].write_text((OTHER * 200).replace("锋", "青"), encoding="utf-8")
    elif change == "packed":
        (folder / "a.txt.gz").write_bytes(gzip.compress(data[0].read_bytes()))
        data[0].unlink()
    else:
        now = data[0]
    if same:
        assert start(now, max_iters=2)["step"] == 2
        assert load_config(tmp_path / "run" / "config.yaml", [])[0].data.data == str(now)
        return
    name = {"one of two edited": "b.txt has changed", "contents swapped": "a.txt has changed",
            "one of two": "b.txt is no longer"}.get(change, "a.txt is no longer")  # fmt: skip
    with pytest.raises(UserError, match=f"learned from another text: .*{name}"):
        start(now, max_iters=2)


def test_a_text_that_is_gone_is_not_needed_again(start, tmp_path, capsys):
    data = write(tmp_path / "a.txt", ONE)
    start(data)
    data.unlink()
    assert start(data, max_iters=2)["step"] == 2
    assert "continues with the data that it prepared" in capsys.readouterr().err


def test_after_damage_to_the_record_of_the_text_it_is_prepared_again(start, killed_before_a_checkpoint, tmp_path):
    data = write(tmp_path / "a.txt", ONE)
    for damage in ("", "[]", "{", json.dumps({"settings": {}, "sizes": {"a": "x"}})):
        killed_before_a_checkpoint(data)
        (tmp_path / "run" / "text.json").write_text(damage)
        write(data, OTHER if damage else ONE)
    start(data)
    assert "锋" in vocabulary(tmp_path)


def test_a_validation_file_of_its_own(start, tmp_path):
    """Its documents are the validation part."""
    data, val = write(tmp_path / "a.txt", ONE), write(tmp_path / "val.txt", OTHER)
    start(data, val=str(val))
    sources = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text(encoding="utf-8"))["sources"]
    assert [(Path(source["path"]).name, source.get("split")) for source in sources] == [
        ("a.txt", None), ("val.txt", "val"),
    ]  # fmt: skip
    write(val, OTHER.replace("前锋", "门将"))
    with pytest.raises(UserError, match=r"learned from another text: .*val\.txt has changed"):
        start(data, val=str(val), max_iters=2)


def test_texts_that_must_not_be_learned_are_known_by_content(start, killed_before_a_checkpoint, tmp_path, capsys):
    """An evaluation set that is edited under the same name."""
    data, evaluation = tmp_path / "a.txt", tmp_path / "evaluation.txt"
    poem = "春江潮水连海平，海上明月共潮生。滟滟随波千万里，何处春江无月明。"
    data.write_text((ONE + OTHER) * 200 + poem, encoding="utf-8")
    evaluation.write_text("别的测试题。\n", encoding="utf-8")
    killed_before_a_checkpoint(data, without=str(evaluation))
    assert "潮" in vocabulary(tmp_path)
    evaluation.write_text(f"{poem}\n", encoding="utf-8")
    capsys.readouterr()
    start(data, without=str(evaluation))
    assert "evaluation.txt has changed" in capsys.readouterr().err
    assert "潮" not in vocabulary(tmp_path)
    evaluation.write_text("又是别的。\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"learned from another text: .*evaluation\.txt has changed"):
        start(data, without=str(evaluation), max_iters=2)
    evaluation.unlink()
    assert start(data, without=str(evaluation), max_iters=2)["step"] == 2


@pytest.mark.parametrize("named", ["directory", "file"])
def test_a_tokenizer_that_is_reused_is_known_by_content(start, killed_before_a_checkpoint, tmp_path, capsys, named):
    data, directory = write(tmp_path / "a.txt", ONE), tmp_path / "tokenizer"
    tokenizer = str(directory if named == "directory" else directory / "tokenizer.json")
    Tokenizer.train_char(Counter(ONE)).save(directory)
    killed_before_a_checkpoint(data, tokenizer=tokenizer)
    assert "锋" not in vocabulary(tmp_path)
    Tokenizer.train_char(Counter(ONE + OTHER)).save(directory)
    capsys.readouterr()
    start(data, tokenizer=tokenizer)
    assert "tokenizer.json has changed" in capsys.readouterr().err
    assert "锋" in vocabulary(tmp_path)
    Tokenizer.train_char(Counter(ONE)).save(directory)  # from now on the run has its own
    assert start(data, tokenizer=tokenizer, max_iters=2)["step"] == 2


def test_nanogpts_own_data_is_trained_on_as_it_is(start, tmp_path):
    """train.bin, val.bin and meta.pkl as data/shakespeare_char/prepare.py writes them."""
    directory, text = tmp_path / "TH", ONE * 100
    directory.mkdir()
    chars = sorted(set(text))
    for name, part in (("train", text[:-200]), ("val", text[-200:])):
        np.array([chars.index(c) for c in part], np.uint16).tofile(directory / f"{name}.bin")
    table = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (directory / "meta.pkl").write_bytes(pickle.dumps(table))
    start(directory)
    model = miaobi.load(tmp_path / "run", device="cpu")
    assert model.tokenizer.encode("红楼") == [table["stoi"][c] for c in "红楼"]
    assert not (tmp_path / "run" / "data").exists()
