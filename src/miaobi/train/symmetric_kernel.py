"""The kernel of `symmetric`, in Triton (triton-lang.org)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP = 32
"""Columns of x and rows of y that are multiplied at once."""


@triton.jit
def kernel(x, y, c, out, rows, inner, beta, alpha,
           x_batch, x_row, x_col, y_batch, y_row, y_col, c_batch, c_row, c_col,
           adds: tl.constexpr, tile: tl.constexpr, step: tl.constexpr):  # fmt: skip
    """One tile of beta c + alpha x y, and its mirror image. Sums are float32; out is contiguous, (N, R, R)."""
    across, down, which = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if across > down:
        return
    r = down * tile + tl.arange(0, tile)
    q = across * tile + tl.arange(0, tile)
    k = tl.arange(0, step)
    left = x + which * x_batch + r[:, None] * x_row + k[None, :] * x_col
    right = y + which * y_batch + k[:, None] * y_row + q[None, :] * y_col
    total = tl.zeros((tile, tile), dtype=tl.float32)
    for begin in range(0, inner, step):
        there = begin + k < inner
        some = tl.load(left, mask=(r[:, None] < rows) & there[None, :], other=0.0)
        others = tl.load(right, mask=there[:, None] & (q[None, :] < rows), other=0.0)
        total = tl.dot(some, others, total, input_precision="ieee")
        left += step * x_col
        right += step * y_row
    total *= alpha
    inside = (r[:, None] < rows) & (q[None, :] < rows)
    if adds:
        at = c + which * c_batch + r[:, None] * c_row + q[None, :] * c_col
        total += beta * tl.load(at, mask=inside, other=0.0).to(tl.float32)
    done = total.to(out.dtype.element_ty)
    whole = out + which * rows * rows
    tl.store(whole + r[:, None] * rows + q[None, :], done, mask=inside)
    if across < down:
        tl.store(whole + q[:, None] * rows + r[None, :], tl.trans(done), mask=tl.trans(inside))


def launch(x: Tensor, y: Tensor, c: Tensor | None, beta: float, alpha: float, tile: int) -> Tensor:
    """`symmetric.symmetric` by the kernel, on the device of x."""
    n, rows, inner = x.shape
    out = x.new_empty(n, rows, rows)
    tiles = triton.cdiv(rows, tile)
    added = x if c is None else c
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[tiles, tiles, n](
            x, y, added, out, rows, inner, beta, alpha, *x.stride(), *y.stride(), *added.stride(),
            adds=c is not None, tile=tile, step=STEP,
        )  # fmt: skip
    return out
