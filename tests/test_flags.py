"""Plain command lines give what tyro makes of them; others are left to it."""

import json

import pytest

from miaobi import cli, flags
from miaobi.corpus.config import PrepareConfig
from miaobi.errors import UserError


def with_tyro(monkeypatch, args: list[str]) -> tuple[list[str], PrepareConfig]:
    found = []
    monkeypatch.setattr(cli, "plain_settings", lambda *_: None)
    monkeypatch.setattr("miaobi.corpus.prepare.prepare", lambda *given: found.append(given) or {})
    cli.prepare([*args, "--json"])
    return found[0]


@pytest.mark.parametrize(
    "line",
    [
        "a.txt --out o",
        "a.txt b/*.txt --out=o/p --split=tail --workers 1",
        "a.txt --out o --skip_bad --simplify False --vocab_size=400 --min_frequency=2 --tokenizer=bpe",
        "a.txt --out o --simplify --split tail --split hash --field= --format=csv",
        "--out=~/o --dedup near",
    ],
)
def test_plain_lines(monkeypatch, capsys, line):
    found = flags.plain_settings(PrepareConfig, line.split())
    assert found is not None
    if found[0]:
        assert found == with_tyro(monkeypatch, line.split())
        assert json.loads(capsys.readouterr().out) == {}
    else:
        assert found == ([], PrepareConfig(out=found[1].out, dedup="near"))


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        "a.txt --out o -h",
        "a.txt",
        "a.txt --out",
        "a.txt --out --split=tail",
        "a.txt --out o --split=head",
        "a.txt --out o --workers=-1",
        "a.txt --out o --workers=two",
        "a.txt --out o --simplify=yes",
        "a.txt --out o --no_such=1",
        "a.txt --out o --val-fraction=0.2",
        "a.txt --out o b.txt",
        "a.txt --out o --weights 1 2",
        "a.txt --out o --val_fraction=0.2",
    ],
)
def test_the_rest_is_tyros(line):
    assert flags.plain_settings(PrepareConfig, line.split()) is None


def test_values_are_checked():
    with pytest.raises(UserError, match="min_frequency is 0"):
        flags.plain_settings(PrepareConfig, "a.txt --out o --min_frequency 0".split())  # noqa: SIM905
