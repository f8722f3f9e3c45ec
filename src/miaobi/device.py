"""What the machine at hand does well: device, precision, compilation, memory, peak speed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from miaobi import native
from miaobi.console import warn_once
from miaobi.errors import UserError

# Dense bf16 (or, where there is none, fp16/fp32) peaks in FLOP/s, from the vendors' data sheets. A key is the words of
# a card's name that tell it from others; of several that fit, the one with most words is meant ("RTX 4080 Laptop GPU"
# is not an RTX 4080). Dashes, and the memory that some names end in, are not words.
PEAK_FLOPS = {
    "B300": 2500e12, "B200": 2250e12, "GB200": 2500e12, "H200": 989e12, "GH200": 989e12, "H100": 989e12,
    "H100 PCIe": 756e12, "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "A40": 149.7e12,
    "A30": 165e12, "A10": 125e12, "A10G": 70e12, "A16": 18e12, "A2": 18e12, "L40S": 362e12, "L40": 181e12,
    "L20": 119.5e12, "L4": 121e12, "L2": 96.5e12, "V100": 125e12, "T4": 65e12, "P100": 19e12,
    "RTX PRO 6000": 503.8e12, "RTX 6000 Ada": 364.2e12, "RTX 5000 Ada": 261.1e12, "RTX 4500 Ada": 158.3e12,
    "RTX 4000 Ada": 106.9e12, "RTX A6000": 154.8e12, "RTX A5000": 111.1e12, "RTX A4500": 94.6e12,
    "RTX A4000": 76.7e12, "RTX A2000": 31.9e12, "TITAN RTX": 130.5e12, "Quadro RTX 6000": 130.5e12,
    "RTX 5090": 209.5e12, "RTX 5090 D": 209.5e12, "RTX 5080": 112.6e12, "RTX 5070 Ti": 87.9e12, "RTX 5070": 61.7e12,
    "RTX 5060 Ti": 47.4e12, "RTX 5060": 38.4e12, "RTX 4090": 165.2e12, "RTX 4090 D": 147.1e12,
    "RTX 4090 Laptop": 65.9e12, "RTX 4080": 97.5e12, "RTX 4080 SUPER": 104.4e12, "RTX 4080 Laptop": 49.3e12,
    "RTX 4070": 58.3e12, "RTX 4070 SUPER": 71e12, "RTX 4070 Ti": 80.2e12, "RTX 4070 Ti SUPER": 88.2e12,
    "RTX 4070 Laptop": 31.3e12, "RTX 4060": 30.2e12, "RTX 4060 Ti": 44.1e12, "RTX 4060 Laptop": 23.2e12,
    "RTX 3090": 71e12, "RTX 3090 Ti": 80e12, "RTX 3080": 59.5e12, "RTX 3080 Ti": 68.2e12, "RTX 3070": 40.6e12,
    "RTX 3070 Ti": 43.5e12, "RTX 3060": 25.3e12, "RTX 3060 Ti": 32.4e12, "RTX 2080 Ti": 107.6e12,
    "RTX 2080": 80.5e12, "RTX 2070": 59.7e12, "RTX 2060": 51.6e12,
    "MI355X": 2500e12, "MI325X": 1307e12, "MI300X": 1307e12, "MI250X": 383e12, "MI210": 181e12, "MI100": 92.3e12,
    "RX 7900 XTX": 122.8e12,
}  # fmt: skip


def known_peak(name: str) -> float | None:
    """FLOP/s of a GPU by its name in the data sheets; None for one that is not among them."""
    words = re.split(r"[\s-]+", re.sub(r"\b\d+\s?GB\b", " ", name.upper()))
    fits = [key for key in PEAK_FLOPS if set(key.upper().split()) <= set(words)]
    if not fits:
        return None
    best = max(fits, key=lambda key: len(key.split()))
    if "LAPTOP" in words and "Laptop" not in best:  # runs at a fraction of the desktop card's power
        return None
    return PEAK_FLOPS[best]


def gpu_has_bf16(device: torch.device) -> bool:
    """Whether this GPU, which need not be the current one, has units for bf16 products."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def pick_device(name: str = "auto") -> torch.device:
    """`auto` takes CUDA, then Apple MPS, then the CPU; a named device that is missing becomes a warning and the CPU.

    Raises UserError for any other, also of those that torch knows.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name!r} is not known; give auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        warn_once(f"device {name} is not available here; using the CPU (--device=cpu says so without this line)")
        return torch.device("cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name} does not exist; this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        warn_once("device mps is not available here; using the CPU")
        return torch.device("cpu")
    return device


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (AVX512-BF16 or AMX); elsewhere bf16 is ~100x slower.

    ONEDNN_MAX_CPU_ISA, which limits what the library of the products uses, counts. MIAOBI_CPU_BF16=yes|no answers
    instead of the machine, so that the other kind's behaviour can be tried. Raises UserError for another value of it.
    """
    answer = os.environ.get("MIAOBI_CPU_BF16", "auto")
    if answer not in ("auto", "yes", "no"):
        raise UserError(f"the environment variable MIAOBI_CPU_BF16 is {answer!r}; give auto, yes or no")
    if answer != "auto":
        return answer == "yes"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    if not re.search("DEFAULT|ALL|AVX512.*(BF16|FP16|AMX)|AVX10", limit.upper()):
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


@functools.cache
def cpu_flags() -> str:
    """The instructions that the CPU has, in the system's words; its make where the system does not list them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Precision of the matrix products: bf16 where the hardware has it, fp16 on older GPUs, else fp32."""
    if name != "auto":
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
        if device.type == "cpu" and dtype != torch.float32 and not cpu_has_bf16():
            warn_once(f"this CPU has no {name} arithmetic and would crawl; using float32")
            return torch.float32
        if device.type == "cpu" and dtype == torch.float16:
            warn_once("float16 on a CPU is slow and overflows; using bfloat16")
            return torch.bfloat16
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if gpu_has_bf16(device) else torch.float16
    if device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def candidate_dtypes(name: str, device: torch.device, picked: torch.dtype) -> list[str]:
    """Precisions worth timing, by torch's names, `picked` first: on a CPU with bf16 also fp32, unless told.

    Small models on a CPU may lose more by conversions than their products win.
    """
    names = [str(picked).removeprefix("torch.")]
    return names + ["float32"] * (name == "auto" and device.type == "cpu" and picked != torch.float32)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler on the CPU, Triton on CUDA."""
    if device.type == "cpu":
        return native.compiler() is not None
    if device.type == "cuda":
        return sys.platform == "linux" and torch.cuda.get_device_capability(device) >= (7, 0)
    return False


def keep_allocations() -> None:
    """Tell glibc to keep freed memory inside the process.

    By default every tensor above 128 kB is a fresh mmap whose pages the kernel must clear again at each step; on a
    CPU that was most of the cost of log-softmax, fill and copy (figures in docs/lab-notes.md). Harmless elsewhere.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 64 << 20)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch ran out of memory: torch.OutOfMemoryError is one; other allocators raise plain ones."""
    plain = ("can't allocate memory", "MPS backend out of memory", "HIP out of memory", "CUDNN_STATUS_ALLOC_FAILED",
             "CUBLAS_STATUS_ALLOC_FAILED")  # fmt: skip
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in plain)


@contextmanager
def explain_memory(device: torch.device, advice: str) -> Iterator[None]:
    """Turn running out of memory, on a GPU or the CPU, into a UserError that ends in `advice`."""
    try:
        yield
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        raise UserError(f"out of memory on {device}: {advice}") from e


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that the device could reach: from the data sheet for known GPUs, else measured by a square product."""
    if device.type == "cuda":
        peak = known_peak(torch.cuda.get_device_name(device))
        if peak is not None:
            return peak
    # A GPU does a small product in less time than it takes to start one; sixteen in a row are waited for once.
    n, times = (4096, 16) if device.type in ("cuda", "mps") else (1024, 1)
    best = float("inf")
    a = torch.randn(n, n, device=device, dtype=dtype)
    for _ in range(4):
        start = time.perf_counter()
        for _ in range(times):
            product = a @ a
        product[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * times * n**3 / best


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring `peak_memory` anew; memory that was freed is given back first, where the system can."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # what `keep_allocations` kept
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM


def peak_memory(device: torch.device) -> int:
    """Most bytes held at once since `reset_peak_memory`: of the GPU, or of this process (elsewhere than on Linux:
    since it began).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status)[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
