"""Blocks -> documents, in bounded memory.

`iter_blocks` walks over the sources in the main process; `read_block` turns one block into documents, in any process.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from miaobi.console import warn
from miaobi.corpus.cutting import Block, decode_block, text_blocks
from miaobi.corpus.dialogue import without_marks
from miaobi.corpus.messages import ALL_EXTRAS
from miaobi.corpus.records import first_line, is_array, kind_of, line_texts, parsed_line, record_blocks, taker
from miaobi.corpus.sources import Source, find_sources
from miaobi.corpus.template import NONCHARACTER
from miaobi.errors import UserError

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True)
class Content:
    """What a block held."""

    raw: str
    """The text as read, line ends as `\\n` (records: their fields as they are, one after the other)."""
    documents: list[str]
    encoding: str
    skipped: int = 0


def iter_blocks(
    sources: list[Source], field: str = "text", skip_bad: bool = False, whole: bool = False,
    extras: frozenset[str] = ALL_EXTRAS, delimiter: str = "",
) -> Iterator[Block]:  # fmt: skip
    """The blocks of all sources, in order.

    Args:
        field: column or key of a record that holds the text.
        skip_bad: leave out unreadable files and records and count them, instead of raising.
        whole: cut at line ends, not at document ends (--split=tail knows no documents).
        extras: what a dialogue may have beside roles and words, see `messages.messages_of`.
        delimiter: between the cells of a .csv; guessed where it is empty.

    Raises:
        UserError: an empty, binary or damaged file, an unknown encoding, a table without `field`.
    """
    for index, source in enumerate(sources):
        try:
            if kind_of(source) in ("csv", "parquet") or (kind_of(source) == "jsonl" and is_array(source)):
                yield from record_blocks(source, index, field, skip_bad, extras, delimiter)
            else:
                yield from text_blocks(source, index, whole)
        except UserError:
            if not skip_bad:
                raise
            yield Block(source, index, encoding="skipped", records=(), skipped=1)


def read_block(
    block: Block, field: str = "text", skip_bad: bool = False, whole: bool = False, extras: frozenset[str] = ALL_EXTRAS
) -> Content:
    """The documents of a block; with `whole`, its text as one document, newlines and all.

    Line ends become `\\n`, newlines around a document are left out; a dialogue's utterances are stripped.

    Raises:
        UserError: what `decode_block` raises, a malformed JSON line, a record without `field`, a dialogue with a
            Unicode noncharacter.
    """
    source = block.source
    try:
        if block.records is not None:
            records, encoding, skipped = list(block.records), block.encoding or "utf-8", block.skipped
        else:
            text, encoding, skipped = decode_block(block, skip_bad)
            if kind_of(source) == "jsonl":
                records, bad = line_texts(block, text, taker(source, field, extras), skip_bad)
                skipped += bad
    except UserError:
        if not skip_bad:
            raise
        return Content("", [], "skipped", 1)
    if source.format == "messages":
        records = [_universal_newlines(record) for record in records]
        return Content(without_marks("".join(records)), records, encoding, skipped)
    if source.format in ("jsonl", "csv", "parquet"):
        documents = [_universal_newlines(record) for record in records]
        if whole:
            documents = ["".join(document + "\n" for document in documents)]
        return Content("".join(records), documents, encoding, skipped)
    if block.records is not None:
        return Content("", [], encoding, skipped)
    text = _universal_newlines(text)
    if source.format == "dialogue" and block.start == 0 and text.lstrip()[:1] == "{":
        _refuse_json(source, text)
    documents = [text] if whole else _documents(text, source.format)
    if source.format == "dialogue" and (found := NONCHARACTER.search(text)):
        if not skip_bad:
            line = first_line(block) + text.count("\n", 0, found.start())
            raise UserError(
                f"{source.name}, line {line}: U+{ord(found[0]):04X} is not a character; remove it "
                "(--skip_bad leaves such dialogues out)"
            )
        clean = [document for document in documents if not NONCHARACTER.search(document)]
        documents, skipped = clean, skipped + len(documents) - len(clean)
    return Content(text, documents, encoding, skipped)


def _refuse_json(source: Source, text: str) -> None:
    """Raises UserError for JSON lines in a file whose name says text: they are no utterances."""
    first = text.lstrip().split("\n", 1)[0]
    if not parsed_line(first)[1]:
        raise UserError(f"{source.name} holds JSON lines, but its name says text: call it .jsonl")


def _documents(text: str, format: str) -> list[str]:
    if format == "files":
        return [text.strip("\n")]
    if format == "lines":
        return [line for line in text.split("\n") if line and not line.isspace()]
    documents = [document.strip("\n") for document in _BLANK_LINES.split(text) if document and not document.isspace()]
    if format == "dialogue":
        return ["\n".join(line.strip() for line in document.strip().split("\n")) for document in documents]
    return documents


def _universal_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_documents(
    paths: list[str], format: str = "auto", whole: bool = False, field: str = "text", skip_bad: bool = False
) -> Iterator[str]:
    """The documents of some sources, or (`whole`) their text as read, in pieces that join to it.

    field, skip_bad: see `iter_blocks`; how much was left out is said at the end.

    Raises:
        UserError: what `iter_blocks` and `read_block` raise.
    """
    skipped = 0
    for block in iter_blocks(find_sources(paths, format), field, skip_bad, whole):
        content = read_block(block, field, skip_bad, whole)
        skipped += content.skipped
        yield from [content.raw] if whole else content.documents
    if skipped:
        warn(f"{skipped:,} bad files, records or bytes were left out or replaced")
