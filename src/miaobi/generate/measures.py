"""Measures of what a model writes: how varied it is, whether it loops, repeats itself, ends."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from miaobi.generate.engine import Completion

LOOP = re.compile(r"(.{2,}?)\1{2,}", re.DOTALL)  # two characters or more, three times running
THRICE = 3


def loops(text: str) -> bool:
    """Whether a phrase of two characters or more occurs three times in succession; laughter (哈哈哈) is none."""
    return any(len(set(match[1])) > 1 for match in LOOP.finditer(text))


def most_frequent(text: str, n: int) -> int:
    """Occurrences of the commonest sequence of n characters; overlapping ones count."""
    return max(Counter(text[i : i + n] for i in range(len(text) - n + 1)).values(), default=0)


def repeats(text: str) -> bool:
    """Whether a 4-gram of characters occurs three times or more."""
    return most_frequent(text, 4) >= THRICE


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of characters over all of them (distinct-n: Li et al. 2016, arXiv:1510.03055)."""
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def is_good(reply: Completion) -> bool:
    """Whether a reply stops by itself, does not loop, and repeats no 4-gram thrice."""
    return reply.finish_reason == "stop" and not loops(reply.text) and not repeats(reply.text)


def figures(texts: Sequence[str], stopped: Sequence[bool]) -> dict[str, float]:
    """distinct_1, distinct_2, distinct_3; repetition: share of texts that repeat a 4-gram three times or more;
    stop_rate: share of those that end by themselves; samples; characters, on average.
    """
    count = max(1, len(texts))
    return {
        **{f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)},
        "repetition": sum(map(repeats, texts)) / count,
        "stop_rate": sum(stopped) / count,
        "samples": len(texts),
        "characters": sum(map(len, texts)) / count,
    }
