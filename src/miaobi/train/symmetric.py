"""Symmetric products on a GPU: only tiles on and below the diagonal are computed; the others are mirrored."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from miaobi.console import warn

TILE = 64
"""Rows and columns of a tile: a share of (1 + TILE / R) / 2 of a product with R rows is computed."""


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton is installed and its kernel gives the same as PyTorch's own product; tested once, on a small
    one.
    """
    if find_spec("triton") is None:  # PyTorch for CUDA brings it along, but on Windows
        return False
    x = torch.randn(2, TILE + 8, TILE + 8, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    c = x + x.mT
    try:
        off = symmetric(x, x.mT, c, 0.5, 0.25).float() - torch.baddbmm(c, x, x.mT, beta=0.5, alpha=0.25).float()
        if not bool(off.abs().max() < 0.2):
            raise ArithmeticError(f"off by {off.abs().max():.2g}")
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # the kernel's, and what Triton, its C compiler and ptxas raise
        why = next(iter(str(e).splitlines()), type(e).__name__)
        warn(f"Triton's kernel for symmetric products does not work here ({why[:200]}): Muon computes whole products, "
             "which is slower")  # fmt: skip
        return False
    return True


@torch.library.custom_op("miaobi::symmetric", mutates_args=())
def symmetric(x: Tensor, y: Tensor, c: Tensor | None, beta: float, alpha: float) -> Tensor:
    """beta c + alpha x y, which must be symmetric. x: (N, R, K). y: (N, K, R). c: (N, R, R) or None, for zeros."""
    from miaobi.train.symmetric_kernel import launch

    return launch(x, y, c, beta, alpha, TILE)


@symmetric.register_fake
def _(x: Tensor, y: Tensor, c: Tensor | None, beta: float, alpha: float) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])
