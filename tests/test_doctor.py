"""What is lacking is named with a remedy, and only what is needed makes the command fail."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import matplotlib.font_manager
import pytest
import torch

from miaobi import doctor, fonts, native


def found(look) -> dict[str, doctor.Check]:
    return {check.name: check for check in look()}


def test_a_machine_that_runs_the_tests_is_healthy(miaobi, monkeypatch):
    monkeypatch.setattr(doctor, "LOOK", 0.01)
    answer = miaobi("doctor", "--json")
    assert answer.code == 0
    told = json.loads(answer.out)
    assert told["healthy"]
    names = [check["name"] for check in told["checks"]]
    assert {"packages", "torch", "precision", "torch.compile", "compiled step", "cache", "fonts", "disk"} <= set(names)
    assert all(check["remedy"] for check in told["checks"] if check["status"] == "missing")


def test_it_fits_one_screen(miaobi, monkeypatch):
    monkeypatch.setattr(doctor, "LOOK", 0.01)
    monkeypatch.setenv("COLUMNS", "100")
    assert len(miaobi("doctor").out.splitlines()) <= 30


def test_a_package_that_is_needed_and_missing_fails_the_command(miaobi, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", (doctor.packages,))
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["torch>=2.9", "numpy>=999", "no-such-thing>=1"])
    answer = miaobi("doctor")
    assert answer.code == 1
    assert "numpy>=999" in answer.out
    assert "no-such-thing" in answer.out
    assert "pip install" in answer.out


def test_an_extra_that_is_not_there_is_no_fault(monkeypatch):
    wants = ["torch>=2.9", 'no-such-thing; extra == "quantum"', 'numpy; extra == "plain"', 'pytest; extra == "dev"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: wants)
    extras = found(doctor.packages)["extras"]
    assert extras.status == "ok"
    assert extras.found == "plain; not installed: quantum"
    assert extras.remedy.endswith("pip install 'miaobi[quantum]'")


def smi(monkeypatch, tmp_path: Path, says: str) -> None:
    """An nvidia-smi that says so."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that works")
@pytest.mark.parametrize(
    ("build", "says", "remedy"), [(None, "stays idle", "CUDA 12.4"), ("12.8", "does not run", "a newer driver")]
)
def test_a_gpu_that_torch_does_not_use_is_named(monkeypatch, tmp_path: Path, build, says: str, remedy: str):
    smi(monkeypatch, tmp_path, "| NVIDIA-SMI 550.54   Driver Version: 550.54.15   CUDA Version: 12.4 |")
    monkeypatch.setattr(torch.version, "cuda", build)
    check = found(doctor.torch_build)["torch"]
    assert check.status == "note"
    assert "550.54.15" in check.found
    assert says in check.found
    assert remedy in check.remedy


def test_no_compiler_is_a_note_with_a_remedy(monkeypatch):
    monkeypatch.setattr(native, "compiler", lambda: None)
    assert found(doctor.compiled_step)["compiled step"].status == "note"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check = found(doctor.torch_build)["torch.compile"]
    assert check.status == "note"
    assert "g++" in check.remedy


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_cache_that_others_can_write_to_is_named(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("MIAOBI_CACHE_DIR", str(tmp_path / "cache"))
    assert found(doctor.compiled_step)["cache"].status == "ok"
    assert not (tmp_path / "cache").exists()  # it only looks
    (tmp_path / "cache").mkdir(mode=0o777)
    (tmp_path / "cache").chmod(0o777)
    check = found(doctor.compiled_step)["cache"]
    assert check.status == "note"
    assert "others can write" in check.found
    (tmp_path / "cache").chmod(0o700)
    (tmp_path / "cache" / "cpu_step-1.failed").write_text("no space", encoding="utf-8")
    assert "could not be compiled" in found(doctor.compiled_step)["cache"].found


def test_a_full_disk_fails_the_command_and_a_small_one_is_told(monkeypatch):
    usage = namedtuple("usage", "total used free")
    for free, status in ((100 << 20, "missing"), (1 << 30, "note"), (100 << 30, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(free, 0, free))
        assert found(doctor.space)["disk"].status == status


def test_few_files_are_told(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 4096))
    assert found(doctor.open_files)["open files"].remedy == "ulimit -n 4096"


def test_a_busy_core_is_seen(monkeypatch):
    if not found(doctor.others):
        pytest.skip("this system does not say")
    monkeypatch.setattr(doctor, "LOOK", 1.0)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        check = found(doctor.others)["other programs"]
    finally:
        busy.kill()
        busy.wait()
    assert check.status == "note"
    assert "top" in check.remedy


def test_a_terminal_without_chinese_is_told():
    command = [sys.executable, "-c", "from miaobi.doctor import terminal; print(next(iter(terminal())))"]
    said = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert "shows as ?" in said.stdout
    assert "PYTHONIOENCODING=utf-8" in said.stdout


def test_a_font_that_was_installed_since_matplotlib_looked_is_found(monkeypatch):
    if not (there := fonts.chinese_fonts()):
        pytest.skip("NO CHINESE FONT HERE")
    manager = matplotlib.font_manager.fontManager
    files = {font.fname for font in manager.ttflist if font.name in fonts.CHINESE}
    monkeypatch.setattr(manager, "ttflist", [font for font in manager.ttflist if font.fname not in files])
    assert fonts.chinese_fonts()[0] in there
    monkeypatch.setattr(matplotlib.font_manager, "findSystemFonts", list)
    monkeypatch.setattr(manager, "ttflist", [])
    assert found(doctor.fonts)["fonts"].status == "note"
