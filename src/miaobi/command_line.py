"""The words of a command line: `--key=value`, `--key value`, bare switches and positional words."""

from __future__ import annotations

import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from miaobi.console import error
from miaobi.errors import UserError
from miaobi.seeds import OURS, Names
from miaobi.settings import as_number, find_config, keys, load, shown, suggest


def unknown_verb(name: str, verbs: list[str]) -> UserError:
    """The error that `miaobi NAME` is none of `verbs`, or of their kinds."""
    group, _, kind = name.partition(" ")
    if kind:
        kinds = [verb.split()[1] for verb in verbs if verb.startswith(f"{group} ")]
        return UserError(f"miaobi {group} does not know {shown(kind)}; it knows {', '.join(kinds)}")
    close = suggest(name, [*dict.fromkeys(verb.split()[0] for verb in verbs)])
    return UserError(f"unknown verb {shown(name)}.{close} `miaobi --help` lists them")


Settings = TypeVar("Settings")


@dataclass
class CommandLine:
    """The words of a command: positional ones, settings, and the flags that every verb has."""

    words: list[str] = field(default_factory=list)
    given: list[tuple[str, str]] = field(default_factory=list)
    as_json: bool = False
    asks_help: bool = False


def split(kind: type, names: Names, args: list[str]) -> CommandLine:
    """`--key=value`, `--key value` and positional words apart; a bare `--flag` is True; after `--` all is positional.

    Raises UserError for a key without its value, and for one dash instead of two.
    """
    line, known, rest = CommandLine(), keys(kind), list(args)
    free = sum(key.is_positional for key in known.values())  # positional settings that are not given yet
    several: tuple[str, tuple[Any, ...]] | None = None  # the list that the words before belong to
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            line.words += rest
            break
        if arg in ("-h", "--help"):
            line.asks_help = True
        elif arg in ("--json", "--json=True") and "json" not in known:
            line.as_json = True
        elif arg.startswith("--"):
            typed, eq, value = arg[2:].partition("=")
            key, several = typed.replace("-", "_"), None
            setting = known.get(names.aliases.get(key, key))
            kinds = names.translated[key][:1] if key in names.translated else setting.kinds if setting else ()
            if not eq:
                value = take_value(typed, kinds, rest, is_known=setting is not None)
                several = (key, typing.get_args(kinds[0])) if kinds and typing.get_origin(kinds[0]) is tuple else None
            line.given.append((key, value))
            free -= setting is not None and setting.is_positional
        elif re.match(r"-[A-Za-z]", arg):
            raise UserError(f"{shown(arg)}: settings have two dashes, such as --{arg[1:2]}...; `--help` lists them")
        elif several and (len(line.words) >= free or as_number(arg, float) is not None) and fits(arg, several[1]):
            line.given.append((several[0], arg))  # --weights 0.3 1
        else:
            line.words.append(arg)
    return line


def take_value(key: str, kinds: tuple[Any, ...], rest: list[str], is_known: bool) -> str:
    """The word after `--key`, taken from `rest`; True for a switch that no True or False follows."""
    following = rest[0] if rest else None
    is_choice = any(following in typing.get_args(k) for k in kinds if typing.get_origin(k) is Literal)
    if bool in kinds and following not in ("True", "true", "False", "false") and not is_choice:
        return "True"
    if following is None or re.match("--[A-Za-z]", following):
        if is_known:
            raise UserError(f"--{key} needs a value: --{key}=...")
        return ""
    return rest.pop(0)


def fits(word: str, elements: tuple[Any, ...]) -> bool:
    """Whether a word may be one more element of a list."""
    return float not in elements or as_number(word, float) is not None


def place_words(kind: type, names: Names, line: CommandLine) -> list[tuple[str, str]]:
    """The settings of a command line, its positional words by the names of their settings. Raises UserError."""
    words, assigned = list(line.words), []
    by_flag = {names.aliases.get(key, key): (key, value) for key, value in line.given}
    for key in (key for key in keys(kind).values() if key.is_positional):
        if typing.get_origin(key.kinds[0]) is tuple:
            assigned += [(key.name, word) for word in words]
            words = []
        elif words and key.name not in by_flag:
            assigned.append((key.name, words.pop(0)))
    if words and "model" in by_flag:
        raise UserError(f"two models: {words[0]} and --{'='.join(by_flag['model'])}; give one")
    if words:
        raise UserError(f"{shown(words[0])} is one word too many; settings look like --key=value")
    return assigned + line.given


def take_config(words: list[str]) -> Path | None:
    """The CONFIG among the words of a command. Raises UserError for two."""
    if len(words) > 1:
        raise UserError(f"one CONFIG at most, got {words[0]} and {words[1]}; settings look like --key=value")
    return find_config(words[0]) if words else None


def parse(kind: type[Settings], program: str, description: str | None) -> Settings:
    """The command line of a script as a dataclass; prints help or the user's mistake and exits."""
    from miaobi.show import explain

    try:
        line = split(kind, OURS, sys.argv[1:])
        if line.asks_help:
            explain(program, description or "", kind, OURS)
            sys.exit(0)
        return load(kind, OURS, program, place_words(kind, OURS, line))[0]
    except UserError as e:
        error(e, program)
        sys.exit(2)
