"""Tables, JSON lines and arrays against Python's csv and json and pyarrow; and any bytes at all."""

import contextlib
import csv
import gzip
import io
import json
import resource
import shlex
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from miaobi.classify.data import read_rows
from miaobi.corpus import blocks, tables
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.documents import iter_blocks, read_block, read_documents
from miaobi.corpus.prepare import prepare
from miaobi.corpus.records import open_records
from miaobi.corpus.sources import find_sources
from miaobi.errors import UserError

ROWS = [("1", "房间很好"), ("0", '他说"太贵",\n还吵'), ("1", "前台；热情|真的，好"), ("0", " 早餐 ")] * 3
MESSAGES = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好呀"}]


@pytest.fixture(autouse=True)
def _told_anew():
    tables.guessed.clear()


def records(path, **options):
    (source,) = find_sources([str(path)])
    return [record.values for record in open_records(source, False, **options)[1]]


def documents(path, format="auto", **options):
    found = iter_blocks(find_sources([str(path)], format), **options)
    return [d for block in found for d in read_block(block).documents]


def write_csv(path, rows=ROWS, header=("label", "text"), **options):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, **options).writerows([header, *rows])
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "|", "\t", "，"])
def test_the_delimiter_is_guessed_and_said(tmp_path, capsys, delimiter):
    path = write_csv(tmp_path / "a.csv", delimiter=delimiter)
    assert documents(path) == [text for _, text in ROWS]
    assert [(row.label, row.text) for row in read_rows(str(path), None, None)] == ROWS
    assert capsys.readouterr().err.count("its columns are taken to be separated by") == (delimiter != ",")
    prepare([str(path)], PrepareConfig(out=tmp_path / "out"))
    (source,) = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["sources"]
    told = source.get("guessed", [])
    assert len(told) == (delimiter != ",")
    assert all(guess.startswith("its columns are taken to be separated by") for guess in told)


@pytest.mark.parametrize("first", ["sep=;\n", "sep=;\r\n", '"sep=;"\n', "sep=^\n"])
def test_excels_first_line_says_the_delimiter(tmp_path, first):
    path = write_csv(tmp_path / "a.csv", delimiter=first.strip('\r\n"')[-1])
    path.write_text(first + path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert documents(path) == [text for _, text in ROWS]
    path.write_text(first + "label;text\n1;a\n1;b;c\n".replace(";", first.strip('\r\n"')[-1]), encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.csv, line 4: 3 columns"):
        documents(path)


@pytest.mark.parametrize(
    "content",
    [
        '"label", "text"\n1, "你好, 世界"\n0, "再见"\n',
        'label, text\n1, "你好, 世界"\n0,"再见"\n',
        '"label"; "text"\n1; "你好, 世界"\n0; "再见"\n',
    ],
)
def test_blanks_before_quotes_are_no_text(tmp_path, content):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    delimiter = content[content.index('"', 1) + 1] if content[0] == '"' else ","
    reader = csv.DictReader(io.StringIO(content), delimiter=delimiter, skipinitialspace=True)
    assert documents(tmp_path / "a.csv") == [row["text"] for row in reader] == ["你好, 世界", "再见"]


@pytest.mark.parametrize("delimiter", ["｜", ":", "#", "\x01", "、"])
@pytest.mark.parametrize("header", [("label", "text"), ("text", "label")])
def test_a_delimiter_that_is_not_guessed_is_named(tmp_path, delimiter, header):
    """Not "name one with --field": the field is there."""
    path = write_csv(tmp_path / "a.csv", [("1", "好")] * 3, header, delimiter=delimiter)
    with pytest.raises(UserError, match=r"one column, .*; if .* stands between its cells, add --delimiter=") as refused:
        documents(path)
    asked = shlex.split(str(refused.value).rsplit(" add ", 1)[1])[0]
    assert documents(path, delimiter=asked.removeprefix("--delimiter=")) == [("好", "1")[header[0] == "text"]] * 3


def test_one_column_needs_no_delimiter_and_another_can_be_given(tmp_path):
    (tmp_path / "a.csv").write_text("text\n你好；世界\na|b\n", encoding="utf-8")
    assert documents(tmp_path / "a.csv") == ["你好；世界", "a|b"]
    (tmp_path / "b.csv").write_text("label#text\n1#你好,世界\n", encoding="utf-8")
    assert documents(tmp_path / "b.csv", delimiter="#") == ["你好,世界"]
    for wrong in ("##", '"', "\n"):
        with pytest.raises(UserError, match="cannot part cells"):
            documents(tmp_path / "b.csv", delimiter=wrong)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.jsonl", "a.json"])
def test_two_columns_of_one_name_are_refused_by_prepare_and_classify(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(
            pa.Table.from_arrays([pa.array(["一"]), pa.array(["二"]), pa.array(["1"])], ["text", "text", "label"]), path
        )
    elif path.suffix in (".jsonl", ".json"):
        line = '{"text": "一", "text": "二", "label": 1}'
        path.write_text(line if path.suffix == ".jsonl" else f"[{line}]", encoding="utf-8")
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        path.write_text("text,text,label\n一,二,1\n".replace(",", separator), encoding="utf-8")
    for read in (lambda: documents(path), lambda: list(read_rows(str(path), None, None))):
        with pytest.raises(UserError, match=r"several columns are called 'text'|key 'text' is there more than once"):
            read()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_read_as_json_reads_it(tmp_path, monkeypatch, encoding, indent):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 50)
    given = [{"text": f"第{i}篇\n[好]{{不}}，" + "长" * (i % 40), "n": i} for i in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(given, ensure_ascii=False, indent=indent), encoding=encoding)
    assert records(tmp_path / "a.json") == given
    assert documents(tmp_path / "a.json") == [record["text"] for record in given]
    assert [row.text for row in read_rows(str(tmp_path / "a.json"), None, None, labels=False)] == documents(
        tmp_path / "a.json"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"text": "好"},\n5]', "line 3: int instead of an object"),
        ('[\n{"text": "好"},\n{"text": }]', "line 3: not JSON"),
        ('[{"text": "好"}', "is missing; is the file whole"),
        ('[{"text": "好"}] {}', "there is more behind the end"),
        ('[{"text": "好"} {"text": "好"}]', "']' is missing before '{'"),
        ("[" * 100_000, "not JSON"),
        ('[{"text": ' + "9" * 5000 + "}]", "not JSON"),
        ('[{"text": "\\ud83d"}]', "half a character"),
        ('[{"label": 1}]', "no field 'text'; the fields are label"),
    ],
)
def test_a_bad_array_names_the_line(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        documents(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonlines", "a.json", "a.parquet", "array.json"])
def test_dialogues_in_every_kind_of_file(tmp_path, name):
    given = [{"messages": [MESSAGES[0] | {"content": f"你好{i}"}, MESSAGES[1]]} for i in range(5)]
    path = tmp_path / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(given), path)
    elif name == "array.json":
        path.write_text(json.dumps(given), encoding="utf-8")
    else:
        path.write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    expected = [f"\ufdd9你好{i}\ufdda你好呀" for i in range(5)]
    assert documents(path, "dialogue") == expected
    assert list(read_documents([str(path)], "dialogue")) == expected


@pytest.mark.parametrize(
    ("name", "format"),
    [("qa.csv", "dialogue"), ("qa.tsv.gz", "dialogue"), ("qa.csv", "text"), ("a.jsonl", "lines"), ("a.ndjson", "csv"),
     ("a.json", "text")],
)  # fmt: skip
def test_a_format_that_contradicts_a_file_is_refused_by_name(tmp_path, name, format):
    (tmp_path / "chat.txt").write_text("你好\n你好呀\n\n吃了吗\n吃了\n", encoding="utf-8")
    (tmp_path / name).write_text("问,答\n你好,好\n", encoding="utf-8")
    sources = [str(tmp_path / "chat.txt"), str(tmp_path / name)]
    for read in (
        lambda: prepare(sources, PrepareConfig(out=tmp_path / "out", format=format)),
        lambda: list(read_documents(sources, format)),
    ):
        with pytest.raises(UserError, match=rf"{name}: --format={format} contradicts its name"):
            read()


RECORDS = "".join(json.dumps({"text": f"春江{i}", "id": i}, ensure_ascii=False) + "\n" for i in range(90_000))


@pytest.mark.parametrize("how", ["sft.data", "a.txt", "a.ldjson", "a.jsonl.bak", "no suffix", "a.txt.gz", "utf-16",
                                 "byte order mark", "an array", "several blocks"])  # fmt: skip
@pytest.mark.parametrize("format", ["auto", "dialogue"])
def test_json_is_no_text_whatever_the_file_is_called(tmp_path, how, format):
    """Braces, keys and numbers would be learned as words; --skip_bad must not take all blocks but the first."""
    content = RECORDS if how == "several blocks" else RECORDS[:2000].rsplit("\n", 1)[0]
    if how == "an array":
        content = json.dumps([json.loads(line) for line in content.split("\n")], ensure_ascii=False, indent=2)
    encoding = {"utf-16": "utf-16", "byte order mark": "utf-8-sig"}.get(how, "utf-8")
    file = tmp_path / ("records" if how == "no suffix" else how if how.startswith(("a.", "sft")) else "b.txt")
    data = content.encode(encoding)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    with pytest.raises(UserError, match=rf"{file.name} holds JSON, but its name says text: call it \.jsonl"):
        documents(file, format)
    (tmp_path / "good.txt").write_text("明月\n\n潮水\n\n何处\n", encoding="utf-8")
    left = PrepareConfig(out=tmp_path / "out", format=format, skip_bad=True, dedup="none", val_fraction=0.4)
    result = prepare([str(file), str(tmp_path / "good.txt")], left)
    assert (result["documents"], result["refused"]) == (3, [str(file)])


def test_json_that_is_to_be_learned_as_it_stands_is(tmp_path):
    (tmp_path / "a.txt").write_text(RECORDS[:2000], encoding="utf-8")
    assert documents(tmp_path / "a.txt", "lines")[0] == '{"text": "春江0", "id": 0}'
    assert documents(tmp_path / "a.txt", "text")[0].startswith('{"text": "春江0", "id": 0}\n{')


@pytest.mark.parametrize("text", ['{"', '{甲} "乙": 丙', '"{": 1', "[1] {2}", '{"他说：" 你好}', '{\\rtl "a": 1}'])
def test_a_text_with_braces_is_a_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(f"{text}\n\n明月", encoding="utf-8")
    assert documents(tmp_path / "a.txt", "auto") == [text, "明月"]


def test_a_suffix_that_says_nothing_is_said(tmp_path, capsys):
    for name in ("a.yml", "b.html", "c.txt"):
        (tmp_path / name).write_text("甲\n\n乙\n\n丙\n", encoding="utf-8")
    prepare([str(tmp_path / "*.*")], PrepareConfig(out=tmp_path / "out", dedup="none", val_fraction=0.4))
    assert "taken as plain text, markup and all, as nothing else is known of such names: .html, .yml\n" in (
        capsys.readouterr().err
    )
    prepare([str(tmp_path / "*.*")], PrepareConfig(out=tmp_path / "out", format="text", val_fraction=0.4))
    assert "markup" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "joint"), [("a.csv", ""), ("a.csv", "\ufeff"), ("a.tsv", "\ufeff"), ("a.csv.gz", "\0")]
)
def test_where_tables_were_joined_the_header_is_no_row(tmp_path, capsys, name, joint):
    """It would be a text `text` of the class `label`."""
    mark = "\t" if ".tsv" in name else ","
    table = f"label{mark}text\n1{mark}春江\n0{mark}text\n"
    data = f"{table}{joint}{table.replace('春', '秋')}{joint}{table}".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert documents(tmp_path / name) == ["春江", "text", "秋江", "text", "春江", "text"]
    rows = list(read_rows(str(tmp_path / name), None, None))
    assert {(row.label, row.text) for row in rows} == {("1", "春江"), ("1", "秋江"), ("0", "text")}
    assert capsys.readouterr().err.count("left out: 2 rows that said the header again") == 1
    prepare([str(tmp_path / name)], PrepareConfig(out=tmp_path / "out", dedup="none"))
    (source,) = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["sources"]
    assert sum("taken out: 2 of the characters" in guess for guess in source["guessed"]) == bool(joint)


def test_what_is_taken_out_of_an_array_is_said(tmp_path, capsys):
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"},\n{"text": "b"}]\n' + bytes(100))
    assert documents(tmp_path / "a.json") == ["a", "b"]
    assert capsys.readouterr().err.count("taken out: 100 of the characters") == 1


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [["体育", "财经"], {"a": 1}])
def test_a_label_that_is_none_is_refused_by_key_and_line(tmp_path, label):
    lines = [{"text": "好", "label": "体育"}, {"text": "坏", "label": label}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: label is (list|dict), and a label is one word or number"):
        list(read_rows(str(tmp_path / "a.jsonl"), None, None))
    assert [row and row.label for row in read_rows(str(tmp_path / "a.jsonl"), None, None, skip_bad=True)] == [
        "体育",
        None,
    ]


# --- hostile files ------------------------------------------------------------------------------------------------


def test_a_small_parquet_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "bomb.parquet"
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 4000, pa.int32()), pa.array(["好" * 1_400_000]))
    pq.write_table(pa.table({"text": texts}), path, compression="zstd", dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 4000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (lambda: documents(path), lambda: records(path)):
        with pytest.raises(UserError, match="becomes more than 1,000 times its size"):
            read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10


@pytest.mark.parametrize("line", ['1,"好', '"', '1,"a"b', '1,"""x', "1,2,3", '""x'])
def test_bad_rows_take_time_that_grows_with_their_number_alone(tmp_path, line):
    """Lines that are read at all: a quote that opens may make the reader look at those that follow, once."""
    (tmp_path / "a.csv").write_text("label,text\n" + (line + "\n") * 2000 + "1,好\n", encoding="utf-8")
    (source,) = find_sources([str(tmp_path / "a.csv")])
    read = 0

    class Counted(tables.Lines):
        def __next__(self):
            nonlocal read
            read += 1
            return super().__next__()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "Lines", Counted)
        found = list(open_records(source, True)[1])
    assert read < 2100
    assert len(found) <= 2002


HOSTILE = st.one_of(
    st.binary(max_size=300),
    st.lists(st.sampled_from([b'{"text": "', b'"}', b"[", b"{", b",", b"\n", b'"', b"\xff", b"\0", b"9" * 5000, b"text",
                              b";", b"label", b"\xef\xbb\xbf", b"\\ud83d", b"null", b"1e999", b"sep=", b":"]),
             max_size=25).map(b"".join),
)  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet"])
@settings(max_examples=60, deadline=None)
@given(data=HOSTILE)
@example(data=b"[" * 50_000)
@example(data=b'{"a":' * 50_000)
@example(data=b"PAR1" + b"\0" * 50 + b"PAR1")
def test_any_bytes_are_a_result_or_a_users_error(tmp_path_factory, name, data):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(data)
    readers = [
        lambda: documents(path),
        lambda: list(read_rows(str(path), None, None)),
        lambda: documents(path, skip_bad=True),
    ]
    if path.suffix not in (".csv", ".tsv"):
        readers.append(lambda: documents(path, "dialogue"))
    for read in readers:
        with contextlib.suppress(UserError):
            read()


@settings(max_examples=80, deadline=None)
@given(place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_parquet_is_a_result_or_a_users_error(tmp_path_factory, place, byte, cut):
    path = tmp_path_factory.mktemp("fuzz") / "a.parquet"
    pq.write_table(
        pa.table({"text": ["好", "坏", None], "messages": [MESSAGES] * 3, "label": [1.0, 0.0, float("nan")]}), path
    )
    data = bytearray(path.read_bytes())
    at = int(place * (len(data) - 1))
    path.write_bytes(data[:at] if cut else data[:at] + bytes([byte]) + data[at + 1 :])
    for read in (
        lambda: documents(path),
        lambda: documents(path, "dialogue"),
        lambda: list(read_rows(str(path), None, None)),
    ):
        with contextlib.suppress(UserError):
            read()


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["好"]}), path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a\.parquet is a parquet file, .*pip install 'miaobi\[parquet\]'"):
        documents(path)
