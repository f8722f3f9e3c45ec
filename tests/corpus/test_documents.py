"""Every encoding, packing and format gives back the text that was written; what cannot be read is named."""

import bz2
import csv
import gzip
import json
import lzma
import random
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from miaobi.corpus import blocks, encodings
from miaobi.corpus.documents import iter_blocks, read_block
from miaobi.corpus.sources import find_sources
from miaobi.errors import UserError

SIMPLIFIED = (
    "皇马昨晚在主场以三比一战胜了来访的对手，球迷们高兴地唱起歌来。\n主教练赛后说，大家都知道这场比赛很重要。\n\n"
    "今天天气很好，我们去公园里走走吧。\n你说得对，可是我还没有吃饭呢！\n\n"
    "经济发展的速度比去年同期提高了百分之五，这是一个很好的消息。"
)
TRADITIONAL = (
    "皇馬昨晚在主場以三比一戰勝了來訪的對手，球迷們高興地唱起歌來。\n主教練賽後說，大家都知道這場比賽很重要。\n\n"
    "今天天氣很好，我們去公園裡走走吧。\n你說得對，可是我還沒有吃飯呢！\n\n"
    "經濟發展的速度比去年同期提高了百分之五，這是一個很好的消息。"
)


def contents(*paths: object, format: str = "auto", field: str = "text", skip_bad: bool = False, whole: bool = False):
    blocks = iter_blocks(find_sources([str(p) for p in paths], format), field, skip_bad, whole)
    return [read_block(block, field, skip_bad, whole) for block in blocks]


def documents(*paths: object, **options: object) -> list[str]:
    return [document for content in contents(*paths, **options) for document in content.documents]


@pytest.mark.parametrize(
    ("codec", "text", "name"),
    [
        ("utf-8", SIMPLIFIED, "utf-8"),
        ("utf-8-sig", SIMPLIFIED, "utf-8-sig"),
        ("gb18030", SIMPLIFIED + "😀㐀", "gb18030"),
        ("gbk", TRADITIONAL, "gb18030"),
        ("big5", TRADITIONAL, "big5"),
        ("utf-16", SIMPLIFIED, "utf-16-le"),
        ("utf-16-le", SIMPLIFIED, "utf-16-le"),
        ("utf-16-be", TRADITIONAL + "😀", "utf-16-be"),
        ("utf-32", SIMPLIFIED + "上海㐀😀", "utf-32-le"),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_encodings(tmp_path, monkeypatch, codec, text, name, line_end, block_bytes):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "a.txt"
    path.write_bytes((text * 3).replace("\n", line_end).encode(codec))
    found = contents(path)
    assert {c.encoding for c in found} == {name}
    with open(path, encoding=codec, newline=None) as file:
        assert "".join(c.raw for c in found) == file.read()
    assert [d for c in found for d in c.documents] == (text * 3).split("\n\n")


def test_big5_with_hong_kong_and_eten_characters(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes((TRADITIONAL + "碁銹裏").encode("cp950") + "啲".encode("big5hkscs"))
    assert contents(path)[0].raw == TRADITIONAL + "碁銹裏啲"


@pytest.mark.parametrize("bad", [b"\xff", b"\x80", b"\xa4"])
def test_one_bad_byte_leaves_the_other_characters_of_big5_alone(tmp_path, bad):
    text = (TRADITIONAL + "裏恒粧銹碁\n") * 20
    (tmp_path / "a.txt").write_bytes(text.encode("cp950") + bad + b"\n" + text.encode("cp950"))
    (found,) = contents(tmp_path / "a.txt", skip_bad=True)
    assert (found.raw, found.skipped) == (f"{text}\ufffd\n{text}", 1)


@pytest.mark.parametrize(("codec", "bad"), [("utf-8", b"\xff"), ("gb18030", b"\xff"), ("utf-16-le", b"\x00\xd8")])
def test_a_replacement_character_in_the_text_is_not_counted_as_bad(tmp_path, codec, bad):
    text = SIMPLIFIED * 9 + "\ufffd\n"
    (tmp_path / "a.txt").write_bytes(text.encode(codec) + bad + text.encode(codec))
    (found,) = contents(tmp_path / "a.txt", skip_bad=True)
    assert (found.raw, found.encoding, found.skipped) == (f"{text}\ufffd{text}", codec, 1)


def test_ascii_for_long_then_gbk(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(encodings, "SAMPLE", 1 << 10)
    text = "plain words\n\n" * 2000 + SIMPLIFIED
    (tmp_path / "a.txt").write_bytes(text.encode("gbk"))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode("gbk")))
    for name in ("a.txt", "b.txt.gz"):
        assert "".join(c.raw for c in contents(tmp_path / name)) == text


@pytest.mark.parametrize("packing", ["gz", "xz", "zst", "zip"])
@pytest.mark.parametrize("codec", ["utf-8", "gb18030", "utf-16"])
@pytest.mark.parametrize("whole", [False, True])
def test_packed_is_cut_like_plain(tmp_path, monkeypatch, packing, codec, whole):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    monkeypatch.setattr(blocks, "MAX_DOCUMENT_BYTES", 400)
    data = (SIMPLIFIED + "\n\n" + "没有换行的一段" * 100).encode(codec)
    (tmp_path / "a.txt").write_bytes(data)
    packed = tmp_path / f"a.txt.{packing}"
    if packing == "zip":
        packed = tmp_path / "a.zip"
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("../../evil/a.txt", data)
            archive.writestr("__MACOSX/a.txt", b"\0\0")
    else:
        pack = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress}[packing]
        packed.write_bytes(pack(data))
    plain, unpacked = contents(tmp_path / "a.txt", whole=whole), contents(packed, whole=whole)
    assert unpacked == plain
    assert len(plain) > 3
    assert {p.name for p in tmp_path.rglob("*")} == {"a.txt", packed.name}  # nothing was extracted


def test_frames_of_a_zst_are_read_one_after_the_other(tmp_path):
    texts = [SIMPLIFIED * 999, "", TRADITIONAL, "好" * 99_999]
    skipped = b"\x50\x2a\x4d\x18\x03\0\0\0..."  # a frame of other data, as the format allows
    packed = skipped.join(zstandard.compress(text.encode()) for text in texts) + skipped
    (tmp_path / "a.txt.zst").write_bytes(packed)
    assert "".join(c.raw for c in contents(tmp_path / "a.txt.zst", whole=True)) == "".join(texts)
    for length in range(len(packed) - len(skipped) - 9, len(packed)):
        (tmp_path / "a.txt.zst").write_bytes(packed[:length])
        if length != len(packed) - len(skipped):
            with pytest.raises(UserError, match="damaged or cut short"):
                contents(tmp_path / "a.txt.zst")


def test_blocks_change_nothing(tmp_path, monkeypatch):
    rng = random.Random(0)
    paragraphs = ["".join(rng.choices(SIMPLIFIED, k=rng.randint(1, 60))) for _ in range(200)]
    text = "".join(p + rng.choice(["\n", "\n\n", "\n \t\n", "\r\n\r\n", "\n\n\n"]) for p in paragraphs)
    (tmp_path / "a.txt").write_bytes(text.encode())
    expected, whole = documents(tmp_path / "a.txt"), documents(tmp_path / "a.txt", whole=True)
    for size in (1, 7, 100, 3000):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        assert documents(tmp_path / "a.txt") == expected
        assert "".join(documents(tmp_path / "a.txt", whole=True)) == whole[0]


def test_formats(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("一\n二\n \n\n三\n", encoding="utf-8")
    assert documents(path) == ["一\n二", "三"]
    assert documents(path, format="lines") == ["一", "二", "三"]
    assert documents(path, format="files") == ["一\n二\n \n\n三"]
    assert documents(path, format="dialogue") == ["一\n二", "三"]
    assert documents(path, whole=True) == ["一\n二\n \n\n三\n"]


RECORDS = ["第一条\n有换行，有逗号", 'with "quotes"', "  前后空格  ", "😀𠮷", "制\t表"]


def write_records(path: Path, encoding: str = "utf-8") -> None:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"id": i, "text": t}, ensure_ascii=i % 2 == 0) for i, t in enumerate(RECORDS)]
        path.write_text("\n".join(lines) + "\n\n", encoding=encoding)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"id": list(range(len(RECORDS))), "text": RECORDS}), path)
    else:
        with open(path, "w", encoding=encoding, newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([("id", "text"), *enumerate(RECORDS)])


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.parquet"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_records(tmp_path, monkeypatch, name, encoding):
    write_records(tmp_path / name, encoding)
    assert documents(tmp_path / name) == RECORDS
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.write(tmp_path / name, name)
    assert documents(tmp_path / "b.zip") == RECORDS
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 16)
    assert documents(tmp_path / name) == RECORDS
    with pytest.raises(UserError, match=r"no field 'body'.*(id, text|id.*text)"):
        contents(tmp_path / name, field="body")


def test_json_error_names_file_and_line(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 32)
    path = tmp_path / "a.jsonl"
    good = '{"text": "好"}\n'
    for bad in ('{"text": ', '["好"]', '{"title": "好"}', '{"text": 3}', '{"text": "\\ud800"}'):
        path.write_text(good * 9 + bad + "\n" + good, encoding="utf-8")
        with pytest.raises(UserError, match=r"a\.jsonl, line 10: "):
            contents(path)
        found = contents(path, skip_bad=True)
        assert [d for c in found for d in c.documents] == ["好"] * 10
        assert sum(c.skipped for c in found) == 1


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be", "utf-32", "gb18030", "utf-8-sig"])
@pytest.mark.parametrize("block_bytes", [50, 1 << 20])
def test_lines_are_counted_in_characters(tmp_path, monkeypatch, codec, block_bytes):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    data = ('{"text": "上海ഊ，你好，Ċ"}\n' * 9 + '["坏"]\n').encode(codec)  # UTF-16 with bytes 0A
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    for name in ("a.jsonl", "a.jsonl.gz"):
        with pytest.raises(UserError, match=r"a\.jsonl\S*, line 10: list"):
            contents(tmp_path / name)


@pytest.mark.parametrize("codec", ["utf-8", "gb18030", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch, codec, name):
    texts = ["上海" + line for line in SIMPLIFIED.split()]
    text = "\n".join(["text", *texts])
    for size in (64, 1 << 20):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        (tmp_path / name).write_bytes(("\ufeff" + text).encode(codec))
        found = contents(tmp_path / name, whole=name == "a.txt")
        assert "".join(c.raw for c in found) == (text if name == "a.txt" else "".join(texts))
        assert {c.encoding.removesuffix("-sig") for c in found} == {codec}


@pytest.mark.parametrize("is_dictionary", [False, True])
def test_parquet_text_that_is_not_utf8(tmp_path, is_dictionary):
    texts = pa.array([SIMPLIFIED.encode(), SIMPLIFIED.encode("gbk"), b"ok"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": texts.dictionary_encode() if is_dictionary else texts}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: field 'text' is in another encoding than UTF-8"):
        contents(tmp_path / "a.parquet")
    (found,) = contents(tmp_path / "a.parquet", skip_bad=True)
    assert (found.documents, found.skipped) == ([SIMPLIFIED, "ok"], 1)


def test_csv_errors(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,好\n2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.csv, line 3: 1 column where"):
        contents(path)
    assert documents(path, skip_bad=True) == ["好"]


@pytest.mark.parametrize(
    ("rows", "line", "kept"),
    [
        (["1,很好", '1,"不错', "0,太吵", "1,安静"], 3, ["很好", "太吵", "安静"]),  # a quote that is never closed
        (["1,很好", '1,"不错', "0,太吵", '1,"安静"'], 3, ["很好", "太吵", "安静"]),  # or by the next one's
        (["1,很好", '1,"不""错\n\n"', '0,"好"吃', "1,安静"], 6, ["很好", '不"错\n\n', "安静"]),
        (["1,天气好，去爬山,然后吃饭", "0,太吵"], 2, ["太吵"]),  # a delimiter without quotes
        (["1,很好,", "0,太吵,,", "0,安静, "], 4, ["很好", "太吵"]),  # empty cells too many lose nothing
    ],
)
def test_rows_of_a_csv_that_would_lose_text(tmp_path, monkeypatch, rows, line, kept):
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["label,text", *rows]), encoding="utf-8")
    for size in (8, 1 << 20):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        with pytest.raises(UserError, match=rf"a\.csv, line {line}: .*(quote|columns).*--skip_bad"):
            contents(path)
        found = contents(path, skip_bad=True)
        assert [d for c in found for d in c.documents] == kept
        assert sum(c.skipped for c in found) == 1


def test_quotes_of_a_tsv_that_do_not_pair_up_are_text(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 32)
    texts = ['"好"吃', '"难吃', "真的", '说"好"', *SIMPLIFIED.split()] * 9
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{t}\t1\n" for t in texts), encoding="utf-8")
    assert documents(tmp_path / "a.tsv") == documents(tmp_path / "a.tsv") == texts
    assert capsys.readouterr().err.count("quotes do not pair up") == 1


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.txt", b"", "is empty"),
        ("empty.txt.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("a.txt", bytes(range(256)) * 4, "binary file"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\1\0\0\0\1\0\x08\x06\0\0\0" + bytes(range(256)), "binary"),
        ("noise.txt", bytes(b or 1 for b in random.Random(2).randbytes(5000)), "makes sense"),
        ("cut.txt.gz", gzip.compress(random.Random(3).randbytes(9000), mtime=0)[:-2000], "damaged|binary"),
        ("cut.txt.xz", lzma.compress(SIMPLIFIED.encode() * 9)[:-40], "damaged"),
        ("cut.txt.zst", zstandard.compress(SIMPLIFIED.encode() * 9999)[:-40], "damaged or cut short: .* no end"),
        ("no.zip", b"PK no archive", "not a readable zip"),
        ("no.parquet", b"PAR1 no table", "not a readable parquet"),
        ("mixed.txt", SIMPLIFIED.encode() + b"\n\n" + SIMPLIFIED.encode("gbk"), r"byte \d+ does not fit"),
        ("mixed.txt", (SIMPLIFIED.encode("gbk") + b"\n\n") * 9 + SIMPLIFIED.encode() * 2, r"byte \d+ does not fit"),
        ("mixed.txt", (SIMPLIFIED.encode("gbk") + b"\n\n") * 20 + TRADITIONAL.encode("big5") * 9, "does not fit"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message) as failure:
        contents(tmp_path / name)
    assert name in str(failure.value)
    if name != "no.zip":
        assert sum(c.skipped for c in contents(tmp_path / name, skip_bad=True)) >= (0 if name == "mixed.txt" else 1)


@pytest.mark.parametrize(("codec", "other"), [("gb18030", "big5"), ("gb18030", "utf-8"), ("utf-8", "gb18030")])
@pytest.mark.parametrize("count", [9, 60])
def test_parts_in_another_encoding_are_read_in_it_when_bad_places_may_be_skipped(tmp_path, codec, other, count):
    parts = [(SIMPLIFIED + "\n") * 90, (TRADITIONAL + "\n") * count, (SIMPLIFIED + "\n") * 5]
    data = b"".join(part.encode(codec) for part, codec in zip(parts, (codec, other, codec), strict=True))
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match="does not fit and looks like"):
        contents(tmp_path / "a.txt")
    (found,) = contents(tmp_path / "a.txt", skip_bad=True)
    assert (found.raw, found.skipped) == ("".join(parts), 0)
    (tmp_path / "a.txt").write_bytes(data + b"\xff\xff\n")
    (found,) = contents(tmp_path / "a.txt", skip_bad=True)
    assert (found.raw, found.skipped) == ("".join(parts) + "\ufffd\ufffd\n", 2)


def test_offset_of_the_bad_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 256)
    data = SIMPLIFIED.encode() + b"\n\n" + SIMPLIFIED.encode()
    bad = len(data) - 30
    data = data[:bad] + b"\xff" + data[bad:]
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=rf"byte {data.index(0xFF)} does not fit"):
        contents(tmp_path / "a.txt")
    found = contents(tmp_path / "a.txt", skip_bad=True)
    assert sum(c.skipped for c in found) >= 1
    assert "\ufffd" in "".join(c.raw for c in found)


BOM, LINES = "\ufeff", [f"第{i}句，皇马赢了。" for i in range(200)]


@pytest.mark.parametrize("codec", ["utf-8", "gb18030", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("packing", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("size", [64, 1 << 21])
def test_byte_order_marks_where_files_were_joined(tmp_path, monkeypatch, codec, packing, size):
    """`cat a.txt b.txt c.txt`, each with its mark, the second without a newline at its end."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
    parts = ["\n".join(LINES[:60]) + "\n", "\n\n".join(LINES[60:120]), "\n".join(LINES[120:]) + "\n"]
    data = "".join(BOM + part for part in parts).encode(codec)
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(pack[packing](data))
    for whole in (False, True):
        found = contents(path, whole=whole)
        assert "".join(c.raw for c in found) == "".join(parts)
        assert sum(c.removed for c in found) == 2  # the first is the file's own


@pytest.mark.parametrize("end", ["。", "”", "！\n", "\n", "\n\n", "\r\n", " "])
def test_a_mark_inside_a_file_that_has_none_at_its_beginning(tmp_path, end):
    (tmp_path / "a.txt").write_bytes(("晚安" + end + BOM + "很好").encode())
    assert contents(tmp_path / "a.txt", whole=True)[0].raw == ("晚安" + end + "很好").replace("\r\n", "\n")


def test_a_space_of_no_width_between_characters_is_text(tmp_path):
    """As 晚安哦\\ufeff⊙∀⊙ in a corpus of chats."""
    (tmp_path / "a.txt").write_text(f"晚安哦{BOM}⊙∀⊙！\n\n很不错", encoding="utf-8")
    assert documents(tmp_path / "a.txt") == [f"晚安哦{BOM}⊙∀⊙！", "很不错"]


@pytest.mark.parametrize("joint", ["\n" + BOM, BOM, "\r\n" + BOM, "\n\0" + BOM, "\n" + BOM + BOM])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_records_of_joined_files(tmp_path, joint, name):
    line = '{{"text": "第{}条"}}' if "json" in name else "第{}条"
    if name == "a.csv" and joint == BOM:
        return  # one cell
    data = ("" if "json" in name else "text\n") + line.format(1) + "\n" + line.format(2) + joint + line.format(3)
    packed = gzip.compress(data.encode()) if name.endswith(".gz") else data.encode()
    (tmp_path / name).write_bytes(packed)
    assert documents(tmp_path / name) == ["第1条", "第2条", "第3条"]


@pytest.mark.parametrize("spelling", ["\\u0000", "\\ufeff"])
def test_json_s_own_spelling_of_what_is_no_text(tmp_path, spelling):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{spelling}好的"}}\n', encoding="utf-8")
    (found,) = contents(tmp_path / "a.jsonl")
    assert (found.documents, found.removed) == (["好的"], 1)


@pytest.mark.parametrize("codec", ["utf-8", "gb18030", "big5", "utf-16"])
@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize(("early", "late"), [(1, 0), (0, 5000), (3, 1), (0, 1 << 19)])
def test_zero_bytes_are_taken_out_and_counted(tmp_path, monkeypatch, codec, skip_bad, early, late):
    """One early in a file made it a binary file, which --skip_bad left out whole; those at its end were learned."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    text = (TRADITIONAL + "\n\n") * 30
    zero = "\0"
    (tmp_path / "a.txt").write_bytes((text[:7] + zero * early + text[7:] + zero * late).encode(codec))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    for name in ("a.txt", "a.txt.gz"):
        found = contents(tmp_path / name, skip_bad=skip_bad)
        assert "".join(c.raw for c in found) == text
        assert sum(c.removed for c in found) == early + late
        assert sum(c.skipped for c in found) == 0
        assert {c.encoding for c in found} == {codec.replace("utf-16", "utf-16-le")}


def test_gbk_after_ascii_with_a_zero_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(encodings, "SAMPLE", 1 << 10)
    text = "plain words\n\n" * 2000 + SIMPLIFIED
    (tmp_path / "a.txt").write_bytes(b"a\0b " + text.encode("gbk"))
    assert contents(tmp_path / "a.txt")[0].raw == "ab " + text
