"""`miaobi prepare`: text of any kind -> tokens on disk, in two passes over the sources.

The first pass counts characters and takes a digest of every document; from these follow the duplicates, the split and
the vocabulary. The second pass encodes. Both run in worker processes, block by block, and this process puts the results
together in the order of the sources.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from miaobi import console
from miaobi.corpus import dialogue, overlap, pipeline, store
from miaobi.corpus.characters import N_CODE_POINTS
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.dialogue import Encoded
from miaobi.corpus.pipeline import DROP, VAL, Job
from miaobi.corpus.sources import Source, find_sources
from miaobi.corpus.survey import Corpus, read_tasks, take_survey, with_progress
from miaobi.corpus.template import CHATML_TEMPLATE, ROLES, SEP_TEMPLATE, ChatTemplate, source_of, with_thinking
from miaobi.corpus.tokenizer import DEFAULT_BPE_VOCAB_SIZE, IM_END, IM_START, PAD, SEP, Tokenizer
from miaobi.corpus.workers import Workers, workers_for
from miaobi.errors import UserError

BPE_SAMPLE_CHARACTERS = 8_000_000
"""BPE is trained on evenly spaced lines of about so many characters; its trainer needs some 65 bytes for each."""


def prepare(sources: list[str], cfg: PrepareConfig) -> dict[str, Any]:
    """Writes the prepared directory cfg.out.

    Args:
        sources: files, directories or globs.
        cfg: see PrepareConfig.

    Returns:
        out, documents, characters and distinct_characters (as read), vocab_size, train_tokens, val_tokens,
        duplicates_removed, encodings (name -> files), skipped (bad files, records and bytes), skipped_in (files that
        had some), seconds.

    Raises:
        UserError: what the user can mend: unreadable input, too little text, a full disk, an --out in use.
    """
    began = time.perf_counter()
    found = [find_sources([source], cfg.format) for source in sources]
    files = [file for group in found for file in group]
    if cfg.weights and len(cfg.weights) != len(sources):
        raise UserError(f"{len(cfg.weights)} weights for {len(sources)} sources; give one number for each source")
    weights = [w for w, group in zip(cfg.weights or [1.0] * len(sources), found, strict=True) for _ in group]
    out = Path(cfg.out).expanduser().resolve()  # `.` has no name to put another beside; a link stays a link
    if not out.name:
        raise UserError(f"--out={cfg.out} is the root of a disk; choose a directory of its own")
    store.clear_leftovers(out)
    store.check_replaceable(out, [file.path for file in files])
    workers = workers_for(files, cfg)
    job = _job(files, cfg)
    # Dialogues and BPE want strings, and Ray's workers have disks of their own: there the second pass reads again.
    sets_aside = cfg.tokenizer == "char" and not job.dialogue and workers.backend == "processes"
    with store.explain_full_disk(out), store.aside(out) if sets_aside else contextlib.nullcontext() as aside:
        corpus = take_survey(files, job, cfg, workers, weights, aside)
        tokenizer = _tokenizer(corpus, cfg, workers)
        with store.explain_refusal(out):
            manifest = _write(out, corpus, tokenizer, cfg, workers)
    statistics = manifest["statistics"]
    return {
        "out": str(Path(cfg.out).expanduser()),
        "documents": statistics["documents"],
        "characters": statistics["characters"],
        "distinct_characters": statistics["distinct_characters"],
        "vocab_size": manifest["vocab_size"],
        "train_tokens": manifest["train"]["tokens"],
        "val_tokens": manifest["val"]["tokens"],
        "duplicates_removed": corpus.exact + corpus.near,
        "encodings": dict(Counter(source["encoding"] for source in manifest["sources"])),
        "skipped": corpus.skipped,
        "skipped_in": [source["path"] for source in manifest["sources"] if source["skipped"]],
        "seconds": round(time.perf_counter() - began, 3),
    }


def settings_of(cfg: PrepareConfig) -> dict[str, Any]:
    """How the data was prepared, as the manifest tells it; by whom and where makes no difference to the data."""
    settings = dataclasses.asdict(cfg)
    for key in ("out", "workers", "backend"):
        del settings[key]
    return json.loads(json.dumps(settings, default=str))


def _job(files: list[Source], cfg: PrepareConfig) -> Job:
    """How documents are made of these files. Raises UserError for settings that do not go together."""
    way, replies_only, extras = "", False, frozenset()
    if cfg.format == "dialogue":
        template = _template(files, cfg)
        way = "lines" if template == SEP_TEMPLATE else "roles"
        if way == "lines" and any(file.format == "messages" for file in files):
            console.log("the sep template knows no roles: system messages are left out, and a line break inside a "
                        "message becomes a blank (--template=chatml keeps both)")  # fmt: skip
        elif way == "roles":
            extras = ChatTemplate(template, _template_tokenizer(cfg)).extras
        replies_only = cfg.loss == "assistant" or (cfg.loss == "auto" and way == "roles")
        if replies_only and way == "lines":
            raise UserError("--loss=assistant needs roles, and in the sep template both speakers are alike; "
                            "use --template=chatml or --loss=all")  # fmt: skip
    elif cfg.template != "auto" or cfg.loss != "auto" or cfg.enable_thinking is not None:
        raise UserError("--template, --loss and --enable_thinking are for dialogues; add --format=dialogue")
    elif cfg.weights and cfg.split == "tail":
        raise UserError("--split=tail takes the text as one stream and knows no weights; use --split=hash")
    if cfg.without and cfg.split == "tail" and not way:
        raise UserError(
            "--split=tail takes the text as one stream and knows no documents; for --without use --split=hash"
        )
    if cfg.without:
        overlap.evaluation_of(cfg.without)  # read before anything else, so that a wrong name is told at once
    return Job(
        cfg.field, cfg.skip_bad, cfg.split == "tail" and not way, cfg.normalize, cfg.simplify,
        near=cfg.dedup == "near" and cfg.split == "hash", dialogue=way, replies_only=replies_only,
        extras=extras | ({"weight"} if replies_only else set()), delimiter=cfg.delimiter,
        without=tuple(str(Path(file).expanduser().resolve()) for file in cfg.without),
    )  # fmt: skip


def _template(files: list[Source], cfg: PrepareConfig) -> str:
    """Jinja source of the template that the dialogues are rendered with."""
    if cfg.template != "auto":
        return {"sep": SEP_TEMPLATE, "chatml": CHATML_TEMPLATE}[cfg.template]
    if cfg.tokenizer not in ("char", "bpe"):
        own = source_of(Tokenizer.load(Path(cfg.tokenizer).expanduser()))
        if own is not None:
            return own
    return CHATML_TEMPLATE if any(file.format == "messages" for file in files) else SEP_TEMPLATE


def _template_tokenizer(cfg: PrepareConfig) -> Tokenizer:
    """The tokenizer whose names a template writes; for one that is yet to be made, any of ours will do."""
    own = cfg.tokenizer in ("char", "bpe")
    return Tokenizer.train_char({}) if own else Tokenizer.load(Path(cfg.tokenizer).expanduser())


# Vocabulary


def _tokenizer(corpus: Corpus, cfg: PrepareConfig, workers: Workers) -> Tokenizer:
    if cfg.tokenizer == "char":
        counts = _kept_counts(corpus, workers)
        counts[[ord(mark) for mark in dialogue.MARKS.values()]] = 0
        if corpus.job.dialogue == "roles":
            counts[[ord(c) for c in set("\n" + "".join(ROLES))]] += 1  # the template writes them
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
    if corpus.job.dialogue:
        return _with_template(tokenizer, _template(corpus.sources, cfg), cfg.enable_thinking)
    if cfg.split == "hash" and tokenizer.eot_id is None:
        raise UserError(
            f"the tokenizer {cfg.tokenizer} has no end-of-text token to end documents with; use --tokenizer=char"
        )
    return tokenizer


def _with_template(tokenizer: Tokenizer, template: str, enable_thinking: bool | None) -> Tokenizer:
    """The tokenizer that carries `template` into every model, with the control tokens that ours need."""
    config = {**tokenizer.config, "split_special_tokens": False}
    config["chat_template"] = with_thinking(template, enable_thinking)
    if template == SEP_TEMPLATE:
        tokenizer = dialogue.with_controls(tokenizer, (SEP, PAD))
        config |= {"eos_token": PAD, "sep_token": SEP}
    elif template == CHATML_TEMPLATE:
        tokenizer = dialogue.with_controls(tokenizer, (IM_START, IM_END))
        config |= {"eos_token": IM_END}
    return Tokenizer(tokenizer.backend, config)


def _end_ids(tokenizer: Tokenizer, corpus: Corpus) -> list[int]:
    """Tokens that end a text or a turn, the one that ends a document last; none where the text is one stream."""
    if corpus.job.whole:
        return []
    if corpus.job.dialogue == "lines":
        return [tokenizer.sep_id, tokenizer.pad_id]
    end = dialogue.end_of_turn(tokenizer) if corpus.job.dialogue else None
    end = tokenizer.eot_id if end is None else end
    return [] if end is None else [end]


def _kept_counts(corpus: Corpus, workers: Workers) -> np.ndarray:
    """(0x110000,) int64: characters of the kept documents; what was dropped is counted again and taken off."""
    total = np.zeros(N_CODE_POINTS, np.int64)
    lossy = set()
    for number, (code_points, counts) in enumerate(corpus.counts):
        dropped = corpus.choices[number] == DROP if corpus.choices else np.zeros(1, bool)
        if not dropped.all():
            total[code_points] += counts
            if dropped.any():
                lossy.add(number)
    if lossy:
        tasks = ((n, task) for n, task in enumerate(read_tasks(corpus)) if n in lossy)
        jobs = ((task, corpus.job, corpus.choices[n], corpus.aside[n]) for n, task in tasks)
        with workers.started() as run:
            results = run(pipeline.count_dropped, jobs)
            for _, (code_points, counts) in with_progress(results, corpus.sources, "counting"):
                total[code_points] -= counts
    return total


def _bpe_sample(corpus: Corpus, workers: Workers) -> Iterator[str]:
    kept = [choice != DROP for choice in corpus.choices] or [slice(None)] * len(corpus.lengths)
    characters = sum(int(lengths[here].sum()) for lengths, here in zip(corpus.lengths, kept, strict=True))
    every = max(1, -(-characters // BPE_SAMPLE_CHARACTERS))
    if every > 1:
        console.log(f"BPE is learned from 1 line in {every}, about {characters // every:,} characters")
    sampled = (
        (task, corpus.job, corpus.choices[number] if corpus.choices else None, every)
        for number, task in enumerate(read_tasks(corpus))
    )
    with workers.started() as run:
        for _, lines in run(pipeline.sample_lines, sampled):
            yield from lines


# Second pass: encode and write


def _write(out: Path, corpus: Corpus, tokenizer: Tokenizer, cfg: PrepareConfig, workers: Workers) -> dict[str, Any]:
    vocab_size = cfg.vocab_size or tokenizer.vocab_size
    dtype = "uint16" if vocab_size <= 65535 else "uint32"
    end_ids = _end_ids(tokenizer, corpus)
    end_id = end_ids[-1] if end_ids else None
    with store.PreparedWriter(out, dtype) as prepared:
        tokenizer.save(prepared.directory)
        if corpus.job.whole:
            function, jobs = pipeline.encode_stretch, _tail_jobs(corpus, cfg, dtype)
            for split in (prepared.train, prepared.val):
                split.write(Encoded(np.empty(0, dtype), np.zeros(1, np.int64)))  # one document, from the first token
        else:
            function = pipeline.encode_documents
            jobs = (
                (task, corpus.job, corpus.choices[number], end_id, dtype, corpus.aside[number])
                for number, task in enumerate(read_tasks(corpus))
                if (corpus.choices[number] != DROP).any()
            )
        train_bytes_at_cut = 0
        is_here = bool(corpus.places)  # set aside: to look characters up is less work than to send ids over
        with (Workers(1) if is_here else workers).started(tokenizer) as run:
            for _, parts in with_progress(run(function, jobs), corpus.sources, "encoding"):
                prepared.train.write(parts[0])
                prepared.val.write(parts[1])
                train_bytes_at_cut += parts[2] if corpus.job.whole else 0
        _count_text(corpus, cfg, prepared, train_bytes_at_cut)
        manifest = {
            "format": store.FORMAT,
            "version": store.VERSION,
            "kind": "dialogue" if corpus.job.dialogue else "text",
            "template": {"lines": "sep", "roles": "roles"}.get(corpus.job.dialogue),
            "dtype": dtype,
            "vocab_size": vocab_size,
            "eot_id": end_id,
            "end_ids": end_ids,
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
                "left_out_by_weights": corpus.left_out,
                "empty_removed": corpus.empty,
                "left_out_by_without": corpus.shared,
                "skipped": corpus.skipped,
            },
            "settings": settings_of(cfg),
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
    for lengths, aside, task in zip(corpus.lengths, corpus.aside, read_tasks(corpus), strict=True):
        yield task, corpus.job, max(0, cut - position), dtype, aside
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
    for split, copies in ((prepared.train, pipeline.copies_in_training(choice)), (prepared.val, choice == VAL)):
        split.characters, split.bytes = int((lengths * copies).sum()), int((sizes * copies).sum())
