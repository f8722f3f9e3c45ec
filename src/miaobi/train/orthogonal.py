"""Newton-Schulz iterations (Jordan et al. 2024, kellerjordan.github.io/posts/muon) with few products and few launches.

A step is x <- (a + b G + c G^2) x, where G = x x^T. Two things make five steps cheaper and change only roundings. All
products of the small square matrices are symmetric, because all of them are polynomials of one G: half of each is
enough. And if x is wide, G and the product of the polynomials are iterated without x (Dao-AILab's Gram Newton-Schulz).
Errors of G grow twelvefold in a step, so it is recomputed after three: the result is then as close to the exact one as
that of the plain iterations, in fp32, fp16 and bf16 (docs/lab-notes.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from miaobi.device import cpu_has_bf16, gpu_has_bf16

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients a, b, c of a step."""
PLAIN, BY_GRAM = (1, 1, 1, 1, 1), (3, 2)
"""Steps from one G = x x^T to the next."""
WIDE = 1.5
"""Columns per row from which on BY_GRAM needs fewer operations."""
BLOCK = 128
"""Rows of a symmetric product that a CPU computes at once. Smaller blocks save more operations but are slower per
operation; a product of fewer than four blocks gains nothing (docs/lab-notes.md)."""
CACHED = 1 << 22
"""Elements that a CPU iterates on at once: what fits into its last-level cache."""


def orthogonalize(g: Tensor) -> Tensor:
    """Approximately the nearest semi-orthogonal matrices of g (N, R, C): singular values end between 0.7 and 1.2.

    In the precision of the iterations: scaling converts them in the same launch.
    """
    is_tall = g.shape[-2] > g.shape[-1]
    x = g.mT if is_tall else g  # the smaller Gram matrix
    dtype = iteration_dtype(g.device)
    if dtype == torch.float16:  # gradients may be smaller than its least number; shares of their norm are not
        x = (x.float() / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    else:
        x = x.to(dtype)
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.device.type == "cpu" and x.numel() > CACHED:
        x = torch.cat([iterated(some) for some in x.split(max(1, CACHED // x[0].numel()))])
    else:
        x = iterated(x)
    return x.mT if is_tall else x


def iterated(x: Tensor) -> Tensor:
    """x (N, R, C), R <= C, with singular values of at most 1, after five steps."""
    for steps in BY_GRAM if x.shape[-1] > WIDE * x.shape[-2] else PLAIN:
        x = advanced(x, steps)
    return x


def advanced(x: Tensor, steps: int) -> Tensor:
    """x (N, R, C), R <= C, with singular values of at most 1.3, after `steps` steps."""
    a, b, c = QUINTIC
    gram = symmetric_product(x, x.mT)
    p = symmetric_product(gram, gram, gram, b, c)  # the step multiplies by a + p
    if steps == 1:
        return torch.baddbmm(x, p, x, beta=a)
    product = p.clone()
    product.diagonal(dim1=-2, dim2=-1).add_(a)
    for _ in range(steps - 1):
        half = symmetric_product(gram, p, gram, a)
        gram = symmetric_product(half, p, half, a)  # of the x that is not there
        p = symmetric_product(gram, gram, gram, b, c)
        product = symmetric_product(p, product, product, a)
    return product @ x


def symmetric_product(x: Tensor, y: Tensor, c: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """beta c + alpha x y, (N, R, R), which must be symmetric. x: (N, R, K). y: (N, K, R). c: (N, R, R), symmetric."""
    rows = x.shape[1]
    if x.device.type == "cuda":
        from miaobi.train import symmetric  # of no use elsewhere

        if rows >= 2 * symmetric.TILE and symmetric.works(x.device, x.dtype):
            return symmetric.symmetric(x, y, c, beta, alpha)
    if x.device.type != "cpu" or x.dtype != torch.float32 or rows < 4 * BLOCK:
        return x @ y if c is None else torch.baddbmm(c, x, y, beta=beta, alpha=alpha)
    out = x.new_empty(len(x), rows, rows)
    for start in range(0, rows, BLOCK):  # what lies on the diagonal and to the right of it
        some, right = slice(start, start + BLOCK), slice(start + BLOCK, None)
        if c is None:
            torch.bmm(x[:, some], y[:, :, start:], out=out[:, some, start:])
        else:
            torch.baddbmm(c[:, some, start:], x[:, some], y[:, :, start:], beta=beta, alpha=alpha,
                          out=out[:, some, start:])  # fmt: skip
        out[:, right, some] = out[:, some, right].mT
    return out


def iteration_dtype(device: torch.device) -> torch.dtype:
    """Precision of the iterations: bf16 if the hardware supports it; on older GPUs (Volta, Turing) fp16, because
    singular values stay in [0, 1.3]; else fp32.
    """
    if device.type == "cuda":
        return torch.bfloat16 if gpu_has_bf16(device) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32
