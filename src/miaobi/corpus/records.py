"""Tables and JSON lines -> the texts in one of their fields."""

from __future__ import annotations

import csv
import functools
import io
import json
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from miaobi import console
from miaobi.corpus import blocks, encodings
from miaobi.corpus.blocks import Block, decode_block, text_blocks
from miaobi.corpus.dialogue import messages_of, packed
from miaobi.corpus.sources import DAMAGED, Source
from miaobi.errors import UserError

if TYPE_CHECKING:
    import pyarrow

MAX_PACKED_TABLE = 512 << 20
"""A packed parquet file is unpacked in memory, up to this many bytes."""


def csv_blocks(source: Source, index: int, field: str, skip_bad: bool) -> Iterator[Block]:
    """Rows of a .csv or .tsv. They may hold line breaks inside quotes, so they are parsed in order, in this process.

    Raises:
        UserError: no such field, a row with too few or too many columns, a quote that is never closed.
    """
    encoding, bad = "utf-8", 0

    def lines() -> Iterator[str]:
        nonlocal encoding, bad
        for block in text_blocks(source, index, whole=True):
            text, encoding, replaced = decode_block(block, skip_bad)
            bad += replaced
            yield from io.StringIO(text, newline="")  # line breaks inside a field stay as they are

    names, rows = table_rows(source, lines(), skip_bad)
    if field not in names:
        raise UserError(_no_field(source, "line 1", field, names))
    column, records, size = names.index(field), [], 0
    for place, cells in rows:
        if cells is not None and column < len(cells):
            records.append(cells[column])
            size += len(cells[column])
        elif skip_bad:
            bad += 1
        else:
            refuse_width(place, cells, names)
        if size > blocks.BLOCK_BYTES // 3:
            yield Block(source, index, encoding=encoding, records=tuple(records), skipped=bad)
            records, size, bad = [], 0, 0
    yield Block(source, index, encoding=encoding, records=tuple(records), skipped=bad)


def lines_of(source: Source, skip_bad: bool) -> Iterator[str]:
    """Decoded lines with their ends."""
    for block in text_blocks(source, 0, whole=True):
        yield from io.StringIO(decode_block(block, skip_bad)[0], newline="")


def table_rows(
    source: Source, lines: Iterator[str], skip_bad: bool
) -> tuple[list[str], Iterator[tuple[str, list[str] | None]]]:
    """The columns of a .csv or .tsv, and (place, cells) of each row below them; None for a row that cannot be read.

    There may be fewer cells than columns, but not more. Raises UserError for a bad row unless `skip_bad`.
    """
    csv.field_size_limit(blocks.MAX_DOCUMENT_BYTES)
    header = next(lines, "")
    is_tsv = source.inner_name.lower().endswith(".tsv") or ("\t" in header and "," not in header)
    delimiter = "\t" if is_tsv else ","
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    quoting = csv.QUOTE_NONE if is_tsv and not _is_quoted(source, skip_bad) else csv.QUOTE_MINIMAL

    def rows() -> Iterator[tuple[str, list[str] | None]]:
        file = source.name
        for number, cells in _parsed(lines, delimiter, quoting):
            place = f"{file}, line {number + 1}"
            if isinstance(cells, list) and not any(cells[len(names) :]):  # spreadsheets add empty cells at the end
                if cells:
                    yield place, cells[: len(names)]
            elif skip_bad:
                yield place, None
            elif isinstance(cells, csv.Error):
                raise UserError(
                    f"{place}: {cells}; is a quote not closed? Quotes inside a cell are doubled, and the whole cell is "
                    'quoted: "他说""好""。" (--skip_bad=True leaves such rows out)'
                ) from cells
            else:
                refuse_width(place, cells, names)

    return names, rows()


def refuse_width(place: str, cells: list[str], names: list[str]) -> NoReturn:
    """Raises UserError: a row has too few or too many cells."""
    raise UserError(
        f"{place}: {len(cells)} columns where the header has {len(names)}; quote cells that contain the delimiter, "
        "or leave such rows out with --skip_bad=True"
    )


def _is_quoted(source: Source, skip_bad: bool) -> bool:
    """Whether quotes in a .tsv are those of a table; in many they are nothing but text."""
    for _, cells in _parsed(lines_of(source, skip_bad), "\t", csv.QUOTE_MINIMAL):
        if isinstance(cells, csv.Error):
            _say_once(f"{source.name}: quotes do not pair up, they are read as text")
            return False
    return True


@functools.cache
def _say_once(message: str) -> None:
    console.log(message)  # though every pass over the text finds it anew


def _parsed(lines: Iterator[str], delimiter: str, quoting: int) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """(number of its first line, cells) of each row, or what is wrong with it.

    Strict: else a quote that is never closed swallows the rest of the file without a word. Of a row that cannot be read
    only the first line is given up, and what it had swallowed is read anew.
    """
    row: list[str] = []
    again: deque[str] = deque()

    def taken() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            row.append(line)
            yield line

    number = 1
    while True:
        try:
            for cells in csv.reader(taken(), delimiter=delimiter, quoting=quoting, strict=True):
                yield number, cells
                number += len(row)
                row.clear()
            return
        except csv.Error as error:
            yield number, error
            again.extendleft(reversed(row[1:]))
            number += 1
            row.clear()


def parquet_blocks(source: Source, index: int, field: str, skip_bad: bool) -> Iterator[Block]:
    """Rows of a .parquet file. Raises UserError: no such field, not text, a damaged file."""
    import pyarrow as pa  # half a second that other formats need not wait for
    import pyarrow.parquet as pq

    try:
        with source.open() as stream:  # opened here, as pyarrow knows no names that are not UTF-8
            table = pq.ParquetFile(_unpacked_table(source, stream) if source.compression else stream)
            if field not in table.schema_arrow.names:
                raise UserError(_no_field(source, "the table", field, table.schema_arrow.names))
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                values = _values(batch.column(0))
                for offset, value in enumerate(values, start=1):
                    if not isinstance(value, str) and not skip_bad:
                        is_encoded = isinstance(value, UnicodeDecodeError)
                        kind = "in another encoding than UTF-8" if is_encoded else type(value).__name__
                        raise UserError(
                            f"{source.name}, row {row + offset}: field {field!r} is {kind}, not text "
                            "(--skip_bad leaves such rows out)"
                        )
                row += len(values)
                records = tuple(value for value in values if isinstance(value, str))
                yield Block(source, index, encoding="utf-8", records=records, skipped=len(values) - len(records))
    except (pa.ArrowException, *DAMAGED) as error:
        raise UserError(f"{source.name} is not a readable parquet file: {error}") from error


def _values(column: pyarrow.Array) -> list[Any]:
    """The values of a column, with an UnicodeDecodeError in the place of each text that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return list(map(_value, column))


def _value(scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _unpacked_table(source: Source, stream: BinaryIO) -> io.BytesIO:
    packed = source.read(stream, MAX_PACKED_TABLE + 1)
    if len(packed) > MAX_PACKED_TABLE:
        raise UserError(f"{source.name}: unpack it first; parquet is compressed inside and needs no second packing")
    return io.BytesIO(packed)


def json_records(block: Block, text: str, field: str, skip_bad: bool) -> tuple[list[str], int]:
    """Texts of the JSON lines in a block, and how many lines were bad (`skip_bad`).

    Raises:
        UserError: a line that is no JSON object or has no text in `field`, with file and line.
    """
    return _each_line(block, text, skip_bad, lambda record: _field_text(record, field))


def json_dialogues(block: Block, text: str, skip_bad: bool) -> tuple[list[str], int]:
    """Dialogues of the JSON lines in a block, packed, and how many lines were bad (`skip_bad`).

    Raises:
        UserError: a line that is no dialogue in a known shape, with file and line.
    """

    def dialogue(record: dict) -> tuple[str, str]:
        messages, problem = messages_of(record)
        return packed(messages), problem

    return _each_line(block, text, skip_bad, dialogue)


def _each_line(
    block: Block, text: str, skip_bad: bool, take: Callable[[dict], tuple[str, str]]
) -> tuple[list[str], int]:
    records, bad = [], 0
    for number, line in enumerate(text.split("\n")):
        if not line or line.isspace():
            continue
        value, problem = _json_line(line, take)
        if not problem:
            records.append(value)
        elif skip_bad:
            bad += 1
        else:
            place = f"{block.source.name}, line {first_line(block) + number}"
            raise UserError(f"{place}: {problem} (--skip_bad leaves such lines out)")
    return records, bad


def _json_line(line: str, take: Callable[[dict], tuple[str, str]]) -> tuple[str, str]:
    """(text, "") or ("", what is wrong)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return "", f"not JSON ({error}); every line must be one object. An array: jq -c '.[]' FILE > FILE.jsonl"
    if not isinstance(record, dict):
        return "", f"{type(record).__name__} instead of an object"
    value, problem = take(record)
    if not problem and "\\u" in line:  # the only way for half a character to get through a decoder
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return "", "it has half a character (a lone surrogate)"
    return value, problem


def _field_text(record: dict, field: str) -> tuple[str, str]:
    if field not in record:
        hint = " These are dialogues: --format=dialogue" if {"messages", "conversations"} & record.keys() else ""
        return "", f"no field {field!r}; the fields are {', '.join(record) or 'none'}. Name one with --field.{hint}"
    if not isinstance(record[field], str):
        return "", f"field {field!r} is {type(record[field]).__name__}, not text"
    return record[field], ""


def first_line(block: Block) -> int:
    """The block's line number in its file; counted only now that an error needs it."""
    if block.first_line:
        return block.first_line
    line, left = 1, block.start
    with open(block.source.path, "rb") as file:
        while left > 0 and (piece := file.read(min(left, 1 << 20))):
            line += encodings.count_lines(piece, block.encoding or "utf-8")
            left -= len(piece)
    return line


def _no_field(source: Source, place: str, field: str, names: list[str]) -> str:
    listed = ", ".join(map(str, names)) or "none"
    return f"{source.name}, {place}: no field {field!r}; the fields are {listed}. Name one with --field"
