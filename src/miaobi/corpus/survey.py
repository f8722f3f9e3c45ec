"""The first pass of `prepare` over all sources: counts, duplicates and the split."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from miaobi import console
from miaobi.corpus import clean, near, pipeline, scan
from miaobi.corpus.characters import N_CODE_POINTS, Aside
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.cutting import Block
from miaobi.corpus.pipeline import DROP, TRAIN, VAL, Job, Survey
from miaobi.corpus.read import iter_blocks
from miaobi.corpus.sources import Source
from miaobi.corpus.workers import Workers
from miaobi.errors import UserError

MIN_VAL_DOCUMENTS, MIN_VAL_TOKENS = 20, 10 * 256
"""A hash split with less for validation first cuts long documents into pieces."""


@dataclasses.dataclass
class Corpus:
    """What the first pass found out about all sources together."""

    sources: list[Source]
    job: Job
    lengths: list[np.ndarray]  # per task (documents,), characters
    sizes: list[np.ndarray]  # per task (documents,), UTF-8 bytes
    digests: list[np.ndarray]  # per task (documents, 16)
    counts: list[tuple[np.ndarray, np.ndarray]]  # per task: code points, occurrences
    owners: list[np.ndarray]  # per task (documents,): which source a document is from
    choices: list[np.ndarray]  # per task (documents,): DROP, TRAIN or VAL; above it, TRAIN several times
    records: list[dict]  # per source: the manifest's entry
    aside: list[Aside | None]  # per task: its characters, where they were set aside
    places: list[tuple[Block, ...]]  # per task that was set aside: its blocks, without their content
    distinct: int = 0
    empty: int = 0
    exact: int = 0
    near: int = 0
    shared: int = 0
    """Documents that share text with the files of --without."""
    left_out: int = 0
    """Documents of sources with a weight below 1."""

    @property
    def skipped(self) -> int:
        """Files, records and bytes that could not be read."""
        return sum(record["skipped"] for record in self.records)


def take_survey(
    files: list[Source],
    job: Job,
    cfg: PrepareConfig,
    workers: Workers,
    weights: list[float],
    aside: Path | None,
) -> Corpus:
    """Reads everything once.

    Args:
        weights: one number for each of the files.
        aside: directory to put the characters into, so that the second pass finds them there.

    Raises UserError for unreadable sources and for text too small to split.
    """
    corpus = _first_pass(files, job, cfg, workers, weights, aside)
    if job.whole:
        return corpus
    if job.dialogue:
        _fill_empty_side(corpus, cfg)
        _repeat(corpus, weights)
        return corpus
    if _val_is_small(corpus) and any((lengths > clean.PIECE_CHARACTERS * 3 // 2).any() for lengths in corpus.lengths):
        console.log(
            f"few documents: long ones are cut at paragraph ends into pieces of about {clean.PIECE_CHARACTERS:,} "
            "characters, so that validation gets some (--split=tail does not cut)"
        )
        for abandoned in aside.iterdir() if aside is not None else ():
            abandoned.unlink()
        corpus = _first_pass(files, dataclasses.replace(job, cut=True), cfg, workers, weights, aside)
    _fill_empty_side(corpus, cfg)
    _repeat(corpus, weights)
    return corpus


def _first_pass(
    files: list[Source],
    job: Job,
    cfg: PrepareConfig,
    workers: Workers,
    weights: list[float],
    aside: Path | None,
) -> Corpus:
    nothing = {"encoding": "skipped", "documents": 0, "characters": 0, "skipped": 0}
    records = [{"path": file.name, "bytes": file.size, **nothing} for file in files]
    corpus = Corpus(files, job, [], [], [], [], [], [], records, [], [])
    raw_presence = np.zeros(N_CODE_POINTS, bool)
    sketches: list[np.ndarray] = []
    jobs = ((task, job, aside) for task in read_tasks(corpus))
    scan.get_ready(files)
    with workers.started() as run:
        for blocks, found in with_progress(run(pipeline.survey, jobs), files, "reading"):
            found: Survey
            corpus.lengths.append(found.lengths)
            corpus.sizes.append(found.sizes)
            corpus.digests.append(found.digests)
            corpus.counts.append((found.code_points, found.counts))
            from_each = [(index, documents) for index, _, documents, _, _ in found.blocks]
            corpus.owners.append(np.repeat(*np.array(from_each, np.int64).reshape(-1, 2).T))
            corpus.empty += found.empty
            corpus.shared += found.shared
            raw_presence[found.raw_code_points] = True
            for index, encoding, documents, characters, skipped in found.blocks:
                record = records[index]
                if encoding != "skipped" and record["encoding"] in ("skipped", "utf-8"):
                    record["encoding"] = encoding  # a stretch of plain ASCII says utf-8 before the rest knows better
                record["documents"] = 1 if job.whole else record["documents"] + documents
                record["characters"] += characters
                record["skipped"] += skipped
            corpus.aside.append(found.aside)
            if found.aside is not None:
                corpus.places.append(tuple(dataclasses.replace(b, data=None, records=None) for b in blocks))
            if found.sketches is not None:
                sketches.append(found.sketches)
    if job.without:
        console.log(f"{corpus.shared:,} documents share text with {', '.join(job.without)} and are left out")
    corpus.distinct = int(raw_presence.sum())
    if sum(record["characters"] for record in records) == 0:
        raise UserError("no text in the sources" + (f"; {corpus.skipped} were skipped" if corpus.skipped else ""))
    if not job.whole:
        _choose(corpus, np.concatenate(sketches) if sketches else None, cfg, np.array(weights))
    return corpus


def _choose(corpus: Corpus, sketches: np.ndarray | None, cfg: PrepareConfig, weights: np.ndarray) -> None:
    """Sets `choices`: duplicates dropped, sources thinned by their weights, the rest split."""
    digests = np.concatenate(corpus.digests) if corpus.digests else np.empty((0, 16), np.uint8)
    keep = np.ones(len(digests), bool)
    if (weights < 1).any():  # first: a document that one source loses may come from another
        keep = _shares(digests) < weights[np.concatenate(corpus.owners)]
        corpus.left_out = int((~keep).sum())
    if cfg.dedup != "none" and cfg.split == "hash":
        taken = keep.copy()
        keep[taken] = clean.first_occurrences(digests[taken])
        corpus.exact = int(taken.sum() - keep.sum())
        if sketches is not None:
            alike = keep & ~near.first_of_their_kind(sketches, cfg.near_threshold)
            corpus.near = int(alike.sum())
            keep &= ~alike
    if cfg.split == "hash":
        is_val = clean.is_validation(digests, cfg.val_fraction)
    else:  # the last dialogues, wherever weights thin them out
        is_val = np.arange(len(digests)) >= int(len(digests) * (1 - cfg.val_fraction))
    choice = np.where(keep, np.where(is_val, VAL, TRAIN), DROP).astype(np.uint8)
    ends = np.cumsum([len(d) for d in corpus.digests])
    corpus.choices = np.split(choice, ends[:-1]) if len(ends) else []


def _shares(digests: np.ndarray) -> np.ndarray:
    """(documents,) float64 in [0, 1), by content and unrelated to the split."""
    return digests[:, :8].copy().view("<u8").ravel() / 2.0**64


def _repeat(corpus: Corpus, weights: list[float]) -> None:
    """Training documents of sources with a weight above 1 are marked to come several times."""
    for choice, owners, digests in zip(corpus.choices, corpus.owners, corpus.digests, strict=True):
        weight = np.array(weights)[owners]
        copies = np.floor(weight) + (_shares(digests) < weight - np.floor(weight))
        often = (choice == TRAIN) & (copies > 1)
        choice[often] = copies[often] + 1


def _val_is_small(corpus: Corpus) -> bool:
    documents = sum(int((choice == VAL).sum()) for choice in corpus.choices)
    characters = sum(
        int(lengths[choice == VAL].sum()) for lengths, choice in zip(corpus.lengths, corpus.choices, strict=True)
    )
    return documents < MIN_VAL_DOCUMENTS or characters < MIN_VAL_TOKENS


def _fill_empty_side(corpus: Corpus, cfg: PrepareConfig) -> None:
    """With a handful of documents, chance may leave one side of the split empty; it then gets the nearest document."""
    choice = np.concatenate(corpus.choices)
    kept = np.flatnonzero(choice != DROP)
    if len(kept) < 2:
        characters = sum(int(lengths.sum()) for lengths in corpus.lengths)
        raise UserError(
            f"the text is {len(kept)} document{'' if len(kept) == 1 else 's'} of {characters} characters: too little "
            "to keep some for validation. Give more text; or --format=lines if every line is a document; "
            "or --split=tail to cut the characters instead"
        )
    for side in (VAL, TRAIN):
        if not (choice == side).any():
            ranks = np.concatenate(corpus.digests)[kept][:, 8:].copy().view("<u8").ravel()
            choice[kept[ranks.argmin() if side == VAL else ranks.argmax()]] = side
            console.warn(
                f"only {len(kept)} documents: one of them was put into {'validation' if side == VAL else 'training'}, "
                "which had none"
            )
            corpus.choices = np.split(choice, np.cumsum([len(c) for c in corpus.choices])[:-1])


def read_tasks(corpus: Corpus) -> Iterable[tuple[Block, ...]]:
    """The same tasks in every pass."""
    job = corpus.job
    if corpus.places:
        return corpus.places
    return pipeline.tasks(iter_blocks(corpus.sources, job.field, job.skip_bad, job.whole, job.extras, job.delimiter))


def with_progress(results: Iterable[tuple], files: list[Source], what: str) -> Iterator[tuple]:
    """Passes `results` on; shows a bar with the time left once it has taken two seconds."""
    before = np.concatenate(([0], np.cumsum([file.size for file in files])))
    began, bar, shown = time.perf_counter(), None, None
    try:
        for blocks, result in results:
            yield blocks, result
            if bar is None and time.perf_counter() - began > 2:
                bar = console.progress()
                bar.start()
                shown = bar.add_task(what, total=int(before[-1]))
            if bar is not None:
                last = blocks[-1]
                bar.update(shown, completed=min(int(before[last.index]) + last.end, int(before[last.index + 1])))
    finally:
        if bar is not None:
            bar.stop()
