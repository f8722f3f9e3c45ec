"""Every command of the documentation is run, page by page, in order, on small stand-ins; or the page says its needs.

`*需要：两张显卡*` or `*Needs: two GPUs*` on a line of its own above a block is the marking: see CONTRIBUTING.md.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from originals import NANOGPT, Original
from tests import commands_that_run, processes
from tests.commands_that_run import leave_hub_model
from tests.serve.conftest import write_classifier
from tests.test_docs import TWINS

from miaobi.corpus.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [page for page in sorted(ROOT.glob("docs/**/*.md")) if page.parent.name != "en"]  # those have the same commands
BLOCK = re.compile(
    r"(?:^\*(?:需要：|Needs: )(?P<needs>[^*\n]+)\*\n+)?^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.M | re.S
)
COMMAND = re.compile(r"^(?:\w+=\S+ )*(miaobi|python3?|pip|torchrun|uvx?|git|py|ray) \S", re.MULTILINE)
HERE = {"miaobi", "python", "head", "grep", "eval"}
"""Programs that the tests can run; whatever calls another one must be marked, and what reads TEXTS."""
TEXTS = ("--suite=", "DATA=", "-m models.", "-m benchmarks.")
"""What these read is not in the repository, or takes long."""


class Block(NamedTuple):
    """A code block of a page."""

    needs: str
    language: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Commands, without comments; a line that goes on is joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(block["needs"] or "", block["language"], block["text"]) for block in found]


def shells(page: Path) -> Iterator[Block]:
    """The blocks that hold commands."""
    return (block for block in blocks(page) if block.language in ("sh", "bash"))


def programs(line: str) -> set[str]:
    """What a line calls, in a pipe too."""
    words = shlex.split(
        re.sub(r"(\|\||&&|\||;)", r" \1 ", line) if "'" not in line else line, comments=True, posix=False
    )
    first, found = True, set()
    for word in words:
        if first and "=" not in word:
            found.add(word)
            first = False
        first = first or word in ("|", "||", "&&", ";")
    return found


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_what_cannot_be_run_here_says_what_it_needs_and_nothing_else_does(page: Path):
    for block in blocks(page):
        if block.language not in ("sh", "bash"):
            assert not COMMAND.search(block.text), f"commands in a block that is not ```sh:\n{block.text}"
            assert not block.needs, block
            continue
        strange = set().union(*map(programs, block.lines)) - HERE | {word for word in TEXTS if word in block.text}
        assert bool(block.needs.strip()) == bool(strange), (
            f"{block.text}\ncalls {strange or 'nothing that the tests cannot run'}, and is marked {block.needs!r}"
        )


@pytest.mark.parametrize(("chinese", "english"), TWINS.items())
def test_both_languages_mark_the_same_blocks_and_call_the_same_programs(chinese: str, english: str):
    ours, theirs = ROOT / "docs" / f"{chinese}.md", ROOT / "docs" / "en" / f"{english}.md"
    seen = [[(bool(block.needs), [sorted(programs(line)) for line in block.lines]) for block in shells(page)]
            for page in (ours, theirs)]  # fmt: skip
    assert seen[0] == seen[1]


# Commands


class Given(NamedTuple):
    """What a page takes for granted, beside the texts."""

    run: tuple[str, ...] = ()
    """Runs of a model that continues texts."""
    chat: tuple[str, ...] = ()
    """Models that chat."""
    classifier: tuple[str, ...] = ()


GIVEN = {
    "命令.md": Given(chat=("chat_run",)),
    "serving.md": Given(run=("demo_run", "runs/first"), chat=("my_run",), classifier=("my_classifier",)),
    "对话.md": Given(run=("my_run",)),
    "分类.md": Given(run=("MODEL",)),
}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as small as those that pages train."""
    place = tmp_path_factory.mktemp("run")
    commands_that_run.furnish(place)
    done = run("miaobi train configs/demo.yaml --data=input.txt --out_dir=my_run", place)
    assert done.returncode == 0, done.stderr
    return place / "my_run"


def furnish(place: Path, given: Given, small_run: Path) -> None:
    """What a reader of a page has."""
    commands_that_run.furnish(place)
    text = (place / "input.txt").read_text(encoding="utf-8")
    for name in ("text.txt", "hongloumeng.txt"):
        (place / name).write_text(text, encoding="utf-8")
    for name in ("ChnSentiCorp_htl_all.csv", "data/ChnSentiCorp_htl_all.csv"):
        shutil.copy(place / "reviews.csv", place / name)
    labelled = [
        f'{{"text": "第{i}本书{said}", "label": {label}}}\n'
        for label, said in ((1, "好看"), (0, "无聊"))
        for i in range(24)
    ]
    (place / "labelled.jsonl").write_text("".join(labelled), encoding="utf-8")
    general = [f'{{"text": "第{i}天，{who}说起了天气和路。"}}\n' for i in range(200) for who in ("酒店", "邻居")]
    (place / "general.jsonl").write_text("".join(general), encoding="utf-8")
    said = [f'{{"text": "你好{i}\\n今天路上{i}个人"}}\n' for i in range(200)]
    (place / "chat.jsonl").write_text("".join(said), encoding="utf-8")
    shutil.copytree(small_run / "checkpoints" / "best", place / "gpt2")
    vocabulary = Tokenizer.load(place / "gpt2").vocab_size
    (place / "out-bpe").mkdir()
    torch.save(Original.random(NANOGPT, False, vocabulary).nanogpt(), place / "out-bpe" / "ckpt.pt")
    shutil.copy(place / "checkpoints" / "pretrained" / "cpt300M.pth", place)
    for name in given.run:
        shutil.copytree(small_run, place / name, symlinks=True)
    for name in given.chat:
        leave_hub_model(place / name)
    for name in given.classifier:
        write_classifier(place / name)


def run(line: str, place: Path) -> subprocess.CompletedProcess:
    """A line of a block, as it is printed, but for flags that make it small."""
    words = shlex.split(line, comments=True)
    if words[0] == "miaobi":
        return commands_that_run.run(words[1:], place)
    if words[0] == "python":
        return processes.run(words[1:], cwd=place)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-ec", line], cwd=place, capture_output=True, text=True, env=os.environ | {"PATH": path}
    )


done_once: set[str] = set()


def run_page(page: Path, place: Path) -> int:
    """Run the commands of a page; how many."""
    count = 0
    for block in blocks(page):
        if block.language in ("py", "python"):
            run_against_a_server(block.text, place)
        if block.language not in ("sh", "bash") or block.needs:
            continue
        for line in block.lines:
            if line == "miaobi demo":  # stands alone, on two pages
                if line in done_once:
                    continue
                done_once.add(line)
            done = run(line, place)
            assert done.returncode == 0, f"{page.name}: {line}\n{done.stdout}\n{done.stderr}"
            count += 1
    return count


def run_against_a_server(program: str, place: Path) -> None:
    """A program of a page that asks `miaobi serve my_run`."""
    server = processes.Process(["-m", "miaobi", "serve", "my_run", "--device=cpu", "--port=0"], cwd=place)
    while not (ready := re.search(r"^ready: (http://\S+)", server.said(), re.MULTILINE)):
        assert server.poll() is None, server.said()
        time.sleep(0.02)
    assert "http://127.0.0.1:8000" in program
    done = processes.run(["-c", program.replace("http://127.0.0.1:8000", ready[1].rstrip("/"))], cwd=place)
    server.send_signal(signal.SIGINT)
    server.wait()
    assert done.returncode == 0, done.stderr


RUN = [page for page in PAGES if any(not block.needs for block in shells(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_work_in_order(page: Path, tmp_path: Path, small_run: Path):
    furnish(tmp_path, GIVEN.get(page.name, Given()), small_run)
    assert run_page(page, tmp_path) > 0


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["miaobi train configs/demo.yaml --data=nowhere.txt", "miaobi smaple my_run",
                                   "python -c 'raise SystemExit(3)'", "grep 没有这样的字 input.txt"])  # fmt: skip
def test_a_command_that_does_not_work_is_found(wrong: str, tmp_path: Path):
    commands_that_run.furnish(tmp_path)
    (tmp_path / "page.md").write_text(f"# Page\n\n```sh\n{wrong}   # as documented\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"page\.md: "):
        run_page(tmp_path / "page.md", tmp_path)
