"""Files out of which nothing can be read: in a directory they are left out and listed, by their own name an error."""

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from miaobi.classify.data import read_rows
from miaobi.corpus import blocks
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.errors import UserError

TEXT = "\n\n".join(f"第{i}场，皇马赢了曼联，球迷高兴" for i in range(60))
PACKINGS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}


def noise(characters: int) -> str:
    """Chinese that hardly packs, a line each 100 characters."""
    draw = random.Random(5)
    lines = ("".join(chr(draw.randint(0x4E00, 0x9000)) for _ in range(99)) for _ in range(characters // 100))
    return "\n".join(lines) + "\n"


def table(rows: int) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": [f"表里第{i}行" for i in range(rows)]}), file)
    return file.getvalue()


def archive(**members: str) -> bytearray:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, text in members.items():
            packed.writestr(name.replace("_", "."), text)
    return bytearray(file.getvalue())


def damaged(directory: Path) -> set[str]:
    """Puts damaged files of all kinds into a directory; their names."""
    record = json.dumps({"text": noise(3000)}, ensure_ascii=False).encode()
    files = {"cut.jsonl.gz": gzip.compress(record)[:-30], "cut.csv.xz": lzma.compress(b"text\n" + record)[:-30],
             "cut.parquet": table(999)[:-100], "middle.parquet": table(999)[:200] + bytes(64) + table(999)[264:],
             "no.zip": b"PK nothing", "latin.txt": bytes(b or 1 for b in random.Random(2).randbytes(5000))}  # fmt: skip
    for suffix, pack in PACKINGS.items():
        packed = pack(noise(9000).encode())
        files[f"cut.txt.{suffix}"] = packed[:-50]
        files[f"middle.txt.{suffix}"] = packed[:1000] + bytes(40) + packed[1040:]
        files[f"no.txt.{suffix}"] = b"hello"
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return set(files)


def test_what_is_damaged_in_a_directory_is_left_out_and_listed(tmp_path, capsys):
    root = tmp_path / "in"
    root.mkdir()
    names = damaged(root)
    (root / "good.txt").write_text(TEXT, encoding="utf-8")
    (root / "good.parquet").write_bytes(table(40))
    packed = archive(x_txt=noise(3000), y_txt="压缩包里的好文章")
    packed[500:600] = bytes(100)
    (root / "part.zip").write_bytes(packed)
    result = prepare([str(root)], PrepareConfig(out=tmp_path / "out"))
    told = capsys.readouterr().err
    assert (result["documents"], result["taken"]) == (60 + 40 + 1, {"text": 2, "parquet": 1})
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    reasons = {Path(source["path"]).name: source["reason"] for source in manifest["sources"] if source.get("reason")}
    reasons |= {Path(entry["path"]).name: entry["reason"] for entry in result["left_out"]}
    assert reasons.keys() == {*names, "part.zip!x.txt"}
    for name, reason in reasons.items():
        assert any(words in reason for words in ("damaged or cut short", "not a readable parquet", "not a zip",
                                                 "makes sense of it")), (name, reason)  # fmt: skip
        assert f"{root / name}" in told
    for name in names - {"no.zip"}:  # by its name: an error, as before
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            prepare([str(root / name)], PrepareConfig(out=tmp_path / "other"))


def zipped(path: Path, damage: str) -> Path:
    """An archive of two texts and a picture; the first text is damaged."""
    packed = archive(x_txt=noise(3000), y_txt=TEXT, z_png="no text")
    if damage == "middle":
        packed[500:600] = bytes(100)
    elif damage == "a short member":  # of which the head is looked at before it is taken
        packed = archive(x_txt=noise(100), y_txt=TEXT, z_png="no text")
        packed[60:90] = bytes(30)
    elif damage == "password":
        packed[6] |= 1  # its flag in the member's header, and in the list of members
        packed[packed.index(b"PK\1\2") + 8] |= 1
    elif damage == "a table":
        file = io.BytesIO(bytes(archive(y_txt=TEXT)))
        with zipfile.ZipFile(file, "a") as more:
            more.writestr("x.parquet", table(999)[:-100])
        packed = file.getvalue()
    path.write_bytes(packed)
    return path


@pytest.mark.parametrize("damage", ["middle", "a short member", "password", "a table"])
def test_what_is_damaged_in_an_archive_that_was_named_is_an_error(tmp_path, damage, miaobi):
    """As a file is that was named; in a directory the archive's member is left out and listed, as there a file is."""
    root = tmp_path / "in"
    root.mkdir()
    path = zipped(root / "a.zip", damage)
    member = "x.parquet" if damage == "a table" else "x.txt"
    for named in (path, root / "*.zip"):
        answer = miaobi("prepare", named, f"--out={tmp_path / 'out'}")
        assert (answer.code, answer.out) == (2, ""), answer
        assert f"a.zip!{member} " in answer.err.splitlines()[-1]
        assert not (tmp_path / "out").exists()
    for arguments in ([root], [path, "--skip_bad=True"]):
        answer = miaobi("prepare", *arguments, f"--out={tmp_path / 'out'}", "--json")
        assert answer.code == 0, answer.err
        result = json.loads(answer.out)
        assert result["documents"] == 60
        told = [entry["path"] for entry in result["left_out"]] + result.get("skipped_in", [])
        assert f"{path}!{member}" in told
        shutil.rmtree(tmp_path / "out")


def test_a_table_to_classify_in_a_damaged_archive_that_was_named_is_an_error(tmp_path):
    packed = archive(x_csv="text,label\n" + "\n".join(f"{line},{i % 2}" for i, line in enumerate(noise(3000).split())))
    packed[900:950] = bytes(50)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.zip").write_bytes(packed)
    with pytest.raises(UserError, match=r"a\.zip!x\.csv is damaged"):
        list(read_rows(str(tmp_path / "in" / "a.zip"), None, None))
    (tmp_path / "in" / "good.csv").write_text("text,label\n好,1\n", encoding="utf-8")
    assert [row.text for row in read_rows(str(tmp_path / "in"), None, None)][-1] == "好"


def test_a_directory_of_nothing_else_says_why(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "cut.parquet").write_bytes(table(999)[:-100])
    with pytest.raises(UserError, match=r"no text in the sources; skipped: 1 \(.*not a readable parquet file"):
        prepare([str(tmp_path / "in")], PrepareConfig(out=tmp_path / "out"))


@pytest.mark.parametrize("packing", [None, *PACKINGS])
def test_what_stands_before_the_damage_of_a_large_file_is_taken_and_that_is_said(
    tmp_path, monkeypatch, capsys, packing
):
    """Of a file that is larger than what is unpacked ahead. None: parquet of several row groups."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(blocks, "MAX_DOCUMENT_BYTES", 9000)
    (tmp_path / "in").mkdir()
    text, name = noise(60_000), f"a.txt.{packing}"
    lines = text.split("\n")[:-1]
    if packing is None:
        file, name = io.BytesIO(), "a.parquet"
        pq.write_table(pa.table({"text": lines}), file, row_group_size=100)
        packed = bytearray(file.getvalue())
        packed[len(packed) // 2 : len(packed) // 2 + 400] = bytes(400)
    else:
        packed = b"".join(PACKINGS[packing](part.encode()) for part in (text[:40_000], text[40_000:]))[:-60]
    (tmp_path / "in" / name).write_bytes(packed)
    result = prepare([str(tmp_path / "in")], PrepareConfig(out=tmp_path / "out", format="lines"))
    assert 0 < result["documents"] < len(lines)
    assert result["skipped_in"] == [str(tmp_path / "in" / name)]
    assert sum(result["taken"].values()) == 1
    assert "(what stands before that place was taken)" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails")
def test_files_that_cannot_be_read_at_all_are_listed(tmp_path):
    (tmp_path / "good.txt").write_text(TEXT, encoding="utf-8")
    for name, target in {"a.txt": "/proc/self/mem", "b.jsonl": "/proc/self/mem", "c.txt": "/dev/null"}.items():
        (tmp_path / name).symlink_to(target)
    result = prepare([str(tmp_path)], PrepareConfig(out=tmp_path / "out"))
    left = {Path(entry["path"]).name: entry["reason"] for entry in result["left_out"]}
    assert left == {"a.txt": "cannot be read: Input/output error", "b.jsonl": "cannot be read: Input/output error",
                    "c.txt": "not a file"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.docx", b"PK\3\4\0\0" + bytes(range(256))), ("b.xlsx", b"PK\3\4\0\0" + bytes(range(256))),
     ("c.rtf", rb"{\rtf1\ansi\deff0 {\fonttbl {\f0 Times;}}\f0\fs60 \u30343?}"), ("d.txt", rb"{\rtf1\ansi word}"),
     ("e.pdf", b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n"), ("f.doc", bytes(range(256)) * 4)],
)  # fmt: skip
def test_a_document_of_an_office_program_is_no_text(tmp_path, name, content):
    """RTF and PDF may be ASCII: their layout would be learned."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is a .*, not text; save it as plain text, a table as \.csv"):
        prepare([str(tmp_path / name)], PrepareConfig(out=tmp_path / "out"))
