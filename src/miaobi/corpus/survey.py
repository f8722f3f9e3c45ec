"""The first pass of `prepare`: characters are counted, and documents known by their digests are chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from miaobi import console
from miaobi.corpus import characters, clean, dialogue, documents, ignored, near, scan, selection
from miaobi.corpus.blocks import Block, with_progress
from miaobi.corpus.characters import N_CODE_POINTS, NONE, Aside
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.documents import DocumentOptions, Task, documents_of, not_blank
from miaobi.corpus.hashes import HASH, Hashes, file_hash, with_data
from miaobi.corpus.ignored import Ignored
from miaobi.corpus.records import first_line
from miaobi.corpus.scan import Text
from miaobi.corpus.selection import VAL
from miaobi.corpus.sources import Source
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.corpus.workers import Workers
from miaobi.errors import UserError, number_of

MIN_VAL_DOCUMENTS, MIN_VAL_TOKENS = 20, 10 * 256
"""A hash split with less for validation first cuts long documents into pieces."""


class BlockStatistics(NamedTuple):
    """Of a block, for the manifest's entry of its source."""

    source: int
    encoding: str
    documents: int
    characters: int  # as read
    skipped: int
    removed: int
    reason: str
    hash: str = ""  # of a small file that is one block
    ignored: Ignored | None = None


@dataclass
class Survey:
    """What the first pass learns about a task."""

    blocks: Task  # without their content where the characters were set aside
    digests: np.ndarray  # (documents, 16) uint8
    lengths: np.ndarray  # (documents,) int64, characters
    sizes: np.ndarray  # (documents,) int64, UTF-8 bytes
    code_points: np.ndarray  # (n,) int64, of the documents, ascending
    counts: np.ndarray  # (n,) int64, occurrences of each
    distinct: np.ndarray  # (m,) int64, the different characters of the text as read
    sketches: np.ndarray | None  # (documents, N_PERMUTATIONS) uint32, for the search for near duplicates
    statistics: list[BlockStatistics]
    empty: int
    shared: int  # documents left out as they share text with the files of --without
    aside: Aside | None
    choice: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.uint8))
    """(documents,) uint8, see `selection`; empty where the text is one stream."""

    @property
    def owners(self) -> np.ndarray:
        """(documents,) int64: which source each is from."""
        per_block = np.array([(block.source, block.documents) for block in self.statistics], np.int64)
        return np.repeat(*per_block.reshape(-1, 2).T)


@dataclass
class Corpus:
    """What the first pass found out about all sources together."""

    sources: list[Source]
    options: DocumentOptions
    is_val: np.ndarray  # (sources,) bool: it is the file for validation
    records: list[dict]  # per source: the manifest's entry
    surveys: list[Survey] = dataclasses.field(default_factory=list)
    n_distinct: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(
        ("exact", "near", "validation", "weights"), 0))  # fmt: skip

    def joined(self, name: str) -> np.ndarray:
        """An array of all surveys, one after the other."""
        return np.concatenate([getattr(survey, name) for survey in self.surveys])

    def total(self, key: str) -> int:
        """Sum of a number over the sources."""
        return sum(record[key] for record in self.records)

    def tasks(self) -> Iterable[Task]:
        """The same tasks in every pass."""
        if self.surveys and self.surveys[0].aside is not None:
            return (survey.blocks for survey in self.surveys)
        return documents.tasks(self.sources, self.options)

    def set_choice(self, choice: np.ndarray) -> None:
        """choice: (documents,) of all surveys."""
        ends = np.cumsum([len(survey.lengths) for survey in self.surveys])
        for survey, part in zip(self.surveys, np.split(choice, ends[:-1]), strict=True):
            survey.choice = part


def take_survey(
    sources: list[Source],
    options: DocumentOptions,
    cfg: PrepareConfig,
    workers: Workers,
    weights: np.ndarray,
    is_val: np.ndarray,
    aside: Path | None,
) -> Corpus:
    """Reads everything once.

    Args:
        weights, is_val: (sources,), see `selection.choose`.
        aside: directory to put the characters into, so that the second pass finds them there.

    Raises UserError for unreadable sources and for text too small to split.
    """
    corpus = _first_pass(sources, options, workers, is_val, aside, Hashes())
    if options.whole:
        return corpus
    _choose(corpus, cfg, weights)
    if not options.dialogue and not is_val.any() and _val_is_small(corpus):
        console.log(
            f"few documents: long ones are cut at paragraph ends into pieces of about {clean.PIECE_CHARACTERS:,} "
            "characters, so that validation gets some (--split=tail does not cut)"
        )
        for abandoned in aside.iterdir() if aside is not None else ():
            abandoned.unlink()
        hashes = Hashes()
        hashes |= {source.path: record[HASH] for source, record in zip(sources, corpus.records, strict=True)}
        corpus = _first_pass(sources, dataclasses.replace(options, cut=True), workers, is_val, aside, hashes)
        _choose(corpus, cfg, weights)
    _check_sides(corpus, weights)
    return corpus


def _first_pass(
    sources: list[Source],
    options: DocumentOptions,
    workers: Workers,
    is_val: np.ndarray,
    aside: Path | None,
    hashes: Hashes,
) -> Corpus:
    nothing = {"encoding": "skipped", HASH: "", "documents": 0, "characters": 0, "skipped": 0, "removed": 0}
    records = [{"path": s.name, "format": s.format, "bytes": s.size, **nothing} for s in sources]
    for index in np.flatnonzero(is_val).tolist():
        records[index]["split"] = "val"
    corpus = Corpus(sources, options, is_val, records)
    is_there = np.zeros(N_CODE_POINTS, bool)
    here = workers.count == 1  # then the bytes are in the cache when they are read
    jobs = ((task, options, aside, hashes if here else None) for task in corpus.tasks())
    scan.get_ready(sources)
    with workers.started() as run:
        for task, survey in with_progress(run(survey_task, jobs), sources, "reading"):
            survey: Survey
            if survey.aside is not None:
                survey.blocks = tuple(dataclasses.replace(b, data=None, records=None) for b in task)
            for block in () if here else task:
                hashes.data(block)
            is_there[survey.distinct] = True
            survey.distinct = NONE  # much memory for many tasks
            for block, statistics in zip(task, survey.statistics, strict=True):
                _count_block(records[statistics.source], statistics, options.whole)
                _count_ignored(records[statistics.source], statistics.ignored or {}, block)
            corpus.surveys.append(survey)
    for record, source in zip(records, sources, strict=True):
        if not record[HASH]:
            hashes[source.path] = hashes.get(source.path) or file_hash(source.path)
            record[HASH] = hashes[source.path]
    if options.without:
        shared = sum(survey.shared for survey in corpus.surveys)
        console.log(f"left out, as they share text with {', '.join(options.without)}: {number_of(shared, 'document')}")
    corpus.n_distinct = int(is_there.sum())
    if corpus.total("characters") == 0:
        skipped = corpus.total("skipped")
        reasons = "; ".join(dict.fromkeys(record["reason"] for record in records if record.get("reason")))
        why = f" ({reasons[:500]})" if reasons else ""
        raise UserError("no text in the sources" + (f"; skipped: {skipped}{why}" if skipped else ""))
    return corpus


def _count_block(record: dict, block: BlockStatistics, is_stream: bool) -> None:
    if block.encoding != "skipped" and record["encoding"] in ("skipped", "utf-8"):
        record["encoding"] = block.encoding  # a stretch of plain ASCII says utf-8 before the rest knows better
    record["documents"] = 1 if is_stream else record["documents"] + block.documents
    record["characters"] += block.characters
    record["skipped"] += block.skipped
    record["removed"] += block.removed
    if block.reason:
        record["reason"] = block.reason
    record[HASH] = block.hash or record[HASH]


def _count_ignored(record: dict, unread: Ignored, block: Block) -> None:
    """Keys in a block that nobody reads, for its source in the manifest; lines are counted for the first only."""
    entry: Ignored = record.setdefault("ignored", {}) if unread else {}
    for key, (count, first) in unread.items():
        if isinstance(first, int) and key not in entry:
            first = f"{block.source.name}, line {first_line(block) + first}"
        ignored.note(entry, [key], first, count)


def _choose(corpus: Corpus, cfg: PrepareConfig, weights: np.ndarray) -> None:
    sketches = corpus.joined("sketches") if corpus.options.near else None
    for survey in corpus.surveys:
        survey.sketches = None
    choice, corpus.dropped = selection.choose(
        corpus.joined("digests"), sketches, corpus.joined("owners"), weights, corpus.is_val, cfg
    )
    corpus.set_choice(choice)


def _val_is_small(corpus: Corpus) -> bool:
    lengths, is_val = corpus.joined("lengths"), corpus.joined("choice") == VAL
    is_small = is_val.sum() < MIN_VAL_DOCUMENTS or lengths[is_val].sum() < MIN_VAL_TOKENS
    return bool(is_small and (lengths > clean.PIECE_CHARACTERS * 3 // 2).any())


def _check_sides(corpus: Corpus, weights: np.ndarray) -> None:
    """Both splits have documents, those of sources with a weight above 1 several times in training."""
    choice, digests = corpus.joined("choice"), corpus.joined("digests")
    if not corpus.is_val.any():
        selection.fill_empty_side(choice, digests, int(corpus.joined("lengths").sum()))
    elif not (choice == VAL).any() or not (choice == selection.TRAIN).any():
        side = "--val" if not (choice == VAL).any() else "the sources, besides what is in --val as well"
        raise UserError(f"there is no document in {side}; give more text")
    selection.repeat(choice, digests, weights[corpus.joined("owners")])
    corpus.set_choice(choice)


# In any process


def survey_task(
    _: Tokenizer | None, task: Task, options: DocumentOptions, aside: Path | None, passing: Hashes | None = None
) -> Survey:
    """The survey of a task; puts its characters into the directory `aside` if there is one.

    passing: where the blocks' bytes are to be counted.
    """
    task, hashes = zip(*(with_data(block, passing) for block in task), strict=True)
    text, statistics, empty, shared = _scanned(task, options) or _read(task, options)
    del task  # the memory of its bytes is used again
    return Survey(
        blocks=(),
        digests=text.digests,
        lengths=text.lengths - (options.dialogue == "roles"),  # see _read
        sizes=text.sizes,
        code_points=text.code_points,
        counts=text.counts,
        distinct=text.distinct,
        sketches=near.sketches(characters.wide(text.points, text.beyond), text.lengths) if options.near else None,
        statistics=[block._replace(hash=digest) for block, digest in zip(statistics, hashes, strict=True)],
        empty=empty,
        shared=shared,
        aside=None if aside is None else Aside.put(aside, text.points, text.lengths, text.beyond),
    )


def _scanned(task: Task, options: DocumentOptions) -> tuple[Text, list[BlockStatistics], int, int] | None:
    """What `_read` gives, by compiled code; None where that does not know how."""
    if len(task) > 1 or options.changes_text or options.cut or options.without:
        return None
    scanned = scan.scan(task[0], options.whole)
    if scanned is None:
        return None
    text, encoding, size, removed = scanned
    return text, [BlockStatistics(task[0].index, encoding, len(text.lengths), size, 0, removed, "")], 0, 0


def _read(task: Task, options: DocumentOptions) -> tuple[Text, list[BlockStatistics], int, int]:
    """The text of a task, `Survey.statistics`, `empty` and `shared`; by Python, which reads everything."""
    texts, raw, statistics, empty, shared = [], [], [], 0, 0
    for block in task:
        content, documents, dropped = documents_of(block, options)
        shared += dropped
        filled = documents if options.whole else not_blank(documents)
        empty += len(documents) - len(filled)
        texts += filled
        raw.append(content.raw)
        statistics.append(BlockStatistics(block.index, content.encoding, len(filled), len(content.raw), content.skipped,
                                          content.removed, content.reason, ignored=content.ignored))  # fmt: skip
    if options.whole:
        texts = ["".join(texts)]
    points, lengths = characters.of_documents(texts, options.whole)
    counts = characters.count_characters(points)
    counts[ord("\n")] -= 0 if options.whole else len(texts)
    present = np.flatnonzero(counts > 0)  # of booleans: ten times as fast
    if options.whole:
        digests, sizes = np.empty((0, 16), np.uint8), np.array([characters.utf8_length(present, counts[present])])
    else:
        digests, sizes = clean.content_digests(texts)
    if options.dialogue == "roles":  # between two turns counts one character of one byte, as where they stand on lines
        turns = np.array([sum(map(text.count, dialogue.ROLE_OF)) for text in texts], np.int64)
        sizes = sizes - 2 * turns - 1
    distinct = present if raw == texts else _distinct(raw, counts, options)
    return Text(points, NONE, lengths, digests, sizes, present, counts[present], distinct), statistics, empty, shared


def _distinct(raw: list[str], counts: np.ndarray, options: DocumentOptions) -> np.ndarray:
    """(n,) int64: the different characters of the text as read, ascending.

    Usually only newlines between documents are missing from the documents' own counts, which saves counting twice.
    """
    missing = sum(map(len, raw)) - int(counts.sum())
    missing_newlines = sum(text.count("\n") for text in raw) - int(counts[ord("\n")])
    if options.changes_text or missing != missing_newlines:
        return np.flatnonzero(characters.count_characters(characters.code_points("".join(raw))))
    present = counts > 0
    present[ord("\n")] |= missing_newlines > 0
    return np.flatnonzero(present)
