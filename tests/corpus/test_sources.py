"""Which files are texts: whitelists, archives, links, pointers; what was left out is listed with its reason."""

import bz2
import json
import os
import zipfile
from pathlib import Path

import pytest

from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.documents import iter_blocks, read_block
from miaobi.corpus.folders import LeftOut
from miaobi.corpus.prepare import prepare
from miaobi.corpus.sources import find_sources, list_sources
from miaobi.errors import UserError


def contents(*paths: object):
    blocks = iter_blocks(find_sources([str(p) for p in paths]))
    return [read_block(block) for block in blocks]


def documents(*paths: object) -> list[str]:
    return [document for content in contents(*paths) for document in content.documents]


@pytest.mark.parametrize("encoding", ["gbk", "utf-8"])
def test_names_in_a_zip_of_chinese_windows(tmp_path, encoding):
    """Without the flag that says UTF-8."""
    name = "新闻.txt".encode(encoding)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x" * (len(name) - 4) + ".txt", "皇马赢了")
    packed = (tmp_path / "a.zip").read_bytes().replace(b"x" * (len(name) - 4) + b".txt", name)
    (tmp_path / "a.zip").write_bytes(packed)
    assert [source.name for source in find_sources([str(tmp_path / "a.zip")])] == [f"{tmp_path}/a.zip!新闻.txt"]
    assert documents(tmp_path / "a.zip") == ["皇马赢了"]


def test_a_zip_is_opened_once_and_every_member_read(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in range(100):
            archive.writestr(f"{number:03}.txt", f"第{number}篇")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("007.txt", "同名的一篇")
        for name in ("meta.pkl", "a/prepare.py", "manifest.json", "a/.hidden.txt", "__MACOSX/a.txt", "train.BIN"):
            archive.writestr(name, "not text of a corpus")
    opened, real = [], zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", lambda path: opened.append(path) or real(path))
    expected = [f"第{number}篇" for number in range(100)]
    expected.insert(8, "同名的一篇")
    assert documents(tmp_path / "a.zip") == expected
    assert len(opened) == 1
    with real(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "换了一个")
    assert documents(tmp_path / "a.zip") == ["换了一个"]


@pytest.mark.parametrize(("found", "offset", "put"), [(b"PK\x01\x02", 6, b"\x63\0"), ("文".encode(), 0, b"\xd6\xd0")])
def test_a_zip_of_an_unknown_version_or_with_broken_names_is_refused(tmp_path, found, offset, put):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("文.txt", "好")
    packed = bytearray((tmp_path / "a.zip").read_bytes())
    at = packed.rindex(found) + offset
    packed[at : at + len(put)] = put
    (tmp_path / "a.zip").write_bytes(packed)
    with pytest.raises(UserError, match=r"a\.zip is not a readable zip archive"):
        contents(tmp_path / "a.zip")


def test_directories_and_globs(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/y.md", ".hidden/x.txt", "a/.x.txt", "train.bin", "prepare.py", "manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert documents(tmp_path) == ["a/y.md", "a/z.txt", "b.txt"]
    assert documents(tmp_path / "**" / "*.txt") == ["a/z.txt", "b.txt"]


def test_linked_directories_are_read_once(tmp_path):
    for name in ("given/own/a.txt", "given/b.bin/b.txt", "elsewhere/c.txt", "elsewhere/deep/d.txt", "hidden/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    given = tmp_path / "given"
    for link, target in {
        "linked": "../elsewhere", "again": "../elsewhere/deep", "an_own": "own", "own/up": "..", "nowhere": "none",
        ".not": "../hidden",
    }.items():  # fmt: skip
        (given / link).symlink_to(target, target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(given)
    expected = ["elsewhere/c.txt", "elsewhere/deep/d.txt", "given/b.bin/b.txt", "given/own/a.txt"]
    assert sorted(documents(given)) == expected
    found = [source.name for source in find_sources([str(given)])]
    assert found == sorted(found)
    assert str(given / "own" / "a.txt") in found


def test_missing_path_suggests(tmp_path):
    (tmp_path / "input.txt").write_text("好", encoding="utf-8")
    with pytest.raises(UserError, match=r"did you mean .*input\.txt"):
        find_sources([str(tmp_path / "inptu.txt")])
    with pytest.raises(UserError, match="no such file"):
        find_sources([str(tmp_path / "nowhere" / "a.txt")])


@pytest.mark.parametrize("target", ["nowhere.txt", "input.txt"])
def test_a_link_that_leads_nowhere_is_not_suggested_instead_of_itself(tmp_path, target):
    (tmp_path / "input.txt").symlink_to(tmp_path / target)  # the second to itself
    with pytest.raises(UserError, match=f"a link that leads nowhere, to .*{target}") as error:
        find_sources([str(tmp_path / "input.txt")])
    assert "did you mean" not in str(error.value)
    with pytest.raises(UserError, match=r"did you mean .*input\.txt"):
        find_sources([str(tmp_path / "inptu.txt")])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no text in this directory"):
        find_sources([str(tmp_path / "none")])


def test_standard_input_is_named_as_the_pipe_that_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"standard input \(-\) is a pipe: .*save what comes out of it as a file"):
        find_sources(["-"])
    (tmp_path / "-").write_text("好", encoding="utf-8")
    assert documents("-") == ["好"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
TEXT = "\n\n".join(f"第{i}场，皇马赢了曼联，球迷高兴" for i in range(60))


def reasons(left: list[LeftOut], root: Path) -> dict[str, str]:
    return {entry.path.removeprefix(f"{root}/"): entry.reason for entry in left}


STRANGERS = {
    # name: (content, what the reason says)
    "readme.md": ("# 说明", "about the files"),
    "README.txt": ("这里是说明", "about the files"),
    "LICENSE": ("MIT", "about the files"),
    "requirements.txt": ("torch", "about the files"),
    "desktop.ini": ("[.ShellClassInfo]", "suffix .ini"),
    "Thumbs.db": (b"\0\1", "suffix .db"),
    ".DS_Store": (b"\0", "hidden"),
    ".git/config": ("[core]", "hidden"),
    "prepare.py": ("print(1)", "suffix .py"),
    "photo.jpg": (b"\xff\xd8\xff", "suffix .jpg"),
    "slides.docx": (b"PK", "suffix .docx"),
    "config.yaml": ("model:\n  n_layer: 3", "suffix .yaml"),
    "metrics.jsonl": ('{"step": 1, "loss": 4.5}\n{"step": 2, "loss": 4.4}\n', "log of a training run"),
    "trainer_log.jsonl": ('{"current_steps": 5, "loss": 1.5, "epoch": 0.1}\n', "log of a training run"),
    "package.json": ('{\n "name": "x"\n}\n', "one JSON object"),
    "state.json": ('{"name": "x"}', "one JSON object"),
    "manifest.json": ('{"files": ["a.txt"], "format": "v2"}', "one JSON object"),
    "lfs.txt": (POINTER, "Git LFS pointer"),
    "lfs.csv": (POINTER, "Git LFS pointer"),
    "annex.txt": (b"/annex/objects/SHA256E-s12--4d7a.txt\n", "git-annex pointer"),
    "empty.txt": (b"", "empty"),
    "old.tar.gz": (b"\x1f\x8b", "archive"),
    "old.rar": (b"Rar!", "archive"),
    "part-00001": (bytes(range(256)), "no suffix, and not text"),
    "bert/config.json": ("{}", None),
    "bert/vocab.txt": ("[PAD]\n[UNK]\n的", None),
    "nano/train.bin": (b"\1\0", "suffix .bin"),
    "nano/meta.pkl": (b"\x80", "suffix .pkl"),
    "nano/val.bin": (b"\1\0", "suffix .bin"),
    "data/tokenized/tokenized_train_0.txt": ("101 872 1962 102", "token ids"),
    "megatron/text_document.idx": (b"MMIDIDX", "suffix .idx"),
    "arrow/data-00000-of-00001.arrow": (b"ARROW1", "suffix .arrow"),
    "arrow/dataset_info.json": ('{"splits": {}}', "one JSON object"),
    "result.json": ('{"settings": {}, "row": {}}', "one JSON object"),
    "events.out.tfevents.1796035374.host": (b"\x18\0", "suffix .host"),
    "report.html": ("<p>好</p>", "suffix .html"),
    "novel.epub": (b"PK", "suffix .epub"),
    "paper.pdf": (b"%PDF-1.7", "suffix .pdf"),
    "film.srt": ("1\n00:00:01,000 --> 00:00:02,000\n好", "suffix .srt"),
    "table.xlsx": (b"PK", "suffix .xlsx"),
    "notes.txt.bak": ("旧的", "suffix .bak"),
    "notes.txt~": ("旧的", "suffix .txt~"),
    "big.txt.part": ("下了一半", "suffix .part"),
    "~$report.docx": (b"\5user", "suffix .docx"),
    "._notes.txt": (b"\0\5\x16\7", "hidden"),
    "books.7z": (b"7z\xbc\xaf", "archive"),
    "null.json": ("null", "not JSON"),
    "empty.jsonl": (b"", "empty"),
    "packed.zip/": (None, None),
}
OTHERS = {
    "ablation.csv": ("protocol,pooling,accuracy\ncorrected,mask,0.9\n", "no field 'text'; the fields are protocol, "),
    "vectors.tsv": ("0.1\t0.2\n0.3\t0.4\n", "no field 'text'; the fields are 0.1, 0.2"),
    "losses.jsonl": ('{"loss": 3.4}\n{"loss": 2.1}\n', "no field 'text'; the fields are loss"),
    "alpaca.json": ('[{"instruction": "问", "output": "答"}]', "no field 'text'; the fields are instruction, output"),
    "ids.json": ("[101, 872, 102]", "int instead of an object: no records"),
}
"""Tables and JSON of something else than text, as their first record shows."""


def test_a_folder_of_strangers_ends_in_a_table(tmp_path, capsys):
    """What is text is taken, as what it is; each of the others is listed with why it is not."""
    root = tmp_path / "folder"
    assert len(STRANGERS | OTHERS) + 14 > 60
    for name, (content, _) in (STRANGERS | OTHERS).items():
        if content is not None:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (root / "notes.txt").write_text(TEXT, encoding="utf-8")
    (root / "part-00000").write_text("没有后缀的文件，也是文章。", encoding="utf-8")
    (root / "old.utf8").write_text("旧的语料，一行一句。", encoding="utf-8")
    (root / "a.ndjson").write_text('{"text": "一条"}\n', encoding="utf-8")
    (root / "b.jsonl").write_text('{"text": "两条", "step": 3}\n', encoding="utf-8")
    (root / "c.csv").write_text("id,text\n1,三条\n", encoding="utf-8")
    (root / "d.txt.bz2").write_bytes(bz2.compress("四条".encode()))
    (root / "nowhere.txt").symlink_to("gone.txt")
    (root / "binary.txt").write_bytes(bytes(range(256)) * 9)
    with zipfile.ZipFile(root / "packed.zip", "w") as archive:
        for name, content in {"e.txt": "五条", "readme.md": "# 说明", "x/.hidden.txt": "x", "lfs.txt": POINTER,
                              "inner.zip": b"PK", "y.exe": b"MZ"}.items():  # fmt: skip
            archive.writestr(name, content)
    prepare([str(tmp_path / "folder" / "notes.txt")], PrepareConfig(out=root / "ours"))
    capsys.readouterr()
    result = prepare([str(root)], PrepareConfig(out=tmp_path / "out"))
    told = capsys.readouterr().err
    left = {entry["path"].removeprefix(f"{root}/"): entry["reason"] for entry in result["left_out"]}
    expected = {name.split("/")[0] if name.startswith(".git/") else name: reason
                for name, (_, reason) in STRANGERS.items() if reason}  # fmt: skip
    expected |= {
        "bert": "a model directory", "ours": "prepared data", "nowhere.txt": "leads nowhere",
        "packed.zip!readme.md": "about the files", "packed.zip!x/.hidden.txt": "hidden",
        "packed.zip!lfs.txt": "Git LFS pointer", "packed.zip!inner.zip": "packed again",
        "packed.zip!y.exe": "suffix .exe",
    }  # fmt: skip
    assert left.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in left[name], name
    assert result["taken"] == {"text": 5, "jsonl": 2, "csv": 1}
    assert sorted(result["skipped_in"]) == sorted(str(root / name) for name in ("binary.txt", *OTHERS))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["left_out"] == result["left_out"]
    refused = {Path(source["path"]).name: source["reason"] for source in manifest["sources"] if source.get("reason")}
    assert refused.keys() == {"binary.txt", *OTHERS}
    assert "binary file" in refused["binary.txt"]
    for name, (_, reason) in OTHERS.items():
        assert f"{name}: {reason}" in refused[name]
        assert f"left out, {reason}" in told
    assert "taken: 5 as text, 2 as jsonl, 1 as csv" in told
    for reason in ("a link that leads nowhere: ", "a binary file", "Git LFS pointer", "a model directory"):
        assert reason in told
    assert len(told.splitlines()) < 50


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [("a.csv", "id,content\n1,好\n", "auto"), ("a.jsonl", '{"content": "好"}\n', "auto"),
     ("a.json", '[{"text": "好"}]', "dialogue"), ("a.ndjson", '{"prompt": "问"}', "dialogue")],
)  # fmt: skip
def test_a_folder_without_the_field_says_which_there_are(tmp_path, name, content, format):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=rf"no text in the sources; skipped: 1 \(.*{name}: no .*the fields are"):
        prepare([str(tmp_path / "in")], PrepareConfig(out=tmp_path / "out", format=format))
    with pytest.raises(UserError, match=rf"{name}.*: no (field|dialogue)"):  # by its name: at once
        prepare([str(tmp_path / "in" / name)], PrepareConfig(out=tmp_path / "out", format=format))


def test_a_record_that_is_damaged_is_not_left_out_with_its_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": \n{"text": "好"}\n', encoding="utf-8")
    (tmp_path / "b.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: not JSON"):
        prepare([str(tmp_path)], PrepareConfig(out=tmp_path / "out"))
    (tmp_path / "a.jsonl").write_text('{"text": "好"}\n{"loss": 2}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: no field"):
        prepare([str(tmp_path)], PrepareConfig(out=tmp_path / "out"))


def test_many_of_a_kind_are_one_line(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    for i in range(300):
        (tmp_path / f"{i}.jpg").write_bytes(b"\xff\xd8")
    left = list_sources([str(tmp_path)])[1]
    assert left == [LeftOut(f"{tmp_path}/", "not text by its suffix .jpg", 300)]


@pytest.mark.parametrize("pointer", [POINTER, b"/annex/objects/MD5E-s9--1.txt\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.dat"])
def test_a_pointer_that_is_named_is_refused(tmp_path, name, pointer):
    (tmp_path / name).write_bytes(pointer)
    with pytest.raises(UserError, match=r"pointer, not the file itself: git (lfs pull|annex get)"):
        contents(tmp_path / name)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar", "a.7z", "a.rar", "a.tar.xz", "a.tbz", "a.tar.zst",
                                  "a.txt.lz4", "a.Z"])  # fmt: skip
def test_an_archive_that_is_named_says_to_unpack_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=r"is an archive; unpack it"):
        find_sources([str(tmp_path / name)])


def test_a_file_that_is_named_is_taken_whatever_its_suffix(tmp_path):
    for name in ("a.log", "b.dat", "readme.md", "c"):
        (tmp_path / name).write_text("有用的话", encoding="utf-8")
        assert documents(tmp_path / name) == ["有用的话"]


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.csv", "dialogue"), ("a.tsv", "dialogue"), ("a.csv", "lines"), ("a.jsonl", "csv"), ("a.ndjson", "files")],
)
def test_a_format_that_contradicts_a_file(tmp_path, name, format):
    (tmp_path / name).write_text("text\n好\n坏\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text(TEXT, encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name}: --format={format} contradicts its name"):
        prepare([str(tmp_path / name), str(tmp_path / "b.txt")], PrepareConfig(out=tmp_path / "out", format=format))
    if format != "csv":
        (tmp_path / "c.txt").write_text("另一个文件", encoding="utf-8")
        result = prepare([str(tmp_path)], PrepareConfig(out=tmp_path / "out", format=format))
        assert [Path(entry["path"]).name for entry in result["left_out"]] == [name]


@pytest.mark.skipif(os.name != "posix" or os.getuid() == 0, reason="root may read everything")
def test_a_directory_that_may_not_be_read_is_listed(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "closed").mkdir(mode=0)
    assert reasons(list_sources([str(tmp_path)])[1], tmp_path) == {"closed": "cannot be read"}
