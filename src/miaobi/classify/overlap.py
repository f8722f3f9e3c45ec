"""Text to pretrain on that shares nothing with the reviews on which a classifier is judged.

    python -m miaobi.classify.overlap SOURCE... --evaluation=reviews.csv --out=clean.jsonl

A document is left out when its normalised text (letters and digits, see `data.normalized`) begins like a review (60
characters) or shares any 20 characters in a row with one. What was left out is counted and printed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from miaobi.classify.data import normalized
from miaobi.classify.tables import read_rows
from miaobi.command_line import parse
from miaobi.config import Location, Positional
from miaobi.console import error, log
from miaobi.corpus.documents import read_documents
from miaobi.corpus.sources import find_sources
from miaobi.errors import UserError
from miaobi.files import text_written_whole

PREFIX, WINDOW = 60, 20
POWERS = np.array([pow(1_000_003, i, 1 << 64) for i in range(WINDOW)], np.uint64)


@dataclass(frozen=True)
class Args:
    """Command line."""

    sources: Positional[tuple[Location, ...]]
    """Files, directories, globs, as in `miaobi prepare`; of tables the text column."""
    evaluation: Location
    """Labelled table whose texts may not be pretrained on."""
    out: Path
    """.jsonl that is written: one document a line, in text."""
    text_column: str | None = None
    """Text column of the evaluation table; default: the one called text, review, content or sentence."""
    mentioning: tuple[str, ...] = ()
    """Keep only documents with one of these words: of general text, what is about the same things as the reviews."""
    labels: bool = False
    """Keep the labels of the sources, all of which are then labelled tables: text for an intermediate classifier."""


def window_hashes(text: str) -> np.ndarray:
    """Polynomial hashes modulo 2^64 of every WINDOW characters in a row: (max(0, n - WINDOW + 1),) uint64."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    if len(codes) < WINDOW:
        return np.empty(0, np.uint64)
    return np.lib.stride_tricks.sliding_window_view(codes, WINDOW) @ POWERS


class Evaluation:
    """The texts that must not be seen before."""

    def __init__(self, texts: list[str]) -> None:
        keys = [key for text in texts if (key := normalized(text))]
        self.prefixes = {key[:PREFIX] for key in keys}
        self.windows = np.unique(np.concatenate([np.empty(0, np.uint64), *map(window_hashes, keys)]))

    def overlaps(self, text: str) -> str:
        """prefix or window, by what the text shares with an evaluation text; "" for nothing."""
        key = normalized(text)
        if key[:PREFIX] in self.prefixes:
            return "prefix"
        found = window_hashes(key)
        places = np.searchsorted(self.windows, found)
        places[places == len(self.windows)] = 0
        return "window" if len(self.windows) and bool((self.windows[places] == found).any()) else ""


def documents(name: str, labels: bool) -> Iterator[dict[str, str]]:
    """Records of a source: of .csv and .tsv the text column, else documents as `miaobi prepare` finds them.

    labels: all are tables, and their rows have a label as well; those without one are left out.
    """
    tables = {source.path: labels or source.format == "csv" for source in find_sources([name])}
    for path, is_table in tables.items():
        if is_table:
            rows = (row for row in read_rows(str(path), None, None, skip_bad=True, labels=labels) if row)
            yield from ({"text": row.text} | ({"label": row.label} if labels else {}) for row in rows
                        if not labels or row.label)  # fmt: skip
        else:
            yield from ({"text": text} for text in read_documents([str(path)]))


def check_out(out: Path, inputs: list[str]) -> None:
    """Raise UserError where `out` is one of the files that are read, or no file."""
    for source in find_sources(inputs):
        if out.exists() and out.samefile(source.path):
            raise UserError(f"--out={out} is among what is read ({source.path}); write to another file")
    if out.exists() and not out.is_file():
        raise UserError(f"--out={out} is no regular file; give the name of a .jsonl that is to be written")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"--out={out} cannot be written; choose another place")


def clean(args: Args) -> dict[str, int]:
    """Write the documents that share nothing with the evaluation.

    Returns documents, elsewhere (they mention nothing of what they should), prefix, window, kept.
    Raises UserError for sources that cannot be read, and an `out` that cannot be written or is one of them.
    """
    check_out(args.out, [*args.sources, args.evaluation])
    rows = read_rows(args.evaluation, args.text_column, None, labels=False)
    evaluation = Evaluation([row.text for row in rows if row is not None])
    counts = {"documents": 0, "elsewhere": 0, "prefix": 0, "window": 0, "kept": 0}
    with text_written_whole(args.out) as f:
        for name in args.sources:
            before = dict(counts)
            for record in documents(name, args.labels):
                counts["documents"] += 1
                if args.mentioning and not any(word in record["text"] for word in args.mentioning):
                    counts["elsewhere"] += 1
                    continue
                shared = evaluation.overlaps(record["text"])
                counts[shared or "kept"] += 1
                if not shared:
                    f.write(json.dumps(record, ensure_ascii=False) + "\n")
            found = {key: counts[key] - before[key] for key in counts}
            log(f"{name}: {found['documents']:,} documents; {found['prefix']:,} begin like an evaluation text, "
                f"{found['window']:,} more share {WINDOW} characters with one")  # fmt: skip
    return counts


def main() -> None:
    """The command. Exit code 2 for the user's mistakes, a full disk among them."""
    args = parse(Args, "python -m miaobi.classify.overlap", __doc__)
    try:
        print(json.dumps(clean(args)))
    except (UserError, OSError) as e:
        error(e)
        sys.exit(2)


if __name__ == "__main__":
    main()
