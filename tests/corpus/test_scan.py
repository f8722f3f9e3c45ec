"""The compiled reader against Python's, on any text and on bytes that are none."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from miaobi import native
from miaobi.corpus import blocks, characters, scan, survey, workers
from miaobi.corpus.blocks import Block
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.documents import DocumentOptions
from miaobi.corpus.prepare import prepare
from miaobi.corpus.sources import Source
from miaobi.errors import UserError

EDGES = "\x00\x1c\x1f \x7f\x80\x85\xa0߿ࠀ\u2028\u3000一\ud7ff\ue000\ufeff\uffff\U00010000\U0010ffff😀é"
PIECES = st.one_of(
    st.sampled_from([*EDGES, "\n", "\n\n", "\r\n", "\n \u3000\n", " \n", "中文，汉字" * 4, "中文1汉字ab。" * 3]),
    st.text(max_size=8),
)
TEXTS = st.lists(PIECES, max_size=24).map("".join)
PLAIN = {"normalize": "none", "simplify": False, "near": False, "field": "text", "skip_bad": False}


@pytest.fixture(autouse=True)
def compiled(built) -> None:
    built(scan.SOURCE)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, all of them worth compiling, and real worker processes, although the text is small."""
    monkeypatch.setattr(scan, "WORTH_COMPILING", 0)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(workers, "SMALL_INPUT_BYTES", 0)


def both(data: bytes, kind: str, encoding: str) -> tuple:
    """(what Python's reader says, what the compiled one says) of a block of its own."""
    source = Source(Path("x"), "text" if kind == "whole" else kind)
    block = Block(source, 3, 0, len(data), encoding, data)
    options = DocumentOptions(whole=kind == "whole", **PLAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "WORTH_COMPILING", 0)
        return survey._read((block,), options), survey._scanned((block,), options)


@pytest.mark.parametrize("kind", scan.KINDS)
@given(text=TEXTS, encoding=st.sampled_from(["utf-8", "utf-16-le", "utf-16-be"]))
@example(text="", encoding="utf-8")
@example(text="\n", encoding="utf-8")
@example(text="\n\n一\n\n", encoding="utf-8")
@example(text=" \n一\n \n\u3000二 \n  ", encoding="utf-8")
@example(text="一" * 40 + "\n\n" + "二" * 3, encoding="utf-8")
@example(text="\r\n \r\n一\r\r\n二\n\r三\r", encoding="utf-8")
@example(text="中文，汉字\r\n\r\n" * 9, encoding="gb18030")
@example(text="這個國家，來會時發\r\n" * 9, encoding="big5")
def test_text(kind, text, encoding):
    (expected, *counts), (found, *scanned_counts) = both(text.encode(encoding), kind, encoding)
    assert scanned_counts == counts
    assert found.points.dtype == np.uint16
    assert characters.wide(found.points, found.beyond).tolist() == expected.points.tolist()
    assert len(set(found.beyond.tolist())) == len(found.beyond)
    for name in ("lengths", "digests", "sizes", "code_points", "counts", "distinct"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name


@pytest.mark.parametrize("kind", scan.KINDS)
@given(before=TEXTS, middle=st.binary(min_size=1, max_size=4), after=TEXTS)
@example(before="中文汉字", middle=b"\xed\xa0\x80", after="")  # half a character
@example(before="中文汉字", middle=b"\xe0\x9f\xbf", after="中文汉字中文汉字")  # too long a spelling
@example(before="中文汉字中文", middle=b"\xe4\xb8", after="")  # cut off
@example(before="中", middle=b"\xf4\x90\x80\x80", after="")  # beyond Unicode
@example(before="中", middle=b"\xc1\xbf", after="")
@example(before="中", middle=b"\xf0\x8f\xbf\xbf", after="")
@example(before="", middle=b"\xf8\x90\x80\x80", after="")  # a leading byte that UTF-8 has not
@example(before="中", middle=b"\r", after="")
def test_bytes_that_are_no_text_are_left_to_python(kind, before, middle, after):
    data = before.encode() + middle + after.encode()
    try:
        is_ordinary = "\r" not in data.decode()
    except UnicodeDecodeError:
        is_ordinary = False
    assert (scan.scan_bytes(data, kind) is not None) == is_ordinary


@pytest.mark.parametrize("kind", scan.KINDS)
@pytest.mark.parametrize("length", range(4))
def test_every_leading_byte(kind, length):
    """Where UTF-8 has no such character, neither has the compiled reader (\\xf8 to \\xff once began one)."""
    for lead, *rest in itertools.product(range(0x80, 0x100), *[(0x80, 0x8F, 0x90, 0x9F, 0xBF)] * length):
        data = bytes([lead, *rest])
        try:
            expected = data.decode()
        except UnicodeDecodeError:
            expected = None
        found = scan.scan_bytes(data, kind)
        assert (found is not None) == (expected is not None), data
        if expected and kind == "whole":
            assert characters.wide(found[0].points, found[0].beyond).tolist() == [ord(c) for c in expected], data


def test_more_rare_characters_than_there_is_room_for():
    many = [chr(0x20000 + i) for i in range(characters.MOST_BEYOND + 1)]
    assert scan.scan_bytes("".join(many).encode(), "whole") is None
    found, _ = scan.scan_bytes("".join(many[1:] * 2).encode(), "whole")
    assert "".join(map(chr, characters.wide(found.points, found.beyond))) == "".join(many[1:] * 2)
    assert found.counts.tolist() == [2] * characters.MOST_BEYOND


@pytest.mark.parametrize("settings", [{"split": "tail"}, {"dedup": "near"}, {"tokenizer": "bpe", "vocab_size": 400},
                                      {"format": "lines", "vocab_size": 300}], ids=str)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
def test_prepared_data_is_the_same(tmp_path, monkeypatch, small, settings, encoding):
    """Blocks that the compiled reader takes, and one that it leaves, against all by Python."""
    texts = [f"{i} 皇马😀曼联{chr(0x4E00 + i)}{'赢得比赛，' * (i % 50)}\n 完 " for i in range(300)]
    text = "\r\n\n \n".join([*texts, *texts[:20], "半\r\n\r角"])
    (tmp_path / "a.txt").write_bytes(text.encode(encoding) + b"\xff")
    taken = []
    scanned = survey._scanned
    monkeypatch.setattr(survey, "_scanned", lambda *a: taken.append(scanned(*a)) or taken[-1])
    settings = {"skip_bad": True, **settings}
    for count in (1, 2):
        prepare([str(tmp_path / "a.txt")], PrepareConfig(out=tmp_path / f"fast{count}", workers=count, **settings))
    assert sum(found is not None for found in taken) > 5
    assert taken[-1] is None
    monkeypatch.setattr(survey, "_scanned", lambda *a: None)
    prepare([str(tmp_path / "a.txt")], PrepareConfig(out=tmp_path / "slow", workers=1, **settings))
    expected = {path.name: path.read_bytes() for path in (tmp_path / "slow").iterdir()}
    for name in ("fast1", "fast2"):
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == expected


def test_a_block_that_nobody_can_read_is_left_to_python(tmp_path, small):
    """A file of its own task was once refused in spite of --skip_bad."""
    files = {"a.txt": range(100, 200), "b.txt": range(200, 300)}  # one task, full; the next file is another
    for name, numbers in files.items():
        (tmp_path / name).write_text("".join(f"皇马{i}\n\n" for i in numbers), encoding="utf-8")
    (tmp_path / "c.txt").write_bytes(b"\0\1\2" * 500)
    sources, out = [str(tmp_path / name) for name in [*files, "c.txt"]], tmp_path / "out"
    with pytest.raises(UserError, match=r"c\.txt is a binary file"):
        prepare(sources, PrepareConfig(out=out))
    assert prepare(sources, PrepareConfig(out=out, skip_bad=True))["skipped"] == 1


def test_nothing_is_compiled_for_a_small_text(tmp_path, monkeypatch):
    for name in ("library", "build"):
        monkeypatch.setattr(native, name, lambda source: pytest.fail("asked for"))
    (tmp_path / "a.txt").write_text("皇马赢得比赛\n\n" * 2000, encoding="utf-8")
    prepare([str(tmp_path / "a.txt")], PrepareConfig(out=tmp_path / "out", dedup="none"))


def test_it_takes_over_in_the_middle(tmp_path, monkeypatch, small):
    """The first blocks of a first run are read before the compiler is done; nobody should see where."""
    ready, asked = native.library(scan.SOURCE), []
    (tmp_path / "a.txt").write_text("\n\n".join(f"{i} 皇马😀曼联" for i in range(2000)), encoding="utf-8")
    prepare([str(tmp_path / "a.txt")], PrepareConfig(out=tmp_path / "whole", workers=1))
    monkeypatch.setattr(native, "library", lambda source: asked.append(0) or (ready if len(asked) > 5 else None))
    prepare([str(tmp_path / "a.txt")], PrepareConfig(out=tmp_path / "out", workers=1))
    assert len(asked) > 10
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("settings", [{}, {"split": "tail"}, {"format": "lines"}])
@pytest.mark.parametrize("noise", ["\0", "\ufeff", "\0\ufeff\0"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
def test_padding_and_marks_inside(tmp_path, monkeypatch, small, settings, noise, encoding):
    """The compiled reader takes such blocks too, and finds in them what Python's does."""
    texts = [f"第{i}场，皇马😀赢了曼联。" for i in range(600)]
    clean = "\n\n".join(texts)
    dirty = clean.replace("第77场", f"{noise}第77场").replace("曼联。\n\n第99场", f"曼联。{noise}\n\n{noise}第99场")
    for name, text in (("clean", clean), ("dirty", dirty + "\0" * 5000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes(text.encode(encoding))
    results = {}
    for name in ("clean", "dirty"):
        results[name] = prepare([str(tmp_path / name)], PrepareConfig(out=tmp_path / f"{name}-out", **settings))
    monkeypatch.setattr(survey, "_scanned", lambda *a: None)
    prepare([str(tmp_path / "dirty")], PrepareConfig(out=tmp_path / "slow-out", **settings))
    for file in ("train.bin", "val.bin", "train.idx", "tokenizer.json"):
        expected = (tmp_path / "clean-out" / file).read_bytes()
        assert (tmp_path / "dirty-out" / file).read_bytes() == expected == (tmp_path / "slow-out" / file).read_bytes()
    assert results["clean"]["removed"] == 0
    assert results["dirty"]["removed"] == len(dirty) + 5000 - len(clean)
    assert results["dirty"]["distinct_characters"] == len(set(clean))
