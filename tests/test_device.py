"""The machine's best choice without flags, and one line of warning where a wish cannot be met."""

import pytest
import torch

from miaobi import device as module
from miaobi.device import can_compile, peak_flops, pick_device, pick_dtype
from miaobi.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize(("name", "warnings"), [("auto", 0), ("cpu", 0), ("cuda", 1), ("cuda:1", 1), ("mps", 1)])
def test_a_device_that_is_not_there_becomes_the_cpu_with_one_line_of_warning(capsys, name, warnings):
    assert pick_device(name) == CPU
    assert capsys.readouterr().err.count("warning:") == warnings


def test_an_accelerator_is_taken_by_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto").type == "cuda"
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="2 CUDA devices"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "mps"


@pytest.mark.parametrize("name", ["gpu9", "meta", "xpu", "vulkan", "xla:0"])
def test_a_device_that_miaobi_does_not_know_is_refused(name):
    """Torch knows most of these."""
    with pytest.raises(UserError, match=f"{name}' is not known"):
        pick_device(name)


@pytest.mark.parametrize(
    ("has_bf16", "wish", "expected", "warnings"),
    [
        (True, "auto", torch.bfloat16, 0),
        (True, "bfloat16", torch.bfloat16, 0),
        (True, "float16", torch.bfloat16, 1),
        (True, "float32", torch.float32, 0),
        (False, "auto", torch.float32, 0),
        (False, "bfloat16", torch.float32, 1),
        (False, "float16", torch.float32, 1),
    ],
)
def test_precision_on_a_cpu_follows_its_hardware(monkeypatch, capsys, has_bf16, wish, expected, warnings):
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: has_bf16)
    assert pick_dtype(wish, CPU) == expected
    assert capsys.readouterr().err.count("warning:") == warnings


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_older_gpus_get_float16(monkeypatch, has_bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert pick_dtype("auto", torch.device("cuda")) == expected


def test_a_cpu_without_a_compiler_does_not_compile(monkeypatch):
    monkeypatch.setattr(module.native.shutil, "which", lambda name: None)
    assert not can_compile(CPU)


def test_the_data_sheet_is_used_for_known_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4080")
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == 97.5e12
    assert peak_flops(CPU, torch.float32) > 1e8
