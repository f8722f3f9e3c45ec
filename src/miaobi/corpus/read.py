"""Sources -> blocks -> documents, in bounded memory.

`iter_blocks` walks over the sources in the main process and cuts them into blocks of some megabytes; `read_block` turns
one block into documents, in any process. A block of plain text is only a byte range, so workers read and decode one
large file together; packed files and tables (csv, parquet) are unpacked in the main process and travel
with their block.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass

from miaobi.corpus import encodings
from miaobi.corpus.sources import Source, find_sources
from miaobi.errors import UserError

BLOCK_BYTES = 2 << 20
"""Size of a block. What is made of it stays in memory that is reused: 2 MiB was 1.7 times as fast as 8."""
MAX_DOCUMENT_BYTES = 32 << 20
"""A text without a blank line for so long is cut at a line end, so that memory stays bounded."""
MAX_FILE_BYTES = 64 << 20
"""Largest file that can be one document (--format=files)."""

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_LINE_ENDS = {  # unit of the encoding -> (line end, blank line)
    "utf-8": (re.compile(rb"\n"), re.compile(rb"\n\r?\n")),
    "utf-16-le": (re.compile(rb"\n\0"), re.compile(rb"\n\0(?:\r\0)?\n\0")),
    "utf-16-be": (re.compile(rb"\0\n"), re.compile(rb"\0\n(?:\0\r)?\0\n")),
}
Bytes = bytes | bytearray | mmap.mmap


@dataclass(frozen=True)
class Block:
    """A piece of a source that ends where a document (or a line) ends."""

    source: Source
    index: int
    """Position of the source in the list of sources."""
    start: int = 0
    """Offset of its first byte in the unpacked source."""
    end: int = 0
    encoding: str | None = None
    """None: a whole small file, whose encoding the reader finds out."""
    data: bytes | None = None
    """The bytes where they had to be unpacked; None: they are in the file."""
    records: tuple[str, ...] | None = None
    """Texts of a table's rows, already parsed."""
    first_line: int = 1
    """Line number of its first line; 0: counted when an error needs it."""
    skipped: int = 0
    """Bad records left out in front of it."""


@dataclass(frozen=True)
class Content:
    """What a block held."""

    raw: str
    """The text as read, line ends as `\\n` (records: their fields as they are, one after the other)."""
    documents: list[str]
    encoding: str
    skipped: int = 0


def iter_blocks(
    sources: list[Source], field: str = "text", skip_bad: bool = False, whole: bool = False
) -> Iterator[Block]:
    """The blocks of all sources, in order.

    Args:
        field: column or key of a record that holds the text.
        skip_bad: leave out unreadable files and records and count them, instead of raising.
        whole: cut at line ends, not at document ends (--split=tail knows no documents).

    Raises:
        UserError: an empty, binary or damaged file, an unknown encoding, a table without `field`.
    """
    from miaobi.corpus.records import csv_blocks, parquet_blocks

    for index, source in enumerate(sources):
        try:
            if source.format == "parquet":
                yield from parquet_blocks(source, index, field, skip_bad)
            elif source.format == "csv":
                yield from csv_blocks(source, index, field, skip_bad)
            else:
                yield from text_blocks(source, index, whole)
        except UserError:
            if not skip_bad:
                raise
            yield Block(source, index, encoding="skipped", records=(), skipped=1)


def text_blocks(source: Source, index: int, whole: bool) -> Iterator[Block]:
    """The blocks of one text file or zip member."""
    at_blank_line = source.format in ("text", "dialogue") and not whole
    in_one = source.format == "files" and not whole
    if source.compression:
        yield from _streamed_blocks(source, index, at_blank_line, in_one)
        return
    if source.size == 0:
        raise UserError(_empty(source))
    if in_one and source.size > MAX_FILE_BYTES:
        raise UserError(_too_long(source))
    if in_one or source.size <= BLOCK_BYTES:
        yield Block(source, index, 0, source.size)
        return
    with open(source.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        encoding, start, _ = _find_encoding(source, data)
        while start < len(data):
            end = _cut(data, start, encoding, at_blank_line)
            yield Block(source, index, start, end, encoding, first_line=1 if start < 4 else 0)
            start = end


def _streamed_blocks(source: Source, index: int, at_blank_line: bool, in_one: bool) -> Iterator[Block]:
    """Unpacks in this process. The buffer exceeds what `_cut` looks at, so the cuts are those of a plain file."""
    needed = (MAX_FILE_BYTES if in_one else MAX_DOCUMENT_BYTES) + 64
    buffer, head, offset, line, encoding, is_certain = bytearray(), 0, 0, 1, "", False
    with source.open() as stream:
        while True:
            if len(buffer) - head < needed:
                del buffer[:head]
                head = 0
                while len(buffer) < 2 * needed and (piece := source.read(stream, BLOCK_BYTES)):
                    buffer += piece
            if not buffer:
                break
            if in_one and len(buffer) > MAX_FILE_BYTES:
                raise UserError(_too_long(source))
            if not is_certain:
                encoding, mark, is_certain = _find_encoding(source, buffer[head : head + BLOCK_BYTES])
                mark = mark if offset == 0 else 0
                head += mark
                offset += mark
            end = len(buffer) if in_one else _cut(buffer, head, encoding, at_blank_line)
            if not is_certain:  # what was looked at is plain ASCII; the block may be longer
                encoding, _, is_certain = _find_encoding(source, buffer[head:end] or b" ")
            data = bytes(memoryview(buffer)[head:end])
            yield Block(source, index, offset, offset + len(data), encoding, data, first_line=line)
            line += data.count(b"\n")
            offset += len(data)
            head = end
    if offset == 0:
        raise UserError(_empty(source))


def _cut(data: Bytes, start: int, encoding: str, at_blank_line: bool) -> int:
    """End of the block that begins at `start`: behind the first blank line (or line) after BLOCK_BYTES."""
    target, limit = start + BLOCK_BYTES, start + MAX_DOCUMENT_BYTES
    if target >= len(data):
        return len(data)
    line, blank = _LINE_ENDS.get(encoding, _LINE_ENDS["utf-8"])  # newline bytes are safe in GB18030 and Big5 too
    unit = 2 if encoding.startswith("utf-16") else 1
    for pattern in (blank, line) if at_blank_line else (line,):
        position = target
        while match := pattern.search(data, position, limit):
            if (match.start() - start) % unit == 0:
                return match.end()
            position = match.start() + 1
        if limit >= len(data):
            return len(data)
    # One endless line: cut between two characters, and not inside \r\n.
    end = start + encodings.complete_length(bytes(data[start:target]), encoding)
    return end + unit if data[end : end + unit].strip(b"\0") == b"\n" else end


def _find_encoding(source: Source, data: Bytes) -> tuple[str, int, bool]:
    """Encoding, length of the byte order mark, and whether there was more than plain ASCII to tell it by."""
    for offset in range(0, len(data), encodings.SAMPLE):
        sample = bytes(data[offset : offset + encodings.SAMPLE])
        if not sample.isascii() or b"\0" in sample:
            name, mark = _detect(source, sample, is_whole=offset + len(sample) == len(data))
            return name, mark if offset == 0 else 0, True
    name, mark = _detect(source, bytes(data[: encodings.SAMPLE]), is_whole=len(data) <= encodings.SAMPLE)
    return name, mark, name != "utf-8"


def _detect(source: Source, sample: bytes, is_whole: bool) -> tuple[str, int]:
    found = encodings.detect(sample, is_whole)
    if found is not None:
        return found
    if b"\0" in sample:
        raise UserError(f"{source.name} is a binary file (it has zero bytes and is not UTF-16), not text; leave it out")
    raise UserError(
        f"{source.name}: neither UTF-8, GB18030, Big5 nor UTF-16 makes sense of it; if it is text, convert it: "
        "iconv -f ENCODING -t utf-8; otherwise leave it out (--skip_bad skips it)"
    )


def decode_block(block: Block, skip_bad: bool = False) -> tuple[str, str, int]:
    """The text of a block as it is in the file, its encoding, and how many bad places were replaced (`skip_bad`).

    Raises:
        UserError: bytes that the encoding does not have, or that another encoding explains far better.
    """
    data, start, encoding = block.data, block.start, block.encoding
    if data is None:
        with open(block.source.path, "rb") as file:
            file.seek(block.start)
            data = file.read(block.end - block.start)
    if encoding is None:
        encoding, mark, _ = _find_encoding(block.source, data)
        data, start = data[mark:], mark
    if skip_bad:
        text, replaced = encodings.decode_replacing(data, encoding)
        return text, encoding, replaced
    mixed = encodings.mixed_encoding(data, encoding)
    if mixed:
        raise UserError(_does_not_fit(block.source, start + mixed[0], encoding, mixed[1]))
    try:
        return encodings.decode(data, encoding), encoding, 0
    except UnicodeDecodeError as error:
        following = encodings.detect(data[error.start : error.start + 4096], is_whole=False)
        other = following[0] if following else ""
        raise UserError(_does_not_fit(block.source, start + error.start, encoding, other)) from error


def read_block(block: Block, field: str = "text", skip_bad: bool = False, whole: bool = False) -> Content:
    """The documents of a block; with `whole`, its text as one document, newlines and all.

    Line ends become `\\n`, newlines around a document are left out; a dialogue's utterances are stripped.

    Raises:
        UserError: what `decode_block` raises, a malformed JSON line, a record without `field`.
    """
    from miaobi.corpus.records import json_records

    source = block.source
    try:
        if block.records is not None:
            records, encoding, skipped = list(block.records), block.encoding or "utf-8", block.skipped
        else:
            text, encoding, skipped = decode_block(block, skip_bad)
            if source.format == "jsonl":
                records, bad = json_records(block, text, field, skip_bad)
                skipped += bad
    except UserError:
        if not skip_bad:
            raise
        return Content("", [], "skipped", 1)
    if source.format in ("jsonl", "csv", "parquet"):
        documents = [_universal_newlines(record) for record in records]
        if whole:
            documents = ["".join(document + "\n" for document in documents)]
        return Content("".join(records), documents, encoding, skipped)
    if block.records is not None:
        return Content("", [], encoding, skipped)
    text = _universal_newlines(text)
    return Content(text, [text] if whole else _documents(text, source.format), encoding, skipped)


def _documents(text: str, format: str) -> list[str]:
    if format == "files":
        return [text.strip("\n")]
    if format == "lines":
        return [line for line in text.split("\n") if line and not line.isspace()]
    documents = [document.strip("\n") for document in _BLANK_LINES.split(text) if document and not document.isspace()]
    if format == "dialogue":
        return ["\n".join(line.strip() for line in document.split("\n")) for document in documents]
    return documents


def _universal_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _does_not_fit(source: Source, offset: int, encoding: str, other: str) -> str:
    seems = f" and looks like {other}" if other and other != encoding else ""
    return (
        f"{source.name}: read as {encoding}, but byte {offset} does not fit{seems}. The file mixes encodings or is "
        "damaged: convert its parts (iconv -f FROM -t utf-8), or pass --skip_bad to replace what cannot be read"
    )


def _empty(source: Source) -> str:
    return f"{source.name} is empty; remove it, or put text into it"


def _too_long(source: Source) -> str:
    return (
        f"{source.name} is longer than {MAX_FILE_BYTES >> 20} MiB, too long for one document (--format=files); "
        "use --format=text or --format=lines"
    )


def read_documents(paths: list[str], whole: bool = False) -> Iterator[str]:
    """The documents of some sources, or (`whole`) their text as read, in pieces that join to it.

    Raises:
        UserError: what `iter_blocks` and `read_block` raise.
    """
    for block in iter_blocks(find_sources(paths), whole=whole):
        content = read_block(block, whole=whole)
        yield from [content.raw] if whole else content.documents
