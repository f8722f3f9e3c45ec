"""What `pip install` promises: every Python from 3.10 on, every package that is imported, and a wheel that runs alone.

The resolvers of the pins wait for the registry; the tests between their start and their answers take its time.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import miaobi
from miaobi.released import NAMES

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
DATA = ("*.cpp", "*.h", "*.css", "*.jinja", "*.csv", "*.json", "*.js", "*.html", "*.svg", "*.typed", "*.yaml")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
ONLY_SOURCE = (
    "snownlp",
    "rouge-score",
    "sqlitedict",
    "word2number",
    "pwinput",
)  # pure Python without a wheel: built anywhere
WITHOUT_SOURCE = ["--only-binary", ":all:", *(part for name in ONLY_SOURCE for part in ("--no-binary", name))]


def uv_compile(python: str, *arguments: object) -> list[str]:
    """The command that resolves requirements for another Python; metadata alone is fetched. A newcomer has no
    compiler: wheels only.
    """
    return [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate",
            "--python-version", python, *WITHOUT_SOURCE, *map(str, arguments)]  # fmt: skip


@pytest.fixture(scope="module")
def registry(asking: dict[str, subprocess.Popen]) -> None:
    """A package registry answers."""
    _, problem = asking["registry"].communicate(timeout=300)
    if asking["registry"].returncode:
        pytest.skip(f"NO PACKAGE REGISTRY CAN BE REACHED; whether every Python can install is not known: {problem}")


def pins(python: str) -> dict[str, str]:
    """What constraints.txt says for a Python on Linux: name -> version."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                name = normal(pin.name)
                assert name not in found, f"{pin.name} has two pins for Python {python}"
                found[name] = str(pin.specifier).removeprefix("==")
    return found


def normal(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_pythons_that_are_tried_are_those_that_are_promised():
    promised = SpecifierSet(re.search(r'requires-python = "(.+)"', PROJECT)[1])
    assert [f"3.{minor}" for minor in range(8, 15) if f"3.{minor}" in promised] == list(PYTHONS)


EVERYTHING = [
    "-c", ROOT / "constraints.txt", ROOT / "pyproject.toml",
    *(f"--extra={name}" for name in ("demo", "dev", "examples", "hf", "ray", "modelscope", "parquet", "track")),
]  # fmt: skip
"""All extras that have pins. What can be installed with all extras can be installed with some: `.[demo]` as well."""


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen]]:
    """Resolvers at work, all waiting for the registry at the same time. One resolves for every Python at once: after
    that each Python's resolver finds in uv's cache what it would ask the registry for.
    """
    place = tmp_path_factory.mktemp("requirements")
    for name, line in {"one": "iniconfig", "numpy": "numpy", "too-new": "numpy==2.4.6"}.items():
        (place / f"{name}.txt").write_text(f"{line}\n", encoding="utf-8")
    commands = {
        "all at once": uv_compile(PYTHONS[0], "--universal", *EVERYTHING),
        "registry": uv_compile("3.11", "--no-cache", place / "one.txt"),
        "too new": uv_compile("3.10", "-c", place / "too-new.txt", place / "numpy.txt"),
    }
    running = {
        name: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name, command in commands.items()
    }
    yield running
    for process in running.values():
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.usefixtures("asking")  # it takes its time while they wait for the registry
def test_nothing_in_the_code_is_newer_than_the_oldest_python():
    command = ["-c", "import vermin; vermin.main()", f"-t={PYTHONS[0]}-", "--no-tips", "--violations", "-q"]
    folders = [ROOT / "src", ROOT / "tests", ROOT / "benchmarks"]
    checked = subprocess.run([sys.executable, *command, *folders], capture_output=True, text=True, timeout=300)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_what_is_newer_than_the_oldest_python_is_found(tmp_path: Path):
    (tmp_path / "new.py").write_text("import tomllib\nfrom enum import StrEnum\n", encoding="utf-8")
    command = ["-c", "import vermin; vermin.main()", f"-t={PYTHONS[0]}-", "--no-tips", "--violations", "-q"]
    checked = subprocess.run([sys.executable, *command, tmp_path], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 1
    assert "tomllib" in checked.stdout
    assert "StrEnum" in checked.stdout


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
    wanted |= {f"miaobi/{path.relative_to(ROOT).as_posix()}" for path in [*shipped, ROOT / "models" / "__init__.py"]}
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


def imported() -> dict[str, set[str]]:
    """Packages that src imports beside Python's own: name -> files."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in (name.partition(".")[0] for name in names):
                if name not in sys.stdlib_module_names and name != "miaobi":
                    found.setdefault(name, set()).add(path.name)
    return found


def test_every_package_that_is_imported_is_declared():
    declared = {normal(Requirement(text).name) for text in re.findall(r'^\s+"([\w\[].*?)",', PROJECT, re.MULTILINE)
                if re.match(r"[\w.-]+(\[[\w,]+\])?[<>=]", text)}  # fmt: skip
    declared |= {normal(name) for name in re.findall(r'"(\w[\w-]*)(?:\[\w+\])?[<>=]=?[\d.]+"', PROJECT)}
    providers = packages_distributions()
    missing = {
        name: sorted(files)
        for name, files in imported().items()
        if not declared & {normal(provider) for provider in providers.get(name, [name])}
    }
    missing.pop("triton", None)  # comes with those builds of torch for which alone the module is imported
    assert missing == {}, "add them to dependencies in pyproject.toml"


def test_every_dependency_is_imported():
    """tensorboard by torch.utils.tensorboard; extras are for who wants them."""
    block = re.search(r"^dependencies = \[\n(.*?)^\]", PROJECT, re.MULTILINE | re.DOTALL)[1]
    needed = {normal(Requirement(text).name) for text in re.findall(r'^\s+"(.+?)"', block, re.MULTILINE)}
    providers = packages_distributions()
    used = {normal(provider) for name in imported() for provider in providers.get(name, [name])}
    assert len(needed) > 20
    assert needed - used == {"tensorboard"}
    assert not needed & {"pyarrow", "transformers", "ray", "wandb", "fastapi"}, "a first run does not need them"


def test_every_package_that_is_declared_has_a_pin():
    names = {normal(name) for name in re.findall(r'"(\w[\w-]*)(?:\[\w+\])?[<>=]=?[\d.]+"', PROJECT)} - {"setuptools"}
    for python in PYTHONS:
        assert names <= set(pins(python)), python


@pytest.mark.slow
@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("python", PYTHONS)
def test_the_pins_can_be_installed_on_every_python(python: str, asking: dict[str, subprocess.Popen]):
    asking["all at once"].communicate(timeout=300)
    for where in (["--offline"], []):  # what the cache lacks is asked for
        done = subprocess.run(uv_compile(python, *where, *EVERYTHING), capture_output=True, text=True, timeout=300)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    chosen = dict(line.partition(" ")[0].split("==") for line in done.stdout.splitlines() if "==" in line)
    known = pins(python)
    assert {"torch", "numpy", "scipy", "pyarrow"} <= set(chosen)
    assert {name: version for name, version in chosen.items() if known.get(name, version) != version} == {}


@pytest.mark.slow
@pytest.mark.usefixtures("registry")
def test_a_pin_without_a_build_for_a_python_is_found(asking: dict[str, subprocess.Popen]):
    """The check above sees what it is for: numpy 2.4.6 left Python 3.10 behind."""
    _, problem = asking["too new"].communicate(timeout=300)
    assert asking["too new"].returncode != 0
    assert "numpy==2.4.6" in problem
