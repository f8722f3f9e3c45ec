"""Checkpoints copied to other storage through fsspec, and runs that go on from there."""

import dataclasses
import importlib.util
import json
import os
import shutil
import threading
from pathlib import Path

import fsspec
import pytest

from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.lock import Holder, this_process
from miaobi.model.checkpoint import load_model
from miaobi.settings import load_config
from miaobi.train import mirror
from miaobi.train.mirror import Mirror
from miaobi.train.run_directory import open_run


@pytest.fixture(params=["directory", "memory"])
def url(request, tmp_path) -> str:
    """Storage that is empty: a directory, and one without renames or links."""
    if request.param == "directory":
        return str(tmp_path / "far away")
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    return "memory://bucket/run"


def names(url: str) -> set[str]:
    files, root = fsspec.core.url_to_fs(url)
    return {Path(path).name for path in files.ls(root, detail=False)}


def test_a_run_whose_machine_is_lost_resumes_from_the_mirror(train, prepared, tmp_path, url):
    settings = {"data": prepared(), "mirror": url, "schedule": "constant", "warmup_iters": 0, "dropout": 0.2}
    whole = train(**settings | {"mirror": None}, out_dir=tmp_path / "whole", max_iters=30)
    train(**settings, out_dir=tmp_path / "run", max_iters=20)
    assert {"best", "last", "step-20"} <= names(url)
    shutil.rmtree(tmp_path / "run")

    result = train(**settings, out_dir=tmp_path / "run", max_iters=30)
    assert result["step"] == 30
    assert result["best_val_loss"] == whole["best_val_loss"]
    runs = [pointed(tmp_path / run / "checkpoints" / "last") / "model.safetensors" for run in ("run", "whole")]
    assert runs[0].read_bytes() == runs[1].read_bytes()
    assert "step-30" in names(url)


def test_the_mirror_holds_whole_checkpoints_and_drops_old_ones(train, prepared, tmp_path, url):
    train(data=prepared(), mirror=url, out_dir=tmp_path / "run", max_iters=40, eval_interval=10)
    here = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names(url) == here | {"run", "config.yaml"}
    files, root = fsspec.core.url_to_fs(url)
    files.get(f"{root}/step-40/", f"{tmp_path / 'copy'}/", recursive=True)
    load_model(tmp_path / "copy")


def far_weights(url: str, step: str) -> bytes:
    files, root = fsspec.core.url_to_fs(url)
    return files.cat_file(f"{root}/{step}/model.safetensors")


def test_a_run_that_starts_over_replaces_the_steps_of_the_run_before(train, prepared, tmp_path, url):
    """Both have a step-20; a name alone does not tell whose it is."""
    settings = {"data": prepared(), "mirror": url, "out_dir": tmp_path / "run", "eval_interval": 20}
    train(**settings)
    before = far_weights(url, "step-20")
    train(**settings, init_from="scratch", seed=5)
    here = (tmp_path / "run" / "checkpoints" / "step-20" / "model.safetensors").read_bytes()
    assert far_weights(url, "step-20") == here != before


def test_a_step_saved_twice_is_copied_twice(train, prepared, tmp_path, url):
    train(data=prepared(), mirror=url, out_dir=tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    progress = checkpoints / "step-20" / "train_state" / "progress.json"
    progress.write_text(progress.read_text().replace('"evaluated": 20', '"evaluated": 10'))
    Mirror(url).push(checkpoints.parent, "a")
    Mirror(url).pull(tmp_path / "again", lambda _: None)
    assert (
        tmp_path / "again" / "checkpoints" / "step-20" / "train_state" / "progress.json"
    ).read_bytes() == progress.read_bytes()


def test_a_run_that_starts_over_and_is_restarted_by_torchrun_does_not_resume_another(train, prepared, tmp_path, url):
    """Its machine was lost before its first checkpoint, and the command is repeated as it was."""
    train(data=prepared(), mirror=url, out_dir=tmp_path / "run")
    given = [("out_dir", str(tmp_path / "new")), ("init_from", "scratch"), ("mirror", url)]
    for restarted in (False, True):
        assert open_run(*load_config(None, given), Mirror(url), restarted) is None


def test_a_checkpoint_that_was_copied_by_half_is_copied_again(train, prepared, tmp_path, url):
    """`last` does not name it: the machine died while it was being copied."""
    files, root = fsspec.core.url_to_fs(url)
    files.makedirs(f"{root}/step-20")
    files.pipe_file(f"{root}/step-20/model.safetensors", b"half")
    train(data=prepared(), mirror=url, out_dir=tmp_path / "run", max_iters=20)
    Mirror(url).pull(tmp_path / "again", lambda _: None)
    load_model(tmp_path / "again", "last")


def test_a_mirror_that_fails_costs_a_warning(train, prepared, tmp_path, monkeypatch, capsys):
    def refused(*_, **__):
        raise PermissionError("no rights there")

    monkeypatch.setattr(fsspec.implementations.local.LocalFileSystem, "put", refused)
    result = train(data=prepared(), mirror=str(tmp_path / "far away"), out_dir=tmp_path / "run")
    assert result["step"] == 20
    assert "could not be copied" in capsys.readouterr().err
    load_model(tmp_path / "run", "last")


@pytest.mark.parametrize("url", ["nosuch://bucket/run", "s3://bucket/run"])
def test_storage_that_nobody_speaks_is_refused_before_training(train, prepared, tmp_path, url):
    if url.startswith("s3") and importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed: it would look for the bucket")
    with pytest.raises(UserError, match="cannot be used"):
        train(data=prepared(), mirror=url, out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["..", "../../../step-1", "", "/", "step-1/../.."])
def test_a_name_in_the_mirror_is_no_path_out_of_it(tmp_path, name):
    """`..` would be the run directory itself, which a checkpoint replaces as a whole."""
    far, checkpoints = tmp_path / "far", tmp_path / "run" / "checkpoints"
    (far / "step-1").mkdir(parents=True)
    (far / "step-1" / "config.json").write_text("{}")
    (far / "last").write_text(name)
    checkpoints.mkdir(parents=True)
    (tmp_path / "run" / "precious").write_text("kept")
    with pytest.raises(UserError, match="which is no checkpoint"):
        Mirror(str(far)).pull(tmp_path / "run", lambda _: None)
    assert (tmp_path / "run" / "precious").read_text() == "kept"
    assert list(checkpoints.iterdir()) == []


# --- whose it is -------------------------------------------------------------------------------------------------


def test_a_mirror_of_another_configuration_is_refused_by_the_key(train, prepared, tmp_path, url):
    train(data=prepared(), mirror=url, out_dir=tmp_path / "a")
    before = far_weights(url, "step-20")
    with pytest.raises(UserError, match=r"the mirror .* holds a run with n_embd=32, now n_embd=16"):
        train(data=prepared(), mirror=url, out_dir=tmp_path / "b", n_embd=16)
    assert not (tmp_path / "b" / "checkpoints" / "last").exists()
    assert far_weights(url, "step-20") == before


def test_a_mirror_of_the_same_configuration_over_other_data_is_refused(train, prepared, tmp_path, url):
    """The path is the same, what lies there is not."""
    shutil.copytree(prepared(), tmp_path / "data")
    train(data=tmp_path / "data", mirror=url, out_dir=tmp_path / "a")
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(prepared(val_fraction=0.2), tmp_path / "data")
    with pytest.raises(UserError, match=r"is not what .* was trained on"):
        train(data=tmp_path / "data", mirror=url, out_dir=tmp_path / "b")


def test_a_run_with_checkpoints_of_its_own_does_not_write_over_anothers(train, prepared, tmp_path, url):
    settings = {"data": prepared(), "seed": 5}
    train(**settings, mirror=url, out_dir=tmp_path / "a")
    train(**settings, out_dir=tmp_path / "b")
    before = far_weights(url, "step-20")
    with pytest.raises(UserError, match="checkpoints of another run"):
        train(**settings, mirror=url, out_dir=tmp_path / "b", max_iters=30)
    assert far_weights(url, "step-20") == before


@pytest.mark.parametrize("lives", [True, False])
def test_a_mirror_has_one_writer(train, prepared, tmp_path, monkeypatch, url, lives):
    """The other machine's disk cannot be seen from here: only its signs of life in the storage."""
    monkeypatch.setattr(mirror, "SILENCE", 1.0)
    files, root = fsspec.core.url_to_fs(url)
    files.makedirs(root, exist_ok=True)
    there = dataclasses.replace(this_process(), machine="elsewhere", host="node-7", pid=1)

    def say(holder: Holder) -> None:
        files.pipe_file(f"{root}/writer.json", json.dumps(dataclasses.asdict(holder)).encode())

    def sign() -> None:
        say(dataclasses.replace(there, token="another"))

    say(there)
    if lives:
        threading.Timer(0.5, sign).start()
        with pytest.raises(UserError, match="is being written by process 1 on node-7"):
            train(data=prepared(), mirror=url, out_dir=tmp_path / "run")
        assert not (tmp_path / "run" / "checkpoints").exists()
    else:
        assert train(data=prepared(), mirror=url, out_dir=tmp_path / "run")["step"] == 20
        assert "writer.json" not in names(url)


@pytest.mark.parametrize("url", ["data:,x", "tar::/etc/passwd", "jupyter://x", "reference::/etc/passwd"])
def test_storage_that_cannot_be_a_mirror_is_refused_whatever_its_library_raises(train, prepared, tmp_path, url):
    with pytest.raises(UserError, match=r"cannot be (used|written|read)"):
        train(data=prepared(), mirror=url, out_dir=tmp_path / "run")


@pytest.mark.parametrize("how", ["pipe", "device", "long"])
def test_what_is_no_counters_in_the_storage_costs_no_more_than_a_copy(train, prepared, tmp_path, how):
    """Others may write there: the file is only compared with ours."""
    url, settings = str(tmp_path / "far away"), {"data": prepared(), "out_dir": tmp_path / "run"}
    train(mirror=url, max_iters=20, **settings)
    step = pointed(tmp_path / "run" / "checkpoints" / "last")
    far = tmp_path / "far away" / step.name / "train_state" / "progress.json"
    far.unlink()
    if how == "pipe":
        os.mkfifo(far)
    elif how == "device":
        far.symlink_to("/dev/zero")
    else:
        far.write_bytes((step / "train_state" / "progress.json").read_bytes() + bytes(1 << 30))
    assert not Mirror(url)._is_copy(step)


@pytest.mark.parametrize("pid", [2**62, 0, -1])
def test_a_writer_that_can_be_no_process_is_dead(tmp_path, pid):
    (tmp_path / "writer.json").write_text(json.dumps(dataclasses.asdict(this_process()) | {"pid": pid}))
    with Mirror(str(tmp_path)).locked():
        pass
