"""YAML 1.2 files with every word as it stands there: 007 and 2024-01-01 are text until a setting wants a number."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miaobi.errors import UserError
from miaobi.files import read_whole

if TYPE_CHECKING:
    from ruamel.yaml.comments import CommentedMap
    from ruamel.yaml.nodes import MappingNode, Node


LARGEST = 128 << 10
"""Bytes of a YAML file that are read: the library takes seconds for more, and a run's has a few thousand."""
CORE = "tag:yaml.org,2002:"
"""Begins the names of YAML's own types."""

Known = dict[tuple[int, int], list[tuple[str, Any, int]]]
"""(id of a node, depth) -> its entries."""


class Scalar(str):
    """A word of a YAML file as it is written; `quoted` where it can only be text."""

    quoted = False

    @classmethod
    def of(cls, text: str, quoted: bool) -> Scalar:
        word = cls(text)
        word.quoted = quoted
        return word


@dataclass(frozen=True)
class Mapping:
    """Keys and values of a YAML mapping, what `<<:` merges included."""

    entries: list[tuple[str, Any, int]] = field(default_factory=list)
    """(key, value, its line from 1); a value is a Scalar, a list of Scalars, or a Mapping."""


def read_mapping(path: Path) -> Mapping:
    """The mapping that a file holds; mappings in it are opened, those inside them are not.

    Raises UserError with file and line.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.nodes import MappingNode
    from ruamel.yaml.reader import ReaderError

    try:
        text = read_whole(path, LARGEST).decode("utf-8-sig")
        with warnings.catch_warnings():  # an anchor may be used twice
            warnings.simplefilter("ignore")
            node = YAML(typ="rt").compose(text)
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}); give a YAML file") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 (byte {e.start}); save it as UTF-8") from e
    except MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else "?"
        raise UserError(f"{path}, line {line}: not valid YAML: {str(e.problem)[:200]}") from e
    except ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise UserError(f"{path}, line {line}: not valid YAML: U+{e.character:04X} is not allowed") from e
    except RecursionError as e:
        raise UserError(f"{path}: not valid YAML: brackets or lists are nested too deeply") from e
    except (YAMLError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError, AssertionError) as e:
        raise UserError(f"{path}: not valid YAML: {str(e)[:200]}") from e  # what the library trips over
    if node is None:
        return Mapping()
    if not isinstance(node, MappingNode):
        raise UserError(f"{path}: expected `key: value` lines, found {node.id}")
    return Mapping(entries(node, path, {}, depth=2))


def entries(node: MappingNode, path: Path, known: Known, depth: int) -> list[tuple[str, Any, int]]:
    """(key, value, line) of a mapping, its own keys before those it merges. known: of those met before."""
    from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode

    if (id(node), depth) in known:  # aliases of aliases would grow without end
        return known[id(node), depth]
    own, merged = known.setdefault((id(node), depth), []), []
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, ScalarNode):
            raise UserError(f"{path}, line {line}: a key is a word, not a {key.id}")
        if key.tag == CORE + "merge":
            for other in value.value if isinstance(value, SequenceNode) else [value]:
                if not isinstance(other, MappingNode):
                    raise UserError(f"{path}, line {line}: `<<:` takes the keys of a mapping, not of a {other.id}")
                merged += entries(other, path, known, depth)
        else:
            own.append((key.value, as_value(value, path, known, depth), line))
    mine = {key for key, _, _ in own}
    own += {key: (key, value, line) for key, value, line in reversed(merged) if key not in mine}.values()
    return own


def as_value(node: Node, path: Path, known: Known, depth: int) -> Any:
    """A node as a Scalar, a list of them, or a Mapping that is opened `depth` - 1 levels down."""
    from ruamel.yaml.nodes import MappingNode, ScalarNode

    if isinstance(node, ScalarNode):
        said_to_be_text = node.tag == CORE + "str" and node.value in ("", "~", "null", "Null", "NULL")  # !!str null
        if not str(node.tag).startswith(CORE):
            raise UserError(f"{path}, line {node.start_mark.line + 1}: settings have no types of their own; "
                            f"leave out {str(node.tag)[:40]}")  # fmt: skip
        return Scalar.of(node.value, quoted=node.style is not None or said_to_be_text)
    if isinstance(node, MappingNode):
        return Mapping(entries(node, path, known, depth - 1) if depth > 1 else [])
    return [as_value(item, path, known, 0) if isinstance(item, ScalarNode) else Mapping() for item in node.value]


def write_yaml(path: Path, tree: CommentedMap) -> None:
    """Write a YAML file, whole or not at all."""
    from ruamel.yaml import YAML

    from miaobi.files import text_written_whole

    yaml = YAML(typ="rt")
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar(CORE + "null", "null"))
    with text_written_whole(path) as file:  # a kill in the middle must not make the run unusable
        yaml.dump(tree, file)


def remarks(path: Path) -> dict[str, str]:
    """The comment behind each word of a file that `read_mapping` has read, by its key; sections are opened."""
    from ruamel.yaml import YAML
    from ruamel.yaml.nodes import MappingNode

    found: dict[str, str] = {}

    def look(node: Node | None, depth: int) -> None:
        if not isinstance(node, MappingNode) or not depth:
            return
        for key, value in node.value:
            look(value, depth - 1)
            behind = (getattr(value, "comment", None) or [None])[0]
            if behind is not None and not isinstance(behind, list):
                found.setdefault(str(key.value), str(behind.value).split("\n")[0].lstrip("# ").strip())

    look(YAML(typ="rt").compose(read_whole(path, LARGEST).decode("utf-8-sig")), 2)
    return found
