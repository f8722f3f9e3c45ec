"""The files of a checkpoint are hashed once, beside other work, and whatever was altered is refused with its name."""

import subprocess
import sys
from pathlib import Path

import pytest

from miaobi import checksums
from miaobi.checksums import Checksums, for_training, hash_ahead, verifying
from miaobi.errors import UserError
from miaobi.files import sha256
from miaobi.settings import load_config
from miaobi.train.run_directory import hash_early


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A directory of three files with their checksums."""
    for i, name in enumerate(("config.json", "model.safetensors", "README.md")):
        (tmp_path / name).write_bytes(bytes([i]) * (1 << (10 * i)))
    with Checksums() as sums:
        sums.write(tmp_path)
    return tmp_path


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that are hashed."""
    names = []
    monkeypatch.setattr(checksums, "sha256", lambda file: names.append(file.name) or sha256(file))
    return names


def test_files_hashed_ahead_are_not_hashed_again_and_those_that_users_edit_are_not_hashed(checkpoint, hashed):
    hash_ahead(checkpoint, for_training)
    with verifying(checkpoint, for_training):
        pass
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    with verifying(checkpoint, for_training):
        pass
    assert len(hashed) == 4, "what was hashed ahead counts once"


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("when", ["before", "after hashing ahead"])
def test_an_altered_file_is_refused_with_its_name_whenever_it_was_altered(checkpoint, ahead, when):
    def alter(now: str) -> None:
        if now == when:
            content = bytearray((checkpoint / "model.safetensors").read_bytes())
            content[500] ^= 1
            (checkpoint / "model.safetensors").write_bytes(content)

    alter("before")
    if ahead:
        hash_ahead(checkpoint, for_training)
        [future.result() for _, future in checksums._ahead.values()]
    alter("after hashing ahead")
    with (
        pytest.raises(UserError, match=r"model\.safetensors is not what was written"),
        verifying(checkpoint, for_training),
    ):
        raise ValueError("what the altered file led to")


def test_a_file_that_is_gone_is_named(checkpoint):
    hash_ahead(checkpoint, for_training)
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"), verifying(checkpoint, for_training):
        pass


@pytest.mark.parametrize("name", ["/etc/passwd", "../other", "a/../../b", "a\\0b", "", "\\ud800", "m" * 9000])
def test_names_of_elsewhere_are_refused(checkpoint, name):
    (checkpoint / "checksums.json").write_text(f'{{"sha256": {{"{name}": "0"}}}}'.replace("\\0", "\\u0000"))
    with (
        pytest.raises(UserError, match=r"(?s)^.{0,1300}(checksums\.json names|is missing)"),
        verifying(checkpoint, for_training),
    ):
        pass


def test_what_finds_the_checkpoint_to_hash_does_without_torch():
    """Else there would be no import to hash beside."""
    code = "import miaobi.train.run_directory, miaobi.training, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("flags", "begins"), [([], True), ([("init_from", "resume")], True),
                                               ([("init_from", "scratch")], False)])  # fmt: skip
def test_a_run_that_goes_on_is_hashed_ahead(trained, tmp_path, monkeypatch, flags, begins):
    """init_from is `scratch` where nobody gives it: that is no reason to wait with it."""
    monkeypatch.setattr(checksums, "_ahead", {})
    hash_early(*load_config(None, [("out_dir", str(trained())), *flags]))
    assert ("model.safetensors" in {file.name for file in checksums._ahead}) is begins


def test_a_process_ends_although_a_file_is_still_being_hashed(tmp_path):
    """An error in the first line of a command is told at once, however large the checkpoint is."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(1 << 40)
    code = "from miaobi.checksums import hashing; from pathlib import Path; import sys; hashing([Path(sys.argv[1])])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model.safetensors"], check=False, timeout=60)
    assert done.returncode == 0
