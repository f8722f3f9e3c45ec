"""cuda:0 on a machine without a GPU: tensors have shapes and no values, and what is done to them is counted.

To be imported before torch: the device is registered while PyTorch's libraries are loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

from miaobi import native
from miaobi.cache import private_cache

SOURCE = Path(__file__).with_name("cuda_guard.cpp")


def load_guard() -> None:
    """Build the device guard, once per machine and PyTorch, and load it."""
    if "torch" in sys.modules:
        raise RuntimeError("fake_cuda must be imported before torch")
    home = Path(importlib.util.find_spec("torch").origin).parent
    key = hashlib.sha256(SOURCE.read_bytes() + (home / "version.py").read_bytes()).hexdigest()[:16]
    made = private_cache() / f"cuda_guard-{key}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=made.parent) as directory:  # nobody finds half of it
            whole = Path(directory, made.name)
            command = [native.compiler(), "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", SOURCE,
                       f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu", "-o", whole]  # fmt: skip
            subprocess.run(list(map(str, command)), check=True)
            whole.replace(made)
    # PyTorch's own libraries first, by their place: where they were when the guard was built may be gone since.
    for library in ("libc10.so", "libtorch_cpu.so", made):
        ctypes.CDLL(str(home / "lib" / library))


load_guard()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula  # noqa: E402

from miaobi.train import symmetric  # noqa: E402

CUDA = torch.device("cuda", 0)
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh",
             "_unsafe_view", "prim::device")  # fmt: skip
CHUNK, BLOCKS, TENSORS = 65536, 320, (110, 64, 48, 36, 30)
"""What one launch of a `_foreach_` operation takes: numbers of a block, blocks, tensors of each of 1 to 5 lists
(ATen/native/cuda/MultiTensorApply.cuh)."""


@register_flop_formula(torch.ops.miaobi.symmetric)
def half_of_a_product(x, y, *_, out_shape=None, **__) -> int:
    """Operations of `symmetric`: those of its tiles, whole ones also where the last rows do not fill them."""
    (n, rows, inner), tile = x, symmetric.TILE
    tiles = -(-rows // tile)
    return n * tiles * (tiles + 1) // 2 * 2 * tile**2 * inner


class Counted(TorchDispatchMode):
    """Counts what is launched on cuda:0, by the name of the operation, and the bytes that go in and out.

    One launch for each operation that is no view; of `_foreach_` and fused optimizers as many as CUDA takes. Copies for
    which the CPU waits are counted as well: all to the CPU, and those from there that are not told not to wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.bytes = 0

    @property
    def total(self) -> int:
        """Launches of all operations."""
        return sum(self.launches.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        sides = {t.device.type for t in (*tensors, *made)}
        if "cuda" not in sides or is_view(func) or name in NO_KERNEL:
            return out
        if name == "dropout" and not args[2]:  # of a model that is not being trained
            return out
        if name in ("_to_copy", "copy_") and "cpu" in sides and not does_not_wait(name, args, kwargs or {}):
            self.waits[name] += 1
        lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
        self.launches[name] += chunked(lists) if name.startswith(("_foreach", "_fused_adam")) else 1
        self.bytes += sum(t.numel() * t.itemsize for t in (*tensors, *made))
        return out


def does_not_wait(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a copy between the CPU and the card was told not to wait; one to the CPU always does."""
    target = torch.device(kwargs.get("device") or "cpu") if name == "_to_copy" else args[0].device
    told = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
    return target.type == "cuda" and bool(told)


def is_view(func) -> bool:
    """Whether an operation gives a view of what it gets."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def chunked(lists: list) -> int:
    """Launches of an operation on lists of tensors."""
    most, launches, tensors, blocks = TENSORS[min(len(lists), 5) - 1], 0, 0, 0
    for tensor in lists[0]:
        tensors, left = tensors + 1, -(-tensor.numel() // CHUNK)
        while left:
            taken = min(left, BLOCKS - blocks)
            left, blocks = left - taken, blocks + taken
            if blocks == BLOCKS:
                launches, tensors, blocks = launches + 1, int(left > 0), 0
        if tensors == most:
            launches, tensors, blocks = launches + 1, 0, 0
    return launches + bool(blocks)


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    """scaled_dot_product_attention as a card computes it, in one kernel: flash attention in half precision, the
    memory-efficient one with a mask or in fp32. Without kernels for CUDA, PyTorch would take several operations.
    """
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(q.dtype).expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, q.requires_grad, dropout_p, is_causal, scale=scale
    )[0]


class RmsNorm(torch.autograd.Function):
    """One kernel forward and one backward, as on a card; it counts as layer norm's."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        out, mean, rstd = torch.ops.aten.native_layer_norm(x, shape, weight, None, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        found = torch.ops.aten.native_layer_norm_backward(
            grad, x, list(weight.shape), mean, rstd, weight, None, [True, True, False]
        )
        return found[0], None, found[1], None


@contextmanager
def fake_cuda(capability: tuple[int, int] = (8, 9)) -> Iterator[None]:
    """Tensors are fake within, and torch.cuda answers as if there were one card of `capability`. To ask a tensor for
    its value raises torch's DataDependentOutputException: on a card it would be waited for.
    """
    answers = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "is_bf16_supported": lambda including_emulation=True: capability >= (8, 0), "device": lambda _: nullcontext(),
        "get_device_capability": lambda *_: capability, "synchronize": lambda *_: None,
    }  # fmt: skip
    with (
        mock.patch.multiple(torch.cuda, **answers),
        mock.patch.object(fake_tensor, "init_gpu_context"),
        mock.patch.object(Tensor, "pin_memory", lambda self: self),
        mock.patch.object(symmetric, "works", return_value=True),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        mock.patch.object(torch.nn.functional, "rms_norm", RmsNorm.apply),
        mock.patch.object(torch.nn.utils.clip_grad, "_has_foreach_support", return_value=True),
        torch.autograd.set_multithreading_enabled(False),  # device threads would need a device
        fake_tensor.FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


@contextmanager
def counting() -> Iterator[tuple[FlopCounterMode, Counted]]:
    """Count what is done within `fake_cuda`."""
    with FlopCounterMode(display=False) as flops, Counted() as counted:
        yield flops, counted
