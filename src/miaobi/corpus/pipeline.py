"""What is done to each stretch of text, in any process: survey it, count it, encode it.

`prepare` calls these through `workers`, which keeps the order of the sources, so the number of workers and where they
are change nothing in the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miaobi.corpus import characters, clean, cutting, dialogue, near, overlap
from miaobi.corpus.characters import Aside
from miaobi.corpus.cutting import Block
from miaobi.corpus.dialogue import Encoded
from miaobi.corpus.messages import ALL_EXTRAS
from miaobi.corpus.read import Content, read_block
from miaobi.corpus.scan import Text, scan
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

MAX_BLOCKS_PER_TASK = 256
DROP, TRAIN, VAL = 0, 1, 2
Stats = tuple[int, str, int, int, int]
"""Of a block: source, encoding, documents, characters as read, skipped."""


@dataclass(frozen=True)
class Job:
    """How documents are made; the same for every pass over the text."""

    field: str
    skip_bad: bool
    whole: bool
    """--split=tail: one document a block, newlines kept."""
    normalize: str
    simplify: bool
    near: bool
    cut: bool = False
    """Cut long documents into pieces."""
    dialogue: str = ""
    """Dialogues: lines (one utterance each) or roles (packed messages)."""
    replies_only: bool = False
    """Dialogues with roles: only the assistant's turns are learned."""
    extras: frozenset[str] = ALL_EXTRAS
    """What a dialogue may have beside roles and words, see `messages.messages_of`."""
    without: tuple[str, ...] = ()
    """Files with whose texts a document may share nothing, see `overlap`."""
    delimiter: str = ""
    """Between the cells of a .csv; guessed where it is empty."""


@dataclass
class Survey:
    """What the first pass learns about a task."""

    digests: np.ndarray  # (documents, 16) uint8
    lengths: np.ndarray  # (documents,) int64, characters
    sizes: np.ndarray  # (documents,) int64, UTF-8 bytes
    code_points: np.ndarray  # (distinct,) int64, of the documents, ascending
    counts: np.ndarray  # (distinct,) int64
    raw_code_points: np.ndarray  # (distinct,) int64, of the text as read
    sketches: np.ndarray | None  # (documents, N_PERMUTATIONS) uint32, for the search for near duplicates
    blocks: list[Stats]
    empty: int
    shared: int  # documents left out as they share text with the files of --without
    aside: Aside | None


def tasks(blocks: Iterable[Block]) -> Iterator[tuple[Block, ...]]:
    """Small blocks together, so that a directory of many small files costs few messages."""
    group, size = [], 0
    for block in blocks:
        group.append(block)
        size += block.end - block.start if block.records is None else sum(map(len, block.records))
        if size >= cutting.BLOCK_BYTES or len(group) >= MAX_BLOCKS_PER_TASK:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)


def survey(_: Tokenizer | None, blocks: tuple[Block, ...], job: Job, aside: Path | None) -> Survey:
    """First pass: digests, lengths and character counts; puts the characters into the file `aside` if there is one."""
    found, stats, empty, shared = _scanned(blocks, job) or _read(blocks, job)
    return Survey(
        digests=found.digests,
        lengths=found.lengths - (job.dialogue == "roles"),  # see _read
        sizes=found.sizes,
        code_points=found.code_points,
        counts=found.counts,
        raw_code_points=found.seen,
        sketches=near.sketches(characters.wide(found.points, found.beyond), found.lengths) if job.near else None,
        blocks=stats,
        empty=empty,
        shared=shared,
        aside=None if aside is None else Aside.put(aside, found.points, found.lengths, found.beyond),
    )


def _scanned(blocks: tuple[Block, ...], job: Job) -> tuple[Text, list[Stats], int, int] | None:
    """What `_read` gives, by compiled code; None where that does not know how."""
    if len(blocks) > 1 or job.normalize != "none" or job.simplify or job.dialogue or job.cut or job.without:
        return None
    scanned = scan(blocks[0], job.whole)
    if scanned is None:
        return None
    found, encoding, size = scanned
    return found, [(blocks[0].index, encoding, len(found.lengths), size, 0)], 0, 0


def _read(blocks: tuple[Block, ...], job: Job) -> tuple[Text, list[Stats], int, int]:
    """The text of a task, `Survey.blocks`, `empty` and `shared`; by Python, which reads everything."""
    documents, raw, stats, empty, shared = [], [], [], 0, 0
    for block in blocks:
        content, found, dropped = _documents(block, job)
        shared += dropped
        kept = found if job.whole else [document for document in found if document and not document.isspace()]
        empty += len(found) - len(kept)
        documents += kept
        raw.append(content.raw)
        stats.append((block.index, content.encoding, len(kept), len(content.raw), content.skipped))
    if job.whole:
        documents = ["".join(documents)]
    points, lengths = _points(documents, job)
    counts = characters.count_characters(points)
    counts[ord("\n")] -= 0 if job.whole else len(documents)
    present = np.flatnonzero(counts > 0)  # of booleans: ten times as fast
    if job.whole:
        digests, sizes = np.empty((0, 16), np.uint8), np.array([characters.utf8_length(present, counts[present])])
    else:
        digests, sizes = clean.content_digests(documents)
    if job.dialogue == "roles":  # between two turns counts one character of one byte, as where they stand on lines
        turns = np.array([sum(map(document.count, dialogue.ROLE_OF)) for document in documents], np.int64)
        sizes = sizes - 2 * turns - 1
    seen = present if raw == documents else _raw_code_points(raw, counts, job)
    return Text(points, characters.NONE, lengths, digests, sizes, present, counts[present], seen), stats, empty, shared


def count_dropped(
    _: Tokenizer | None, blocks: tuple[Block, ...], job: Job, choice: np.ndarray, aside: Aside | None
) -> tuple[np.ndarray, np.ndarray]:
    """(code points, counts) of the documents in this task that the duplicate search dropped."""
    points, ends = _read_points(blocks, job, choice, aside)
    dropped = np.flatnonzero(choice == DROP)
    counts = characters.count_characters(_chosen(points, ends, dropped)[0])
    counts[ord("\n")] -= len(dropped)
    present = np.flatnonzero(counts > 0)
    return present, counts[present]


def sample_lines(
    _: Tokenizer | None, blocks: tuple[Block, ...], job: Job, choice: np.ndarray | None, every: int
) -> list[str]:
    """Every n-th line of the kept documents, to train BPE on."""
    documents = _all(blocks, job, choice)
    if choice is not None:
        documents = [document for document, where in zip(documents, choice, strict=True) if where != DROP]
    if job.dialogue == "roles":
        documents = [dialogue.without_marks(document, "\n") for document in documents]
    return [line for document in documents for line in document.split("\n") if line][::every]


def encode_documents(
    tokenizer: Tokenizer,
    blocks: tuple[Block, ...],
    job: Job,
    choice: np.ndarray,
    end_id: int,
    dtype: str,
    aside: Aside | None,
) -> tuple[Encoded, Encoded]:
    """Second pass of the hash split: train and val of this task."""
    by_character = tokenizer.by_character and not job.dialogue
    if by_character:
        points, ends = _read_points(blocks, job, choice, aside)
    else:
        documents = _all(blocks, job, choice)
    parts = []
    for copies in (copies_in_training(choice), choice == VAL):
        numbers = np.repeat(np.arange(len(choice)), copies)
        if by_character:
            part = Encoded(*tokenizer.encode_points(*_chosen(points, ends, numbers), end_id))
        elif job.dialogue == "lines":
            part = dialogue.encode_lines(tokenizer, [documents[i] for i in numbers])
        elif job.dialogue:
            part = dialogue.encode_roles(tokenizer, [documents[i] for i in numbers], job.replies_only)
        else:
            part = Encoded(*tokenizer.encode_documents([documents[i] for i in numbers], end_id))
        parts.append(dataclasses.replace(part, ids=part.ids.astype(dtype, copy=False)))
    return parts[0], parts[1]


def copies_in_training(choice: np.ndarray) -> np.ndarray:
    """How often each document is in the training part: values above VAL say one less than themselves."""
    return np.where(choice > VAL, choice.astype(np.int64) - 1, choice == TRAIN)


def encode_stretch(
    tokenizer: Tokenizer, blocks: tuple[Block, ...], job: Job, n_train: int, dtype: str, aside: Aside | None
) -> tuple[Encoded, Encoded, int]:
    """Second pass of the tail split: the first `n_train` characters of this task are train, the others val.

    The last value is the number of UTF-8 bytes of the train part where the cut is inside this task, else 0. Removes
    what was set aside.
    """
    points = aside.take() if aside is not None else _points(["".join(_all(blocks, job, None))], job)[0]
    parts, no_starts = [], np.empty(0, np.int64)
    for piece in (points[:n_train], points[n_train:]):
        if tokenizer.by_character:
            ids, _ = tokenizer.encode_points(piece, np.array([len(piece)]), end_id=None)
        else:
            ids, _ = tokenizer.encode_documents([characters.text_of(piece)], end_id=None)
        parts.append(Encoded(ids.astype(dtype, copy=False), no_starts))
    counts = characters.count_characters(points[:n_train]) if 0 < n_train < len(points) else np.zeros(0, np.int64)
    return *parts, characters.utf8_length(np.arange(len(counts)), counts)


def _documents(block: Block, job: Job) -> tuple[Content, list[str], int]:
    """What a block holds, its documents, and how many were left out for --without."""
    content = read_block(block, job.field, job.skip_bad, job.whole, job.extras)
    documents = content.documents
    if job.normalize != "none" or job.simplify:
        documents = [clean.normalize_text(document, job.normalize, job.simplify) for document in documents]
    if job.dialogue == "lines":
        documents = [dialogue.as_lines(document) for document in documents]
    elif job.dialogue:
        documents = [dialogue.packed(dialogue.unpacked(document)) for document in documents]
    found = len(documents)
    if job.without:
        documents = overlap.without(documents, job.without)
    dropped = found - len(documents)
    if job.cut:
        documents = [piece for document in documents for piece in clean.cut_document(document)]
    return content, documents, dropped


def _all(blocks: tuple[Block, ...], job: Job, choice: np.ndarray | None) -> list[str]:
    """The documents as the survey saw them."""
    documents = [document for block in blocks for document in _documents(block, job)[1]]
    if not job.whole:
        documents = [document for document in documents if document and not document.isspace()]
    if choice is not None and len(choice) != len(documents):
        raise UserError(f"{blocks[0].source.name} was changed while it was being read; run the command again")
    return documents


def _points(documents: list[str], job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Code points of the documents, a newline behind each unless the text is one stream; and their lengths."""
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    return (characters.code_points(documents[0]) if job.whole else characters.of_documents(documents)), lengths


def _read_points(
    blocks: tuple[Block, ...], job: Job, choice: np.ndarray, aside: Aside | None
) -> tuple[np.ndarray, np.ndarray]:
    """Code points of the documents of a task, a newline behind each; and where each begins, and the last one ends."""
    if aside is not None:
        points, lengths = aside.take(), aside.lengths
    else:
        points, lengths = _points(_all(blocks, job, choice), job)
    return points, np.concatenate(([0], np.cumsum(lengths + 1)))


def _chosen(points: np.ndarray, ends: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `_read_points` gave -> the code points of some of the documents, and where each of those ends."""
    taken = [points[low:high] for low, high in zip(ends[numbers].tolist(), ends[numbers + 1].tolist(), strict=True)]
    lengths = ends[numbers + 1] - ends[numbers]
    return np.concatenate(taken) if taken else points[:0], np.cumsum(lengths)


def _raw_code_points(raw: list[str], counts: np.ndarray, job: Job) -> np.ndarray:
    """(distinct,) int64: the characters of the text as read, ascending.

    Usually only newlines between documents are missing from the documents' own counts, which saves counting twice.
    """
    missing = sum(map(len, raw)) - int(counts.sum())
    missing_newlines = sum(text.count("\n") for text in raw) - int(counts[ord("\n")])
    if job.normalize != "none" or job.simplify or job.dialogue or missing != missing_newlines:
        return np.flatnonzero(characters.count_characters(characters.code_points("".join(raw))))
    present = counts > 0
    present[ord("\n")] |= missing_newlines > 0
    return np.flatnonzero(present)
