"""Packed files that become gigabytes: a clear error, in bounded time and memory, and never a whole text at once."""

import bz2
import gzip
import io
import lzma
import re
import time
import zipfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from miaobi.corpus import unpack
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.corpus.sources import find_sources
from miaobi.errors import UserError

MIB = 1 << 20
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.compress}
LINES = "皇马赢了曼联\n\n".encode()


def peak() -> int:
    """Bytes of memory that this process had at most since `clear_refs`."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def refused(path: Path, **settings: object) -> tuple[float, int]:
    """Seconds and bytes that it takes to refuse a bomb."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    before, began = peak(), time.process_time()
    with pytest.raises(UserError, match=r"becomes more than 100 times its size.*leave it out.*unpack it and give"):
        prepare([str(path)], PrepareConfig(out=path.parent / "out", workers=1, **settings))
    assert not (path.parent / "out").exists()
    return time.process_time() - began, peak() - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of memory")
@pytest.mark.parametrize("packing", PACK)
def test_a_bomb_of_gigabytes_costs_seconds_and_little_memory(tmp_path, packing):
    """Half a megabyte of 4 MiB again and again: 500 MB as .gz, 30 GB and more as the others."""
    frame = PACK[packing](LINES * (4 * MIB // len(LINES)))
    path = tmp_path / f"bomb.txt.{packing}"
    path.write_bytes(frame * (MIB // 2 // len(frame)))
    seconds, growth = refused(path)
    assert seconds < 20
    assert growth < 512 * MIB


@pytest.mark.parametrize(
    ("name", "content"),
    [("one-line.txt.gz", b"a"), ("a.jsonl.bz2", b'{"text": "aaaaaaaa"}\n'), ("one-line.jsonl.zst", b'{"text": "'),
     ("array.json.gz", b'[{"text": "a"},'), ("nested.json.bz2", b"["), ("a.csv.zst", b"text,n\n"),
     ("one-cell.csv.gz", b'text\n"a'), ("a.tsv.xz", b"text\tn\n"), ("a.parquet.gz", b"PAR1")],
)  # fmt: skip
def test_whatever_is_packed(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(unpack, "ANYWAY", 2 * MIB)
    path = tmp_path / name
    path.write_bytes(PACK[name.rpartition(".")[2]](content + content[-1:] * (4 * MIB)))
    with pytest.raises(UserError):
        prepare([str(path)], PrepareConfig(out=tmp_path / "out", workers=1))
    source = find_sources([str(path)])[0]
    with source.open() as stream, pytest.raises(UserError, match="becomes more than 100 times"):
        any(not source.read(stream, 1 << 16) for _ in range(1000))
    with source.open() as stream, pytest.raises(UserError, match="becomes more than 100 times"):
        source.read(stream, 1 << 40)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_by_the_sizes_that_it_states(tmp_path, monkeypatch, method):
    monkeypatch.setattr(unpack, "ANYWAY", 2 * MIB)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for number in range(3):  # each by itself is small enough
            archive.writestr(f"{number}.txt", LINES * (MIB // len(LINES)))
    refused(path)
    data = bytearray(path.read_bytes())  # a size that is a lie: no more than that is ever read
    for found in re.finditer(b"PK\x01\x02", bytes(data)):
        data[found.start() + 24 : found.start() + 28] = (100).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged|readable"):
        prepare([str(path)], PrepareConfig(out=tmp_path / "out", workers=1))


def test_an_xz_that_asks_for_much_memory(tmp_path):
    compressor = lzma.LZMACompressor(filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}])
    packed = bytearray(compressor.compress(LINES) + compressor.flush())
    at = packed.index(b"\x21\x01") + 2  # the filter's only property: the size of its dictionary
    packed[at] = 37  # 1.5 GiB
    header = packed[12 : 12 + (packed[12] + 1) * 4 - 4]
    packed[12 + len(header) : 12 + len(header) + 4] = zlib.crc32(header).to_bytes(4, "little")
    (tmp_path / "a.txt.xz").write_bytes(packed)
    with pytest.raises(UserError, match="Memory usage limit exceeded"):
        prepare([str(tmp_path / "a.txt.xz")], PrepareConfig(out=tmp_path / "out", workers=1))


@pytest.mark.parametrize("packing", PACK)
def test_texts_that_repeat_themselves_are_no_bombs(tmp_path, monkeypatch, packing):
    monkeypatch.setattr(unpack, "ANYWAY", 1000)
    halves = ["\n\n".join(f"第{i}场，皇马赢了曼联" * 3 for i in range(n, n + 1500)).encode() for n in (0, 1500)]
    (tmp_path / "a.txt").write_bytes(b"".join(halves))
    (tmp_path / f"b.txt.{packing}").write_bytes(b"".join(map(PACK[packing], halves)))
    cfg = PrepareConfig(out=tmp_path / "out", workers=1)
    plain, packed = (prepare([str(path)], cfg) for path in sorted(tmp_path.glob("*.t*")))
    assert plain["characters"] == packed["characters"] == len(b"".join(halves).decode())


@pytest.mark.parametrize("padding", [b"\0" * 4, b"\0" * 8192])
def test_streams_of_an_xz_may_have_zeros_between_them(tmp_path, padding):
    (tmp_path / "a.txt.xz").write_bytes(padding.join(lzma.compress(LINES * n) for n in (1, 2, 3)) + padding)
    source = find_sources([str(tmp_path / "a.txt.xz")])[0]
    with source.open() as stream:
        assert source.read(stream, 1 << 20) == LINES * 6


def test_a_table_that_is_packed_twice(tmp_path):
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["皇马赢了曼联，球迷高兴"] * 100}), out)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(out.getvalue()))
    assert prepare([str(tmp_path / "a.parquet.gz")], PrepareConfig(out=tmp_path / "out", workers=1, dedup="none"))
