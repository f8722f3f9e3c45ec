"""Which files of a directory or an archive are text of a corpus, and why the others are left out."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from miaobi.corpus import encodings
from miaobi.corpus.store import OWN_NAMES, is_prepared
from miaobi.errors import names_listed

COMPRESSION = {".gz": "gz", ".bz2": "bz2", ".xz": "xz", ".zst": "zst", ".zip": "zip"}
ARCHIVES = {
    ".tar", ".tgz", ".tbz2", ".tbz", ".tb2", ".txz", ".tzst", ".tlz", ".rar", ".7z", ".z", ".lz4", ".lzma",
}  # fmt: skip
"""Which nothing here unpacks."""
FORMAT_BY_NAME = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".json": "jsonl",
    ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
TEXT_SUFFIXES = {".txt", ".text", ".md", ".utf8", ".gbk", ".gb18030", ".big5"}
_NOT_CORPUS = {
    "readme", "license", "licence", "copying", "notice", "changelog", "contributing", "authors", "makefile",
    "dockerfile", "requirements", "vocab", "merges", "special_tokens", "cmakelists",
}  # fmt: skip
_TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt"}
_WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")
_LOG_KEYS = {"step", "current_steps", "iter", "epoch"}
_BY_SUFFIX = "not text by its suffix "
_LISTED = 20
"""More files of one directory than this, left out for one reason, are one line of the list."""
HEAD = 4096
"""Bytes of a file that are looked at before it is taken."""
MAX_POINTER = 512
POINTERS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file itself: git lfs pull",
    b"/annex/objects/": "a git-annex pointer, not the file itself: git annex get",
}


@dataclass(frozen=True)
class LeftOut:
    """A file, or several files of one directory, that were not taken for text."""

    path: str
    reason: str
    files: int = 1


def reason_by_name(name: str) -> str:
    """Why a file of this name is no text of a corpus, or "" where its name speaks for it or says nothing."""
    path = Path(name)
    if is_hidden(name):
        return "hidden"
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSION else path
    suffix = inner.suffix.lower()
    if path.suffix.lower() in ARCHIVES or suffix in ARCHIVES:
        return "an archive that is not unpacked here"
    if path.suffix.lower() == ".zip" or suffix in FORMAT_BY_NAME:
        return ""
    if inner.name.split(".")[0].lower() in _NOT_CORPUS:
        return "about the files, by its name"
    if re.fullmatch(r"tokenized_train_\d+\.txt", inner.name):  # GPT2-Chinese's
        return "token ids, by its name"
    return "" if not suffix or suffix in TEXT_SUFFIXES else f"{_BY_SUFFIX}{suffix}"


def reason_by_content(name: str, head: bytes) -> str:
    """Why a file that begins like this (HEAD bytes) is no text of a corpus, or ""."""
    if not head:
        return "empty"
    if pointer := pointer_reason(head):
        return pointer
    suffix = Path(name).suffix.lower()
    if not suffix and encodings.detect(head, is_whole=len(head) < HEAD) is None:
        return "no suffix, and not text"
    if FORMAT_BY_NAME.get(suffix) != "jsonl":
        return ""
    encoding, mark = encodings.detect(head, is_whole=False) or ("utf-8", 0)
    text = head[mark:].decode(encoding, "replace").lstrip()
    first, _, more = text.partition("\n")
    record = _json_object(first)
    if record and _LOG_KEYS & record.keys() and not any(isinstance(value, (str, list)) for value in record.values()):
        return "the log of a training run"
    if suffix == ".json" and (first.strip() == "{" or (record is not None and not more.strip())):
        return "one JSON object, not records"
    return "" if text.startswith(("{", "[")) or suffix != ".json" else "not JSON"


def pointer_reason(head: bytes) -> str:
    """What a small file stands for that is only a pointer to text elsewhere, or ""."""
    return next((reason for begin, reason in POINTERS.items() if head.startswith(begin)), "")


def _json_object(line: str) -> dict | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def files_below(root: Path, leave: Callable[[Path, str], None]) -> Iterator[Path]:
    """Files that their names and the directories they are in do not rule out; `leave` is called with the others.

    Links to directories are followed; each real directory is read once.
    """
    seen, waiting = set(), deque([root])
    while waiting:
        refused = lambda error: leave(Path(error.filename), "cannot be read")  # noqa: E731
        for name, directories, files in os.walk(waiting.popleft(), onerror=refused):  # links wait, so that a
            directory, status = Path(name), os.stat(name)  # directory's own path wins
            if (status.st_dev, status.st_ino) in seen:
                directories.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            if reason := _directory_reason(directory, set(files), is_root=directory == root):
                directories.clear()
                leave(directory, reason)
                continue
            for child in directories:
                if is_hidden(child):
                    leave(directory / child, "hidden")
            directories[:] = sorted(child for child in directories if not is_hidden(child))
            waiting.extend(directory / child for child in directories if (directory / child).is_symlink())
            is_ours = "manifest.json" in files and is_prepared(directory)
            for file in files:
                path = directory / file
                reason = "made by miaobi prepare" if is_ours and OWN_NAMES.fullmatch(file) else reason_by_name(file)
                if not reason and not path.is_file():
                    reason = "not a file" if path.exists() else "a link that leads nowhere"
                if reason:
                    leave(path, reason)
                else:
                    yield path


def _directory_reason(directory: Path, files: set[str], is_root: bool) -> str:
    if "config.json" in files and (_TOKENIZER_FILES & files or any(name.endswith(_WEIGHTS) for name in files)):
        return "a model directory"
    if not is_root and "manifest.json" in files and all(map(OWN_NAMES.fullmatch, files)) and is_prepared(directory):
        return "prepared data"
    return ""


def is_clear(name: str, size: int) -> bool:
    """Whether a file need not be opened to know that it is to be read: it takes long for a million small ones."""
    suffix = Path(name).suffix.lower()
    return size > MAX_POINTER and suffix != "" and FORMAT_BY_NAME.get(suffix) != "jsonl"


def grouped(left: Iterable[LeftOut]) -> list[LeftOut]:
    """Many files of one directory with one reason become one entry."""
    left = list(left)
    counts = Counter((os.path.dirname(entry.path), entry.reason) for entry in left)
    result = {}
    for entry in left:
        key = os.path.dirname(entry.path), entry.reason
        if counts[key] <= _LISTED:
            result[entry.path] = entry
        else:
            result[key] = LeftOut(os.path.join(key[0], ""), entry.reason, counts[key])
    return list(result.values())


def table_lines(taken: Counter[str], left: list[LeftOut]) -> list[str]:
    """A compact table: what was taken, as what, and what was left out and why."""
    by_reason: dict[str, list[LeftOut]] = {}
    suffixes = sorted({entry.reason for entry in left if entry.reason.startswith(_BY_SUFFIX)})
    unknown = names_listed(reason.removeprefix(_BY_SUFFIX) for reason in suffixes)
    for entry in left:  # suffixes of all kinds together: they say the same
        several = len(suffixes) > 1 and entry.reason in suffixes
        reason = f"not text by their suffixes ({unknown})" if several else entry.reason
        by_reason.setdefault(reason, []).append(entry)
    lines = ["taken: " + ", ".join(f"{count:,} as {format}" for format, count in taken.most_common())]
    for reason, entries in by_reason.items():
        names = ", ".join(
            entry.path if entry.files == 1 else f"{entry.path} ({entry.files:,})" for entry in entries[:4]
        )
        more = f" and {len(entries) - 4:,} more" if len(entries) > 4 else ""
        lines.append(f"left out, {reason}: {names}{more}")
    return lines
