"""Records of JSON lines, JSON arrays and tables -> texts or dialogues: one reader for `prepare`, `eval` and `classify`.

JSON lines are read block by block, in any process; the other kinds in order, in the main process.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from miaobi.corpus import blocks, encodings, ignored
from miaobi.corpus.blocks import REMOVED, Block, decoded, text_blocks
from miaobi.corpus.dialogue import packed
from miaobi.corpus.ignored import Ignored
from miaobi.corpus.messages import ALL_EXTRAS, ignored_keys, messages_of
from miaobi.corpus.sources import FORMAT_BY_NAME, NotTextError, Source
from miaobi.corpus.tables import (
    Record,
    csv_records,
    lines_of,
    parquet_records,
    refuse_repeated,
    repeated,
    say_once,
    wrong_width,
)  # fmt: skip
from miaobi.errors import UserError, brief, names_listed

Take = Callable[[dict[str, Any]], tuple[str, str]]
"""A record -> (its text, "") or ("", what is wrong with it)."""
_SKIP = "(--skip_bad leaves such lines out)"


def open_records(
    source: Source, skip_bad: bool, columns: list[str] | None = None, delimiter: str = ""
) -> tuple[list[str] | None, Iterator[Record]]:
    """The columns of a file (None for JSON, where every record has its own), and its records in order.

    Args:
        columns: what will be asked for; parquet need not read the others.
        delimiter: see `csv_records`.

    Raises:
        UserError: a file that cannot be read. A bad record has a `problem` instead.
    """
    kind = kind_of(source)
    if kind == "csv":
        return csv_records(source, skip_bad, delimiter)
    if kind == "parquet":
        return parquet_records(source, columns)
    return None, _array_records(source, skip_bad) if is_array(source) else _line_records(source, skip_bad)


def kind_of(source: Source) -> str:
    """How the records lie in the file: jsonl, csv or parquet. A format says what is taken out of them."""
    if source.format != "messages":
        return source.format
    return FORMAT_BY_NAME.get(Path(source.inner_name).suffix.lower(), "jsonl")


def is_array(source: Source) -> bool:
    """Whether a file of JSON is one array, as Alpaca's is, and not one record a line."""
    with source.open() as stream:
        head = source.read(stream, 4096)
    return head.lstrip(b"\xef\xbb\xbf\xff\xfe\x84\x31\x95\x33\0 \t\r\n")[:1] == b"["


def is_in_order(source: Source) -> bool:
    """Whether the file's records are read in order, by the main process: those of tables and JSON arrays."""
    kind = kind_of(source)
    return kind in ("csv", "parquet") or (kind == "jsonl" and is_array(source))


def column_of(source: Source, names: list[str], column: str) -> None:
    """Raises UserError where `column` is none of a table's `names`, or several of them."""
    if column not in names:
        if len(names) == 1 and (part := re.search(rf"(\W){re.escape(column)}\b|\b{re.escape(column)}(\W)", names[0])):
            char = part[1] or part[2]
            raise UserError(f"{source.name}: one column, {names[0][:80]!r}; if {char!r} stands between its cells, add "
                            f"--delimiter={shlex.quote(char)}")  # fmt: skip
        raise UserError(
            f"{source.name}: no field {column!r}; the fields are {names_listed(names)}. Name one with --field"
        )
    if column in repeated(names):
        refuse_repeated(source.name, column)


# For prepare: blocks of texts


def taker(source: Source, field: str, extras: frozenset[str] = ALL_EXTRAS) -> Take:
    """What is taken out of each record of a source: the text in `field`, or a whole dialogue, packed.

    extras: what the template can render besides roles and text, see `messages_of`.
    """
    if source.format != "messages":
        return lambda values: _field_text(values, field)

    def dialogue(values: dict[str, Any]) -> tuple[str, str]:
        messages, problem = messages_of(values, extras)
        return packed(messages), problem

    return dialogue


def record_blocks(
    source: Source, index: int, field: str, skip_bad: bool,
    extras: frozenset[str] = ALL_EXTRAS, delimiter: str = "",
) -> Iterator[Block]:  # fmt: skip
    """The records of a table or a JSON array, taken in order in this process.

    Raises:
        UserError: no such field; without `skip_bad`, a record that cannot be taken.
    """
    take = taker(source, field, extras)
    is_dialogue = source.format == "messages"
    names, records = open_records(source, skip_bad, None if is_dialogue else [field], delimiter)
    if names is not None and not is_dialogue:
        column_of(source, names, field)
    texts, size, bad, encoding, unread = [], 0, 0, "utf-8", {}
    for record in records:
        bad, encoding = bad + record.lost, record.encoding
        text, problem = ("", record.problem) if record.problem else take(record.values)
        if problem and names is not None and not record.problem and not is_dialogue and field not in record.values:
            problem = wrong_width(len(record.values), len(names))
        if problem and not skip_bad:
            record.refuse(problem)
        if problem:
            bad += 1
        else:
            texts.append(text)
            size += len(text)
            ignored.note(unread, ignored_keys(record.values) if is_dialogue else (), record.location)
        if size > blocks.BLOCK_BYTES // 3:
            yield Block(source, index, encoding=encoding, records=tuple(texts), skipped=bad, ignored=unread)
            texts, size, bad, unread = [], 0, 0, {}
    yield Block(source, index, encoding=encoding, records=tuple(texts), skipped=bad, ignored=unread)


RECORDS = ("jsonl", "csv", "parquet", "messages")
"""Formats of files that hold records."""
_SHAPES = {"messages", "conversations", "instruction"}
"""Fields of dialogues, see `messages`."""
_NO_OBJECT = "instead of an object"


def refuse_other_records(source: Source, field: str, skip_bad: bool, delimiter: str = "") -> None:
    """Raises NotTextError for a table or JSON whose columns, or whose first record, are of something else than text.

    For files of a directory or an archive, which nobody named: figures of runs, lists, other people's settings.
    """
    names, records = open_records(source, skip_bad, None, delimiter)
    first = next(records, None) if names is None else None
    known = names if names is not None else [*first.values] if first is not None else [field]
    if _SHAPES & set(known) if source.format == "messages" else field in known:
        return
    if first is None or not first.problem:
        what = "dialogue" if source.format == "messages" else f"field {field!r}"
        hint = ". If one of them is the text, name it with --field" if source.format != "messages" else ""
        hint = ". These are dialogues: --format=dialogue" if hint and _SHAPES & set(known) else hint
        raise NotTextError(f"{source.name}: no {what}; the fields are {', '.join(map(str, known)) or 'none'}{hint}")
    if first.problem.endswith(_NO_OBJECT):
        raise NotTextError(f"{source.name}: {first.problem}: no records")


def line_texts(block: Block, text: str, take: Take, skip_bad: bool) -> tuple[list[str], int, Ignored]:
    """What is taken out of the JSON lines in a block, how many lines were bad (`skip_bad`), and what was not read.

    Raises:
        UserError: a line that is no JSON object or has nothing to take, with file and line.
    """
    texts, bad, unread, is_dialogue = [], 0, {}, block.source.format == "messages"
    for number, line in enumerate(text.split("\n")):
        if not line or line.isspace():
            continue
        values, problem = parsed_line(line)
        value, problem = ("", problem) if problem else take(values)
        if not problem:
            texts.append(value)
            ignored.note(unread, ignored_keys(values) if is_dialogue else (), number)
        elif skip_bad:
            bad += 1
        else:
            location = f"{block.source.name}, line {first_line(block) + number}"
            raise UserError(f"{location}: {problem} {_SKIP}")
    return texts, bad, unread


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


def _field_text(values: dict[str, Any], field: str) -> tuple[str, str]:
    value = values.get(field)
    if isinstance(value, str):
        return (value, "") if is_whole(value) else ("", HALF_A_CHARACTER)
    if field not in values:
        hint = " These are dialogues: --format=dialogue" if _SHAPES & values.keys() else ""
        return "", f"no field {field!r}; the fields are {names_listed(values)}. Name one with --field.{hint}"
    kind = "in another encoding than UTF-8" if isinstance(value, UnicodeDecodeError) else type(value).__name__
    return "", f"field {field!r} is {kind}, not text"


# JSON

HALF_A_CHARACTER = "it has half a character (a lone surrogate): cut inside an emoji, or decoded wrongly"


def is_whole(text: str) -> bool:
    """Whether a text has no half of a character, which JSON's \\u escapes can spell."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def parsed_line(line: str) -> tuple[dict[str, Any], str]:
    """(record, "") of a JSON line, or ({}, what is wrong)."""
    try:
        values = json.loads(line, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON ({error}); every line must be one object, or the whole file one array of objects"
    if not isinstance(values, dict):
        return {}, f"{type(values).__name__} instead of an object, so not a JSON object; every line must be one"
    return values, ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a key that is there twice: JSON's readers take one of them without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"the key {brief(min(repeated([key for key, _ in pairs])))} is there more than once")
    return values


def _line_records(source: Source, skip_bad: bool) -> Iterator[Record]:
    for number, line in enumerate(lines_of(source, skip_bad), start=1):
        if line.strip():
            yield Record(f"{source.name}, line {number}", *parsed_line(line))


def _array_records(source: Source, skip_bad: bool) -> Iterator[Record]:
    """The objects of a JSON array, which is never in memory as a whole."""
    array = _Array(source, skip_bad)
    array.take("[")
    if array.peek() == "]":
        array.take("]")
    else:
        while True:
            array.peek()
            location = f"{source.name}, line {array.line}"
            value = array.value()
            problem = "" if isinstance(value, dict) else f"{type(value).__name__} {_NO_OBJECT}"
            yield Record(location, {} if problem else value, problem, array.lost, array.encoding)
            array.lost = 0
            if array.peek() != ",":
                break
            array.take(",")
        array.take("]")
    if array.peek():
        raise array.error("there is more behind the end of the array")
    if array.removed:
        say_once(source.name, REMOVED.format(array.removed))


class _Array:
    """Text of a JSON array, read as far as it is needed."""

    def __init__(self, source: Source, skip_bad: bool) -> None:
        self.source, self.text, self.at, self.line = source, "", 0, 1
        self.lost, self.removed, self.encoding = 0, 0, "utf-8"
        self._blocks = (decoded(block, skip_bad) for block in text_blocks(source, 0, whole=True))
        self._decoder = json.JSONDecoder(object_pairs_hook=_object)

    def peek(self) -> str:
        """The next character that is not white space, "" at the end; the place is in front of it."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n\ufeff":
                self.line += self.text[self.at] == "\n"
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Raises UserError unless `character` comes next."""
        if (actual := self.peek()) != character:
            where = f" before {actual!r}" if actual else "; is the file whole?"
            raise self.error(f"{character!r} is missing{where}")
        self.at += 1

    def value(self) -> Any:
        """Raises UserError for what is not JSON: the start of the next value is unknown then."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > blocks.MAX_DOCUMENT_BYTES or not self._more():
                    raise self.error(f"not JSON ({error.msg})") from error
            except (ValueError, RecursionError) as error:
                raise self.error(f"not JSON ({error})") from error
            else:
                self.line += self.text.count("\n", self.at, end)
                self.at = end
                return value

    def error(self, problem: str) -> UserError:
        """What is wrong, and near which line."""
        return UserError(f"{self.source.name}, line {self.line}: {problem}; the file must be one array of objects, "
                         "or one object a line")  # fmt: skip

    def _more(self) -> bool:
        """At least as much again as is left, so that a long value is not tried too often."""
        rest, needed = [self.text[self.at :]], max(1, len(self.text) - self.at)
        while needed > 0 and (block := next(self._blocks, None)) is not None:
            text, self.encoding, lost, removed = block
            rest.append(text)
            needed -= len(text)
            self.lost, self.removed = self.lost + lost, self.removed + removed
        if len(rest) == 1:
            return False
        self.text, self.at = "".join(rest), 0
        return True
