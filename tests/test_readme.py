"""The READMEs' own commands run as printed, and the documents hold together: links, errors, no developer's paths."""

import ast
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from tests import commands_that_run, processes

from miaobi.config import DataConfig
from miaobi.corpus.messages import messages_of
from miaobi.generate.config import ChatConfig
from miaobi.generate.terminal import COMMANDS

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.en.md")
DOCUMENTS = [*READMES, "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]
SETUP = [
    "pip install -c constraints.txt -e '.[demo]' && miaobi demo",
    "pip install -c constraints.txt -e '.[demo,dev]' && pytest",
]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Contents of a document's fenced blocks in some language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(name), re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[str]:
    """Every line of every bash block, without comments and blank lines."""
    lines = [line.strip() for block in blocks(name, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


# Commands


def test_both_readmes_have_the_same_commands_in_the_same_order():
    assert commands("README.md") == commands("README.en.md")
    assert blocks("README.md", "python") == blocks("README.en.md", "python")


def test_both_readmes_show_the_same_transcript_of_the_demo():
    chinese, english = (re.findall(r"```text\n(.*?)```", read(page), re.S) for page in ("README.md", "README.en.md"))
    assert chinese == english
    assert "bits/char" in chinese[0]


def test_the_readme_begins_with_the_two_setup_commands():
    assert commands("README.md")[:2] == SETUP


def test_ci_runs_the_second_setup_command_verbatim():
    assert SETUP[1] in [line.strip() for line in read(".ci/run").splitlines()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("readme")
    commands_that_run.furnish(place)
    return place


@pytest.mark.slow
def test_the_readmes_commands_and_python_work_in_order(workplace: Path):
    printed = [line for line in commands("README.md") if line.startswith("miaobi ")]
    assert [line.split()[1] for line in printed].count("train") >= 3
    replies = ""
    for line in printed:
        words = shlex.split(line, comments=True)[1:]
        done = commands_that_run.run(words, workplace)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert done.stdout.strip() or words[0] in ("chat", "serve"), line  # two steps may teach nothing to say
        if words[0] == "sample":
            wanted = 3 if "--num_samples=3" in words else 10
            prompt = next(word.partition("=")[2] for word in words if word.startswith("--start="))
            assert done.stdout.count("---------------") == wanted
            assert done.stdout.startswith(prompt)
        if words[0] == "chat":
            assert not re.search("^miaobi:", done.stderr, re.MULTILINE), f"{line}\n{done.stderr}"
            replies += done.stdout
    assert replies.strip()

    each_alone = "import sys\nfor block in sys.argv[1:]:\n    exec(compile(block, 'README.md', 'exec'), {})"
    done = processes.run(["-c", each_alone, *blocks("README.md", "python")], cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("中国")


# Documents


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def links(name: str) -> Iterator[tuple[Path, str]]:
    """(file, anchor) of every relative link."""
    for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = unquote(target).partition("#")
            yield ((ROOT / name).parent / path if path else ROOT / name), anchor


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_point_to_files_and_headings_that_exist(name: str):
    for path, anchor in links(name):
        assert path.exists(), f"{name} links to {path}"
        assert path.resolve().is_relative_to(ROOT), f"{name} links out of the repository: {path}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name} links to the heading #{anchor}"


def test_no_file_names_a_developers_machine():
    listing = ["git", "ls-files", "-z"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True, text=True, encoding="utf-8").stdout
    somewhere = re.compile(r"(?<![\w.~-])(/(?:work|home|root|Users|tmp/w)/[^\s`'\")]*|[A-Z]:\\Users\\\S*)")
    found = []
    for name in filter(None, names.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            found += [f"{name}: {match}" for match in somewhere.findall(data.decode("utf-8", "replace"))]
    assert not found


# docs/对话.md


def test_the_page_on_dialogues_names_the_commands_and_defaults_of_the_chat():
    page = read("docs/对话.md")
    default = ChatConfig()
    for name in ("temperature", "top_p", "repetition_penalty", "max_new_tokens"):
        assert f"--{name}={getattr(default, name)}" in page
    for command in COMMANDS:
        assert f"`{command.split()[0]}" in page
    assert f"--long_history={DataConfig().long_history}" in page


def test_the_readmes_show_dialogues_that_prepare_reads():
    for name in (*READMES, "docs/对话.md"):
        shown = re.findall(r'`?(\{"(?:messages|conversations|instruction)".*\})', read(name))
        assert len(shown) == 3
        for record in shown:
            messages, problem = messages_of(json.loads(record))
            assert not problem
            assert messages[-1]["role"] == "assistant"


# docs/常见错误.md


def messages(source: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, constant pieces of the message) of every UserError and warning in a file."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and node.args):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called not in ("UserError", "warn") or source.name == "console.py":
            continue
        message: ast.AST = node.args[0]
        if isinstance(message, ast.Call):  # a message that several places share
            shared = functions.get(getattr(message.func, "id", getattr(message.func, "attr", "")))
            if shared is None:
                continue  # it stands in another file
            message = shared
        elif isinstance(message, ast.Name):
            continue  # handed on; its text stands where it was made
        yield node.lineno, [part.value for part in ast.walk(message) if isinstance(part, ast.Constant)]


def test_every_error_is_explained_in_chinese():
    """DESIGN: docs/常见错误 explains every error. Known by the message's first or longest clause."""
    page, unexplained = read("docs/常见错误.md"), []
    for source in sorted((ROOT / "src").rglob("*.py")):
        for line, pieces in messages(source):
            clauses = [c.strip() for p in pieces if isinstance(p, str) for c in re.split(r"[;:.,(){}\n]", p)]
            clauses = [clause for clause in clauses if len(clause) >= 8]
            if clauses and clauses[0] not in page and max(clauses, key=len) not in page:
                unexplained.append(f"{source.relative_to(ROOT)}:{line}: {max(clauses, key=len)}")
    assert not unexplained
