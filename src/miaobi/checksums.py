"""SHA-256 of the files of a checkpoint: written with it, compared where it is read, in threads beside other work.

hashlib hashes without Python's lock, so that on another core it costs next to nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from miaobi.environment import usable_cores
from miaobi.errors import UserError
from miaobi.files import flush, is_a, read_json, refuse_pointers, sha256, write_json

CHECKSUMS = "checksums.json"
WEIGHED = ("config.json", "model.safetensors", "tokenizer.json")
"""Files of a checkpoint of ours that are compared with its checksums wherever a model is read."""
EDITABLE = {"generation_config.json", "tokenizer_config.json", "chat_template.jinja", "README.md"}
"""Files that users may edit: they say how to sample, and change nothing in training. All others are compared there."""
MOST_THREADS = 8

_ahead: dict[Path, tuple[tuple[int, ...], Future[str]]] = {}
"""What `hash_ahead` has begun: of each file which one it was (`_state`), and its SHA-256."""


class Checksums(ThreadPoolExecutor):
    """A thread that hashes files while others are written, and all while they are flushed to the disk."""

    def __init__(self) -> None:
        super().__init__(1)
        self.begun: dict[Path, Callable[[], str]] = {}

    def add(self, file: Path, digest: str = "") -> None:
        """Begin to hash a file that is whole; digest: its SHA-256, where somebody else has computed it."""
        self.begun[file] = (lambda: digest) if digest else self.submit(sha256, file).result

    def write(self, directory: Path) -> None:
        """Write the SHA-256 of every file in `directory` into its checksums.json. Raises OSError."""
        files = sorted(p for p in directory.rglob("*") if p.is_file())
        for file in files:
            if file not in self.begun:
                self.add(file)
        for file in files:
            flush(file)
        names = {file: file.relative_to(directory).as_posix() for file in files}
        sums = {name: self.begun[file]() for file, name in names.items()}
        sizes = {name: file.stat().st_size for file, name in names.items()}
        write_json(directory / CHECKSUMS, {"sha256": sums, "bytes": sizes})


def for_model(name: str) -> bool:
    """Whether a file of a checkpoint is compared where its model is read."""
    return name in WEIGHED


def for_training(name: str) -> bool:
    """Whether a file of a checkpoint is compared where a run goes on from it."""
    return name not in EDITABLE


@contextmanager
def verifying(directory: Path, wanted: Callable[[str], bool]) -> Iterator[None]:
    """Compare the files of a directory with its checksums.json while the body reads them; one without (older, or
    foreign) is taken as it is.

    wanted: whether a file is looked at, by its path in the directory.
    Raises UserError naming the first file that is missing or altered, also in place of what the body made of it.
    """
    sums, sizes = recorded(directory, wanted)
    for file in sums:
        if not os.path.isfile(file):  # also where the system knows no such name
            raise UserError(f"{str(file)[:1000]} is missing: the copy of {directory.name} is not whole; copy it again")
        if sizes.get(file, size := file.stat().st_size) != size:
            raise altered(file, f"it has {size:,} bytes instead of {sizes[file]:,}")
    begun = {file: _ahead.pop(file, None) for file in sums}
    ready = {file: ahead[1] for file, ahead in begun.items() if ahead is not None and ahead[0] == _state(file)}
    digests = ready | hashing(file for file in sums if file not in ready)
    try:
        yield
    except Exception:  # an altered file explains it
        refuse_altered(sums, digests)
        raise
    refuse_altered(sums, digests)


def refuse_altered(sums: dict[Path, str], digests: dict[Path, Future[str]]) -> None:
    """Raise UserError naming the first file whose SHA-256 is not the one that was written down."""
    for file, digest in sums.items():
        if digests[file].result() != digest:
            raise altered(file, "its SHA-256 differs")


def altered(file: Path, how: str) -> UserError:
    """The error for a file that is not what was written. Raises UserError for a Git LFS pointer, and says so."""
    refuse_pointers([file])
    return UserError(f"{file} is not what was written ({how}): it was cut short or altered; "
                     "copy it again, or use another checkpoint")  # fmt: skip


def recorded(directory: Path, wanted: Callable[[str], bool]) -> tuple[dict[Path, str], dict[Path, int]]:
    """The files that a directory's checksums.json names: their SHA-256, and their sizes (older ones do not tell).

    Raises UserError where it is damaged.
    """
    found = read_json(directory / CHECKSUMS)
    sums, sizes = found.get("sha256", {}), found.get("bytes", {})
    if not is_a(sums, dict[str, str]) or not is_a(sizes, dict[str, int]):
        raise UserError(f"{directory / CHECKSUMS} is damaged; copy it again")
    for name in sums:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise UserError(f"{directory / CHECKSUMS} names {name[:80]!r}, which is not in its directory")
    files = {name: directory / name for name in sums if wanted(name)}
    return {file: sums[name] for name, file in files.items()}, {files[n]: sizes[n] for n in files.keys() & sizes.keys()}


def hash_ahead(directory: Path, wanted: Callable[[str], bool]) -> None:
    """Begin to hash the files that `verifying` will compare, while there is nothing to read them with yet: importing
    torch takes as long as hashing gigabytes. Raises UserError and OSError for what `verifying` will explain.
    """
    states = {file: _state(file) for file in recorded(directory, wanted)[0]}
    for file, digest in hashing(states).items():
        _ahead[file] = states[file], digest


def _state(file: Path) -> tuple[int, ...]:
    """Tells whether a file is still the one it was."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def hashing(files: Iterable[Path]) -> dict[Path, Future[str]]:
    """Begin to hash files, the largest first, on all cores but one; these threads let the process end at any time."""
    digests: dict[Path, Future[str]] = {file: Future() for file in files}
    waiting = deque(sorted(digests, key=lambda file: -file.stat().st_size))

    def work() -> None:
        while waiting:
            with contextlib.suppress(IndexError):  # another thread has taken the last one
                file = waiting.popleft()
                try:
                    digests[file].set_result(sha256(file))
                except Exception as e:  # for whoever asks for the result
                    digests[file].set_exception(e)

    for _ in range(min(len(waiting), max(1, usable_cores() - 1), MOST_THREADS)):
        Thread(target=work, daemon=True).start()
    return digests
