"""YAML files and `--key=value` into a RunConfig, with the seeds' own key names understood."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

from miaobi.config import RunConfig
from miaobi.console import log
from miaobi.errors import UserError

ALIASES = {  # nanoGPT's and small-gpt's names -> ours
    "lr": "learning_rate",
    "warmup_steps": "warmup_iters",
    "decay_steps": "lr_decay_iters",
    "train_batch": "batch_size",
    "eval_freq": "eval_interval",
    "eval_steps": "eval_iters",
    "save_freq": "save_interval",
    "checkpoint_root": "out_dir",
    "data_path": "data",
    "dataset": "data",
    "max_epoch": "max_epochs",
    "train_percent": "val_fraction",
}
NO_LONGER = {  # keys of the seeds that mean nothing here, and why
    "always_save_checkpoint": "best and last are always kept",
    "backend": "chosen by the device: nccl on GPUs, gloo on CPUs",
    "tensorboard_path": "TensorBoard events are written into the run directory",
    "test_batch": "evaluation uses the training batch's size; results do not depend on it",
    "ddp": "processes that torchrun starts find each other; --parallel=ddp or fsdp chooses how they share the work",
    "fsdp": "processes that torchrun starts find each other; --parallel=ddp or fsdp chooses how they share the work",
    "sharding_strategy": "--parallel=fsdp shards; --fsdp_shard_size within one machine",
    "local_rank": "set by torchrun",
    "world_size": "set by torchrun",
    "sentimental_data_path": "a setting of `miaobi classify`",
    "base_model": "a setting of `miaobi classify`",
    "use_mask": "a setting of `miaobi classify`",
    "frozen": "a setting of `miaobi classify`",
}
UNLIMITED = 10**9
SMALL_GPT = {"train_batch", "data_path", "decay_steps", "train_percent", "checkpoint_root"}

Origin = dict[str, str]  # key -> where its value came from


def sections() -> dict[str, str]:
    """Key -> section of RunConfig; keys are unique across sections."""
    default = RunConfig()
    return {
        key.name: section.name
        for section in dataclasses.fields(RunConfig)
        for key in dataclasses.fields(getattr(default, section.name))
    }


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


def suggest(key: str, known: list[str]) -> str:
    """` Did you mean ...?`, or nothing."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def canonical(key: str, value: Any, where: str) -> tuple[str, Any] | None:
    """Our name and value for a key as some user wrote it; None if it means nothing here (one line says why).

    Raises UserError for an unknown key.
    """
    if key in NO_LONGER:
        log(f"{where}: {key} is not needed: {NO_LONGER[key]}")
        return None
    name = ALIASES.get(key, key)
    if name not in sections():
        known = [*sections(), *ALIASES]
        raise UserError(f"{where}: unknown key {key!r}.{suggest(key, known)} `miaobi train --help` lists all keys")
    value = coerce(key, value, key_type(name), where)
    if key == "dataset":
        value = f"data/{value}"  # nanoGPT looks there
    elif key == "train_percent":
        value = round(1.0 - value, 6)
    return name, value


def key_type(name: str) -> Any:
    """Declared type of a key."""
    section = type(getattr(RunConfig(), sections()[name]))
    return typing.get_type_hints(section)[name]


def coerce(key: str, value: Any, kind: Any, where: str) -> Any:
    """`value` (from YAML, or a string from the command line) as type `kind`.

    Raises UserError saying what was expected.
    """
    choices = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    text = value if isinstance(value, str) else None
    if types.NoneType in choices and (value is None or text in ("None", "null", "NULL")):
        return None
    for choice in choices:
        if typing.get_origin(choice) is Literal and value in typing.get_args(choice):
            return value
        if choice is bool and (isinstance(value, bool) or text in ("True", "true", "False", "false")):
            return value if isinstance(value, bool) else text.lower() == "true"
        if choice in (int, float) and not isinstance(value, bool) and value is not None:
            if choice is int and (isinstance(value, int) or (text or "").isdecimal()):
                return int(value)  # by way of a float it would lose digits
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue
            if choice is float or number.is_integer():
                return choice(number)
        if choice is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    raise UserError(f"{where}: {key} is {value!r}, but it must be {describe(choices)}")


def describe(choices: tuple) -> str:
    """A type in words."""
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", types.NoneType: "null"}
    return " or ".join(
        ", ".join(map(repr, typing.get_args(c))) if typing.get_origin(c) is Literal else words[c] for c in choices
    )


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Flat keys of a configuration file as written (sections opened), and the line of each.

    YAML 1.2, so 2e-5 is a number. Raises UserError with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree = YAML(typ="rt").load(text)
    except FileNotFoundError as e:
        there = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"no configuration file {path}.{suggest(path.name, there)}") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e}); give a YAML file") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 (byte {e.start}); save it as UTF-8") from e
    except MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else "?"
        raise UserError(f"{path}, line {line}: not valid YAML: {e.problem}") from e
    except ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise UserError(f"{path}, line {line}: not valid YAML: U+{e.character:04X} is not allowed") from e
    if tree is None:
        return {}, {}
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{path}: expected `key: value` lines, found {type(tree).__name__}")
    names = {section.name for section in dataclasses.fields(RunConfig)}
    values, lines = {}, {}
    for key, value in tree.items():
        if key in names and value is None:
            continue  # all keys of the section are commented out
        opened = value.items() if key in names and isinstance(value, CommentedMap) else [(key, value)]
        node = value if key in names and isinstance(value, CommentedMap) else tree
        for inner, item in opened:
            line, inner = line_of(node, inner), str(inner)  # 5: or true: are keys too
            if inner in values:
                raise UserError(f"{path}, line {line}: {inner} is given twice")
            values[inner], lines[inner] = item, line
    return values, lines


def line_of(node: CommentedMap, key: Any) -> int:
    """Line of a key, counted from 1; of one that comes by a merge (`<<: *other`), where its mapping begins."""
    place = (node.lc.data or {}).get(key)
    return (node.lc.line if place is None else place[0]) + 1


def load_config(path: Path | None, given: list[tuple[str, str]]) -> tuple[RunConfig, Origin]:
    """Defaults, then the file, then the command line's (key, value) pairs.

    Returns the configuration and where each value came from. Raises UserError for unknown keys and wrong types.
    """
    values, origin, written = collect(path, given, canonical)
    if values.get("max_epochs") is not None and "max_iters" not in values:
        values["max_iters"], origin["max_iters"] = UNLIMITED, "max_epochs decides"
    if values.get("family", "auto") == "auto":
        seed_keys = sorted(written & (SMALL_GPT | {"bias"}))
        values["family"] = "gpt2" if seed_keys else "qwen3"
        origin["family"] = f"auto, because {', '.join(seed_keys)} is given" if seed_keys else "auto"
    if written & {"data_path", "train_percent"}:  # small-gpt's corpus and its cut
        for key, value in {"format": "dialogue", "split": "tail"}.items():
            if key not in values:
                values[key], origin[key] = value, "small-gpt's way, because data_path is given"
    return with_values(RunConfig(), values), origin


def collect(
    path: Path | None, given: list[tuple[str, str]], canonical: Callable[[str, Any, str], tuple[str, Any] | None]
) -> tuple[dict[str, Any], Origin, set[str]]:
    """Values of a file, then of the command line, under our names; where each came from; the keys as written.

    canonical: our name and value for a key, or None for one that means nothing.
    Raises UserError for two keys in the file that mean the same.
    """
    values: dict[str, Any] = {}
    origin: Origin = {}
    file_values, lines = read_yaml(path) if path else ({}, {})
    for key, value in file_values.items():
        place = f"{path}, line {lines[key]}"
        if (found := canonical(key, value, place)) is not None:
            if found[0] in values:
                raise UserError(f"{place}: {key} means {found[0]}, which was given at {origin[found[0]]}; keep one")
            values[found[0]], origin[found[0]] = found[1], place
    for key, value in given:
        if (found := canonical(key, value, f"--{key}")) is not None:
            values[found[0]], origin[found[0]] = found[1], "command line"
    return values, origin, {*file_values, *(key for key, _ in given)}


def shipped_config(name: str) -> Path:
    """A configuration that comes with miaobi: inside an installed package, beside `src` in a checkout."""
    package = Path(__file__).parent
    folders = (package / "configs", package.parents[1] / "configs")
    return next((f / name for f in folders if (f / name).is_file()), folders[0] / name)


def save_config(path: Path, cfg: RunConfig, origin: Origin) -> None:
    """Write the configuration with, behind each value, where it came from. Read back by `read_yaml`."""
    sections = dataclasses.fields(RunConfig)
    write_yaml(path, CommentedMap((s.name, with_origins(getattr(cfg, s.name), origin)) for s in sections))


def with_origins(part: Any, origin: Origin) -> CommentedMap:
    """A dataclass as YAML's keys and values, each with a comment that says where the value came from."""
    tree = CommentedMap((f.name, getattr(part, f.name)) for f in dataclasses.fields(part))
    for key in tree:
        tree.yaml_add_eol_comment(origin.get(key, "default"), key)
    return tree


def write_yaml(path: Path, tree: CommentedMap) -> None:
    """Write a YAML file, whole or not at all."""
    yaml = YAML(typ="rt")
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as f:
        yaml.dump(tree, f)
    os.replace(aside, path)  # a kill in the middle must not make the run unusable
