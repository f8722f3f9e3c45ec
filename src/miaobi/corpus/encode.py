"""The second pass of `prepare`: the documents that were chosen become tokens.

`workers` keeps the order of the sources, so the number of workers and where they are change nothing in the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from miaobi import console
from miaobi.corpus import characters, dialogue
from miaobi.corpus.blocks import with_progress
from miaobi.corpus.characters import N_CODE_POINTS, Aside
from miaobi.corpus.documents import DocumentOptions, Task, task_documents
from miaobi.corpus.selection import DROP, VAL, copies_in_training
from miaobi.corpus.store import Encoded
from miaobi.corpus.survey import Corpus
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.corpus.workers import Workers

BPE_SAMPLE_CHARACTERS = 8_000_000
"""BPE is trained on evenly spaced lines of about so many characters; its trainer needs some 65 bytes for each."""


# What the vocabulary is made of


def kept_counts(corpus: Corpus, workers: Workers) -> np.ndarray:
    """(0x110000,) int64: characters of the kept documents; what was dropped is counted again and taken off."""
    total, lossy = np.zeros(N_CODE_POINTS, np.int64), set()
    for number, survey in enumerate(corpus.surveys):
        dropped = survey.choice == DROP
        if corpus.options.whole or not dropped.all():
            total[survey.code_points] += survey.counts
            if dropped.any():
                lossy.add(number)
    if lossy:
        tasks = ((task, survey) for n, (task, survey) in enumerate(_tasks(corpus)) if n in lossy)
        jobs = ((task, corpus.options, survey.choice, survey.aside) for task, survey in tasks)
        with workers.started() as run:
            for _, (code_points, counts) in with_progress(run(_count_dropped, jobs), corpus.sources, "counting"):
                total[code_points] -= counts
    return total


def sampled_lines(corpus: Corpus, workers: Workers) -> Iterator[str]:
    """Evenly spaced lines of the kept documents, to train BPE on."""
    size = sum(int(s.lengths.sum() if corpus.options.whole else s.lengths[s.choice != DROP].sum())
               for s in corpus.surveys)  # fmt: skip
    every = max(1, -(-size // BPE_SAMPLE_CHARACTERS))
    if every > 1:
        console.log(f"BPE is learned from 1 line in {every}, about {size // every:,} characters")
    jobs = ((task, corpus.options, survey.choice, every) for task, survey in _tasks(corpus))
    with workers.started() as run:
        for _, lines in run(_sample_lines, jobs):
            yield from lines


def _tasks(corpus: Corpus) -> Iterator[tuple]:
    return zip(corpus.tasks(), corpus.surveys, strict=True)


def _count_dropped(
    _: Tokenizer | None, task: Task, options: DocumentOptions, choice: np.ndarray, aside: Aside | None
) -> tuple[np.ndarray, np.ndarray]:
    """(code points, counts) of the documents in this task that were not chosen."""
    points, ends = _read_points(task, options, choice, aside)
    dropped = np.flatnonzero(choice == DROP)
    counts = characters.count_characters(_chosen(points, ends, dropped)[0])
    counts[ord("\n")] -= len(dropped)
    present = np.flatnonzero(counts > 0)
    return present, counts[present]


def _sample_lines(
    _: Tokenizer | None, task: Task, options: DocumentOptions, choice: np.ndarray, every: int
) -> list[str]:
    if options.whole:
        texts = task_documents(task, options)
    else:
        texts = task_documents(task, options, len(choice))
        texts = [text for text, where in zip(texts, choice, strict=True) if where != DROP]
    if options.dialogue == "roles":
        texts = [dialogue.without_marks(text, "\n") for text in texts]
    return [line for text in texts for line in text.split("\n") if line][::every]


# Tokens


def encoded(
    corpus: Corpus, tokenizer: Tokenizer, end_id: int | None, dtype: str, workers: Workers, n_train: int
) -> Iterator[tuple[Encoded, Encoded, int]]:
    """Train and val of each task, and, of the task that the tail split cuts in two, the UTF-8 bytes of its train part.

    n_train: characters of the training part where the text is one stream.
    """
    function, jobs = _encode_documents, _jobs(corpus, end_id, dtype)
    if corpus.options.whole:
        function, jobs = _encode_stretch, _stretches(corpus, n_train, dtype)
    # Set aside: to look characters up is less work than to send ids over.
    is_aside = bool(corpus.surveys) and corpus.surveys[0].aside is not None
    with (Workers(1) if is_aside else workers).started(tokenizer) as run:
        for _, parts in with_progress(run(function, jobs), corpus.sources, "encoding"):
            yield parts


def _jobs(corpus: Corpus, end_id: int | None, dtype: str) -> Iterator[tuple]:
    for task, survey in _tasks(corpus):
        if (survey.choice != DROP).any():
            yield task, corpus.options, survey.choice, end_id, dtype, survey.aside


def _stretches(corpus: Corpus, n_train: int, dtype: str) -> Iterator[tuple]:
    position = 0
    for task, survey in _tasks(corpus):
        yield task, corpus.options, max(0, n_train - position), dtype, survey.aside
        position += int(survey.lengths.sum())


def _encode_documents(
    tokenizer: Tokenizer,
    task: Task,
    options: DocumentOptions,
    choice: np.ndarray,
    end_id: int,
    dtype: str,
    aside: Aside | None,
) -> tuple[Encoded, Encoded, int]:
    by_character = tokenizer.by_character and not options.dialogue
    if by_character:
        points, ends = _read_points(task, options, choice, aside)
    else:
        texts = task_documents(task, options, len(choice))
    parts = []
    for copies in (copies_in_training(choice), choice == VAL):
        numbers = np.repeat(np.arange(len(choice)), copies)
        if by_character:
            part = Encoded(*tokenizer.encode_points(*_chosen(points, ends, numbers), end_id))
        elif options.dialogue == "lines":
            part = dialogue.encode_lines(tokenizer, [texts[i] for i in numbers])
        elif options.dialogue:
            part = dialogue.encode_roles(tokenizer, [texts[i] for i in numbers], options.replies_only)
        else:
            part = Encoded(*tokenizer.encode_documents([texts[i] for i in numbers], end_id))
        parts.append(dataclasses.replace(part, ids=part.ids.astype(dtype, copy=False)))
    return parts[0], parts[1], 0


def _encode_stretch(
    tokenizer: Tokenizer, task: Task, options: DocumentOptions, n_train: int, dtype: str, aside: Aside | None
) -> tuple[Encoded, Encoded, int]:
    """The tail split: the first `n_train` characters of this task are train, the others val."""
    points = aside.take() if aside is not None else characters.code_points("".join(task_documents(task, options)))
    parts, no_starts = [], np.empty(0, np.int64)
    for piece in (points[:n_train], points[n_train:]):
        if tokenizer.by_character:
            ids, _ = tokenizer.encode_points(piece, np.array([len(piece)]), end_id=None)
        else:
            ids, _ = tokenizer.encode_documents([characters.text_of(piece)], end_id=None)
        parts.append(Encoded(ids.astype(dtype, copy=False), no_starts))
    counts = characters.count_characters(points[:n_train]) if 0 < n_train < len(points) else np.zeros(0, np.int64)
    return *parts, characters.utf8_length(np.arange(len(counts)), counts)


def _read_points(
    task: Task, options: DocumentOptions, choice: np.ndarray, aside: Aside | None
) -> tuple[np.ndarray, np.ndarray]:
    """Code points of the documents of a task, a newline behind each; and where each begins, and the last one ends."""
    if aside is not None:
        points, lengths = aside.take(), aside.lengths
    else:
        points, lengths = characters.of_documents(task_documents(task, options, len(choice)))
    return points, np.concatenate(([0], np.cumsum(lengths + 1)))


def _chosen(points: np.ndarray, ends: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `_read_points` gave -> the code points of some of the documents, and where each of those ends."""
    taken = [points[low:high] for low, high in zip(ends[numbers].tolist(), ends[numbers + 1].tolist(), strict=True)]
    lengths = ends[numbers + 1] - ends[numbers]
    return np.concatenate(taken) if taken else points[:0], np.cumsum(lengths)
