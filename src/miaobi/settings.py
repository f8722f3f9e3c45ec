"""The one parser: a dataclass, a YAML file and `--key=value` into frozen settings, and errors that say what to write.

The dataclasses may have sections (RunConfig) or none; their attribute docstrings are the help.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from miaobi.errors import UserError, brief
from miaobi.kinds import POSITIONAL
from miaobi.released import shipped
from miaobi.seeds import PRETRAINING, TRAIN, Names, shipped_for
from miaobi.yaml_file import Mapping, Scalar, read_mapping, write_yaml

if TYPE_CHECKING:  # imported when a run is configured: `prepare` needs neither
    from ruamel.yaml.comments import CommentedMap

    from miaobi.config import RunConfig

Origin = dict[str, str]  # key -> where its value came from
UNLIMITED = 10**9
NULL = ("None", "null", "Null", "NULL")
MISSING = dataclasses.MISSING


@dataclass(frozen=True)
class Key:
    """A setting of a dataclass."""

    name: str
    kinds: tuple[Any, ...]
    """What its value may be: types, Literals, Annotated[str, Path] for text that names a place, NoneType."""
    is_positional: bool
    section: str
    """Attribute that holds it; "" where the dataclass has no sections."""
    owner: type
    default: Any


@functools.cache
def keys(kind: type) -> dict[str, Key]:
    """Every setting of a dataclass by its name, those of its sections included; names are unique."""
    hints, settings = typing.get_type_hints(kind, include_extras=True), {}
    for f in dataclasses.fields(kind):
        hint, default = hints[f.name], f.default if f.default_factory is MISSING else f.default_factory
        if dataclasses.is_dataclass(hint):
            settings |= {k.name: dataclasses.replace(k, section=f.name) for k in keys(hint).values()}
            continue
        positional = POSITIONAL in typing.get_args(hint)
        if positional:
            rest = [a for a in typing.get_args(hint)[1:] if a != POSITIONAL]
            hint = typing.Annotated[(typing.get_args(hint)[0], *rest)] if rest else typing.get_args(hint)[0]
        union = typing.get_origin(hint) in (types.UnionType, typing.Union)
        settings[f.name] = Key(f.name, typing.get_args(hint) if union else (hint,), positional, "", kind, default)
    return settings


def run_keys() -> dict[str, Key]:
    """Every setting of RunConfig."""
    from miaobi.config import RunConfig

    return keys(RunConfig)


def sections() -> dict[str, str]:
    """Key -> section of RunConfig."""
    return {key.name: key.section for key in run_keys().values()}


def flatten(cfg: RunConfig) -> dict[str, Any]:
    """Key -> value over all sections."""
    return {key: getattr(getattr(cfg, section), key) for key, section in sections().items()}


def with_values(cfg: RunConfig, values: dict[str, Any]) -> RunConfig:
    """`cfg` with some keys replaced; every section is validated again."""
    where, by_section = sections(), {}
    for key, value in values.items():
        by_section.setdefault(where[key], {})[key] = value
    return dataclasses.replace(
        cfg, **{s: dataclasses.replace(getattr(cfg, s), **changed) for s, changed in by_section.items()}
    )


def suggest(word: str, known: list[str]) -> str:
    """` Did you mean ...?`, or nothing."""
    import difflib

    close = difflib.get_close_matches(word[:80], [k for k in known if k != word], n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


# --- values ------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value for a message: at most 80 characters of it, whatever it is."""
    if isinstance(value, (list, tuple, dict, Mapping)):
        return "a list" if isinstance(value, (list, tuple)) else "a mapping"
    text = "null" if value is None else str(value)
    return text if value is None or re.fullmatch(r"-?\d{1,40}", text) or not isinstance(value, str) else brief(text)


def coerce(key: str, value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    """`value` (of a YAML file, a command line, or Python) as one of `kinds`. Text keeps its spelling.

    Raises UserError with the place, the key, and what it must be.
    """
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            items = value if isinstance(value, (list, tuple)) else [value]
            return tuple(coerce(key, item, typing.get_args(kind)[:1], where) for item in items)
    quoted = isinstance(value, Scalar) and value.quoted
    empty = isinstance(value, Scalar) and not value and not quoted  # `key:`
    if types.NoneType in kinds and (value is None or empty or (not quoted and value in (*NULL, Scalar("~")))):
        return None
    if value is None or empty or isinstance(value, (list, tuple, dict, Mapping)):
        raise UserError(f"{where}: {key} is {shown(None if empty else value)}, but it must be {describe(kinds)}")
    text = str(value)
    for kind in kinds:
        if typing.get_origin(kind) is Literal and text in typing.get_args(kind):
            return text
        if kind is bool and text in ("True", "true", "TRUE", "False", "false", "FALSE"):
            return text.lower() == "true"
        if kind in (int, float) and (number := as_number(text, kind)) is not None:
            return number
        if kind is str:
            return text
        if kind is Path or Path in typing.get_args(kind):
            path = as_place(key, text, where)
            return Path(path) if kind is Path else path
    large = " of at most 64 bits" if int in kinds and re.fullmatch(r"[-+]?\d{19,}", text) else ""
    raise UserError(f"{where}: {key} is {shown(value)}, but it must be {describe(kinds)}{large}")


def as_number(text: str, kind: type) -> int | float | None:
    """`text` as a number of `kind`; None if it is not one, or has more than 64 bits. 3e4 is a whole number too."""
    try:
        if kind is float:
            return float(re.sub(r"^([-+]?)\.(?=inf$|nan$)", r"\1", text.lower()))
        with_prefix = re.fullmatch(r"[-+]?0[xob]\w+", text)
        exact = int(text, 0 if with_prefix else 10)  # by way of a float it would lose digits
    except ValueError:
        try:
            exact = int(float(text)) if kind is int and float(text).is_integer() else None
        except ValueError:
            return None
    return exact if exact is not None and abs(exact) < 2**64 else None


def as_place(key: str, text: str, where: str) -> str:
    """Text that names a file, directory or model, with ~ expanded. Raises UserError for what can be no name."""
    if not text.strip():
        raise UserError(f"{where}: {key} is empty (a variable that is not set?); write a name, or leave it out")
    if "\0" in text:
        raise UserError(f"{where}: {key} is {shown(text)}; no name holds the character NUL")
    try:
        name = os.fsencode(os.path.expanduser(text))
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: {key} is {shown(text)}; no name holds half a character") from e
    if len(name) >= 4096 or max(map(len, name.split(os.fsencode(os.sep)))) > 255:
        raise UserError(f"{where}: {key} is {shown(text)}; it is too long to name a file or directory")
    return os.path.expanduser(text)


def describe(kinds: tuple[Any, ...]) -> str:
    """Types in words."""
    words = {int: "a whole number", float: "a number", bool: "True or False", types.NoneType: "null"}
    return " or ".join(
        ", ".join(map(repr, typing.get_args(kind))) if typing.get_origin(kind) is Literal else words.get(kind, "text")
        for kind in kinds
    )


# --- settings -------------------------------------------------------------------------------------------------------


def find_config(name: str) -> Path:
    """A CONFIG argument; where there is no such file, the one of that name that ships with miaobi. Raises UserError."""
    path = Path(as_place("CONFIG", name, "command line"))
    shipped = shipped_config(path.name)
    ours = shipped_for(path.name)
    if path.suffix == ".py":
        instead = f"configs/{ours} is that one" if ours else f"write the settings of {path.name} as {path.stem}.yaml"
        raise UserError(f"{name}: miaobi reads YAML; {instead}")
    if not path.exists() and ours and not shipped.exists():
        raise UserError(f"no configuration file {path}. miaobi ships the same settings as configs/{ours}")
    return shipped if not path.exists() and shipped.exists() else path


def shipped_config(name: str) -> Path:
    """A configuration that comes with miaobi."""
    return shipped("configs", name)


def canonical(kind: type, names: Names, key: str, value: Any, where: str, verb: str) -> tuple[str, Any]:
    """Our name and value for a key as some user wrote it. Raises UserError for an unknown key."""
    name = names.aliases.get(key, key)
    if (setting := keys(kind).get(name)) is None:
        close = suggest(key, [*keys(kind), *names.aliases])
        raise UserError(f"{where}: unknown key {brief(key)}.{close} `{verb} --help` lists all keys")
    if key in names.translated:
        theirs, ours = names.translated[key]
        return name, ours(coerce(key, value, (theirs,), where))
    return name, coerce(key, value, setting.kinds, where)


def collect(
    kind: type, names: Names, verb: str, path: Path | None, given: list[tuple[str, Any]]
) -> tuple[dict[str, Any], Origin, set[str]]:
    """Values of a file, then of the command line, under our names; where each came from; the keys as written.

    Raises UserError for two keys in the file that mean the same, unknown keys and wrong types.
    """
    values: dict[str, Any] = {}
    origin: Origin = {}
    file_values, lines = read_yaml(path) if path else ({}, {})
    for key, value in file_values.items():
        line_of = f"{path}, line {lines[key]}"
        if key in names.no_longer:
            continue
        name, ours = canonical(kind, names, key, value, line_of, verb)
        if name in values:
            raise UserError(f"{line_of}: {key} means {name}, which was given at {origin[name]}; keep one")
        values[name], origin[name] = ours, line_of
    for key, value in given:
        if key in names.no_longer:
            continue
        setting = keys(kind).get(names.aliases.get(key, key))
        where = f"--{key}" if setting is None or not setting.is_positional or key != setting.name else key.upper()
        name, ours = canonical(kind, names, key, value, where, verb)
        repeated = isinstance(ours, tuple) and origin.get(name) == "command line"
        values[name], origin[name] = values[name] + ours if repeated else ours, "command line"
    written = {*file_values, *(key for key, _ in given)}
    if (ignored := [key for key in names.no_longer if key in written]) and os.environ.get("RANK", "0") == "0":
        from miaobi.console import log

        places = [str(path)] * any(key in file_values for key in ignored)
        places += ["command line"] * any(key in names.no_longer for key, _ in given)
        log(f"{' and '.join(places)}: not needed: {explain(ignored, names.no_longer)}")
    return values, origin, written


def explain(ignored: list[str], reasons: dict[str, str]) -> str:
    """`a, b (why); c (why)`."""
    by_reason: dict[str, list[str]] = {}
    for key in ignored:
        by_reason.setdefault(reasons[key], []).append(key)
    return "; ".join(f"{', '.join(those)} ({reason})" for reason, those in by_reason.items())


def load(kind: type, names: Names, verb: str, given: list[tuple[str, Any]]) -> tuple[Any, Origin]:
    """The settings of a verb without a CONFIG, and where each came from. Raises UserError."""
    values, origin, _ = collect(kind, names, verb, None, given)
    for key in keys(kind).values():
        if key.default is MISSING and key.name not in values:
            name = key.name.upper() if key.is_positional else f"--{key.name}"
            raise UserError(f"{verb} needs {name}; `{verb} --help` says what it is")
    return kind(**values), origin


def load_config(path: Path | None, given: list[tuple[str, Any]]) -> tuple[RunConfig, Origin]:
    """Defaults, then the file, then the command line's (key, value) pairs.

    Returns the configuration and where each value came from. Raises UserError for unknown keys and wrong types.
    """
    from miaobi.config import RunConfig

    values, origin, written = collect(RunConfig, TRAIN, "miaobi train", path, given)
    for key in ("max_epochs", "max_minutes"):
        if values.get(key) is not None and "max_iters" not in values:
            values["max_iters"], origin["max_iters"] = UNLIMITED, f"{key} decides"
    if values.get("family", "auto") == "auto":
        seed_keys = sorted(written & (PRETRAINING | {"bias"}))
        values["family"] = "gpt2" if seed_keys else "qwen3"
        origin["family"] = f"auto, because {', '.join(seed_keys)} is given" if seed_keys else "auto"
    if written & {"data_path", "train_percent"}:  # small-gpt's corpus and its cut
        for key, value in {"format": "dialogue", "split": "tail"}.items():
            if key not in values:
                values[key], origin[key] = value, "small-gpt's way, because data_path is given"
    refuse_bytes(values)
    return with_values(RunConfig(), values), origin


def refuse_bytes(values: dict[str, Any]) -> None:
    """Raise UserError for a name that is not UTF-8: config.yaml could not keep it, nor TensorBoard write there."""
    for key, value in values.items():
        try:
            str(value).encode()
        except UnicodeEncodeError as e:
            raise UserError(f"{key} is {str(value)!a:.200}: a name that is not UTF-8; rename it") from e


# --- YAML --------------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Flat keys of a configuration file as written (sections opened), and the line of each.

    Values are text as it stands there (`Scalar`), lists of it, or a Mapping. Raises UserError with file and line.
    """
    if not os.path.exists(path):
        names_there = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"no configuration file {path}.{suggest(path.name, names_there)}")
    names = {key.section for key in run_keys().values()}
    values, lines = {}, {}
    for key, value, line in read_mapping(path).entries:
        if key in names and value == "" and not value.quoted:
            continue  # all keys of the section are commented out
        opened = value.entries if key in names and isinstance(value, Mapping) else [(key, value, line)]
        for inner, item, at in opened:
            if inner in values:
                raise UserError(f"{path}, line {at}: {inner[:80]} is given twice")
            values[inner], lines[inner] = item, at
    return values, lines


def save_config(path: Path, cfg: RunConfig, origin: Origin) -> None:
    """Write the configuration with, behind each value, where it came from. Read back by `read_yaml`."""
    from ruamel.yaml.comments import CommentedMap

    write_yaml(
        path, CommentedMap((s.name, with_origins(getattr(cfg, s.name), origin)) for s in dataclasses.fields(cfg))
    )


def with_origins(part: Any, origin: Origin) -> CommentedMap:
    """A dataclass as YAML's keys and values, each with a comment that says where the value came from."""
    from ruamel.yaml.comments import CommentedMap
    from ruamel.yaml.scalarstring import SingleQuotedScalarString

    tree = CommentedMap((f.name, getattr(part, f.name)) for f in dataclasses.fields(part))
    for key, value in tree.items():
        if value == "None":  # text, which without quotes would be nothing
            tree[key] = SingleQuotedScalarString(value)
        tree.yaml_add_eol_comment(origin.get(key, "default"), key)
    return tree
