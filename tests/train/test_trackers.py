"""Trackers: the real packages, offline, and what is said of broken ones."""

import json
import os
import sqlite3
import sys
from pathlib import Path

import pytest

from miaobi.errors import UserError
from miaobi.train import trackers
from miaobi.train.same_run import REPORTING
from miaobi.train.trackers import About, start


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory):
    """Nothing leaves this machine, and nothing is written at home."""
    place = tmp_path_factory.mktemp("trackers")
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWANLAB_MODE": "offline", "TRACKIO_DIR": str(place),
                "SWANLAB_SAVE_DIR": str(place / "swanlab"), "HF_HUB_OFFLINE": "1"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
            patch.delitem(sys.modules, name)  # it looks for its directory when it is imported
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.delenv("TRACKIO_SPACE_ID", raising=False)
        yield place


@pytest.fixture(scope="module")
def run(offline: Path, prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run at all three, begun, and continued by a command that names nothing but its length."""
    from tests.conftest import tiny

    from miaobi.settings import load_config
    from miaobi.train.loop import train

    for kind in ("wandb", "swanlab", "trackio"):
        pytest.importorskip(kind, reason=f"{kind} is not installed")
    out = tmp_path_factory.mktemp("tracked") / "run"
    flags = tiny(data=prepared(), out_dir=out, max_iters=10, wandb_project="sport")
    given = [tuple(flag[2:].split("=", 1)) for flag in flags]
    given += [("trackers", "swanlab"), ("trackers", "trackio"), ("wandb_log", "True")]
    train(*load_config(None, given))
    train(*load_config(None, [("out_dir", str(out)), ("max_iters", "20")]))
    return out


def logged(run: Path) -> dict[int, float]:
    """Step -> validation loss, as metrics.jsonl has them."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}


@pytest.mark.slow
def test_wandb_gets_both_halves_of_a_run_under_one_id(run: Path):
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1
    for file in files:
        assert b"val_loss" in file.read_bytes()
        assert b"n_layer" in file.read_bytes()


@pytest.mark.slow
def test_swanlab_keeps_the_curves_in_the_run_directory(run: Path):
    written = b"".join(file.read_bytes() for file in (run / "swanlog").rglob("*") if file.is_file())
    assert b"val_loss" in written
    assert b"sport" in written


@pytest.mark.slow
def test_trackio_has_every_evaluation_in_its_data_base(run: Path, offline: Path):
    (file,) = offline.glob("sport*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, *_ in rows} == {rows[0][0]}
    found = {step: json.loads(metrics).get("val_loss") for _, step, metrics in rows}
    for step, loss in logged(run).items():
        assert found[step] == pytest.approx(loss)


@pytest.mark.parametrize("kind", ["wandb", "swanlab", "trackio"])
def test_a_package_that_is_broken_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    import importlib

    def broken(name: str):
        raise ModuleNotFoundError("No module named 'parts'", name=name if where == "missing" else "parts")

    monkeypatch.setattr(importlib, "import_module", broken)
    about = About("miaobi", None, "0" * 32, {})
    where = "missing"
    with pytest.raises(UserError, match=rf"--trackers={kind} needs .*pip install 'miaobi\[track\]'"):
        start(kind, tmp_path, about)
    where = "broken"
    with pytest.raises(UserError, match=rf"{kind} is installed but cannot be imported .*parts"):
        start(kind, tmp_path, about)


def test_a_tracker_that_refuses_is_a_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Package:
        @staticmethod
        def init(**settings: object) -> None:
            raise RuntimeError("no api key")

    monkeypatch.setattr(trackers, "_package", lambda kind: Package)
    with pytest.raises(UserError, match=r"wandb could not start .*no api key"):
        start("wandb", tmp_path, About("miaobi", None, "0" * 32, {}))


def test_who_watches_does_not_make_it_another_run():
    assert {"trackers", "wandb_log", "wandb_project", "wandb_run_name"} <= REPORTING
    assert os.environ.get("WANDB_MODE") in (None, "offline")
