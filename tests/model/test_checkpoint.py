"""Directories that exist whole or not at all, pointers, and damaged models."""

import errno
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.model.conftest import CFG, TOKENIZER

from miaobi.checksums import Checksums
from miaobi.errors import UserError
from miaobi.files import point, pointed, put_back, written_whole
from miaobi.model.checkpoint import load_model, model_directory, save_model
from miaobi.model.families import to_hf
from miaobi.model.transformer import Transformer


def everything(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# --- whole or not at all -----------------------------------------------------------------------------------------


def test_what_is_written_appears_complete_and_replaces_what_was_there(tmp_path):
    for content in ("one", "two"):
        with written_whole(tmp_path / "step-1") as aside:
            (aside / "deep").mkdir()
            (aside / "deep" / "file").write_text(content)
            assert not (tmp_path / "step-1" / "deep" / "file").exists() or content == "two"
        assert everything(tmp_path) == {"step-1/deep/file": content.encode()}


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt(), SystemExit(1)])
def test_a_failure_leaves_nothing_behind_and_the_old_directory_in_place(tmp_path, fault):
    with written_whole(tmp_path / "step-1") as aside:
        (aside / "file").write_text("old")

    def write_and_fail() -> None:
        with written_whole(tmp_path / "step-1") as aside:
            (aside / "file").write_text("new")
            raise fault

    with pytest.raises(type(fault)):
        write_and_fail()
    assert everything(tmp_path) == {"step-1/file": b"old"}
    assert os.listdir(tmp_path) == ["step-1"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failing_flush_or_rename_leaves_nothing_half_done(tmp_path, monkeypatch, call):
    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(*((os, "fsync", fail) if call == "fsync" else (Path, "rename", fail)))
    with pytest.raises(OSError, match="injected"), written_whole(tmp_path / "step-1") as aside:
        (aside / "file").write_text("new")
    assert os.listdir(tmp_path) == []


def test_a_kill_between_the_renames_loses_neither_directory(tmp_path, monkeypatch):
    """A checkpoint is written again where a run was interrupted before an evaluation; it may be the only one."""
    with written_whole(tmp_path / "step-1") as aside:
        (aside / "file").write_text("old")
    rename, killed = Path.rename, []

    def kill(source: Path, target: Path) -> None:
        if source.name.endswith(".tmp"):
            killed.append({re.sub(r"\.[0-9]+-\w+\.tmp", ".tmp", k): v for k, v in everything(tmp_path).items()})
        rename(source, target)

    monkeypatch.setattr(Path, "rename", kill)
    with written_whole(tmp_path / "step-1") as aside:
        (aside / "file").write_text("new")
    assert everything(tmp_path) == {"step-1/file": b"new"}
    assert killed == [{".step-1.old/file": b"old", ".step-1.tmp/file": b"new"}]

    rename(tmp_path / "step-1", tmp_path / ".step-1.old")
    put_back(tmp_path / "step-1")
    assert everything(tmp_path) == {"step-1/file": b"new"}


def test_leftovers_of_a_killed_process_do_not_get_in(tmp_path):
    (tmp_path / ".step-1.tmp").mkdir()
    (tmp_path / ".step-1.tmp" / "garbage").write_text("x")
    with written_whole(tmp_path / "step-1") as aside:
        (aside / "file").write_text("new")
    assert everything(tmp_path) == {"step-1/file": b"new"}


def test_files_are_flushed_before_the_name_appears(tmp_path, monkeypatch):
    order = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda a, b: (order.append("rename"), rename(a, b))[1])
    with written_whole(tmp_path / "step-1") as aside:
        for name in "abc":
            (aside / name).write_text(name)
    assert order == ["fsync"] * 4 + ["rename", "fsync"]  # three files and their directory, then the parent


# --- pointers ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["symlinks", "symlinks refused"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "symlinks refused":

        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError("A required privilege is not held by the client")

        monkeypatch.setattr(Path, "symlink_to", refuse)


@pytest.mark.usefixtures("links")
def test_a_pointer_names_its_sibling_and_can_be_moved(tmp_path):
    (run := tmp_path / "run").mkdir()
    link = run / "last"
    assert pointed(link) is None
    for name in ("step-1", "step-2"):
        (run / name).mkdir()
        point(link, name)
        assert pointed(link) == run / name
    assert sorted(os.listdir(run)) == ["last", "step-1", "step-2"]
    run.rename(moved := tmp_path / "moved")  # relative: a copied run still works
    assert pointed(moved / "last") == moved / "step-2"
    (moved / "step-2").rmdir()
    assert pointed(moved / "last") is None


@pytest.mark.parametrize("links", [True, False])
def test_what_a_kill_left_between_two_renames_is_found(tmp_path, monkeypatch, links):
    """A reader sees the step that is being written again, or the pointer that is; the next `train` puts them back."""
    if not links:
        monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    step, last = tmp_path / "step-10", tmp_path / "last"
    step.mkdir()
    (step / "config.json").write_text("{}", encoding="utf-8")
    point(last, "step-10")
    step.rename(tmp_path / ".step-10.old")
    assert pointed(last) == tmp_path / ".step-10.old"
    (tmp_path / ".step-10.old").rename(step)
    last.rename(tmp_path / ".last.old")
    assert pointed(last) == step


def test_a_pointer_cannot_lead_out_of_its_run(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last").write_text("../secret\n")
    assert pointed(tmp_path / "run" / "last") is None


@pytest.mark.usefixtures("links")
def test_a_model_argument_is_a_run_or_a_model_directory(tmp_path, directory):
    run = tmp_path / "run"
    for name in ("step-1", "step-2"):
        (run / "checkpoints" / name).mkdir(parents=True)
        save_model(run / "checkpoints" / name, Transformer(CFG), TOKENIZER, (TOKENIZER.eot_id,))
    point(run / "checkpoints" / "best", "step-1")
    point(run / "checkpoints" / "last", "step-2")
    assert model_directory(directory) == directory
    assert model_directory(run).resolve().name == "step-1"
    assert model_directory(str(run), "last").resolve().name == "step-2"
    assert model_directory(run, "step-2").name == "step-2"
    with pytest.raises(UserError, match=r"no checkpoint 'step-9'; it has: best, last, step-1, step-2"):
        model_directory(run, "step-9")


def test_no_model_says_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        model_directory(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither config\.json nor checkpoints/"):
        model_directory(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a PEFT adapter.*merge_and_unload"):
        model_directory(tmp_path)


@pytest.mark.parametrize("name", ["checkpoints/cpt4000.pth", "out/ckpt.pt", "a/model.safetensors", "m/Q8_0.GGUF",
                                  "config/train90M.yaml", "cpt4000.pth"])  # fmt: skip
def test_a_file_that_is_missing_is_not_sought_on_the_hub(name, tmp_path, monkeypatch):
    """small-gpt's own place for checkpoints looks like OWNER/NAME."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"no model at {name}: no such file"):
        model_directory(name)


def test_the_directory_of_checkpoints_names_its_run(tmp_path):
    (tmp_path / "run" / "checkpoints" / "step-1").mkdir(parents=True)
    with pytest.raises(UserError, match=f"it is inside a run: give {tmp_path / 'run'}$"):
        model_directory(tmp_path / "run" / "checkpoints")


# --- damaged models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.95])
def test_a_file_cut_short_is_named(directory, name, kept):
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=name):
        load_model(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(directory, name):
    (directory / name).unlink()
    with pytest.raises(UserError, match=name):
        load_model(directory)


@pytest.mark.parametrize("config", ["[]", "3", '{"model_type": "gpt2"}', '{"model_type": "gpt2", "n_layer": "two"}'])
def test_a_config_that_makes_no_sense_is_named(directory, config):
    (directory / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(directory)


@pytest.mark.parametrize("whole", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("how", ["pipe", "device"])
def test_a_shard_that_is_no_file_is_not_waited_for(directory, whole, how):
    (directory / "model.safetensors").unlink()
    (directory / "checksums.json").unlink(missing_ok=True)
    (directory / f"{whole}.index.json").write_text('{"weight_map": {"a": "shard"}}')
    shard = directory / "shard"
    os.mkfifo(shard) if how == "pipe" else shard.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="shard"):
        load_model(directory)


def test_a_damaged_or_incomplete_index_is_named(directory):
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    index = directory / "model.safetensors.index.json"
    for content in ("{", "{}", '{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'):
        index.write_text(content)
        with pytest.raises(UserError, match=r"index\.json|model-00002-of-00002"):
            load_model(directory)


class Bomb:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_nothing_in_a_model_directory_is_executed(directory, tmp_path):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        load_model(directory)
    assert not (tmp_path / "executed").exists()


def test_reading_a_model_imports_no_compiler(directory):
    """torch's meta device would: sympy and dynamo, seconds before the first token."""
    code = (
        "import sys; from miaobi.model.checkpoint import load_model; before = set(sys.modules)\n"
        "load_model(sys.argv[1]); print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True)
    assert not {"sympy", "torch._dynamo", "huggingface_hub"} & set(done.stdout.split())


def test_a_train_state_is_not_read_through_a_model_argument(directory, tmp_path):
    (directory / "train_state").mkdir()
    (directory / "train_state" / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    load_model(directory)
    assert not (tmp_path / "executed").exists()


def test_saved_files_are_what_the_hub_expects(directory):
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json"} <= set(os.listdir(directory))  # fmt: skip
    generation = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == TOKENIZER.eot_id
    assert json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))["model_max_length"] == 8
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in to_hf(load_model(directory)[0]).values())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_flipped_bit_of_a_checkpoint_of_ours_is_noticed(directory, name):
    with Checksums() as checksums:
        checksums.write(directory)
    load_model(directory)
    (directory / "README.md").write_text("notes of somebody", encoding="utf-8")
    (directory / "generation_config.json").write_text('{"temperature": 0.5}', encoding="utf-8")
    load_model(directory)
    content = bytearray((directory / name).read_bytes())
    content[-3] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is not what was written"):
        load_model(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_model_of_ours_from_a_clone_without_lfs_says_so(directory, name):
    """Its SHA-256 differs too, but what is to be done is not to copy it again."""
    with Checksums() as checksums:
        checksums.write(directory)
    (directory / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_model(directory)
