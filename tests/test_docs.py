"""The documentation: it builds without a warning, both languages show the same commands, and every command is one that
miaobi takes.
"""

import html
import importlib.util
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

from miaobi import cli, command_line, seeds, settings

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "README.en.md", *ROOT.glob("docs/**/*.md")])
NOT_TRIED = ("lab-notes.md", "常见错误.md")  # what was typed once, and what is wrong on purpose
TWINS = {
    "index": "index", "zh/续写": "continue", "zh/聊天": "chat", "zh/自己的语料": "own-text",
    "zh/在你的机器上": "machines",
    "zh/命令": "commands", "zh/格式": "formats", "zh/内部": "inside", "zh/问答": "questions",
}  # fmt: skip


def command_lines(page: Path) -> list[str]:
    """Lines of a page's code blocks that call miaobi, without comments; a line that goes on is joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [
        line.strip() for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S) for line in block.split("\n")
    ]
    return [line for line in lines if re.match(r"(\w+=\S+ )*(miaobi|(\w+ )*torchrun .*-m miaobi) [a-z]", line)]


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and content of a page's code blocks."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.M | re.S)


def words_of(line: str) -> list[str]:
    """The words after `miaobi`, up to a pipe or a redirection."""
    words = shlex.split(line, comments=True)
    words = words[words.index("miaobi") + 1 :]
    return words[: next((i for i, word in enumerate(words) if word in ("|", ">", "&&", "2>")), len(words))]


def parsed(words: list[str]) -> None:
    """Read a command line as `cli.run` does, to the point where the verb would begin."""
    name = " ".join(words[:2]) if words[0] in cli.GROUPS else words[0]
    verb = cli.VERBS[name]
    kind, names = cli.imported(verb.settings), getattr(seeds, verb.names)
    line = command_line.split(kind, names, words[len(name.split()) :])
    if verb.load:
        cli.imported(verb.load)(command_line.take_config(line.words), line.given)
    else:
        settings.load(kind, names, f"miaobi {name}", command_line.place_words(kind, names, line))


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in NOT_TRIED], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_is_one_that_miaobi_takes(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Verbs, keys, values, shipped configurations; those of other projects are stood in for by small files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for line in command_lines(page):
        words = words_of(line)
        for word in words[1:]:
            at = tmp_path / word
            if word.endswith((".yaml", ".py")) and "=" not in word and not word.startswith("configs/"):
                at.parent.mkdir(parents=True, exist_ok=True)
                at.write_text("n_layer: 2\n" if "sentiment" not in word else "max_epoch: 1\n", encoding="utf-8")
        try:
            parsed(words)
        except Exception as e:
            pytest.fail(f"{line}\n{type(e).__name__}: {e}")


OTHERS = {"echo", "eval", "git", "grep", "head", "llama-server", "podman", "pytest", "python3", "ray", "ruff", "sudo",
          "torchrun", "uv", "uvx", "vllm", "py", ".venv\\Scripts\\activate"}  # fmt: skip
"""Programs that the pages call beside ours."""


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"],
                         ids=lambda p: str(p.relative_to(ROOT)))  # fmt: skip
def test_every_block_is_of_its_language_and_calls_what_there_is(page: Path):
    """Shell that bash reads, Python that compiles; modules, scripts and extras that are here."""
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M))
    shell = "\n".join(content for language, content in blocks(page) if language in ("sh", "bash"))
    read = subprocess.run(["bash", "-n"], input=shell, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    for language, content in blocks(page):
        if language in ("py", "python"):
            compile(content, page.name, "exec")
        elif language == "json":
            [json.loads(line) for line in content.splitlines()]  # records, one a line
    for line in filter(str.strip, shell.replace("\\\n", " ").splitlines()):
        words = shlex.split(line, comments=True, posix="\\Scripts" not in line)
        words = list(itertools.dropwhile(lambda word: re.match(r"\w+=", word), words)) or ["miaobi"]
        assert words[0] in {"miaobi", "python", "pip", "bash", *OTHERS}, line
        if words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), line
        elif words[0] in ("python", "bash"):
            assert (ROOT / words[1]).is_file() or words[1] in ("-c", ".ci/run"), line
        for named in re.findall(r"(?:miaobi|\.)\[([\w,]+)\]", line):
            assert set(named.split(",")) <= extras, line


def anchors(page: Path) -> set[str]:
    """Those of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def test_no_link_of_a_page_is_dead():
    pages = [*ROOT.glob("*.md"), ROOT / "llms.txt", *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
    seen = 0
    for page in pages:
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = urllib.parse.unquote(target).partition("#")
            to = (page.parent / file).resolve() if file else page
            assert to.exists(), f"{page.relative_to(ROOT)}: {target}"
            assert not anchor or to.suffix != ".md" or anchor in anchors(to), f"{page.relative_to(ROOT)}: {target}"
            seen += 1
    assert seen > 60


def test_a_command_that_miaobi_does_not_take_is_noticed():
    with pytest.raises(Exception, match="n_layer"):
        parsed(words_of("miaobi train --n_lyer=3"))


@pytest.mark.parametrize(("chinese", "english"), TWINS.items())
def test_both_languages_have_the_same_commands(chinese: str, english: str):
    ours = [words_of(line) for line in command_lines(ROOT / "docs" / f"{chinese}.md")]
    theirs = [words_of(line) for line in command_lines(ROOT / "docs" / "en" / f"{english}.md")]
    strangers = ("notes/", "papers/*.txt.gz", "笔记/", "报纸/*.txt.gz", "--without=FILE", "--without=评测集.csv")
    assert [[w for w in line if w not in strangers] for line in ours] == [
        [w for w in line if w not in strangers] for line in theirs
    ]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in ROOT.glob("docs/**/*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation, page


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Zensical needs Python 3.11")
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    built = subprocess.run(
        [Path(sys.executable).parent / "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert "No issues found" in re.sub(r"\x1b\[[\d;]*m", "", built.stdout + built.stderr)
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\">\s]+)", page.read_text("utf-8"))
        assert not loaded, (page, loaded)
    check_links(tmp_path / "site")


def check_links(site: Path) -> None:
    """Every link inside the built site leads to a page, and to a place in it, that there is."""
    text = {page.resolve(): page.read_text("utf-8") for page in site.rglob("*.html")}
    ids = {page: set(re.findall(r"\bid=\"?([^\s\">]+)", content)) for page, content in text.items()}
    seen = 0
    for page, content in text.items():
        for link in re.findall(r"<a\b[^>]*?\bhref=\"?([^\s\">]+)", content):
            target, _, anchor = urllib.parse.unquote(html.unescape(link)).partition("#")
            if re.match(r"[a-z]+:", target) or page.name == "404.html":
                continue
            to = (page.parent / target).resolve() if target else page
            to = to / "index.html" if to.is_dir() else to
            assert to.is_file(), (page, link)
            assert not anchor or to not in ids or anchor in ids[to], (page, link)
            seen += 1
    assert seen > 200
