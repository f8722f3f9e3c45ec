"""`miaobi prepare`: text of any kind -> tokens on disk, in two passes over the sources.

The first pass (`survey`) counts characters and takes a digest of every document; from these follow the duplicates, the
split and the vocabulary. The second pass (`encode`) encodes. Both run in worker processes, task by task, and this
process puts the results together in the order of the sources.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from miaobi import console
from miaobi.corpus import dialogue, encode, folders, ignored, overlap, selection, store, tables
from miaobi.corpus.blocks import REMOVED
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.documents import DocumentOptions
from miaobi.corpus.folders import LeftOut
from miaobi.corpus.ignored import Ignored
from miaobi.corpus.selection import VAL
from miaobi.corpus.sources import TEXTS, Source, list_sources, refuse_contradictions
from miaobi.corpus.store import Encoded
from miaobi.corpus.survey import Corpus, take_survey
from miaobi.corpus.template import CHATML_TEMPLATE, ROLES, SEP_TEMPLATE, ChatTemplate, source_of, with_thinking
from miaobi.corpus.tokenizer import DEFAULT_BPE_VOCAB_SIZE, IM_END, IM_START, PAD, SEP, Tokenizer
from miaobi.corpus.workers import Workers, workers_for
from miaobi.errors import UserError, names_listed, number_of


def prepare_sources(cfg: PrepareConfig) -> dict[str, Any]:
    """`miaobi prepare`: see `prepare`."""
    if not cfg.sources:
        raise UserError("prepare needs at least one file, directory or glob; miaobi prepare --help")
    return prepare(list(cfg.sources), cfg)


def prepare(sources: list[str], cfg: PrepareConfig) -> dict[str, Any]:
    """Writes the prepared directory cfg.out.

    Args:
        sources: files, directories or globs.
        cfg: see PrepareConfig.

    Returns:
        out, documents, characters and distinct_characters (as read), vocab_size, train_tokens, val_tokens,
        duplicates_removed, also_in_validation (documents that --val has too), encodings (name -> files), taken (format
        -> files), left_out (path, reason, files: what of directories and archives was not taken), skipped (bad files,
        records and bytes), skipped_in (files that had some), ignored (keys of dialogues that are not read -> how often,
        and where first), removed (characters of padding, byte order marks inside), seconds.

    Raises:
        UserError: what the user can put right: unreadable input, too little text, a full disk, an --out in use.
    """
    began = time.perf_counter()
    tables.guessed.clear()
    groups, left = list_sources([*sources, *([cfg.val] if cfg.val else [])], cfg.format)
    files = [file for group in groups for file in group]
    refuse_contradictions(files, cfg.format)
    guesses = {Path(file.inner_name).suffix.lower() for file in files if file.is_guess and file.format in TEXTS}
    if odd := sorted(guesses - folders.TEXT_SUFFIXES - {""}):
        console.log(f"taken as plain text, markup and all, as nothing else is known of such names: {names_listed(odd)}")
    if cfg.weights and len(cfg.weights) != len(sources):
        raise UserError(
            f"{number_of(len(cfg.weights), 'weight')} for {number_of(len(sources), 'source')}; give one number "
            f"for each source"
        )
    sizes = [len(group) for group in groups]
    weights = np.repeat([*(cfg.weights or [1.0] * len(sources)), *([1.0] if cfg.val else [])], sizes)
    is_val = np.repeat(np.arange(len(groups)) >= len(sources), sizes)
    out = Path(cfg.out).expanduser().resolve()  # `.` has no name to derive a temporary one from; a link stays a link
    if not out.name:
        raise UserError(f"--out={cfg.out} is the root of a disk; choose a directory of its own")
    workers = workers_for(files, cfg)
    options = _document_options(files, cfg)
    # Dialogues and BPE want strings, and Ray's workers have disks of their own: there the second pass reads again.
    sets_aside = cfg.tokenizer == "char" and not options.dialogue and workers.backend == "processes"
    with contextlib.ExitStack() as stack:
        stack.enter_context(store.explain_full_disk(out))
        stack.enter_context(store.one_writer(out))
        store.clear_leftovers(out)
        store.check_replaceable(out, [file.path for file in files])
        aside = stack.enter_context(store.aside(out)) if sets_aside else None
        corpus = take_survey(files, options, cfg, workers, weights, is_val, aside)
        for record in corpus.records:
            record |= {"guessed": guesses} if (guesses := tables.guessed.get(record["path"])) else {}
        tokenizer = _tokenizer(corpus, cfg, workers)
        with store.explain_refusal(out):
            manifest = _write(out, corpus, tokenizer, cfg, workers, left)
    statistics, records = manifest["statistics"], manifest["sources"]
    unread = _ignored(records)
    _say_what_was_left(records, left, statistics["removed"])
    if unread:
        console.log(console.one_line(ignored.in_words(unread)))
    return {
        "out": str(Path(cfg.out).expanduser()),
        "documents": statistics["documents"],
        "characters": statistics["characters"],
        "distinct_characters": statistics["distinct_characters"],
        "vocab_size": manifest["vocab_size"],
        "train_tokens": manifest["train"]["tokens"],
        "val_tokens": manifest["val"]["tokens"],
        "duplicates_removed": sum(statistics["duplicates_removed"].values()),
        "also_in_validation": statistics["also_in_validation"],
        "encodings": dict(Counter(record["encoding"] for record in records)),
        "taken": dict(_taken(records)),
        "left_out": manifest["left_out"],
        "skipped": statistics["skipped"],
        "skipped_in": [record["path"] for record in records if record["skipped"]],
        "refused": [record["path"] for record in records if record.get("reason") and not record["documents"]],
        "ignored": unread,
        "removed": statistics["removed"],
        "seconds": round(time.perf_counter() - began, 3),
    }


def _taken(records: list[dict]) -> Counter[str]:
    return Counter(record["format"] for record in records if record["documents"] or not record.get("reason"))


def _ignored(records: list[dict]) -> Ignored:
    """What was not read, of all sources together."""
    together: Ignored = {}
    for record in records:
        for key, (count, first) in record.get("ignored", {}).items():
            ignored.note(together, [key], first, count)
    return together


def _say_what_was_left(records: list[dict], left: list[LeftOut], removed: int) -> None:
    refused = [LeftOut(r["path"], _why(r["reason"].removeprefix(r["path"]))) for r in records if r.get("reason")]
    if left or refused:
        for line in folders.table_lines(_taken(records), [*left, *refused]):
            console.log(console.one_line(line))
    if removed:
        console.warn(REMOVED.format(removed))


def _why(reason: str) -> str:
    """A refusal as the reason why a file was left out: without the advice to leave it out."""
    return re.sub(r"^(: | is | )|; (otherwise )?leave it out.*", "", reason)


def settings_of(cfg: PrepareConfig) -> dict[str, Any]:
    """How the data was prepared, as the manifest tells it; by whom and where makes no difference to the data."""
    settings = dataclasses.asdict(cfg)
    for key in ("out", "sources", "workers", "backend"):
        del settings[key]
    return json.loads(json.dumps(settings, default=str))


def _document_options(files: list[Source], cfg: PrepareConfig) -> DocumentOptions:
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
        overlap.evaluation_of.cache_clear()  # what an earlier text of this process was compared with may have changed
        overlap.evaluation_of(cfg.without)  # read before anything else, so that a wrong name is reported at once
    return DocumentOptions(
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
        counts = encode.kept_counts(corpus, workers)
        counts[[ord(mark) for mark in dialogue.MARKS.values()]] = 0
        if corpus.options.dialogue == "roles":
            counts[[ord(c) for c in set("\n" + "".join(ROLES))]] += 1  # the template writes them
        present = np.flatnonzero(counts)
        tokenizer = Tokenizer.train_char(
            {chr(c): int(n) for c, n in zip(present.tolist(), counts[present].tolist(), strict=True)},
            cfg.vocab_size,
            cfg.min_frequency,
        )
    elif cfg.tokenizer == "bpe":
        lines = encode.sampled_lines(corpus, workers)
        tokenizer = Tokenizer.train_bpe(lines, cfg.vocab_size or DEFAULT_BPE_VOCAB_SIZE, cfg.min_frequency)
    else:
        tokenizer = Tokenizer.load(Path(cfg.tokenizer).expanduser())
    if cfg.vocab_size is not None and tokenizer.vocab_size > cfg.vocab_size:
        raise UserError(
            f"--vocab_size={cfg.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens; leave it out"
        )
    if corpus.options.dialogue:
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
    if corpus.options.whole:
        return []
    if corpus.options.dialogue == "lines":
        return [tokenizer.sep_id, tokenizer.pad_id]
    end = dialogue.end_of_turn(tokenizer) if corpus.options.dialogue else None
    end = tokenizer.eot_id if end is None else end
    return [] if end is None else [end]


# Second pass


def _write(
    out: Path, corpus: Corpus, tokenizer: Tokenizer, cfg: PrepareConfig, workers: Workers, left: list[LeftOut]
) -> dict[str, Any]:
    vocab_size = cfg.vocab_size or tokenizer.vocab_size
    dtype = "uint16" if vocab_size <= 65535 else "uint32"
    end_ids = _end_ids(tokenizer, corpus)
    end_id = end_ids[-1] if end_ids else None
    n_train = _tail_cut(corpus, cfg) if corpus.options.whole else 0
    with store.PreparedWriter(out, dtype) as prepared:
        tokenizer.save(prepared.directory)
        if corpus.options.whole:
            for split in (prepared.train, prepared.val):
                split.write(Encoded(np.empty(0, dtype), np.zeros(1, np.int64)))  # one document, from the first token
        bytes_at_cut = 0
        for train, val, n_bytes in encode.encoded(corpus, tokenizer, end_id, dtype, workers, n_train):
            prepared.train.write(train)
            prepared.val.write(val)
            bytes_at_cut += n_bytes
        _count_text(corpus, prepared, n_train, bytes_at_cut)
        n_documents = prepared.train.documents + prepared.val.documents
        manifest = {
            "format": store.FORMAT,
            "version": store.VERSION,
            "kind": "dialogue" if corpus.options.dialogue else "text",
            "template": {"lines": "sep", "roles": "roles"}.get(corpus.options.dialogue),
            "dtype": dtype,
            "vocab_size": vocab_size,
            "eot_id": end_id,
            "end_ids": end_ids,
            "train": prepared.train.close(),
            "val": prepared.val.close(),
            "sources": corpus.records,
            "left_out": [dataclasses.asdict(entry) for entry in left],
            "statistics": {
                "documents": len(corpus.sources) if corpus.options.whole else n_documents,
                "characters": corpus.total("characters"),
                "distinct_characters": corpus.n_distinct,
                "duplicates_removed": {"exact": corpus.dropped["exact"], "near": corpus.dropped["near"]},
                "also_in_validation": corpus.dropped["validation"],
                "left_out_by_weights": corpus.dropped["weights"],
                "left_out_by_without": sum(survey.shared for survey in corpus.surveys),
                "cut_into_pieces": corpus.options.cut,
                "empty_removed": sum(survey.empty for survey in corpus.surveys),
                "skipped": corpus.total("skipped"),
                "removed": corpus.total("removed"),
            },
            "settings": settings_of(cfg),
        }
        prepared.commit(manifest)
    return manifest


def _tail_cut(corpus: Corpus, cfg: PrepareConfig) -> int:
    """Characters of the training part. Raises UserError where nothing is left for one of both."""
    total = int(corpus.joined("lengths").sum())
    if cfg.val:
        return sum(record["characters"] for record in corpus.records if record.get("split") != "val")
    cut = int(total * (1 - cfg.val_fraction))  # nanoGPT's data[:int(n*0.9)]
    if cut in (0, total):
        raise UserError(
            f"the text has {number_of(total, 'character')}, too few to cut into training and validation; give more text"
        )
    return cut


def _count_text(corpus: Corpus, prepared: store.PreparedWriter, n_train: int, bytes_at_cut: int) -> None:
    """Characters and UTF-8 bytes of both splits, from what the first pass counted."""
    lengths, sizes = corpus.joined("lengths"), corpus.joined("sizes")
    if corpus.options.whole:
        prepared.train.characters, prepared.val.characters = n_train, int(lengths.sum()) - n_train
        prepared.train.bytes = int(sizes[np.cumsum(lengths) <= n_train].sum()) + bytes_at_cut
        prepared.val.bytes = int(sizes.sum()) - prepared.train.bytes
        return
    choice = corpus.joined("choice")
    for split, copies in ((prepared.train, selection.copies_in_training(choice)), (prepared.val, choice == VAL)):
        split.characters, split.bytes = int((lengths * copies).sum()), int((sizes * copies).sum())
