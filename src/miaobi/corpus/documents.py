"""Blocks -> documents, in bounded memory: what every pass over the text reads, the same each time.

`iter_blocks` walks over the sources in the main process; `read_block` turns one block into documents, in any process.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from miaobi.console import warn
from miaobi.corpus import blocks, clean, dialogue, ignored, overlap
from miaobi.corpus.blocks import REMOVED, Block, decoded, text_blocks, without_noise
from miaobi.corpus.ignored import Ignored
from miaobi.corpus.messages import ALL_EXTRAS
from miaobi.corpus.records import (
    RECORDS,
    first_line,
    is_in_order,
    line_texts,
    record_blocks,
    refuse_other_records,
    taker,
)
from miaobi.corpus.sources import Source, find_sources, refuse_contradictions
from miaobi.corpus.template import NONCHARACTER
from miaobi.errors import UserError

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
MAX_BLOCKS_PER_TASK = 256
Task = tuple[Block, ...]
"""Blocks that are worked on together."""


@dataclass(frozen=True)
class DocumentOptions:
    """How documents are made; the same for every pass over the text."""

    field: str = "text"
    """Column or key of a record that holds the text."""
    skip_bad: bool = False
    """Leave out unreadable files and records and count them, instead of raising."""
    whole: bool = False
    """--split=tail knows no documents: one a block, newlines and all."""
    normalize: str = "none"
    simplify: bool = False
    near: bool = False
    """Near duplicates are looked for."""
    cut: bool = False
    """Cut long documents into pieces."""
    dialogue: str = ""
    """Dialogues: lines (one utterance each) or roles (packed messages)."""
    replies_only: bool = False
    """Dialogues with roles: only the assistant's turns are learned."""
    extras: frozenset[str] = ALL_EXTRAS
    """What a dialogue may have besides roles and text, see `messages.messages_of`."""
    without: tuple[str, ...] = ()
    """Files with whose texts a document may share nothing, see `overlap`."""
    delimiter: str = ""
    """Between the cells of a .csv; guessed where it is empty."""

    @property
    def changes_text(self) -> bool:
        """Whether documents have other characters than the text."""
        return self.normalize != "none" or self.simplify or bool(self.dialogue)


@dataclass(frozen=True)
class Content:
    """What a block held."""

    raw: str
    """The text as read, line ends as `\\n` (records: their fields as they are, one after the other)."""
    documents: list[str]
    encoding: str
    skipped: int = 0
    """Bad files, records and bytes."""
    removed: int = 0
    """Characters that `without_noise` took out."""
    reason: str = ""
    """Why a whole file was skipped."""
    ignored: Ignored | None = None
    """Keys of records that are not read."""


def iter_blocks(
    sources: list[Source], field: str = "text", skip_bad: bool = False, whole: bool = False,
    extras: frozenset[str] = ALL_EXTRAS, delimiter: str = "",
) -> Iterator[Block]:  # fmt: skip
    """The blocks of all sources, in order. The settings are those of DocumentOptions.

    Raises:
        UserError: an empty, binary or damaged file, an unknown encoding, a table without `field`.
    """
    for index, source in enumerate(sources):
        found = 0
        try:
            if source.is_listed and source.format in RECORDS:
                refuse_other_records(source, field, skip_bad, delimiter)
            in_order = is_in_order(source)
            for block in (
                record_blocks(source, index, field, skip_bad, extras, delimiter)
                if in_order
                else text_blocks(source, index, whole)
            ):
                yield block
                found += 1
        except UserError as error:
            _refuse_unless_skipped(error, source, skip_bad)
            reason = f"{error}{' (what stands before that place was taken)' if found else ''}"
            yield Block(source, index, encoding="skipped", records=(), skipped=1, reason=reason)


def tasks(sources: list[Source], options: DocumentOptions) -> Iterator[Task]:
    """Small blocks together, so that a directory of many small files costs few messages."""
    group, size = [], 0
    for block in iter_blocks(
        sources, options.field, options.skip_bad, options.whole, options.extras, options.delimiter
    ):
        group.append(block)
        size += block.end - block.start if block.records is None else sum(map(len, block.records))
        if size >= blocks.BLOCK_BYTES or len(group) >= MAX_BLOCKS_PER_TASK:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def read_block(
    block: Block, field: str = "text", skip_bad: bool = False, whole: bool = False, extras: frozenset[str] = ALL_EXTRAS
) -> Content:
    """The documents of a block; with `whole`, its text as one document, newlines and all.

    Line ends become `\\n`, newlines around a document are left out; a dialogue's utterances are stripped.

    Raises:
        UserError: what `decoded` raises, a malformed JSON line, a record without `field`, a dialogue with a
            Unicode noncharacter.
    """
    try:
        if block.records is not None or block.source.format in ("jsonl", "messages"):
            return _read_records(block, field, skip_bad, whole, extras)
        return _read_text(block, skip_bad, whole)
    except UserError as error:
        _refuse_unless_skipped(error, block.source, skip_bad)
        return Content("", [], "skipped", 1, reason=str(error))


def _refuse_unless_skipped(error: UserError, source: Source, skip_bad: bool) -> None:
    """Nobody named a binary file in a directory; text that cannot be read there may not be lost without a word."""
    if not skip_bad and not source.leaves_out(error):
        raise error


def _read_records(block: Block, field: str, skip_bad: bool, whole: bool, extras: frozenset[str]) -> Content:
    removed, reason, unread = 0, "", block.ignored
    if block.records is not None:
        records, encoding, skipped, reason = list(block.records), block.encoding or "utf-8", block.skipped, block.reason
    else:
        text, encoding, skipped, removed = decoded(block, skip_bad)
        records, bad, unread = line_texts(block, text, taker(block.source, field, extras), skip_bad)
        skipped += bad
    clean_records = list(map(without_noise, records))  # JSON has its own spelling of them
    removed += sum(map(len, records)) - sum(map(len, clean_records))
    documents = [_universal_newlines(record) for record in clean_records]
    raw = "".join(clean_records)
    if block.source.format == "messages":
        raw = dialogue.without_marks("".join(documents))
    elif whole and documents:
        documents = ["".join(document + "\n" for document in documents)]
    return Content(raw, documents, encoding, skipped, removed, reason, unread)


def _read_text(block: Block, skip_bad: bool, whole: bool) -> Content:
    source = block.source
    text, encoding, skipped, removed = decoded(block, skip_bad)
    text = _universal_newlines(text)
    documents = [text] if whole else _documents(text, source.format)
    if source.format == "dialogue" and (match := NONCHARACTER.search(text)):
        if not skip_bad:
            line = first_line(block) + text.count("\n", 0, match.start())
            raise UserError(
                f"{source.name}, line {line}: U+{ord(match[0]):04X} is not a character; remove it "
                "(--skip_bad leaves such dialogues out)"
            )
        good = [document for document in documents if not NONCHARACTER.search(document)]
        documents, skipped = good, skipped + len(documents) - len(good)
    return Content(text, documents, encoding, skipped, removed)


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


def documents_of(block: Block, options: DocumentOptions) -> tuple[Content, list[str], int]:
    """What a block held, its documents as they are learned (empty ones, of which the text is no record, included), and
    how many were left out for --without.

    Raises UserError as `read_block`.
    """
    content = read_block(block, options.field, options.skip_bad, options.whole, options.extras)
    documents = content.documents
    if options.normalize != "none" or options.simplify:
        documents = [clean.normalize_text(document, options.normalize, options.simplify) for document in documents]
    if options.dialogue == "lines":
        if count := sum(document.count(dialogue.MARKS["system"]) for document in documents):
            unread = dict(content.ignored or {})
            ignored.note(unread, ["system"], block.source.name, count)
            content = dataclasses.replace(content, ignored=unread)
        documents = [dialogue.as_lines(document) for document in documents]
    elif options.dialogue:
        documents = [dialogue.packed(dialogue.unpacked(document)) for document in documents]
    count = len(documents)
    if options.without:
        documents = overlap.without(documents, options.without)
    dropped = count - len(documents)
    if options.cut:
        documents = [piece for document in documents for piece in clean.cut_document(document)]
    return content, documents, dropped


def task_documents(task: Task, options: DocumentOptions, expected: int | None = None) -> list[str]:
    """The documents of a task as the first pass saw them. Raises UserError where they are not as many as `expected`."""
    documents = [document for block in task for document in documents_of(block, options)[1]]
    if not options.whole:
        documents = not_blank(documents)
    if expected is not None and expected != len(documents):
        raise UserError(f"{task[0].source.name} was changed while it was being read; run the command again")
    return documents


def not_blank(documents: Iterable[str]) -> list[str]:
    """The documents with more than white space."""
    return [document for document in documents if document and not document.isspace()]


def read_documents(
    paths: list[str], format: str = "auto", whole: bool = False, field: str = "text", skip_bad: bool = False
) -> Iterator[str]:
    """The documents of some sources, or (`whole`) their text as read, in pieces that join to it.

    field, skip_bad: see DocumentOptions; how much was left out is said at the end.

    Raises:
        UserError: what `iter_blocks` and `read_block` raise.
    """
    skipped = removed = 0
    sources = find_sources(paths, format)
    if not whole:  # a file that is read as it is may be called anything
        refuse_contradictions(sources, format)
    for block in iter_blocks(sources, field, skip_bad, whole):
        content = read_block(block, field, skip_bad, whole)
        skipped += content.skipped
        removed += content.removed
        yield from [content.raw] if whole else content.documents
    if skipped:
        warn(f"bad files, records or bytes left out or replaced: {skipped:,}")
    if removed:
        warn(REMOVED.format(removed))
