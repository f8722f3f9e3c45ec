"""The optimizers' state on disk: any cut reads as the whole, older files are read, and nothing in them runs."""

import io
import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from miaobi.config import ModelConfig, OptimConfig
from miaobi.errors import UserError
from miaobi.files import pointed, write_json
from miaobi.model.transformer import Transformer
from miaobi.train import optimizer_state
from miaobi.train.older_state import OlderState, Reader
from miaobi.train.optimizer import make_optimizers
from miaobi.train.optimizer_state import Part, Saved, State, copied, file_name, load, write
from miaobi.train.recipe import resolve_optim
from miaobi.train.world import World


def write_parts(directory: Path, tensor: torch.Tensor, cuts: list[int]) -> None:
    """A tensor's rows as the files of len(cuts) + 1 ranks; a rank may have none."""
    edges = [0, *cuts, len(tensor)]
    for rank, (a, z) in enumerate(pairwise(edges)):
        where = {"w/exp_avg": [list(tensor.shape), [a, 0]]} if z > a else {}
        tensors = {"w/exp_avg": tensor[a:z].contiguous()} if z > a else {}
        save_file(tensors, directory / file_name(rank, len(cuts) + 1), {"where": json.dumps(where)})
    write_json(directory / "optimizer.json", {"ranks": len(cuts) + 1, "tensors": 1, "scaler": {}})


@given(rows=st.integers(1, 12), data=st.data())
def test_rows_written_by_any_ranks_are_read_by_any_others(tmp_path_factory, rows, data):
    directory = tmp_path_factory.mktemp("parts")
    tensor = torch.arange(rows * 3.0).reshape(rows, 3)
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=5)))
    write_parts(directory, tensor, cuts)
    a = data.draw(st.integers(0, rows - 1))
    z = data.draw(st.integers(a + 1, rows))
    assert torch.equal(Saved(directory).read("w/exp_avg", (a, 0), (z - a, 3)), tensor[a:z])


@pytest.mark.parametrize("fault", ["gap", "overlap", "outside", "a file too few", "the index says more"])
def test_parts_that_do_not_fit_together_are_refused(tmp_path, fault):
    tensor = torch.arange(12.0).reshape(4, 3)
    write_parts(tmp_path, tensor, [2])
    offset = {"gap": None, "overlap": 1, "outside": 3}.get(fault)
    if offset is not None:
        where = json.dumps({"w/exp_avg": [[4, 3], [offset, 0]]})
        save_file({"w/exp_avg": tensor[2:].contiguous()}, tmp_path / file_name(1, 2), {"where": where})
    elif fault == "gap":
        save_file({}, tmp_path / file_name(1, 2), {"where": "{}"})
    elif fault == "a file too few":
        (tmp_path / file_name(1, 2)).unlink()
    else:
        write_json(tmp_path / "optimizer.json", {"ranks": 2, "tensors": 5})
    with pytest.raises((ValueError, OSError)):
        Saved(tmp_path)


@pytest.mark.parametrize("room", [1, 100, 200, 10_000])
def test_a_state_too_large_for_one_file_is_read_from_several(tmp_path, monkeypatch, room):
    monkeypatch.setattr(optimizer_state, "FILE_BYTES", room)
    values = {f"w{i}/exp_avg": torch.full((4, i), float(i)) for i in (9, 1, 2, 3, 5)}
    parts = {name: Part(tuple(tensor.shape), (0, 0), tensor) for name, tensor in values.items()}
    names = list(write(State(parts, len(parts), {}), tmp_path, World()))
    assert names[0] == file_name(0, 1)
    assert len(names) == {1: 5, 100: 3, 200: 2, 10_000: 1}[room]
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == sorted(names)
    saved = Saved(tmp_path)
    assert all(torch.equal(saved.read(name, (0, 0), tuple(v.shape)), v) for name, v in values.items())
    (tmp_path / names[-1]).unlink()
    with pytest.raises((OSError, ValueError), match=re.escape(names[-1])):
        Saved(tmp_path)


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_goes_on_in_float16_whatever_it_began_in(tmp_path, begun):
    """On a card without bf16: the scale of the loss begins anew where the checkpoint, in bf16 or fp32, has none."""
    model = Transformer(ModelConfig(family="gpt2", n_layer=1, n_head=1, n_embd=8, block_size=4, vocab_size=9))
    optimizers = make_optimizers(model, resolve_optim(OptimConfig(), "gpt2", 10), "adamw")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers[0].step()
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**9, enabled=enabled) for enabled in (begun, True)]
    list(write(copied(model, optimizers, scalers[0], World()), tmp_path, World()))
    scalers[1].load_state_dict(scalers[1].state_dict() | {"scale": 2.0**5})
    load(tmp_path, model, optimizers, scalers[1])
    assert scalers[1].get_scale() == (2.0**9 if begun else 2.0**5)
    load(tmp_path, model, optimizers, torch.amp.GradScaler("cpu", enabled=False))


# --- runs written before -----------------------------------------------------------------------------------------


@pytest.fixture
def half_way(train, prepared, tmp_path):
    """A run of 20 steps, and the settings of the one of 40 that it is half of."""
    settings = {"data": prepared(), "out_dir": tmp_path / "run", "dropout": 0.1, "schedule": "constant",
                "warmup_iters": 0, "family": "qwen3", "eval_interval": 20}  # fmt: skip
    train(**settings, max_iters=20)
    return settings | {"max_iters": 40}


def as_before(checkpoint: Path) -> None:
    """Write the optimizers' state of a checkpoint as miaobi did before: torch's distributed format."""
    directory = checkpoint / "train_state"
    saved, state = Saved(directory), {}
    for name, shape in saved.shapes.items():
        parameter, key = name.split("/")
        state.setdefault(parameter, {})[key] = saved.read(name, (0,) * len(shape), shape).clone()
    for file in directory.glob("optimizer*"):
        file.unlink()
    (checkpoint / "checksums.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"optimizer": state, "scaler": {"scale": 65536.0, "_growth_tracker": 3}}, checkpoint_id=directory)


def test_a_run_of_an_older_version_resumes_and_ends_in_the_same_weights(train, half_way, tmp_path):
    shutil.copytree(tmp_path / "run", tmp_path / "whole", symlinks=True)
    as_before(pointed(tmp_path / "run" / "checkpoints" / "last"))
    assert OlderState(tmp_path / "run" / "checkpoints" / "last" / "train_state").scaler["scale"] == 65536.0
    for name in ("run", "whole"):
        train(**half_way | {"out_dir": tmp_path / name})
    files = [pointed(tmp_path / n / "checkpoints" / "last") / "model.safetensors" for n in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def poison(checkpoint: Path, how: str, marker: Path) -> None:
    """Make the state of a checkpoint run a command, if anything in it can."""
    directory = checkpoint / "train_state"
    if how == ".metadata":
        for file in directory.glob("optimizer*"):
            file.unlink()
        (directory / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
    elif how == "entries of bytes":
        as_before(checkpoint)
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        metadata = pickle.loads((directory / ".metadata").read_bytes())
        payload = io.BytesIO()
        torch.save(Evil(marker), payload)
        name = next(iter(metadata.state_dict_metadata))
        metadata.state_dict_metadata[name] = BytesStorageMetadata()
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, len(payload.getvalue())
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))
        for file in directory.glob("*.distcp"):
            file.write_bytes(payload.getvalue())
    else:  # names as the files of now, contents as the files of before
        for file in directory.glob("optimizer*"):
            file.write_bytes(pickle.dumps(Evil(marker)))
        (directory / "progress.json").write_bytes(pickle.dumps(Evil(marker)))
    (checkpoint / "checksums.json").unlink(missing_ok=True)


@pytest.mark.parametrize("how", [".metadata", "entries of bytes", "pickles under our names"])
@pytest.mark.parametrize("way", ["out_dir", "resume_from", "mirror", "eval_only", "finished"])
def test_nothing_in_a_received_run_is_executed(train, half_way, tmp_path, how, way):
    run, marker = tmp_path / "run", tmp_path / "executed"
    poison(pointed(run / "checkpoints" / "last"), how, marker)
    settings = dict(half_way)
    if way == "resume_from":
        settings |= {"out_dir": tmp_path / "new", "resume_from": run}
    elif way == "mirror":
        far = tmp_path / "far"
        shutil.copytree(run / "checkpoints", far, symlinks=True)
        for name in ("best", "last"):
            (far / name).unlink()
            (far / name).write_text("step-20")
        settings |= {"out_dir": tmp_path / "new", "mirror": far}
    elif way == "eval_only":
        settings |= {"eval_only": True}
    elif way == "finished":
        settings |= {"max_iters": 20}
    if way == "eval_only" and how != "pickles under our names":
        train(**settings)  # an evaluation needs no optimizer, and reads none
    else:
        with pytest.raises(UserError):
            train(**settings)
    assert not marker.exists()


@given(st.binary(max_size=200))
def test_any_bytes_as_metadata_are_an_error_and_nothing_else(tmp_path_factory, content):
    directory = tmp_path_factory.mktemp("bytes")
    (directory / ".metadata").write_bytes(content)
    with pytest.raises((ValueError, OSError, EOFError, KeyError)):
        OlderState(directory)


@pytest.mark.parametrize("module", ["os", "builtins", "torch.distributed.checkpoint.metadata", "torch._utils"])
def test_the_reader_of_older_metadata_knows_no_functions(module):
    with pytest.raises(pickle.UnpicklingError):
        Reader(io.BytesIO(f"c{module}\neval\n.".encode())).load()


@pytest.mark.parametrize("index", [2**24, 2**31 - 1])
def test_a_memo_far_beyond_the_end_of_older_metadata_takes_no_memory(tmp_path, index):
    """An unpickler makes a table of as many places as the file says: gigabytes for ten bytes."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x02Nr" + index.to_bytes(4, "little") + b".")
    with pytest.raises(ValueError, match="memo far beyond"):
        OlderState(tmp_path)


KINDS = {
    "true or false": torch.tensor([[True] * 3] * 4), "whole": torch.ones(4, 3, dtype=torch.int64),
    "complex": torch.ones(4, 3, dtype=torch.complex64), "of 8 bits": torch.ones(4, 3).to(torch.float8_e4m3fn),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_another_kind_are_refused_by_name(tmp_path, kind):
    """torch's optimizers fail on them with a traceback, or count with them."""
    write_parts(tmp_path, KINDS[kind], [])
    with pytest.raises(ValueError, match="w/exp_avg has numbers of the kind"):
        Saved(tmp_path)


@pytest.mark.parametrize("key", ["step", "exp_avg_sq"])
def test_numbers_below_zero_are_refused_where_there_can_be_none(train, half_way, tmp_path, key):
    checkpoint = pointed(tmp_path / "run" / "checkpoints" / "last")
    file = checkpoint / "train_state" / file_name(0, 1)
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict
    save_file({n: -1 - t if n.endswith(f"/{key}") else t for n, t in tensors.items()}, file, header)
    (checkpoint / "checksums.json").unlink()
    with pytest.raises(UserError, match=f"/{key} has numbers below zero"):
        train(**half_way)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
@pytest.mark.parametrize("file", [0, 1])
@pytest.mark.parametrize("how", ["pipe", "device"])
def test_a_part_that_is_no_file_is_not_waited_for(tmp_path, monkeypatch, file, how):
    """Also where there is no checksums.json to compare it with."""
    monkeypatch.setattr(optimizer_state, "FILE_BYTES", 1)
    parts = {f"w{i}/exp_avg": Part((2,), (0,), torch.ones(2)) for i in range(2)}
    list(write(State(parts, len(parts), {}), tmp_path, World()))
    odd = tmp_path / file_name(0, 1, file)
    odd.unlink()
    os.mkfifo(odd) if how == "pipe" else odd.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"{re.escape(odd.name)} is missing, or no file"):
        Saved(tmp_path)


@pytest.mark.parametrize("how", ["pipe", "bomb", "twice", "no zip"])
def test_older_parts_take_no_more_than_they_are(tmp_path, how):
    """A zip of a megabyte may unpack to a gigabyte, and a thousand parts may be the same bytes."""
    dcp.save({"optimizer": {f"w{i}": {"exp_avg": torch.ones(9)} for i in range(3)}}, checkpoint_id=tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    if how == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif how == "no zip":
        file.write_bytes(b"x" * file.stat().st_size)
    else:
        part = io.BytesIO()
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED if how == "bomb" else zipfile.ZIP_STORED) as archive:
            archive.writestr("archive/data/0", bytes(1 << 20))
        file.write_bytes(part.getvalue())
        metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, len(part.getvalue())
        (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises((ValueError, UserError, RuntimeError)):
        OlderState(tmp_path)


def test_older_parts_of_the_same_bytes_are_read_once(tmp_path):
    dcp.save({"optimizer": {f"w{i}": {"exp_avg": torch.ones(9)} for i in range(9)}}, checkpoint_id=tmp_path)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    first, *others = metadata.storage_data.values()
    for info in others:
        info.offset, info.length = first.offset, first.length
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[: first.offset + 2 * first.length])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="the same bytes twice"):
        OlderState(tmp_path)
