"""Compiled code: kept where nobody else can write, loaded from nowhere else, and never a reason to fail."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from miaobi import cache, native

POSIX = pytest.mark.skipif(os.name != "posix", reason="permissions")
ROOT = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="gives files to another user")
SOURCE = 'extern "C" int answer() { return 42; }\n'
pytestmark = POSIX


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache will be, not made yet; what is asked at a fresh start."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(cache.OURS, "")
    native.build.cache_clear()
    yield tmp_path / "cache" / "miaobi"
    native.build.cache_clear()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def waited(path: Path) -> bool:
    for _ in range(200):
        if path.exists():
            return True
        time.sleep(0.05)
    return False


def test_a_new_one_is_the_users_alone_under_any_umask(place: Path, tmp_path: Path):
    source = tmp_path / "part.cpp"
    source.write_text(SOURCE)
    before = os.umask(0)
    try:
        made = native.build(source)
        assert made.parent == place
        assert mode(place) == 0o700
        assert waited(made)
        assert not mode(made) & 0o077
    finally:
        os.umask(before)
    assert native.library(source).answer() == 42


def test_directories_above_it_are_nobody_elses_under_any_umask(tmp_path: Path):
    """Else they would be refused the next time: who can write there can put another in its place."""
    before = os.umask(0)
    try:
        place = cache.private_directory(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert [mode(path) for path in (place, place.parent, place.parent.parent)] == [0o700, 0o755, 0o755]
    assert cache.private_directory(place) == place


def test_one_that_others_could_only_read_is_closed(place: Path):
    place.mkdir(parents=True, mode=0o755)
    assert cache.private_cache() == place
    assert mode(place) == 0o700


def not_private(kind: str, place: Path, tmp_path: Path) -> None:
    place.parent.mkdir(parents=True)
    if kind == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "theirs")
    elif kind == "dangling link":
        place.symlink_to(tmp_path / "nowhere")
    elif kind == "file":
        place.write_text("no directory")
    else:
        place.mkdir()
        if kind == "writable by others":
            place.chmod(0o777)
        elif kind == "writable by a group":
            place.chmod(0o770)
        elif kind == "another user's":
            os.chown(place, 12345, 12345)
        elif kind == "another user's file in it":
            (place / "x.so").write_text("")
            os.chown(place / "x.so", 12345, 12345)
            place.chmod(0o755)
        elif kind == "parent that anybody can change":
            place.parent.chmod(0o777)
        elif kind == "another user's home":
            os.chown(place.parent, 12345, 12345)


@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "writable by others", "writable by a group",
                                  "parent that anybody can change",
                                  pytest.param("another user's", marks=ROOT),
                                  pytest.param("another user's home", marks=ROOT),
                                  pytest.param("another user's file in it", marks=ROOT)])  # fmt: skip
def test_what_others_could_have_filled_is_not_used(kind: str, place: Path, tmp_path: Path, capfd):
    not_private(kind, place, tmp_path)
    fresh = cache.private_cache()
    assert fresh != place
    assert mode(fresh) == 0o700
    assert capfd.readouterr().err.count("warning") == 1
    assert cache.private_cache() == fresh  # and said once
    assert not capfd.readouterr().err
    assert cache.is_ours(fresh)


@pytest.mark.parametrize("kind", ["unset", "read-only", "relative XDG_CACHE_HOME"])
def test_no_home_is_no_reason_to_fail(kind: str, tmp_path: Path):
    """In a process of its own: what is fallen back on is cleared away when it ends."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(cache.__file__).parents[1])}
    if kind == "read-only":
        (tmp_path / "home").write_text("no directory at all")
        env["HOME"] = str(tmp_path / "home")
    elif kind == "relative XDG_CACHE_HOME":
        env |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": "here"}
    code = "import os, pwd\n"
    if kind == "unset":  # as with `docker run --user 4711`
        code += "def unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\n"
    code += "from miaobi.cache import private_cache\nprint(private_cache())"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    if kind == "relative XDG_CACHE_HOME":  # the specification: to be ignored
        assert done.stdout.strip() == str(tmp_path / ".cache" / "miaobi")
    else:
        assert done.stderr.replace("\n", " ").count("warning") == 1
        assert not Path(done.stdout.strip()).exists()


@pytest.mark.parametrize("kind", ["writable by others", "link", pytest.param("another user's", marks=ROOT)])
def test_a_library_that_others_could_have_written_is_not_loaded(kind: str, place: Path, tmp_path: Path, capfd):
    source = tmp_path / f"part{kind[0]}.cpp"
    source.write_text(SOURCE)
    made = native.build(source)
    assert waited(made)
    if kind == "link":
        made.rename(tmp_path / "real.so")
        made.symlink_to(tmp_path / "real.so")
    elif kind == "writable by others":
        made.chmod(0o722)
    else:
        os.chown(made, 12345, 12345)
    assert native.library(source) is None
    assert "not loaded" in capfd.readouterr().err


def test_a_broken_compiler_is_asked_once(place: Path, tmp_path: Path, monkeypatch, capfd):
    source, count = tmp_path / "part.cpp", tmp_path / "count"
    source.write_text(SOURCE)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "c++").write_text(f'#!/bin/sh\necho x >> {count}\necho "no room in my head" >&2\nexit 1\n')
    (tmp_path / "bin" / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    made = native.build(source)
    assert waited(made.with_suffix(".failed"))
    for _ in range(3):
        native.build.cache_clear()  # as another process would
        assert native.build(source) is None
    assert count.read_text() == "x\n"
    said = capfd.readouterr().err.replace("\n", " ")
    assert said.count("could not build part.cpp (no room in my head)") == 3
    os.utime(made.with_suffix(".failed"), (0, 0))  # long ago: a disk may have been full
    native.build.cache_clear()
    assert native.build(source) == made


COMPILES = """
import os, sys, torch, torch._inductor.config
from miaobi.cache import keep_compiled_code_private
torch._inductor.config.cpp_cache_precompile_headers = False  # ten seconds
if sys.argv[1:]: import torch._inductor.codecache
keep_compiled_code_private()
print(torch.compile(lambda x: x.sin() + 1)(torch.zeros(8)).sum().item())
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


@pytest.mark.slow
@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("late", [(), ("imported before",)])
def test_torch_compiles_into_the_users_own(late: tuple[str, ...], tmp_path: Path):
    """Nothing is looked for under the name in the temporary directory that anybody can take first."""
    (tmp_path / "tmp").mkdir()
    env = os.environ | {"TMPDIR": str(tmp_path / "tmp"), "XDG_CACHE_HOME": str(tmp_path / "cache"), cache.OURS: "",
                        "TORCHINDUCTOR_VEC_ISA_OK": "0"}  # no program for every vector unit  # fmt: skip
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", COMPILES, *late], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result, used = done.stdout.split()
    assert (float(result), used) == (8.0, str(tmp_path / "cache" / "miaobi" / "inductor"))
    assert any(Path(used).rglob("*.so"))
    assert not any(path.is_file() for path in (tmp_path / "tmp").rglob("torchinductor*/**/*"))


@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
@pytest.mark.parametrize("kind", ["good", "new", "writable by others", "link", "opened before"])
def test_a_users_own_choice_for_torch_is_checked(variable, kind, place: Path, tmp_path: Path, monkeypatch, capfd):
    wished = tmp_path / "own" / "code"
    if kind in ("writable by others", "link"):
        not_private(kind, wished, tmp_path)
    elif kind != "new":
        wished.mkdir(parents=True, mode=0o755)
    if kind == "opened before":  # a directory in it that torch made under umask 0
        (wished / "ab").mkdir()
        (wished / "ab").chmod(0o777)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv(variable, str(wished))
    from torch._inductor.runtime import cache_dir_utils, runtime_utils

    for module in (cache_dir_utils, runtime_utils):
        monkeypatch.setattr(module, "default_cache_dir", module.default_cache_dir)
    cache.keep_compiled_code_private.__wrapped__()
    used = Path(os.environ[variable])
    assert mode(used) == 0o700
    assert (used == wished) == (kind in ("good", "new"))
    assert ("is not used" in capfd.readouterr().err) == (kind not in ("good", "new"))


def test_what_was_not_used_for_long_is_removed_once_a_day(place: Path, tmp_path: Path):
    private = cache.private_cache()
    outside = tmp_path / "outside"
    outside.write_text("x")
    old, now = time.time() - 2 * cache.UNUSED, time.time()
    times = {"old.so": (old, old), "checked/old": (old, old), "inductor/ab/old.py": (old, old), "new.so": (now, now),
             "inductor/cd/read.so": (now, old), "inductor/cd/unread.so": (old, old)}  # fmt: skip
    for name, (read, written) in times.items():
        (private / name).parent.mkdir(parents=True, exist_ok=True)
        (private / name).write_text("x")
        os.utime(private / name, (read, written))
    (private / "link").symlink_to(outside)
    os.utime(private / "link", (old, old), follow_symlinks=False)
    (private / "inductor" / "locks").symlink_to(tmp_path)
    cache.remove_unused(private)
    left = {str(path.relative_to(private)) for path in private.rglob("*") if path.is_file() and not path.is_symlink()}
    assert left == {"new.so", "inductor/cd/read.so", cache.LOOKED, cache.TAG}
    assert not (private / "inductor" / "ab").exists()
    assert outside.exists()  # a link goes, not what it points at
    (private / "old.so").write_text("x")
    os.utime(private / "old.so", (old, old))
    cache.remove_unused(private)
    assert (private / "old.so").exists()  # not looked for again today
    os.utime(private / cache.LOOKED, (old, old))
    cache.remove_unused(private)
    assert not (private / "old.so").exists()


@pytest.mark.parametrize("named", ["a home", "empty", "new"])
def test_a_directory_that_the_user_named_is_cleared_only_where_it_was_ours_from_the_beginning(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """MIAOBI_CACHE_DIR=~ must not cost anybody what is old in his home."""
    home = tmp_path / "home"
    monkeypatch.setenv(cache.OURS, str(home))
    if named != "new":
        home.mkdir(mode=0o700)
    letter = home / "triton" / "letter.txt"
    if named == "a home":
        letter.parent.mkdir(mode=0o700)
        letter.write_text("x")
    assert cache.private_cache() == home
    letter.parent.mkdir(exist_ok=True)
    letter.write_text("x")
    os.utime(letter, (1e9, 1e9))
    cache.remove_unused(cache.private_cache())
    assert letter.exists() == (named == "a home")
    assert (home / cache.TAG).exists() == (named != "a home")
