"""Causal attention in fp32 by a compiled part of our own (cpu_attention.cpp), as an operator that torch can
differentiate and its compiler takes as it is.

torch's fused kernel for the CPU multiplies pieces that are too small for the matrix library: in training it gets a
quarter of what the processor can do, this one half and more (docs/lab-notes.md).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from miaobi import native

SOURCE = Path(__file__).with_name("cpu_attention.cpp")
WIDTHS = 16
"""A head's width must be a multiple of this."""


class Strides(ctypes.Structure):
    """Of batch, head and row, in floats."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "head", "row")]


class Shape(ctypes.Structure):
    """B, H, H_kv, T, D."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "length", "width")]


def is_ready(width: int) -> bool:
    """Whether heads so wide can be computed here. The first time on a machine it waits for the compiler, a few
    seconds.
    """
    return width % WIDTHS == 0 and native.awaited(SOURCE) is not None


def fits(q: Tensor, mask: object, dropout: float) -> bool:
    """Whether `attention` computes what is wanted: causal, in fp32, nothing dropped."""
    return mask is None and dropout == 0.0 and q.dtype == torch.float32 and q.device.type == "cpu"


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention. q: (B, H, T, D). k, v: (B, H_kv, T, D). Returns (B, H, T, D). fp32, where `is_ready`."""
    return _attention(q, k, v)[0]


@torch.library.custom_op("miaobi::cpu_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The states, and for the way back the logarithms of the softmax's denominators (B, H, T)."""
    q, k, v = map(_rows_whole, (q, k, v))
    y, sums = _empty(q, k, v)
    _call("miaobi_attention", q, k, _at(q), _at(k), _at(v), _at(y), [_pointer(sums)])
    return y, sums


@_attention.register_fake
def _empty(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, D = q.shape
    return q.new_empty(B, T, H, D).transpose(1, 2), q.new_empty(B, H, T)


@torch.library.custom_op("miaobi::cpu_attention_backward", mutates_args=())
def _backward(q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, y, grad = map(_rows_whole, (q, k, v, y, grad))
    grads = _empty_grads(q, k, v, y, sums, grad)
    _call("miaobi_attention_backward", q, k, _at(q), _at(k), _at(v), _at(y), [_pointer(sums)], _at(grad),
          [_pointer(g) for g in grads], [_strides(g) for g in grads])  # fmt: skip
    return grads


@_backward.register_fake
def _empty_grads(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, sums: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    def beside(x: Tensor) -> Tensor:
        B, H, T, D = x.shape
        return x.new_empty(B, T, H, D).transpose(1, 2)

    return beside(q), beside(k), beside(v)


def _remember(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(*ctx.saved_tensors, grad)


_attention.register_autograd(_differentiate, setup_context=_remember)


def _rows_whole(x: Tensor) -> Tensor:
    """x, the numbers of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _strides(x: Tensor):
    return ctypes.byref(Strides(*x.stride()[:3]))


def _at(x: Tensor) -> list:
    return [_pointer(x), _strides(x)]


def _call(name: str, q: Tensor, k: Tensor, *arguments: list) -> None:
    """Raises RuntimeError where there is no memory, in torch's words for that."""
    B, H, T, D = q.shape
    flat = [argument for group in arguments for argument in group]
    shape, threads = ctypes.byref(Shape(B, H, k.shape[1], T, D)), torch.get_num_threads()
    if not getattr(native.library(SOURCE), name)(shape, *flat, threads):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: attention needs some more")
