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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from miaobi import console
from miaobi.config import PrepareConfig
from miaobi.corpus import pipeline, store
from miaobi.corpus.pipeline import DROP, TRAIN, VAL, Workers
from miaobi.corpus.sources import Source, find_sources
from miaobi.corpus.survey import Corpus, read_tasks, take_survey, with_progress
from miaobi.corpus.tokenizer import DEFAULT_BPE_VOCAB_SIZE, Tokenizer
from miaobi.errors import UserError

SMALL_INPUT_BYTES = 4 << 20
"""Below this, starting worker processes takes longer than the work."""
BPE_SAMPLE_CHARACTERS = 8_000_000
"""BPE is trained on evenly spaced lines of about so many characters; its trainer needs some 65 bytes for each."""


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
    corpus = take_survey(files, cfg, workers)
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
            f"--vocab_size={cfg.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens; leave it out"
        )
    needed = {"sep": tokenizer.sep_id, "pad": tokenizer.pad_id} if cfg.format == "dialogue" else {}
    if cfg.split == "hash" and not needed:
        needed = {"end-of-text": tokenizer.eot_id}
    for name, id_ in needed.items():
        if id_ is None:
            raise UserError(
                f"the tokenizer {cfg.tokenizer} has no {name} token to end documents with; use --tokenizer=char"
            )
    return tokenizer


def _kept_counts(corpus: Corpus, workers: int) -> np.ndarray:
    """(0x110000,) int64: characters of the kept documents; what was dropped is read again and taken off."""
    total = np.zeros(pipeline.N_CODE_POINTS, np.int64)
    lossy = set()
    for number, (code_points, counts) in enumerate(corpus.counts):
        dropped = corpus.choices[number] == DROP if corpus.choices else np.zeros(1, bool)
        if not dropped.all():
            total[code_points] += counts
            if dropped.any():
                lossy.add(number)
    if lossy:
        jobs = ((task, corpus.job, corpus.choices[n]) for n, task in enumerate(read_tasks(corpus)) if n in lossy)
        with Workers(workers) as pool:
            results = pool.map(pipeline.count_dropped, jobs)
            for _, (code_points, counts) in with_progress(results, corpus.sources, "counting"):
                total[code_points] -= counts
    return total


def _bpe_sample(corpus: Corpus, workers: int) -> Iterator[str]:
    characters = sum(int(lengths.sum()) for lengths in corpus.lengths)
    every = max(1, -(-characters // BPE_SAMPLE_CHARACTERS))
    if every > 1:
        console.log(f"BPE is learned from every {every}th line, about {characters // every:,} characters")
    sampled = (
        (task, corpus.job, corpus.choices[number] if corpus.choices else None, every)
        for number, task in enumerate(read_tasks(corpus))
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
                for number, task in enumerate(read_tasks(corpus))
                if (corpus.choices[number] != DROP).any()
            )
        train_bytes_at_cut = 0
        with Workers(workers, tokenizer) as pool:
            for _, parts in with_progress(pool.map(function, jobs), corpus.sources, "encoding"):
                prepared.train.write(parts[0].ids, parts[0].starts)
                prepared.val.write(parts[1].ids, parts[1].starts)
                train_bytes_at_cut += parts[2] if corpus.job.whole else 0
        _count_text(corpus, cfg, prepared, train_bytes_at_cut)
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


def _tail_cut(corpus: Corpus, cfg: PrepareConfig) -> int:
    """Characters of the training part."""
    total = sum(int(lengths.sum()) for lengths in corpus.lengths)
    cut = int(total * (1 - cfg.val_fraction))  # nanoGPT's data[:int(n*0.9)]
    if cut in (0, total):
        raise UserError(f"{total} characters are too few to cut into training and validation; give more text")
    return cut


def _tail_jobs(corpus: Corpus, cfg: PrepareConfig, dtype: str) -> Iterator[tuple]:
    cut, position = _tail_cut(corpus, cfg), 0
    for lengths, task in zip(corpus.lengths, read_tasks(corpus), strict=True):
        yield task, corpus.job, max(0, cut - position), dtype
        position += int(lengths.sum())


def _count_text(corpus: Corpus, cfg: PrepareConfig, prepared: store.PreparedWriter, train_bytes_at_cut: int) -> None:
    """Characters and UTF-8 bytes of both splits, from what the first pass counted."""
    lengths, sizes = np.concatenate(corpus.lengths), np.concatenate(corpus.sizes)
    if corpus.job.whole:
        cut = _tail_cut(corpus, cfg)
        prepared.train.characters, prepared.val.characters = cut, int(lengths.sum()) - cut
        prepared.train.bytes = int(sizes[np.cumsum(lengths) <= cut].sum()) + train_bytes_at_cut
        prepared.val.bytes = int(sizes.sum()) - prepared.train.bytes
        return
    choice = np.concatenate(corpus.choices)
    for split, side in ((prepared.train, TRAIN), (prepared.val, VAL)):
        split.characters, split.bytes = int(lengths[choice == side].sum()), int(sizes[choice == side].sum())
