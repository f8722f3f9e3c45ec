"""Command lines of plain `--key=value`, read without tyro, whose import takes longer than preparing a novel."""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from miaobi.arguments import spelled_out

Settings = TypeVar("Settings")


def plain_settings(kind: type[Settings], args: list[str]) -> tuple[list[str], Settings] | None:
    """(positional arguments, settings) of a command line whose values are all of plain types.

    None where tyro has to look: --help, lists, anything missing or mistaken.
    """
    hints = typing.get_type_hints(kind)
    positional = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))
    given, rest = {}, iter(spelled_out(kind, args[len(positional) :]))
    for arg in rest:
        key, eq, text = arg.partition("=")
        name, value = key[2:], plain_value(hints.get(key[2:]), text if eq else next(rest, "-"))
        if not key.startswith("--") or value is None:
            return None
        given[name] = value
    nothing = dataclasses.MISSING
    for setting in dataclasses.fields(kind):
        if setting.default is nothing and setting.default_factory is nothing and setting.name not in given:
            return None
    return positional, kind(**given)


def plain_value(kind: Any, text: str) -> Any:
    """`text` as the type of a setting; None where it does not fit, or the type is not plain."""
    if text.startswith("-"):
        return None
    if typing.get_origin(kind) is Literal:
        return text if text in typing.get_args(kind) else None
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if bool in kinds:
        return {"True": True, "False": False}.get(text)
    if int in kinds:
        return int(text) if text.isdecimal() else None
    return next((k(text) for k in kinds if k in (str, Path)), None)
