"""Tables of texts, with or without labels, row by row: .csv, .tsv, .jsonl, or plain lines, in any encoding."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from miaobi.corpus.records import lines_of, refuse_width, table_rows
from miaobi.corpus.sources import Source, find_sources
from miaobi.errors import UserError

TEXT_COLUMNS = ("text", "review", "content", "sentence")
LABEL_COLUMNS = ("label", "labels", "sentiment", "class")


@dataclass(frozen=True)
class Row:
    """One text of a file. label: None where there is no such column, "" where the cell is empty."""

    place: str
    text: str
    label: str | None = None


def read_rows(name: str, text_column: str | None, label_column: str | None, skip_bad: bool = False,
              labels: bool = True) -> Iterator[Row | None]:  # fmt: skip
    """Rows of .csv, .tsv and .jsonl files one by one, None for one that `skip_bad` leaves out; of others, their lines.

    labels: whether a label column is needed. Quoted cells may hold line breaks.

    Raises:
        UserError: missing files and columns, rows that cannot be read.
    """
    for source in find_sources([name]):
        if source.format == "parquet":
            raise UserError(f"{source.name}: classify reads .csv, .tsv, .jsonl and lines of text; save it as one")
        if source.format == "text":
            for number, line in enumerate(lines_of(source, skip_bad), start=1):
                yield Row(f"{source.name}, line {number}", line.rstrip("\r\n"))
            continue
        columns: tuple[str, str | None] | None = None
        for place, record in json_records(source, skip_bad) if source.format == "jsonl" else table(source, skip_bad):
            if columns is None and record is not None:
                columns = find_columns(source, list(record), text_column, label_column, labels)
            yield None if record is None else row_of(place, record, *columns, skip_bad)


def table(source: Source, skip_bad: bool) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(place, column -> cell) of the rows of a .csv or .tsv."""
    names, rows = table_rows(source, lines_of(source, skip_bad), skip_bad)
    for place, cells in rows:
        if cells is not None and len(cells) < len(names) and not skip_bad:
            refuse_width(place, cells, names)
        is_whole = cells is not None and len(cells) == len(names)
        yield place, dict(zip(names, cells, strict=True)) if is_whole else None


def json_records(source: Source, skip_bad: bool) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(place, field -> value) of the lines of a .jsonl."""
    for number, line in enumerate(lines_of(source, skip_bad), start=1):
        if not line.strip():
            continue
        place = f"{source.name}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) and not skip_bad:
            raise UserError(f"{place}: not a JSON object; every line must be one (--skip_bad=True leaves others out)")
        yield place, record if isinstance(record, dict) else None


def find_columns(
    source: Source, names: list[str], text: str | None, label: str | None, labels: bool
) -> tuple[str, str | None]:
    """The text and the label column. Raises UserError where one is missing."""
    found = []
    for asked, known, key in (text, TEXT_COLUMNS, "text_column"), (label, LABEL_COLUMNS, "label_column"):
        if key == "label_column" and asked is None and not labels:
            return found[0], None
        name = asked if asked is not None else next((n for n in known if n in names), None)
        if name is None or name not in names:
            asked = f"no column {asked!r}" if asked is not None else f"no column called {', '.join(known)}"
            raise UserError(f"{source.name}: {asked}; there are {', '.join(map(str, names)) or 'none'}. "
                            f"Name one with --{key}")  # fmt: skip
        found.append(name)
    return found[0], found[1]


def row_of(place: str, record: dict[str, Any], text: str, label: str | None, skip_bad: bool) -> Row | None:
    """A record as text and label. Raises UserError for a text that is none."""
    value = record.get(text)
    if not isinstance(value, str):
        if skip_bad:
            return None
        raise UserError(f"{place}: {text} is {type(value).__name__}, not text (--skip_bad=True leaves such rows out)")
    found = None if label is None else record.get(label)
    try:
        f"{value}{found}".encode()
    except UnicodeEncodeError as e:
        if skip_bad:
            return None
        raise UserError(f"{place}: it has half a character (a lone surrogate): cut inside an emoji, or decoded "
                        "wrongly. Remove it, or leave such rows out with --skip_bad=True") from e  # fmt: skip
    if label is None:
        return Row(place, value)
    return Row(place, value, "" if found is None else str(found).strip())
