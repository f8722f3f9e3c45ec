"""Reads optimizer state of older versions: torch's distributed checkpoints, without executing anything in them.

Their `.metadata` is a pickle. It is read by an unpickler that knows a dozen names and replaces each by plain data: no
function or class that the file names is ever called. Tensors are read by torch with weights_only=True.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miaobi.files import read_whole
from miaobi.model.tensors import refuse_bomb

PREFIX = "optimizer."


class Plain:
    """Stands for any object of the file: its arguments and fields."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update(part)


KNOWN = {
    f"torch.distributed.checkpoint.{name}"
    for name in ("metadata.Metadata", "metadata.TensorStorageMetadata", "metadata.BytesStorageMetadata",
                 "metadata.ChunkStorageMetadata", "metadata.TensorProperties", "metadata.MetadataIndex",
                 "metadata._MEM_FORMAT_ENCODING", "metadata.StorageMeta", "filesystem._StorageInfo")
} | {"torch.Size", "torch.serialization._get_layout", "torch.float32", "torch.float64", "torch.bfloat16",
     "torch.float16", "torch.int64", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath",
     "pathlib._local.WindowsPath"}  # fmt: skip


class Reader(pickle.Unpickler):
    """Unpickler that knows the names above, and makes plain data of them."""

    def find_class(self, module: str, name: str) -> Any:
        """`Plain` for a known name. Raises UnpicklingError for any other."""
        if f"{module}.{name}" not in KNOWN:
            raise pickle.UnpicklingError(f"it names {module[:60]}.{name[:60]}, which is no data")
        return Plain


def checked(file: Path) -> bytes:
    """The bytes of a pickle. Raises UnpicklingError if it would allocate memory far beyond its own size."""
    data = read_whole(file)
    for code, argument, _ in pickletools.genops(data):
        if "PUT" in code.name and isinstance(argument, int) and argument > len(data):
            raise pickle.UnpicklingError("a memo far beyond its end")
    return data


def offset_of(index: Any) -> tuple[int, ...]:
    """Offset of a part; () for numbers."""
    offset = getattr(index, "offset", None)
    return () if offset is None else tuple(offset.args[0])


class OlderState:
    """A directory with `.metadata` and `*.distcp`; the interface of `optimizer_state.Saved`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.left = sum(file.stat().st_size for file in directory.glob("*.distcp") if file.is_file())
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        self.scaler: dict[str, float] = {}
        try:
            storage = Reader(io.BytesIO(checked(directory / ".metadata"))).load().storage_data
            for index, info in storage.items():
                name, offset = str(index.fqn), offset_of(index)
                self.add(name, offset, self.read_part(info))
        except (pickle.UnpicklingError, zipfile.BadZipFile, AttributeError, IndexError, TypeError, MemoryError,
                RecursionError) as e:  # fmt: skip
            raise ValueError(f".metadata is damaged: {str(e)[:200] or type(e).__name__}") from e
        for name, parts in self.parts.items():
            ends = [[o + n for o, n in zip(offset, part.shape, strict=True)] for offset, part in parts]
            self.shapes[name] = tuple(map(max, zip(*ends, strict=True)))
            if sum(part.numel() for _, part in parts) != torch.Size(self.shapes[name]).numel():
                raise ValueError(f"{name} is not whole")

    def read_part(self, info: Any) -> Any:
        """A tensor, or a number of the GradScaler."""
        file = self.directory / Path(str(info.relative_path)).name
        if not file.is_file():  # a pipe would be waited for
            raise ValueError(f"{file.name} is missing, or no file")
        with file.open("rb") as f:
            f.seek(int(info.offset))
            data = f.read(int(info.length))
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(".metadata names the same bytes twice")
        refuse_bomb(io.BytesIO(data), file.name)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    def add(self, name: str, offset: tuple[int, ...], part: Any) -> None:
        """Register a part under its current name."""
        if name.startswith("scaler.") and isinstance(part, (int, float)):
            self.scaler[name.removeprefix("scaler.")] = float(part)
        elif name.startswith(PREFIX) and isinstance(part, Tensor):
            parameter, _, key = name.removeprefix(PREFIX).rpartition(".")
            self.parts.setdefault(f"{parameter}/{key}", []).append((offset, part))
        else:
            raise ValueError(f"{name[:80]} is neither a tensor nor a number")

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A region of a tensor."""
        whole = torch.zeros(self.shapes[name])
        for begins, part in self.parts[name]:
            whole[tuple(slice(b, b + n) for b, n in zip(begins, part.shape, strict=True))] = part
        return whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
