"""The one exception that means "the user can fix this", and how its message shows a value."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

BRIEF = 80
"""Characters that a value takes in a message at most."""
LONGEST = 3000
"""Characters of a message: whatever somebody put into it, it is no page."""


class UserError(Exception):
    """Bad input or a wrong setting: says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        """message: of one line; what is beyond LONGEST is left out of its middle."""
        half = LONGEST // 2
        super().__init__(message if len(message) <= LONGEST else f"{message[:half]} ... {message[-half + 5 :]}")


def not_finite(what: str) -> UserError:
    """The error of a model whose weights are finite but not what it computes with them, such as a rope_theta of 1e-320.

    what: the numbers, in words.
    """
    return UserError(f"{what} of this model are not finite (nan or inf): its weights or its config.json are damaged, "
                     "or the run that wrote it diverged; copy it again, or use an older checkpoint")  # fmt: skip


class _Brief(reprlib.Repr):
    """Looks at a few members of a few levels: an alias bomb or a list that holds itself takes no longer."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, BRIEF - 2, BRIEF
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdeque = 4

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, str):
            return self.repr_str(str.__str__(x), level)  # kinds of str too, as a YAML parser makes them
        if isinstance(x, bool) or x is None or type(x) is float:
            return repr(x)
        if isinstance(x, int):
            digits = int(x.bit_length() * 0.30103) + 1
            return int.__repr__(x) if digits <= BRIEF // 2 else f"<a number of some {digits:,} digits>"
        if isinstance(x, bytes):
            return repr(bytes(x[:BRIEF])) + ("..." if len(x) > BRIEF else "")
        for kind, shorten in ((dict, self._dict), (list, self.repr_list), (tuple, self.repr_tuple)):
            if isinstance(x, kind):
                return shorten(x, level)
        return f"<{type(x).__name__}>"

    def _dict(self, x: dict, level: int) -> str:
        if level <= 0:
            return "{...}" if x else "{}"
        pairs = []
        for key, value in x.items():
            if len(pairs) == self.maxdict:
                pairs.append("...")
                break
            pairs.append(f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}")
        return f"{{{', '.join(pairs)}}}"


def brief(value: Any) -> str:
    """How a message shows a value from a file: its repr, of at most `BRIEF` characters and bounded work."""
    text = _Brief().repr(value)
    return text if len(text) <= BRIEF else f"{text[: BRIEF - 3]}..."


def names_listed(names: Iterable[Any], most: int = 20) -> str:
    """Names from a file for a message: so many of them, each of at most `BRIEF` characters; `none` for none."""
    names = list(names)
    some = [name if len(name) <= BRIEF else f"{name[: BRIEF - 3]}..." for name in map(str, names[:most])]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(some)}{more}" or "none"


def number_of(n: int, one: str) -> str:
    """A number with its noun, which it agrees with: `1 document`, `2,000 documents`, `3 matrices`."""
    if n == 1:
        return f"1 {one}"
    many = (
        f"{one[:-2]}ices" if one.endswith("ix") else f"{one}es" if one.endswith(("s", "x", "ch", "sh")) else f"{one}s"
    )
    return f"{n:,} {many}"
