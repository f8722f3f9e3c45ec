"""What other programs may use: few names, whose examples run as they stand there."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import miaobi


def test_the_examples_run_as_they_stand(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "novel.txt").write_bytes(corpus_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(miaobi)
    assert found.attempted > 8
    assert found.failed == 0


def test_there_are_at_most_ten_names_and_they_are_there():
    assert len(miaobi.__all__) <= 10
    assert all(hasattr(miaobi, name) for name in miaobi.__all__)
    assert Path(miaobi.__file__).with_name("py.typed").is_file()


def test_importing_it_imports_nothing_slow():
    command = "import sys, miaobi; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'rich')))"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0
