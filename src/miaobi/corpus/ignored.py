"""Keys of records that nothing is made of: how often there were, and where the first of them stands."""

from __future__ import annotations

from collections.abc import Iterable

from miaobi.errors import BRIEF

Ignored = dict[str, tuple[int, int | str]]
"""key -> (how often, where first): a line of a block, counted from 0, or in words."""
MOST, OTHERS = 50, "(other keys)"
"""A file with more different ones than this has the rest of them counted together."""
_SHOWN = 8


def note(ignored: Ignored, keys: Iterable[str], where: int | str, count: int = 1) -> None:
    """Counts each of the keys once more, or `count` times."""
    for key in keys:
        key = key if len(key) <= BRIEF else f"{key[: BRIEF - 3]}..."
        key = key if key in ignored or len(ignored) < MOST else OTHERS
        before, first = ignored.get(key, (0, where))
        ignored[key] = before + count, first


def in_words(ignored: Ignored) -> str:
    """What `note` has counted, for people; "" where there is nothing."""
    entries = [f"`{key}` ({count:,}, first in {first})" for key, (count, first) in list(ignored.items())[:_SHOWN]]
    more = f" and {len(ignored) - _SHOWN:,} more, see manifest.json" if len(ignored) > _SHOWN else ""
    return f"keys of the dialogues that are not read: {', '.join(entries)}{more}" if entries else ""
