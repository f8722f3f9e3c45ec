"""Files -> blocks: pieces of text that end where a document or a line ends, cut without being decoded, and decoded.

Blocks are cut in the main process and decoded in any.
"""

from __future__ import annotations

import mmap
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from miaobi import console
from miaobi.corpus import encodings
from miaobi.corpus.folders import pointer_reason
from miaobi.corpus.ignored import Ignored
from miaobi.corpus.sources import TEXTS, NotTextError, Source
from miaobi.errors import UserError

BLOCK_BYTES = 2 << 20
"""Size of a block. What is made of it stays in memory that is reused: 2 MiB was 1.7 times as fast as 8."""
MAX_DOCUMENT_BYTES = 32 << 20
"""A text without a blank line for so long is cut at a line end, so that memory stays bounded."""
MAX_FILE_BYTES = 64 << 20
"""Largest file that can be one document (--format=files)."""

_OFFICE_REMEDY = "save it as plain text, a table as .csv, and give that"
_OFFICE = {".doc", ".docx", ".wps", ".odt", ".rtf", ".pdf", ".epub", ".mobi", ".azw3", ".xls", ".xlsx", ".et", ".ods",
           ".ppt", ".pptx"}  # fmt: skip

NOISE = "\0\ufeff"
"""What `without_noise` looks for."""
_JOINT = re.compile("(?:^|(?<=[\\s。！？!?….;；”’」』》）)}\\]]))\ufeff+")


def _line_ends(encoding: str) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    line, carriage_return = "\n".encode(encoding), "\r".encode(encoding)
    return re.compile(line), re.compile(line + b"(?:" + carriage_return + b")?" + line)


_LINE_ENDS = {name: _line_ends(name) for name in ("utf-8", *encodings.UNITS)}  # -> (line end, blank line)
Bytes = bytes | bytearray | mmap.mmap

REMOVED = "taken out: {:,} of the characters U+0000 and U+FEFF (padding, and byte order marks where files were joined)"
_JSON = re.compile(rb'\s*\[?\s*\{\s*"[^"\r\n]*"\s*:')
"""How records begin, in lines or as an array."""
_MARKS = b"\xef\xbb\xbf\xff\xfe"


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
    reason: str = ""
    """Why the whole file was."""
    ignored: Ignored = field(default_factory=dict, compare=False)
    """Keys of its records that are not read."""


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
    with source.opened() as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        encoding, first, _ = _find_encoding(source, data)
        start = first
        while start < len(data):
            end = _cut(data, start, encoding, at_blank_line)
            yield Block(source, index, start, end, encoding, first_line=1 if start == first else 0)
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
            line += encodings.count_lines(data, encoding)
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
    unit = len(line.pattern)
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
    if bytes(data[:5]) in (b"{\\rtf", b"%PDF-") and not source.is_exact:  # which may be ASCII from end to end
        raise NotTextError(f"{source.name} is a document with its layout, not text; {_OFFICE_REMEDY}")
    is_guess = source.is_guess and source.format in TEXTS
    if is_guess and _JSON.match(bytes(data[:1024]).lstrip(_MARKS).replace(b"\0", b"")):  # UTF-16's, too
        remedy = ", or --format=text to learn it as it stands" if source.format == "text" else ""
        raise NotTextError(f"{source.name} holds JSON, but its name says text: call it .jsonl{remedy}")
    for offset in range(0, len(data), encodings.SAMPLE):
        sample = bytes(data[offset : offset + encodings.SAMPLE])
        if not sample.isascii() or b"\0" in sample:
            name, mark = _detect(source, sample, is_whole=offset + len(sample) == len(data))
            if name != "utf-8" or not sample.isascii():  # else ASCII and some zero bytes, which tell nothing
                return name, mark if offset == 0 else 0, True
    name, mark = _detect(source, bytes(data[: encodings.SAMPLE]), is_whole=len(data) <= encodings.SAMPLE)
    return name, mark, name != "utf-8"


def _detect(source: Source, sample: bytes, is_whole: bool) -> tuple[str, int]:
    if pointer := pointer_reason(sample):
        raise NotTextError(f"{source.name} is {pointer}")
    detected = encodings.detect(sample, is_whole)
    if detected is not None:
        return detected
    if b"\0" in sample:
        raise NotTextError(
            f"{source.name} is a binary file (it has zero bytes and is not UTF-16), not text; "
            + (_OFFICE_REMEDY if Path(source.inner_name).suffix.lower() in _OFFICE else "leave it out")
        )
    raise NotTextError(
        f"{source.name}: neither UTF-8, GB18030, Big5 nor UTF-16 makes sense of it; if it is text, convert it: "
        "iconv -f ENCODING -t utf-8; otherwise leave it out (prepare, eval and classify do so with --skip_bad=True)"
    )


def block_bytes(block: Block) -> tuple[bytes, int, str]:
    """The bytes of a block without a byte order mark, the offset of the first of them, and their encoding.

    Raises:
        UserError: a small file whose encoding nobody knows.
    """
    data = block.data
    if data is None:
        with block.source.opened() as file:
            file.seek(block.start)
            data = file.read(block.end - block.start)
    if block.encoding is not None:
        return data, block.start, block.encoding
    encoding, mark, _ = _find_encoding(block.source, data)
    return data[mark:], mark, encoding


class Decoded(NamedTuple):
    """The text of a block."""

    text: str
    encoding: str
    replaced: int
    """Places with bad bytes, U+FFFD now (`skip_bad`)."""
    removed: int
    """Characters that `without_noise` took out."""


def decoded(block: Block, skip_bad: bool = False) -> Decoded:
    """The text of a block as it is in the file, but `without_noise`.

    Raises:
        UserError: what `block_bytes` raises; bytes that the encoding does not have, or that another encoding explains
            far better.
    """
    data, start, encoding = block_bytes(block)
    if skip_bad:
        text, replaced = encodings.decode_replacing(data, encoding)
    else:
        mixed = encodings.mixed_encoding(data, encoding)
        if mixed:
            raise UserError(_does_not_fit(block.source, start + mixed[0], encoding, mixed[1]))
        try:
            text, replaced = encodings.decode(data, encoding), 0
        except UnicodeDecodeError as error:
            following = encodings.detect(data[error.start : error.start + 4096], is_whole=False)
            other = following[0] if following else ""
            raise UserError(_does_not_fit(block.source, start + error.start, encoding, other)) from error
    if block.source.is_exact:
        return Decoded(text, encoding, replaced, 0)
    if block.source.format in ("jsonl", "messages"):
        text = text.replace("}\ufeff{", "}\n{")  # the first file's last line had no end
    clean = without_noise(text, encoding)
    return Decoded(clean, encoding, replaced, len(text) - len(clean))


def without_noise(text: str, encoding: str = "utf-8") -> str:
    """`text` without U+0000, with which disks and editors fill files up, and without the byte order marks, U+FEFF,
    that are inside where files were joined: at the beginning of a line or a sentence, and anywhere in a file that
    begins with one (as a space of no width, which it was before Unicode 3.2, other texts have it between words).
    """
    if "\0" in text:
        text = text.replace("\0", "")
    if "\ufeff" in text:
        text = _JOINT.sub("", text) if encoding == "utf-8" else text.replace("\ufeff", "")
    return text


def _does_not_fit(source: Source, offset: int, encoding: str, other: str) -> str:
    seems = f" and looks like {other}" if other and other != encoding else ""
    return (
        f"{source.name}: read as {encoding}, but byte {offset} does not fit{seems}. The file mixes encodings or is "
        "damaged: convert its parts (iconv -f FROM -t utf-8); prepare, eval and classify replace what cannot be read "
        "with --skip_bad=True"
    )


def _empty(source: Source) -> str:
    return f"{source.name} is empty; remove it, or put text into it"


def _too_long(source: Source) -> str:
    return (
        f"{source.name} is longer than {MAX_FILE_BYTES >> 20} MiB, too long for one document (--format=files); "
        "use --format=text or --format=lines"
    )


def with_progress(results: Iterable[tuple], sources: list[Source], what: str) -> Iterator[tuple]:
    """Passes on (blocks, result) of each task; shows a bar with the time left once it has taken two seconds."""
    before = [0, *accumulate(source.size for source in sources)]
    began, bar, shown = time.perf_counter(), None, None
    try:
        for blocks, result in results:
            yield blocks, result
            if bar is None and time.perf_counter() - began > 2:
                bar = console.progress()
                bar.start()
                shown = bar.add_task(what, total=before[-1])
            if bar is not None:
                last = blocks[-1]
                bar.update(shown, completed=min(before[last.index] + last.end, before[last.index + 1]))
    finally:
        if bar is not None:
            bar.stop()
