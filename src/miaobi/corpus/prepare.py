"""`miaobi prepare`: text of any kind -> tokens on disk, in two passes over the sources.

The first pass counts characters and takes a digest of every document; from these follow the duplicates, the split and
the vocabulary. The second pass encodes. Both run in worker processes, block by block, and this process puts the results
together in the order of the sources.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from miaobi import console
from miaobi.config import PrepareConfig
from miaobi.corpus import clean, pipeline, store
from miaobi.corpus.pipeline import DROP, TRAIN, VAL, Job, Survey, Workers
from miaobi.corpus.read import Block, iter_blocks
from miaobi.corpus.sources import Source, find_sources
from miaobi.corpus.tokenizer import DEFAULT_BPE_VOCAB_SIZE, Tokenizer
from miaobi.errors import UserError

SMALL_INPUT_BYTES = 4 << 20
"""Below this, starting worker processes takes longer than the work."""
MIN_VAL_DOCUMENTS, MIN_VAL_TOKENS = 20, 10 * 256
"""A hash split with less for validation first cuts long documents into pieces."""
BPE_SAMPLE_CHARACTERS = 20_000_000
"""BPE is trained on evenly spaced lines of about so many characters; its trainer keeps all distinct words in memory."""


@dataclasses.dataclass
class Corpus:
    """What the first pass found out about all sources together."""

    sources: list[Source]
    job: Job
    lengths: list[np.ndarray]  # per task (documents,), characters
    digests: list[np.ndarray]  # per task (documents, 16)
    counts: list[tuple[np.ndarray, np.ndarray]]  # per task: code points, occurrences
    choices: list[np.ndarray]  # per task (documents,): DROP, TRAIN or VAL
    records: list[dict]  # per source: the manifest's entry
    distinct: int = 0
    skipped: int = 0
    empty: int = 0
    exact: int = 0
    near: int = 0


def prepare(sources: list[str], cfg: PrepareConfig) -> dict[str, Any]:
    """Writes the prepared directory cfg.out.

    Args:
        sources: files, directories or globs.
        cfg: see PrepareConfig.

    Returns:
        out, documents, characters and distinct_characters (as read), vocab_size, train_tokens, val_tokens,
        duplicates_removed, encodings (name -> files), skipped, seconds.

    Raises:
        UserError: what the user can mend: unreadable input, too little text, a full disk, an --out in use.
    """
    began = time.perf_counter()
    if cfg.split == "tail" and cfg.format == "dialogue":
        raise UserError("--split=tail cuts inside dialogues; use --split=hash with --format=dialogue")
    files = find_sources(sources, cfg.format)
    out = Path(cfg.out).expanduser()
    store.check_replaceable(out, [file.path for file in files])
    workers = _worker_count(files, cfg)
    corpus = _survey(files, cfg, workers)
    tokenizer = _tokenizer(corpus, cfg, workers)
    with store.explain_full_disk(out):
        manifest = _write(out, corpus, tokenizer, cfg, workers)
    statistics = manifest["statistics"]
    return {
        "out": str(out),
        "documents": statistics["documents"],
        "characters": statistics["characters"],
        "distinct_characters": statistics["distinct_characters"],
        "vocab_size": manifest["vocab_size"],
        "train_tokens": manifest["train"]["tokens"],
        "val_tokens": manifest["val"]["tokens"],
        "duplicates_removed": corpus.exact + corpus.near,
        "encodings": dict(Counter(source["encoding"] for source in manifest["sources"])),
        "skipped": corpus.skipped,
        "seconds": round(time.perf_counter() - began, 3),
    }


def _worker_count(files: list[Source], cfg: PrepareConfig) -> int:
    size = sum(file.size * (4 if file.compression else 1) for file in files)
    if size < SMALL_INPUT_BYTES:
        return 1
    if cfg.workers:
        return cfg.workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# First pass: survey, duplicates, split


def _survey(files: list[Source], cfg: PrepareConfig, workers: int) -> Corpus:
    job = Job(
        cfg.field, cfg.skip_bad, cfg.split == "tail", cfg.normalize, cfg.simplify,
        near=cfg.dedup == "near" and cfg.split == "hash",
    )  # fmt: skip
    corpus = _first_pass(files, job, cfg, workers)
    if cfg.split == "tail":
        return corpus
    if _val_is_small(corpus) and any((lengths > clean.PIECE_CHARACTERS * 3 // 2).any() for lengths in corpus.lengths):
        console.log(
            f"few documents: long ones are cut at paragraph ends into pieces of about {clean.PIECE_CHARACTERS:,} "
            "characters, so that validation gets some (--split=tail does not cut)"
        )
        corpus = _first_pass(files, dataclasses.replace(job, cut=True), cfg, workers)
    _fill_empty_side(corpus, cfg)
    return corpus


def _first_pass(files: list[Source], job: Job, cfg: PrepareConfig, workers: int) -> Corpus:
    records = [
        {"path": f.name, "bytes": f.size, "encoding": "skipped", "documents": 0, "characters": 0} for f in files
    ]
    corpus = Corpus(files, job, [], [], [], [], records)
    raw_presence = np.zeros(pipeline.N_CODE_POINTS, bool)
    near = clean.NearDuplicates(cfg.near_threshold) if job.near else None
    minhashes_new: list[np.ndarray] = []
    with Workers(workers) as pool:
        for _, found in _with_progress(pool.map(pipeline.survey, _tasks(corpus)), files, "reading"):
            found: Survey
            corpus.lengths.append(found.lengths)
            corpus.digests.append(found.digests)
            corpus.counts.append((found.code_points, found.counts))
            corpus.empty += found.empty
            raw_presence[found.raw_code_points] = True
            for index, encoding, documents, characters, skipped in found.blocks:
                record = records[index]
                if encoding != "skipped" and record["encoding"] in ("skipped", "utf-8"):
                    record["encoding"] = encoding  # a stretch of plain ASCII says utf-8 before the rest knows better
                record["documents"] += documents
                record["characters"] += characters
                corpus.skipped += skipped
            if near:
                minhashes_new.append(np.array([near.is_new(minhash) for minhash in found.minhashes], bool))
    corpus.distinct = int(raw_presence.sum())
    if not job.whole:
        _choose(corpus, minhashes_new, cfg)
    if sum(record["characters"] for record in records) == 0:
        raise UserError("no text in the sources" + (f"; {corpus.skipped} were skipped" if corpus.skipped else ""))
    return corpus


def _choose(corpus: Corpus, is_new: list[np.ndarray], cfg: PrepareConfig) -> None:
    """Sets `choices`: duplicates dropped, the rest split by their content."""
    digests = np.concatenate(corpus.digests) if corpus.digests else np.empty((0, 16), np.uint8)
    choice = np.where(clean.is_validation(digests, cfg.val_fraction), VAL, TRAIN).astype(np.uint8)
    if cfg.dedup != "none":
        first = clean.first_occurrences(digests)
        corpus.exact = int((~first).sum())
        choice[~first] = DROP
        if is_new:
            near = first & ~np.concatenate(is_new)
            corpus.near = int(near.sum())
            choice[near] = DROP
    ends = np.cumsum([len(d) for d in corpus.digests])
    corpus.choices = np.split(choice, ends[:-1]) if len(ends) else []


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
            f"the text is {len(kept)} document{'' if len(kept) == 1 else 's'} of {characters} characters: too little to "
            "keep some for validation. Give more text; or --format=lines if every line is a document; or --split=tail "
            "to cut the characters instead"
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


# Vocabulary


def _tokenizer(corpus: Corpus, cfg: PrepareConfig, workers: int) -> Tokenizer:
    if cfg.tokenizer == "char":
        counts = _kept_counts(corpus, workers)
        present = np.flatnonzero(counts)
        tokenizer = Tokenizer.train_char(
            {chr(c): int(n) for c, n in zip(present.tolist(), counts[present].tolist(), strict=True)},
            cfg.vocab_size,
            cfg.min_frequency,
        )
    elif cfg.tokenizer == "bpe":
        lines = _bpe_sample(corpus, workers)
        tokenizer = Tokenizer.train_bpe(lines, cfg.vocab_size or DEFAULT_BPE_VOCAB_SIZE, cfg.min_frequency)
    else:
        tokenizer = Tokenizer.load(Path(cfg.tokenizer).expanduser())
    if cfg.vocab_size is not None and tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(
            f"--vocab_size={cfg.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens; leave --vocab_size out"
        )
    needed = {"sep": tokenizer.sep_id, "pad": tokenizer.pad_id} if cfg.format == "dialogue" else {}
    if cfg.split == "hash" and not needed:
        needed = {"end-of-text": tokenizer.eot_id}
    for name, id_ in needed.items():
        if id_ is None:
            raise UserError(f"the tokenizer {cfg.tokenizer} has no {name} token to end documents with; use --tokenizer=char")
    return tokenizer


def _kept_counts(corpus: Corpus, workers: int) -> np.ndarray:
    """(0x110000,) int64: characters of the kept documents. Tasks that lost some documents are counted again."""
    total = np.zeros(pipeline.N_CODE_POINTS, np.int64)
    partly = set()
    for number, (code_points, counts) in enumerate(corpus.counts):
        choice = corpus.choices[number] if corpus.choices else np.ones(1)
        if (choice != DROP).all():
            total[code_points] += counts
        elif (choice != DROP).any():
            partly.add(number)
    if partly:
        again = (
            (task, corpus.job, corpus.choices[number])
            for number, (task, _) in enumerate(_tasks(corpus))
            if number in partly
        )
        with Workers(workers) as pool:
            mapped = pool.map(pipeline.count_kept, again)
            for _, (code_points, counts) in _with_progress(mapped, corpus.sources, "counting"):
                total[code_points] += counts
    return total


def _bpe_sample(corpus: Corpus, workers: int) -> Iterator[str]:
    characters = sum(int(lengths.sum()) for lengths in corpus.lengths)
    every = max(1, -(-characters // BPE_SAMPLE_CHARACTERS))
    if every > 1:
        console.log(f"BPE is learned from every {every}th line, about {characters // every:,} characters")
    sampled = (
        (task, corpus.job, corpus.choices[number] if corpus.choices else None, every)
        for number, (task, _) in enumerate(_tasks(corpus))
    )
    with Workers(workers) as pool:
        for _, lines in pool.map(pipeline.sample_lines, sampled):
            yield from lines


# Second pass: encode and write


def _write(out: Path, corpus: Corpus, tokenizer: Tokenizer, cfg: PrepareConfig, workers: int) -> dict[str, Any]:
    vocab_size = cfg.vocab_size or tokenizer.vocab_size
    dtype = "uint16" if vocab_size <= 65535 else "uint32"
    is_dialogue = cfg.format == "dialogue"
    end_id = tokenizer.pad_id if is_dialogue else tokenizer.eot_id
    with store.PreparedWriter(out, dtype) as prepared:
        tokenizer.save(prepared.directory)
        if corpus.job.whole:
            end_id = None
            function, jobs = pipeline.encode_stretch, _tail_jobs(corpus, cfg, dtype)
            for split in (prepared.train, prepared.val):
                split.write(np.empty(0, dtype), np.zeros(1, np.int64))  # one document, from the first token on
        else:
            function = pipeline.encode_documents
            newline_id = tokenizer.sep_id if is_dialogue else None
            jobs = (
                (task, corpus.job, corpus.choices[number], end_id, newline_id, dtype)
                for number, (task, _) in enumerate(_tasks(corpus))
                if (corpus.choices[number] != DROP).any()
            )
        with Workers(workers, tokenizer) as pool:
            for _, parts in _with_progress(pool.map(function, jobs), corpus.sources, "encoding"):
                for split, part in zip((prepared.train, prepared.val), parts, strict=True):
                    split.write(part.ids, part.starts)
                    split.characters += part.characters
                    split.bytes += part.bytes
        manifest = {
            "format": store.FORMAT,
            "version": store.VERSION,
            "kind": "dialogue" if is_dialogue else "text",
            "dtype": dtype,
            "vocab_size": vocab_size,
            "eot_id": end_id,
            "train": prepared.train.close(),
            "val": prepared.val.close(),
            "sources": corpus.records,
            "statistics": {
                "documents": prepared.train.documents + prepared.val.documents
                if not corpus.job.whole
                else len(corpus.sources),
                "characters": sum(record["characters"] for record in corpus.records),
                "distinct_characters": corpus.distinct,
                "duplicates_removed": {"exact": corpus.exact, "near": corpus.near},
                "empty_removed": corpus.empty,
                "skipped": corpus.skipped,
            },
            "settings": {
                key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(cfg).items()
            },
        }
        prepared.commit(manifest)
    return manifest


def _tail_jobs(corpus: Corpus, cfg: PrepareConfig, dtype: str) -> Iterator[tuple]:
    sizes = [int(lengths.sum()) for lengths in corpus.lengths]
    n_train = int(sum(sizes) * (1 - cfg.val_fraction))  # nanoGPT's data[:int(n*0.9)]
    if n_train == 0 or n_train == sum(sizes):
        raise UserError(f"{sum(sizes)} characters are too few to cut into training and validation; give more text")
    position = 0
    for size, (task, _) in zip(sizes, _tasks(corpus), strict=True):
        yield task, corpus.job, min(max(0, n_train - position), size), dtype
        position += size


# Both passes


def _tasks(corpus: Corpus) -> Iterator[tuple[tuple[Block, ...], Job]]:
    job = corpus.job
    for task in pipeline.tasks(iter_blocks(corpus.sources, job.field, job.skip_bad, job.whole)):
        yield task, job


def _with_progress(results: Iterable[tuple], files: list[Source], what: str) -> Iterator[tuple]:
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
