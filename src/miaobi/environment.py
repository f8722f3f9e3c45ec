"""What a result depends on besides its settings: versions, the state of the code, the machine."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from miaobi import __version__

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors")
"""Those whose version may change a result."""


@dataclass
class Environment:
    """Versions, code and machine."""

    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    """Of the repository that this code lies in (a checkout, or the project of a venv), else of the current directory;
    None where there is none."""
    git_dirty: bool | None = None
    """Whether files were changed since; None where that is not known."""
    system: str = ""
    cpu: str = ""
    cores: int = 0
    """That this process may use."""
    memory_bytes: int | None = None
    gpus: list[str] = field(default_factory=list)
    """Those that torch sees, where it is imported."""


def environment() -> Environment:
    """What is here. torch is not imported for it."""
    versions = {"miaobi": __version__, "python": platform.python_version()}
    commit, dirty = git_state()
    return Environment(
        versions | {name: found for name in PACKAGES if (found := version(name)) is not None}, commit, dirty,
        f"{platform.system()} {platform.release()} {platform.machine()}", cpu_name(), usable_cores(), memory_bytes(),
        gpus(),
    )  # fmt: skip


def version(package: str) -> str | None:
    """Version of an installed package; None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def git_state() -> tuple[str | None, bool | None]:
    """Commit, and whether files were changed since; see `Environment`.

    Of the current directory's repository only the commit: to look for changes git may run filters that it configures.
    """
    code = Path(__file__).parent
    if commit := _git(code, "rev-parse", "HEAD"):
        changed = _git(code, "status", "--porcelain", "--untracked-files=no")
        return commit, None if changed is None else bool(changed)
    return _git(Path.cwd(), "rev-parse", "HEAD"), None


def _git(directory: Path, *words: str) -> str | None:
    """What git says; None where it is missing, fails, or takes long. Nothing that a repository configures is run."""
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-C", str(directory), *words]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    """The CPU as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """The machine's memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def gpus() -> list[str]:
    """Names of the GPUs that torch sees, where it is imported."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
