"""`miaobi doctor`: what this machine has and lacks, with a remedy each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from miaobi import native
from miaobi.cache import NotPrivateError, private_directory, wished_cache
from miaobi.console import can_show
from miaobi.environment import cpu_name, memory_bytes, usable_cores, version

LOOK = 0.5
"""Seconds in which the work of other programs is measured."""
GIB = 1 << 30
NEEDED_DISK, WISHED_DISK = GIB // 4, 5 * GIB
WISHED_SHARED = 64 << 20
WISHED_FILES = 1024
UNITS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "asimd": "NEON",
         "bf16": "BF16"}  # fmt: skip
"""Flag of a CPU -> its units."""
TAKEN = 0.3
"""Cores that others may take before it is reported."""


@dataclass(frozen=True)
class DoctorConfig:
    """What this machine has and lacks."""


@dataclass(frozen=True)
class Check:
    """What was looked at. ok; note = it works, but less well; missing = miaobi needs it."""

    name: str
    status: Literal["ok", "note", "missing"]
    found: str
    remedy: str = ""


def doctor(cfg: DoctorConfig) -> dict[str, Any]:
    """`miaobi doctor`: healthy (nothing needed is missing), checks [{name, status, found, remedy}, ...]."""
    checks = [check for look in CHECKS for check in look()]
    return {
        "healthy": all(check.status != "missing" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def packages() -> Iterator[Check]:
    """Every package that is needed, in a version that fits; then the extras."""
    from packaging.requirements import Requirement

    wrong, extras = [], {}
    for line in metadata.requires("miaobi") or []:
        wanted = Requirement(line)
        extra = re.search(r"""extra == ['"]([\w-]+)['"]""", line)
        if wanted.marker and not wanted.marker.evaluate({"extra": extra[1] if extra else ""}):
            continue
        has = version(wanted.name)
        if extra:
            extras.setdefault(extra[1], []).append((wanted.name, has))
        elif has is None or not wanted.specifier.contains(has, prereleases=True):
            wrong.append(f"{wanted} ({f'is {has}' if has else 'not installed'})")
    here = f"Python {sys.version.split()[0]}, miaobi {version('miaobi')}"
    if wrong:
        yield Check("packages", "missing", "; ".join(wrong), "pip install --upgrade miaobi")
    else:
        yield Check("packages", "ok", here)
    extras.pop("dev", None)
    absent = {name: [p for p, has in found if has is None] for name, found in extras.items()}
    lacking = [name for name, those in absent.items() if those]
    whole = ", ".join(name for name in absent if name not in lacking) or "none"
    yield Check("extras", "ok", whole + (f"; not installed: {', '.join(lacking)}" if lacking else ""),
                f"only where you want it: pip install 'miaobi[{lacking[0]}]'" if lacking else "")  # fmt: skip


def torch_build() -> Iterator[Check]:
    """torch, and whether its build is for the GPU and the driver that are here."""
    try:
        import torch
    except (ImportError, OSError) as e:
        yield Check("torch", "missing", f"cannot be imported ({str(e)[:120]})", "pip install --force-reinstall torch")
        return
    from miaobi.device import can_compile, pick_device

    driver, build = nvidia_driver(), torch.version.cuda or getattr(torch.version, "hip", None)
    about = f"{torch.__version__}, built for {f'CUDA {build}' if build else 'the CPU'}"
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield Check("torch", "ok", f"{about}; {names}; driver {driver[0] if driver else '?'}")
    elif driver and not build:
        yield Check("torch", "note", f"{about}, but there is an NVIDIA GPU (driver {driver[0]}): it stays idle",
                    f"pip install torch --index-url of a build for CUDA {driver[1] or 'of the driver'} or older: "
                    "see pytorch.org/get-started")  # fmt: skip
    elif driver:
        yield Check("torch", "note", f"{about}, which driver {driver[0]} (CUDA up to {driver[1] or '?'}) does not run",
                    "a newer driver, or a torch built for an older CUDA; then run this again")  # fmt: skip
    else:
        yield Check("torch", "ok", f"{about}; {'Apple GPU' if pick_device().type == 'mps' else 'no GPU here'}")
    yield precision(torch)
    device = pick_device()
    if can_compile(device) and not headers():
        yield Check("torch.compile", "note", f"Python's C headers are missing ({sysconfig.get_paths()['include']})",
                    "Debian, Ubuntu: apt install python3-dev; until then training runs eager")  # fmt: skip
    elif can_compile(device):
        yield Check("torch.compile", "ok", f"can compile for the {device.type}")
    else:
        yield Check("torch.compile", "note", f"has no compiler for the {device.type}: training runs eager",
                    "Debian, Ubuntu: apt install g++" if device.type == "cpu" else "")  # fmt: skip


def nvidia_driver() -> tuple[str, str | None] | None:
    """Version of NVIDIA's driver and of the CUDA that it can run; None without one."""
    try:
        looked = subprocess.run(["nvidia-smi"], capture_output=True, encoding="utf-8", timeout=20, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    driver, cuda = (re.search(rf"{name} Version:\s*([\d.]+)", looked.stdout) for name in ("Driver", "CUDA"))
    return (driver[1], cuda[1] if cuda else None) if driver else None


def precision(torch: Any) -> Check:
    """What the processor, or the GPU, multiplies fast."""
    from miaobi.device import cpu_flags, cpu_has_bf16

    flags = cpu_flags().split()
    units = [name for flag, name in UNITS.items() if flag in flags]
    about = f"{cpu_name()}, {usable_cores()} cores, {' '.join(units) or 'no vector units that are known'}"
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Check("precision", "ok", f"{about}; the GPU has bf16")
        return Check("precision", "ok", f"{about}; the GPU has no bf16: float16 is used")
    return Check("precision", "ok", f"{about}; bf16: {'yes' if cpu_has_bf16() else 'no, float32 is used'}")


def headers() -> bool:
    """Whether Python's C headers are there, which torch.compile includes."""
    return Path(sysconfig.get_paths()["include"], "Python.h").is_file()


def compiled_step() -> Iterator[Check]:
    """The step of generation in C++, and the cache that it is kept in."""
    program = native.compiler()
    if program is None:
        yield Check("compiled step", "note", "no C++ compiler: sample, chat and serve run without it, slower",
                    "Debian, Ubuntu: apt install g++" if sys.platform == "linux" else "")  # fmt: skip
    else:
        yield Check("compiled step", "ok", f"built by {program} when it is first wanted")
    try:
        directory = wished_cache()
    except (RuntimeError, KeyError):
        yield Check("cache", "note", "no home directory: what is compiled is forgotten each time",
                    "set MIAOBI_CACHE_DIR to a directory of your own")  # fmt: skip
        return
    try:
        if directory.exists():
            private_directory(directory)
    except NotPrivateError as e:
        yield Check("cache", "note", f"{directory} is not used: {e}", "remove it, or set MIAOBI_CACHE_DIR")
        return
    failed = sorted(directory.glob("*.failed"))
    if failed:
        yield Check("cache", "note", f"{directory}: a part could not be compiled ({failed[0].name})",
                    f"read {failed[0]}, correct it and delete the file")  # fmt: skip
    else:
        yield Check("cache", "ok", f"{directory}, yours alone")


def fonts() -> Iterator[Check]:
    """Chinese in plots."""
    from miaobi.fonts import chinese_fonts

    found = chinese_fonts()
    if found:
        yield Check("fonts", "ok", f"Chinese in plots: {found[0]}")
    else:
        yield Check("fonts", "note", "no Chinese font: Chinese labels of plots show as boxes",
                    "Debian, Ubuntu: apt install fonts-noto-cjk")  # fmt: skip


def space() -> Iterator[Check]:
    """Disk, shared memory and memory."""
    free = shutil.disk_usage(Path.cwd()).free
    status = "missing" if free < NEEDED_DISK else "note" if free < WISHED_DISK else "ok"
    yield Check("disk", status, f"{free / GIB:.1f} GiB free in {Path.cwd()}",
                "" if status == "ok" else "free some space, or give --out_dir on another disk")  # fmt: skip
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).free
        status = "note" if size < WISHED_SHARED else "ok"
        yield Check("shared memory", status, f"{size / GIB:.2f} GiB free in {shared}",
                    "" if status == "ok" else "processes share memory there; Docker: --shm-size=1g")  # fmt: skip
    total, available = memory_bytes(), available_memory()
    if total:
        size = f"{total / GIB:.1f} GiB" + (f", {available / GIB:.1f} free" if available is not None else "")
        few = available is not None and available < GIB
        yield Check("memory", "note" if few else "ok", size, "close other programs" if few else "")


def available_memory() -> int | None:
    """Bytes that programs may still take; None where the system does not say."""
    try:
        return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))[1])
    except (OSError, TypeError):
        return None


def others() -> Iterator[Check]:
    """Cores that other programs keep busy."""
    from miaobi.train.threads import cpu_seconds, own_seconds

    if cpu_seconds() is None:
        return
    before, own, began = cpu_seconds(), own_seconds(), time.monotonic()
    time.sleep(LOOK)
    spent = cpu_seconds() - before - (own_seconds() - own)
    taken = min(max(0.0, spent / (time.monotonic() - began)), usable_cores())
    busy = taken > TAKEN
    yield Check("other programs", "note" if busy else "ok", f"take {taken:.1f} of {usable_cores()} cores",
                "end them for full speed: `top` names them" if busy else "")  # fmt: skip


def open_files() -> Iterator[Check]:
    """How many files a process may open."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < WISHED_FILES
    number = "any number" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    yield Check("open files", "note" if few else "ok", f"{number} at once",
                f"ulimit -n {4 * WISHED_FILES}" if few else "")  # fmt: skip


def terminal() -> Iterator[Check]:
    """Whether Chinese can be shown and typed."""
    encoding = getattr(sys.stdout, "encoding", None) or "?"
    locale = next((os.environ[key] for key in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(key)), "not set")
    if can_show("妙笔"):
        yield Check("terminal", "ok", f"{encoding}, locale {locale}")
    else:
        remedy = "set PYTHONUTF8=1, and chcp 65001" if os.name == "nt" else "export LANG=C.UTF-8 PYTHONIOENCODING=utf-8"
        yield Check("terminal", "note", f"{encoding}, locale {locale}: Chinese shows as ?", remedy)


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    packages, torch_build, compiled_step, fonts, space, others, open_files, terminal,
)  # fmt: skip
