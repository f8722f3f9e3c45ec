"""The built wheel alone: what is in it, that it runs without the checkout, and that uv installs it as a tool."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import miaobi
from miaobi.released import NAMES

ROOT = Path(__file__).parents[1]
DATA = ("*.cpp", "*.h", "*.css", "*.jinja", "*.csv", "*.json", "*.js", "*.html", "*.svg", "*.typed", "*.yaml")


def uv(*words: object, env: dict[str, str] | None = None) -> str:
    """What uv printed."""
    command = [sys.executable, "-m", "uv", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | (env or {}))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, which is built from what git has or would take."""
    place = tmp_path_factory.mktemp("release")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (place / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place / "checkout" / name)
    uv(
        "build",
        "--quiet",
        "--offline",
        "--no-build-isolation",
        "--python",
        sys.executable,
        "--out-dir",
        place,
        place / "checkout",
    )
    (found,) = place.glob("*.whl")
    assert len(list(place.glob("*.tar.gz"))) == 1
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of a fresh environment with the wheel; the libraries are those of this environment, the checkout is not."""
    place = tmp_path_factory.mktemp("fresh") / "venv"
    uv("venv", "--quiet", "--offline", "--python", sys.executable, place)
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    uv("pip", "install", "--quiet", "--no-deps", "--no-index", "--offline", "--python", python, wheel)
    (packages,) = place.rglob("site-packages")
    # a path in a .pth file is searched, but its own .pth files, such as that of the editable checkout, are not read
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return python.parent


@pytest.mark.slow
def test_the_wheel_has_every_module_and_every_file_that_verbs_read(wheel: Path):
    packed = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    wanted = {str(path.relative_to(source).as_posix()) for kind in ("*.py", *DATA) for path in source.rglob(kind)}
    wanted |= {f"miaobi/configs/{path.name}" for path in ROOT.glob("configs/*.yaml")}
    shipped = [path for name in NAMES for path in (ROOT / "models" / name).glob("*") if path.suffix != ".gguf"]
    wanted |= {f"miaobi/{path.relative_to(ROOT).as_posix()}" for path in shipped}
    assert wanted - packed == set()
    models = {name for name in packed if name.startswith("miaobi/models/")}
    assert models == {name for name in wanted if name.startswith("miaobi/models/")}, "no GGUF, no scripts"
    assert wheel.stat().st_size < 20_000_000
    unknown = {path.suffix for path in source.rglob("*") if path.is_file()} - {f".{k.rpartition('.')[2]}" for k in DATA}
    assert {s for s in unknown if "egg-info" not in s} <= {".py", ".pyc", ".txt", ""}, (
        "a kind of file that is not packed"
    )
    assert {name for name in packed if name.startswith(("tests/", "benchmarks/", "docs/"))} == set()


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "models" / "base" / "config.json").is_file(), reason="no released weights here")
def test_the_wheel_alone_continues_offline(installed: Path, tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    asked = [installed / "miaobi", "sample", "--start=中国", "--num_samples=1", "--max_new_tokens=5", "--json"]
    done = subprocess.run(asked, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"][0]["text"].startswith("中国")
    assert f"{installed.parent}" in done.stderr, "the models of the wheel, not of the checkout"


@pytest.mark.slow
def test_the_wheel_alone_runs_the_quick_demo(installed: Path, tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    asked = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 600}
    where = subprocess.run([installed / "python", "-c", "import miaobi; print(miaobi.__file__)"], **asked)
    assert Path(where.stdout.strip()).is_relative_to(installed.parent)
    done = subprocess.run([installed / "miaobi", "demo", "--quick", "--json"], **asked)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["stopped"] == "max_iters"
    assert set(result["sentiment"]) >= {"accuracy", "opinions"}
    assert (tmp_path / "demo_quick_run" / "report.html").exists()


@pytest.mark.slow
def test_uv_installs_it_as_a_tool_and_uvx_runs_it(wheel: Path, tmp_path: Path):
    """Without its libraries, which other tests resolve: --version needs none, and the name of the command counts."""
    metadata = zipfile.ZipFile(wheel).read(f"miaobi-{miaobi.__version__}.dist-info/METADATA").decode()
    needs = [line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    without = {f"{Requirement(need).name}; python_version < '3'\n" for need in needs if not need.startswith("miaobi")}
    (tmp_path / "none.txt").write_text("".join(without), encoding="utf-8")
    places = {"UV_TOOL_DIR": str(tmp_path / "tools"), "UV_TOOL_BIN_DIR": str(tmp_path / "bin")}
    options = ("--no-index", "--python", sys.executable, "--overrides", tmp_path / "none.txt", "--offline")
    uv("tool", "install", *options, wheel, env=places)
    said = subprocess.run([tmp_path / "bin" / "miaobi", "--version"], capture_output=True, text=True)
    assert said.stdout == f"miaobi {miaobi.__version__}\n"
    assert uv("tool", "run", *options, "--from", wheel, "miaobi", "--version", env=places) == said.stdout
