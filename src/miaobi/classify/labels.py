"""What is a label, and which labels are the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from decimal import Decimal

NUMBER = re.compile(r"[+-]?(\d{1,30}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,2})?")


def label_text(value: str | float | Decimal | None) -> str:
    """A label as text, "" for none: what tables of numbers have there is NaN."""
    if value is None or value != value:
        return ""
    return str(value).strip()


def label_names(labels: Iterable[str], known: Sequence[str] = ()) -> dict[str, str]:
    """Every label that was read -> the name of its class: numbers by value where all are, 1 and 1.0; true and false,
    which every program writes in its own case, where all are; else as written.

    known: classes that there are already, whose names stay.

    `nan` is a missing label (not among the keys) only where the others are numbers: it is a word too (男).
    """
    spelled = {label for label in (*known, *labels) if label}
    words = {label for label in spelled if label.lower() != "nan"}
    if words and {word.lower() for word in words} <= {"true", "false"}:
        by_word: dict[str, str] = {}
        for label in (*known, *sorted(words)):
            by_word.setdefault(label.lower(), label)
        return {label: by_word[label.lower()] for label in words}
    if not words or not all(map(NUMBER.fullmatch, words)):
        return {label: label for label in spelled} if words else {}
    by_value: dict[Decimal, str] = {}
    for label in (*known, *sorted(words, key=lambda label: (len(label), label))):
        by_value.setdefault(Decimal(label), label)
    return {label: by_value[Decimal(label)] for label in words}
