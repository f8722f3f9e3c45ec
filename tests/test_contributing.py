"""CONTRIBUTING.md: what it says is there, is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "miaobi"
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading."""
    section = re.split(r"^## ", PAGE.split(f"## {heading}\n")[1], flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def names(file: Path) -> set[str]:
    """What a module defines at its top level."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize(("question", "answer"), [row[:2] for row in rows("Where is it?")])
def test_every_answer_names_a_file_and_what_stands_in_it(question: str, answer: str):
    found = re.findall(r"`([\w/]+\.py)` `(\w+)`", answer)
    assert found, question
    for file, name in found:
        assert name in names(SOURCE / file), f"{question} {file} has no {name}"


def test_there_are_ten_questions_at_least():
    assert len(rows("Where is it?")) >= 10


@pytest.mark.parametrize(("room", "what"), [row[:2] for row in rows("Where things live")])
def test_every_room_and_file_of_the_table_exists(room: str, what: str):
    for path in re.findall(r"`([^`]+)`", room):
        place = next((p for p in (SOURCE / path, ROOT / path) if p.exists()), None)
        assert place is not None, path
        if place.parent == SOURCE and place.is_dir():
            for name in re.findall(r"`(\w+)`", what):
                assert (place / f"{name}.py").is_file(), f"{path}{name}.py"
