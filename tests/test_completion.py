"""Completion: what real shells offer at TAB, and what the parser knows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from miaobi import cli, completion
from miaobi.settings import keys


def offered(*words: str) -> list[str]:
    """What the last of the words can become."""
    *before, word = words
    return completion.answer([f"--complete={word}", *before], cli.VERBS, cli.imported).splitlines()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("my.yaml", "mine.txt", "my novel.txt", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "my_run" / "checkpoints").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_verbs_and_their_kinds():
    assert {"train", "classify", "data"} < set(offered(""))
    assert offered("tr") == ["train"]
    assert offered("convert", "") == [name.split()[1] for name in cli.VERBS if name.startswith("convert ")]
    assert offered("--completion", "") == ["bash", "zsh", "fish", "powershell"]
    assert offered("no_such_verb", "") == []


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_setting_of_every_verb_is_offered_and_no_other(name: str):
    known = keys(cli.imported(cli.VERBS[name].settings))
    found = offered(*name.split(), "--")
    assert {word.strip("-=") for word in found} == {*known, "json", "help"}
    switches = {word[2:] for word in found if not word.endswith("=")} - {"json", "help"}
    assert switches == {key for key, setting in known.items() if bool in setting.kinds}


def test_values_are_choices_or_places(place: Path):
    assert offered("sample", "--dtype=f") == ["--dtype=float32", "--dtype=float16"]
    assert offered("sample", "--dtype", "f") == ["float32", "float16"]
    assert offered("train", "--compile=T") == ["--compile=True"]
    assert offered("sample", "my_run", "--stream", "my_") == ["my_run/"]  # a switch takes no word
    assert offered("prepare", "--out=my") == ["--out=my novel.txt", "--out=my.yaml", "--out=my_run/"]
    assert offered("train", "--dataset=x") == offered("train", "--no_such_key=") == []
    assert offered("sample", "my_run/") == ["my_run/checkpoints/"]
    assert offered("sample", str(place / "my_r")) == [f"{place}/my_run/"]
    assert offered("prepare", ".h") == [".hidden"]
    assert offered("prepare", "nowhere/") == []
    assert offered("train", "m") == ["my.yaml", "my_run/"]  # a CONFIG
    assert offered("train", "--train-batch=") == []  # another project's name for a number


def test_an_unknown_shell_is_told_which_are_known(miaobi):
    for words in (["tcsh"], []):
        answer = miaobi("--completion", *words)
        assert answer.code == 2
        assert "bash, zsh, fish, powershell" in answer.err


def test_powershell_reads_its_script():
    """By a grammar of it, as it runs nowhere here: in the form that Microsoft documents for native commands."""
    powershell = pytest.importorskip("tree_sitter_powershell")
    from tree_sitter import Language, Parser

    def has_error(source: str) -> bool:
        return Parser(Language(powershell.language())).parse(source.encode()).root_node.has_error

    source = completion.script(["powershell"])
    assert not has_error(source)
    for part in ("}\n", ")", "'"):
        assert has_error(source.replace(part, "", 1)), "the grammar notices what is missing"
    assert "Register-ArgumentCompleter -Native -CommandName miaobi -ScriptBlock {\n    param($" in source
    assert re.search(r"param\(\$\w+, \$\w+, \$\w+\)\n", source), "a word, the line's syntax, the cursor"
    made = re.search(r"\[System\.Management\.Automation\.CompletionResult\]::new\((.*?)\)\n", source)[1].split(", ")
    assert (len(made), made[2]) == (4, "'ParameterValue'"), "what is typed, what is listed, its kind, its tip"


BASH = """
. ./script
complete_line() {
    COMP_LINE=$1 COMP_POINT=${#1}
    $(complete -p miaobi | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
    printf '[%s]' "${COMPREPLY[@]}"; echo
}
while IFS= read -r line; do complete_line "$line"; done < lines
"""
ZSH = """
compdef() { :; }
. ./script
compadd() { while [[ $1 != -- ]]; do shift; done; shift; for word; do printf '[%s]' $word; done; }
while IFS= read -r line; do
    words=("${(@Q)${(z)line}}"); [[ $line == *' ' ]] && words+=(""); CURRENT=${#words}; PREFIX=${words[-1]}
    _miaobi; echo
done < lines
"""
FISH = """
source script
while read -l line; echo (complete -C $line | cut -f1 | sed 's/.*/[&]/' | string join ''); end < lines
"""
LINES = {  # what is typed -> what must be among the offers
    "miaobi tr": "train",
    "miaobi sample --max_n": "--max_new_tokens=",
    "miaobi sample --dtype=bfl": "bfloat16",
    "miaobi sample --dtype in": "int8",
    "miaobi prepare mine": "mine.txt",
    "miaobi sample my_": "my_run/",
    "miaobi data g": "get",
    "miaobi no_such_verb ": "",
}


@pytest.mark.skipif(os.name != "posix", reason="a shell")
@pytest.mark.parametrize(("shell", "driver"), [("bash", BASH), ("zsh", ZSH), ("fish", FISH)])
def test_a_real_shell_completes(place: Path, shell: str, driver: str):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed") if shell != "bash" else pytest.fail("bash is not installed")
    (place / "script").write_text(completion.script([shell]), encoding="utf-8")
    (place / "lines").write_text("".join(f"{line}\n" for line in LINES), encoding="utf-8")
    (place / "bin").mkdir()
    command = place / "bin" / "miaobi"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m miaobi "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    environment = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}", "HOME": str(place)}
    done = subprocess.run(
        [shell, "-c", driver], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == len(LINES), done.stdout + done.stderr
    for (line, expected), found in zip(LINES.items(), answers, strict=True):
        if expected:
            assert f"[{expected}]" in found or f"={expected}]" in found, f"{line}: {found}"
        else:
            assert found in ("", "[]"), f"{line}: {found}"
