"""What is done to each stretch of text, in any process: survey it, count it, encode it.

`prepare` calls these through `workers`, which keeps the order of the sources, so the number of workers and where they
are change nothing in the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from miaobi.corpus import clean, cutting, dialogue
from miaobi.corpus.cutting import Block
from miaobi.corpus.dialogue import Encoded
from miaobi.corpus.read import Content, read_block
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError

N_CODE_POINTS = 0x110000
MAX_BLOCKS_PER_TASK = 256
_SLICE = 1 << 18
"""Characters counted at a time, so that NumPy's 64-bit copies of them stay in the cache."""
DROP, TRAIN, VAL = 0, 1, 2


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


@dataclass
class Survey:
    """What the first pass learns about a task."""

    digests: np.ndarray  # (documents, 16) uint8
    lengths: np.ndarray  # (documents,) int64, characters
    sizes: np.ndarray  # (documents,) int64, UTF-8 bytes
    code_points: np.ndarray  # (distinct,) int64, of the documents, ascending
    counts: np.ndarray  # (distinct,) int64
    raw_code_points: np.ndarray  # (distinct,) int64, of the text as read
    minhashes: list | None
    blocks: list[tuple[int, str, int, int, int]]
    """Per block: source, encoding, documents, characters as read, skipped."""
    empty: int


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


def survey(_: Tokenizer | None, blocks: tuple[Block, ...], job: Job) -> Survey:
    """First pass: digests, lengths and character counts."""
    documents, raw, stats, empty = [], [], [], 0
    for block in blocks:
        content, found = _documents(block, job)
        kept = found if job.whole else [document for document in found if document and not document.isspace()]
        empty += len(found) - len(kept)
        documents += kept
        raw.append(content.raw)
        stats.append((block.index, content.encoding, len(kept), len(content.raw), content.skipped))
    if job.whole:
        documents = ["".join(documents)]
    counts = count_characters("".join(documents))
    code_points = np.flatnonzero(counts)
    if job.whole:
        digests, sizes = np.empty((0, 16), np.uint8), np.array([utf8_length(code_points, counts[code_points])])
    else:
        digests, sizes = clean.content_digests(documents)
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    if job.dialogue == "roles":  # between two turns counts one character of one byte, as where they stand on lines
        turns = np.array([sum(map(document.count, dialogue.ROLE_OF)) for document in documents], np.int64)
        lengths, sizes = lengths - 1, sizes - 2 * turns - 1
    return Survey(
        digests=digests,
        lengths=lengths,
        sizes=sizes,
        code_points=code_points,
        counts=counts[code_points],
        raw_code_points=_raw_code_points(raw, counts, job),
        minhashes=clean.minhashes(documents) if job.near else None,
        blocks=stats,
        empty=empty,
    )


def count_dropped(
    _: Tokenizer | None, blocks: tuple[Block, ...], job: Job, choice: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(code points, counts) of the documents in this task that the duplicate search dropped."""
    documents = _all(blocks, job, choice)
    counts = count_characters("".join(documents[i] for i in np.flatnonzero(choice == DROP)))
    code_points = np.flatnonzero(counts)
    return code_points, counts[code_points]


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
    tokenizer: Tokenizer, blocks: tuple[Block, ...], job: Job, choice: np.ndarray, end_id: int, dtype: str
) -> tuple[Encoded, Encoded]:
    """Second pass of the hash split: train and val of this task."""
    documents = _all(blocks, job, choice)
    parts = []
    for copies in (copies_in_training(choice), choice == VAL):
        chosen = [documents[i] for i in np.repeat(np.arange(len(documents)), copies)]
        if job.dialogue == "lines":
            part = dialogue.encode_lines(tokenizer, chosen)
        elif job.dialogue:
            part = dialogue.encode_roles(tokenizer, chosen, job.replies_only)
        else:
            part = Encoded(*tokenizer.encode_documents(chosen, end_id))
        parts.append(dataclasses.replace(part, ids=part.ids.astype(dtype, copy=False)))
    return parts[0], parts[1]


def copies_in_training(choice: np.ndarray) -> np.ndarray:
    """How often each document is in the training part: values above VAL say one less than themselves."""
    return np.where(choice > VAL, choice.astype(np.int64) - 1, choice == TRAIN)


def encode_stretch(
    tokenizer: Tokenizer, blocks: tuple[Block, ...], job: Job, n_train: int, dtype: str
) -> tuple[Encoded, Encoded, int]:
    """Second pass of the tail split: the first `n_train` characters of this task are train, the others val.

    The last value is the number of UTF-8 bytes of the train part where the cut is inside this task, else 0.
    """
    text = "".join(_all(blocks, job, None))
    parts, no_starts = [], np.empty(0, np.int64)
    for piece in (text[:n_train], text[n_train:]):
        ids, _ = tokenizer.encode_documents([piece], end_id=None)
        parts.append(Encoded(ids.astype(dtype, copy=False), no_starts))
    return *parts, len(text[:n_train].encode()) if 0 < n_train < len(text) else 0


def count_characters(text: str) -> np.ndarray:
    """(65536 or 0x110000,) int64: occurrences of every code point, the longer array only when it is needed."""
    total = np.zeros(65536, np.int64)
    code_points = np.frombuffer(text.encode("utf-32-le"), "<u4")
    for low in range(0, len(code_points), _SLICE):
        counts = np.bincount(code_points[low : low + _SLICE])
        if len(counts) > len(total):
            total = np.concatenate((total, np.zeros(N_CODE_POINTS - len(total), np.int64)))
        total[: len(counts)] += counts
    return total


def utf8_length(code_points: np.ndarray, counts: np.ndarray) -> int:
    """Bytes in UTF-8 of a text with these characters."""
    return int(sum(counts[code_points >= low].sum() for low in (0, 0x80, 0x800, 0x10000)))


def _documents(block: Block, job: Job) -> tuple[Content, list[str]]:
    content = read_block(block, job.field, job.skip_bad, job.whole)
    documents = content.documents
    if job.normalize != "none" or job.simplify:
        documents = [clean.normalize_text(document, job.normalize, job.simplify) for document in documents]
    if job.dialogue == "lines":
        documents = [dialogue.as_lines(document) for document in documents]
    elif job.dialogue:
        documents = [dialogue.packed(dialogue.unpacked(document)) for document in documents]
    if job.cut:
        documents = [piece for document in documents for piece in clean.cut_document(document)]
    return content, documents


def _all(blocks: tuple[Block, ...], job: Job, choice: np.ndarray | None) -> list[str]:
    """The documents as the survey saw them."""
    documents = [document for block in blocks for document in _documents(block, job)[1]]
    if not job.whole:
        documents = [document for document in documents if document and not document.isspace()]
    if choice is not None and len(choice) != len(documents):
        raise UserError(f"{blocks[0].source.name} was changed while it was being read; run the command again")
    return documents


def _raw_code_points(raw: list[str], counts: np.ndarray, job: Job) -> np.ndarray:
    """(distinct,) int64: the characters of the text as read, ascending.

    Usually only newlines between documents are missing from the documents' own counts, which saves counting twice.
    """
    missing = sum(map(len, raw)) - int(counts.sum())
    missing_newlines = sum(text.count("\n") for text in raw) - int(counts[ord("\n")])
    if job.normalize != "none" or job.simplify or job.dialogue or missing != missing_newlines:
        return np.flatnonzero(count_characters("".join(raw)))
    present = counts > 0
    present[ord("\n")] |= missing_newlines > 0
    return np.flatnonzero(present)
