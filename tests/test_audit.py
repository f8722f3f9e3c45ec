"""What Python itself reports while every verb reads clean and hostile files: nothing foreign is executed, nothing is
unpickled that is not ours, no process and no connection but those listed here, and no writing elsewhere.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

import miaobi
from miaobi.cli import VERBS

SOURCES = Path(miaobi.__file__).parent
CODE = [Path(p).resolve() for p in (sys.prefix, sys.base_prefix, sysconfig.get_paths()["stdlib"], SOURCES, __file__)]
CODE += [(Path(__file__).parent / name).resolve() for name in ("audited.py", "convert/originals.py")]
CODE += [Path(sysconfig.get_paths()["purelib"]).resolve()]
UNPICKLED = r"(numpy|collections|builtins|miaobi\.corpus|pathlib|concurrent|multiprocessing)\b.*"
"""Modules of what prepare's own workers send back."""
PROCESSES = (
    r"subprocess\.Popen (\S+ -I \S+/miaobi/corpus/jinja_process\.py \S+|sh -c umask 077; .*|.*resource_tracker.*|"
    r"git -c core\.fsmonitor=false -c core\.hooksPath=/dev/null -C \S+ (rev-parse HEAD|status --porcelain "
    r"--untracked-files=no)|fc-list .*|nvidia-smi|uname -p)"
)
"""The commit of this code stands in cards and reports; matplotlib asks the system for its fonts,
doctor for the card's driver and the processor.
Templates are rendered in a process of their own; the compiler of what is written in C++; prepare's workers."""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """What the session in audited.py reports."""
    work = tmp_path_factory.mktemp("audited")
    env = os.environ | {"TMPDIR": str(tmp_path_factory.mktemp("temporary")), "OMP_NUM_THREADS": "1",
                        "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    command = [sys.executable, Path(__file__).with_name("audited.py"), work]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout) | {"work": str(work), "temporary": env["TMPDIR"], "said": done.stderr}


def is_code(path: str) -> bool:
    return path.startswith("<frozen") or any(Path(path).resolve().is_relative_to(place) for place in CODE)


def test_every_verb_ends_well_or_with_the_users_mistake(report):
    assert all(code in ((0,) if name.startswith("clean") else (0, 2)) for name, code in report["ended"].items()), [
        (name, code) for name, code in report["ended"].items() if code
    ]
    assert "Traceback" not in report["said"]
    assert len(report["ended"]) > 25


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_is_left_out(report, verb):
    """A new one belongs into audited.py, on clean files and on hostile ones."""
    for how in ("clean", "hostile"):
        assert any(name.startswith(f"{how}: {verb}") for name in report["ended"]), how


def test_nothing_of_a_file_is_executed(report):
    assert not report["executed"]
    assert "foreign text" not in report["seen"]
    for event in ("exec", "compile"):
        for name in report["seen"][event]:
            assert is_code(name.partition(" by ")[2] or name), (event, name)


def test_nothing_is_imported_from_where_the_data_are(report):
    assert report["foreign modules"] == {}
    for library in report["seen"].get("ctypes.dlopen", {}):
        cache = Path(os.environ.get("MIAOBI_CACHE_DIR") or Path.home() / ".cache").resolve()
        assert library == "None" or is_code(library) or Path(library).resolve().is_relative_to(cache), library


def test_only_our_own_workers_are_unpickled(report):
    for name in report["seen"].get("pickle.find_class", {}):
        assert re.fullmatch(UNPICKLED, name), name


def test_no_other_process_and_no_connection(report):
    for command in report["seen"].get("process", {}):
        assert re.fullmatch(PROCESSES, command, re.DOTALL), command
    assert "network" not in report["seen"]


def test_nothing_is_written_elsewhere(report):
    caches = (Path.home() / ".cache", os.environ.get("MIAOBI_CACHE_DIR") or Path.home() / ".cache")
    places = [report["work"], report["temporary"], "/dev/null", "/proc/self", *map(str, caches)]
    for path in report["seen"]["written"]:
        assert any(Path(path).is_relative_to(place) for place in places), path
    assert not Path(tempfile.gettempdir(), "executed").exists()


def test_the_hook_sees_what_it_is_to_see(report):
    """The same session ends with each of the things that must not happen, done on purpose."""
    control = report["control"]
    assert "foreign text" in control
    assert any("builtins.exec" in name for name in control["pickle.find_class"])
    assert any("os.system" in name for name in control["process"])
    assert "network" in control
