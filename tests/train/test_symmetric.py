"""Symmetric products on a GPU: the kernel in Triton's interpreter, and what is done where it is not to be had."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from miaobi.train import symmetric
from miaobi.train.symmetric import works

CPU = torch.device("cpu")
INTERPRETED = """
import torch
from miaobi.train.symmetric import symmetric
draw = torch.Generator().manual_seed(0)
for shape in (2, 64, 64), (3, 130, 200), (1, 200, 33), (2, 128, 512):
    for dtype, atol in (torch.float32, 1e-5), (torch.float16, 0.02):
        x = (torch.randn(shape, generator=draw) / shape[2] ** 0.5).to(dtype)
        gram = symmetric(x, x.mT, None, 0.0, 1.0)
        torch.testing.assert_close(gram, x @ x.mT, atol=atol, rtol=0.01)
        tall = x.mT.contiguous().mT
        assert torch.equal(symmetric(tall, tall.mT, None, 0.0, 1.0), gram)
        got = symmetric(gram, gram, gram, -4.775, 2.0315)
        whole = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        torch.testing.assert_close(got, whole, atol=8 * atol, rtol=0.05)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which PyTorch's CPU build comes without")
def test_the_kernel_gives_the_products(tmp_path):
    """Rows that do not fill their tiles, x and y that lie by columns; bf16 is left out, which the interpreter lacks."""
    environment = {"TRITON_INTERPRET": "1", "PATH": "", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def afresh():
    works.cache_clear()
    yield
    works.cache_clear()


def test_a_kernel_that_is_not_there_or_wrong_or_fails_is_not_used(afresh, monkeypatch, capsys):
    products = {
        "right": lambda x, y, c, beta, alpha: torch.baddbmm(c, x, y, beta=beta, alpha=alpha),
        "wrong": lambda x, y, c, beta, alpha: torch.baddbmm(c, x, y, beta=beta, alpha=2 * alpha),
        "nan": lambda x, y, c, beta, alpha: torch.full_like(c, torch.nan),
    }
    monkeypatch.setattr(symmetric, "find_spec", lambda name: None)
    assert not works(CPU, torch.float16)
    assert capsys.readouterr().err == ""  # Windows: nothing is wrong
    monkeypatch.setattr(symmetric, "find_spec", lambda name: name)
    for how, product in products.items():
        works.cache_clear()
        monkeypatch.setattr(symmetric, "symmetric", product)
        assert works(CPU, torch.float16) == (how == "right")
        assert ("whole products, which is slower" in capsys.readouterr().err) == (how != "right")

    def fails(*_):
        raise RuntimeError("ptxas fatal: no such architecture\nand more")

    works.cache_clear()
    monkeypatch.setattr(symmetric, "symmetric", fails)
    assert not works(CPU, torch.float16)
    assert not works(CPU, torch.float16)
    assert capsys.readouterr().err.count("ptxas fatal: no such architecture)") == 1  # said once
