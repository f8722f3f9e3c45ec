"""Rows of .csv, .tsv and .parquet files, each as {column: value}."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import re
from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

from miaobi import console
from miaobi.corpus import blocks
from miaobi.corpus.blocks import REMOVED, decoded, text_blocks
from miaobi.corpus.sources import DAMAGED, DamagedError, NotTextError, Source
from miaobi.errors import UserError, number_of

if TYPE_CHECKING:
    import pyarrow

MAX_PACKED_TABLE = 512 << 20
"""A packed parquet file is unpacked in memory, up to this many bytes."""
MAX_GROWTH = 1000
"""How many times its size a parquet file may become as text: more is no text, but made to fill memories."""
_BATCH_BYTES = 8 << 20
DELIMITERS = {",": "commas", "\t": "tabs", ";": "`;`", "|": "`|`", "，": "`，`"}
_SAMPLE_LINES, _SAMPLE_CHARACTERS = 50, 1 << 16  # what the delimiter is guessed from


class Record(NamedTuple):
    """One record of a file, whatever its kind."""

    location: str
    """File and line (parquet: row), for messages."""
    values: dict[str, Any]
    problem: str = ""
    """Why it cannot be read; then there are no values."""
    lost: int = 0
    """Bad bytes that were replaced since the record before (`skip_bad`)."""
    encoding: str = "utf-8"

    def refuse(self, problem: str = "") -> NoReturn:
        """Raises UserError: what is wrong with it, and where."""
        raise UserError(f"{self.location}: {problem or self.problem} (--skip_bad=True leaves such records out)")


def repeated(names: list[str]) -> frozenset[str]:
    """Columns of which there are several: whichever was taken, it might be the wrong one."""
    return frozenset(str(name) for name, count in Counter(names).items() if count > 1)


def refuse_repeated(name: str, column: str) -> NoReturn:
    """Raises UserError: a column that is asked for is there several times."""
    raise UserError(f"{name}: several columns are called {column!r}, and which one is meant is unclear; "
                    "rename all but one, or name another column")  # fmt: skip


# CSV


class Dialect(NamedTuple):
    """How the cells of a table are separated and quoted."""

    delimiter: str
    blanks: bool
    """Blanks may stand between a delimiter and a quote: `"a", "b"`."""


def csv_records(source: Source, skip_bad: bool, delimiter: str = "") -> tuple[list[str], Iterator[Record]]:
    """The columns of a .csv or .tsv, and the records below them. Cells may hold line breaks inside quotes.

    A row may have fewer cells than there are columns: the last ones are then missing. A row that is broken, or has
    more, is a record with a problem.

    Args:
        delimiter: what stands between cells; guessed from the first lines where it is empty, and said.
    """
    csv.field_size_limit(blocks.MAX_DOCUMENT_BYTES)
    lines = Lines(source, skip_bad)
    head = list(itertools.islice(lines, _SAMPLE_LINES))
    first = 1
    if head and (separator := re.fullmatch(r'"?sep=(.|\\t)"?[,;\t]*\r?\n?', head[0])):  # Excel's
        delimiter, first = delimiter or separator[1].replace("\\t", "\t"), 2
        del head[0]
    dialect = _dialect(source, head, delimiter)
    quoting = csv.QUOTE_MINIMAL
    if dialect.delimiter == "\t" and not _is_quoted(source, skip_bad, first):
        quoting = csv.QUOTE_NONE
    parsed = _parsed(itertools.chain(head, lines), dialect, quoting, first)
    _, names, _ = next(parsed, (0, [], 0))
    if isinstance(names, csv.Error):
        raise UserError(f"{source.name}, line {first}: the header cannot be read ({names}); is a quote not closed?")
    names = [name.strip() for name in names]

    def records() -> Iterator[Record]:
        repeated = 0
        for line, cells, _ in parsed:
            location, lost, lines.lost = f"{source.name}, line {line}", lines.lost, 0
            if isinstance(cells, csv.Error):
                yield Record(location, {}, _broken_row(cells), lost, lines.encoding)
            elif [cell.strip() for cell in cells[: len(names)]] == names and not any(cells[len(names) :]):
                repeated += 1  # where tables were joined
            elif any(cells[len(names) :]):  # spreadsheets add empty cells at the end
                yield Record(location, {}, wrong_width(len(cells), len(names)), lost, lines.encoding)
            elif cells:
                yield Record(location, dict(zip(names, cells, strict=False)), "", lost, lines.encoding)
        if repeated:
            say_once(source.name, f"left out: {number_of(repeated, 'row')} that said the header again")
        if lines.removed:
            say_once(source.name, REMOVED.format(lines.removed))

    return names, records()


def wrong_width(cells: int, columns: int) -> str:
    """What is wrong with a row that has too few or too many cells."""
    return f"{number_of(cells, 'column')} where the header has {columns}; quote cells that contain the delimiter"


def _broken_row(error: csv.Error) -> str:
    return (
        f"{error}; is a quote not closed? Quotes inside a cell are doubled, and the whole cell is quoted: "
        '"他说""好""。"'
    )


class Lines:
    """Iterator over the decoded lines of a source, with their ends; says what was lost while decoding them."""

    def __init__(self, source: Source, skip_bad: bool) -> None:
        self.encoding, self.lost, self.removed = "utf-8", 0, 0
        self._lines = self._decoded(source, skip_bad)

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        return next(self._lines)

    def _decoded(self, source: Source, skip_bad: bool) -> Iterator[str]:
        for block in text_blocks(source, 0, whole=True):
            text, self.encoding, lost, removed = decoded(block, skip_bad)
            self.lost, self.removed = self.lost + lost, self.removed + removed
            yield from io.StringIO(text, newline="")  # line breaks inside a cell stay as they are


def lines_of(source: Source, skip_bad: bool) -> Iterator[str]:
    """Decoded lines with their ends. Raises UserError as `decoded`."""
    return Lines(source, skip_bad)


def _dialect(source: Source, head: list[str], delimiter: str) -> Dialect:
    """The delimiter by which most of the first rows have as many cells as the header, commas where that is open."""
    if len(delimiter) > 1 or delimiter in ('"', "\n", "\r"):
        raise UserError(f"delimiter={delimiter!r} cannot part cells; give one character, such as ;")
    is_tsv = source.inner_name.lower().endswith(".tsv")
    sample = "".join(head)[:_SAMPLE_CHARACTERS].splitlines(keepends=True)
    tried = [delimiter] if delimiter else ["\t"] if is_tsv else list(DELIMITERS)
    best, columns = Dialect(tried[0], False), 1
    for char in tried:
        has_blanks = char != "\t" and re.search(re.escape(char) + ' +"', "".join(sample)) is not None
        for blanks in (True, False) if has_blanks else (False,):
            agreeing = _agreeing(sample, Dialect(char, blanks))
            if agreeing > columns:
                best, columns = Dialect(char, blanks), agreeing
    if not delimiter and not is_tsv and best.delimiter != ",":
        say_once(source.name, f"its columns are taken to be separated by {DELIMITERS[best.delimiter]} "
                  "(--delimiter says otherwise)")  # fmt: skip
    return best


def _agreeing(sample: list[str], dialect: Dialect) -> int:
    """How many of the first rows, the header among them, have as many cells as it; 0 where that has only one."""
    try:
        rows = list(csv.reader(sample, delimiter=dialect.delimiter, skipinitialspace=dialect.blanks))
    except csv.Error:
        return 0
    width = len(rows[0]) if rows else 0
    # A single row decides as well: it counts twice, so that a header alone is enough.
    return 0 if width < 2 else 1 + sum(len(row) == width for row in rows)


def _is_quoted(source: Source, skip_bad: bool, first: int) -> bool:
    """Whether quotes in a table with tabs are those of cells; in many they are nothing but text."""
    for _, cells, _ in _parsed(lines_of(source, skip_bad), Dialect("\t", False), csv.QUOTE_MINIMAL, first):
        if isinstance(cells, csv.Error):
            say_once(source.name, "quotes do not pair up, they are read as text")
            return False
    return True


guessed: dict[str, list[str]] = {}
"""What was guessed of a table, by its name, and said; for the manifest."""


def say_once(name: str, guess: str) -> None:
    """Though every pass over the text finds it anew."""
    if guess not in guessed.setdefault(name, []):
        guessed[name].append(guess)
        console.log(f"{name}: {guess}")


def _parsed(
    lines: Iterator[str], dialect: Dialect, quoting: int, number: int
) -> Iterator[tuple[int, list[str] | csv.Error, int]]:
    """(number of its first line, cells or what is wrong with it, its lines) of each row.

    Strict: else a quote that is never closed swallows the rest of the file without a word. Of a row that cannot be read
    only the first line is given up, and what it had swallowed is read anew.
    """
    row: list[str] = []
    again: deque[str] = deque()

    def taken() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            row.append(line)
            yield line

    options = {"delimiter": dialect.delimiter, "skipinitialspace": dialect.blanks, "quoting": quoting, "strict": True}
    while True:
        try:
            for cells in csv.reader(taken(), **options):
                yield number, cells, len(row)
                number += len(row)
                row.clear()
            return
        except csv.Error as error:
            yield number, error, 1
            again.extendleft(reversed(row[1:]))
            number += 1
            row.clear()


# Parquet


def parquet_records(source: Source, columns: list[str] | None = None) -> tuple[list[str], Iterator[Record]]:
    """The columns of a .parquet file, and its records.

    Args:
        columns: those of them to read, as far as they are there; None for all.

    Raises UserError for a damaged file, and one that grows beyond MAX_GROWTH.
    """
    names = _guarded(source, lambda: _open_table(source)[0].schema_arrow.names)
    present = None if columns is None else [name for name in dict.fromkeys(columns) if name in names]
    return list(names), _parquet_rows(source, present)


def _parquet_rows(source: Source, columns: list[str] | None) -> Iterator[Record]:
    table, stream = _guarded(source, lambda: _open_table(source))
    size, row, limit = 0, 0, MAX_GROWTH * max(source.size, 128 << 10)
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    if sum(group.total_byte_size for group in groups) > limit:
        refuse_growth(source)
    per_row = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    rows = max(1, min(256, _BATCH_BYTES // max(1, per_row)))
    batches = iter(table.iter_batches(batch_size=rows, columns=columns))
    try:
        while (batch := _guarded(source, lambda: next(batches, None))) is not None:
            # One row at a time: a thousand rows of one text in a dictionary are small until they are strings.
            for i in range(batch.num_rows):
                row += 1
                values = {}
                for name, column in zip(batch.schema.names, batch.columns, strict=True):
                    values[name] = _guarded(source, functools.partial(_value, column, i))
                    size += _text_size(values[name])
                if size > limit:
                    refuse_growth(source)
                yield Record(f"{source.name}, row {row}", values)
    finally:
        stream.close()


def refuse_growth(source: Source) -> NoReturn:
    """Raises UserError: what a packed file unpacks to is out of all proportion."""
    raise DamagedError(f"{source.name} becomes more than {MAX_GROWTH:,} times its size when it is read; "
                    "it is damaged, or made to fill memories: leave it out")  # fmt: skip


def _guarded(source: Source, read: Any) -> Any:
    """What `read` gives. Raises UserError for whatever pyarrow makes of a damaged file."""
    try:
        import pyarrow as pa  # half a second, and 170 MB, that other formats need not wait for
    except ModuleNotFoundError as e:
        raise UserError(f"{source.name} is a parquet file, which pyarrow reads: pip install 'miaobi[parquet]'") from e
    try:
        return read()
    except (pa.ArrowException, *DAMAGED, ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise DamagedError(f"{source.name} is not a readable parquet file: {error}") from error


def _open_table(source: Source) -> tuple[pyarrow.parquet.ParquetFile, BinaryIO]:
    import pyarrow.parquet as pq

    stream = source.open()  # opened here, as pyarrow knows no names that are not UTF-8
    try:
        file = _unpacked_table(source, stream) if source.compression else stream
        meta = pq.ParquetFile(file).metadata
        texts = [meta.schema.column(i) for i in range(meta.num_columns)]
        kept_once = [column.path for column in texts if column.physical_type == "BYTE_ARRAY"]
        return pq.ParquetFile(file, read_dictionary=kept_once), stream
    except BaseException:
        stream.close()
        raise


def _value(column: pyarrow.Array, i: int) -> Any:
    """One value; a UnicodeDecodeError in the place of a text that is not UTF-8."""
    try:
        return column[i].as_py()
    except UnicodeDecodeError as error:
        return error


def _text_size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_text_size, value.values()))
    return sum(map(_text_size, value)) if isinstance(value, list) else 8


def _unpacked_table(source: Source, stream: BinaryIO) -> io.BytesIO:
    packed = source.read(stream, MAX_PACKED_TABLE + 1)
    if len(packed) > MAX_PACKED_TABLE:
        raise NotTextError(f"{source.name}: unpack it first; parquet is compressed inside and needs no second packing")
    return io.BytesIO(packed)
