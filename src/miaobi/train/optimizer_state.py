"""Saving the optimizers' state: safetensors, one file per rank, readable by any number of ranks in any layout.

`optimizer-R-of-N.safetensors` holds the parts of rank R, as PARAMETER/KEY; the file's header has their positions in the
whole tensors, and `optimizer.json` what is common to all. State beyond `FILE_BYTES` continues in
`optimizer-R-of-N.1.safetensors` and so on; the first file has their number. Nothing in them is executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.amp import GradScaler

from miaobi.errors import UserError
from miaobi.files import is_a, read_record, write_json
from miaobi.model.families import is_finite
from miaobi.model.transformer import Transformer
from miaobi.train.layout import is_sharded
from miaobi.train.older_state import OlderState
from miaobi.train.optimizer import Muon
from miaobi.train.world import World

Optimizers = list[torch.optim.Optimizer]
KEYS = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}
NEVER_NEGATIVE = ("step", "exp_avg_sq")
DTYPES = ("F64", "F32", "F16", "BF16")
INDEX = "optimizer.json"
FILE_BYTES = 128 << 20
"""Bytes of tensors per file, unless a single one is larger: each file is hashed while the next is written."""


@dataclass(frozen=True)
class Index:
    """Content of optimizer.json."""

    ranks: int
    """Number of ranks that wrote files."""
    tensors: int
    """Number of whole tensors in all files."""
    scaler: dict[str, float] = field(default_factory=dict)
    """GradScaler's state; empty except for float16."""


@dataclass
class Part:
    """Rows of a tensor that one rank holds."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    values: Tensor


@dataclass
class State:
    """A copy on the CPU of what this rank writes."""

    parts: dict[str, Part]
    tensors: int
    """Number of whole tensors, over all ranks."""
    scaler: dict[str, float]


def file_name(rank: int, ranks: int, file: int = 0) -> str:
    """Name of a rank's file."""
    return f"optimizer-{rank}-of-{ranks}{f'.{file}' if file else ''}.safetensors"


def copied(model: Transformer, optimizers: Optimizers, scaler: GradScaler, world: World) -> State:
    """A copy of what this rank is to write. Tensors that every rank has whole are divided among the ranks."""
    parts, count = {}, 0
    for name, tensor in sorted(held(model, optimizers).items()):
        if is_sharded(tensor):
            if (part := local_part(tensor)) is not None:
                parts[name] = part
        elif count % world.size == world.rank:
            parts[name] = Part(tuple(tensor.shape), (0,) * tensor.ndim, tensor.detach().to("cpu", copy=True))
        count += 1
    return State(parts, count, {key: float(value) for key, value in scaler.state_dict().items()})


def held(model: Transformer, optimizers: Optimizers) -> dict[str, Tensor]:
    """PARAMETER/KEY -> state, of every parameter that has state. Rates and decays belong to the configuration."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}/{key}": state[key]
        for optimizer in optimizers
        for p, state in optimizer.state.items()
        for key in KEYS[type(optimizer)]
    }


def local_part(tensor: Any) -> Part | None:
    """This rank's rows of a DTensor; None if it has none, or if another rank writes the same rows."""
    mesh, placements = tensor.device_mesh, tensor.placements
    replicated = any(placement.is_replicate() and mesh.get_local_rank(i) for i, placement in enumerate(placements))
    offset, local = offset_of(tensor), tensor.to_local()
    if replicated or not local.numel():
        return None
    return Part(tuple(tensor.shape), offset, local.detach().to("cpu", copy=True))


def offset_of(tensor: Any) -> tuple[int, ...]:
    """Where this rank's part of a DTensor begins in the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def write(state: State, directory: Path, world: World) -> Iterator[str]:
    """Write this rank's parts, and on rank 0 the index; yields the name of each complete file. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, Part]] = [{}]
    room = FILE_BYTES
    for key, part in state.parts.items():
        if files[-1] and part.values.nbytes > room:
            files.append({})
            room = FILE_BYTES
        files[-1][key] = part
        room -= part.values.nbytes
    for i, parts in enumerate(files):
        name = file_name(world.rank, world.size, i)
        where = {key: [list(part.shape), list(part.offset)] for key, part in parts.items()}
        header = {"where": json.dumps(where)} | ({"files": str(len(files))} if len(files) > 1 and i == 0 else {})
        try:
            save_file({key: part.values.contiguous() for key, part in parts.items()}, directory / name, header)
        except SafetensorError as e:  # how it reports a full disk
            raise OSError(f"{name} was not written whole ({e}); is the disk full?") from e
        yield name
    if world.is_first:
        write_json(directory / INDEX, asdict(Index(world.size, state.tensors, state.scaler)))


def load(directory: Path, model: Transformer, optimizers: Optimizers, scaler: GradScaler) -> None:
    """Load the optimizers' state from a checkpoint of any number of ranks and any layout.

    Raises UserError if something is missing, truncated, altered, or of another model or optimizer.
    """
    try:
        saved = Saved(directory) if (directory / INDEX).is_file() else OlderState(directory)
        wanted = {
            f"{name}/{key}": (optimizer, p, key)
            for optimizer in optimizers
            for name, p in named(model, optimizer)
            for key in KEYS[type(optimizer)]
        }
        if saved.shapes and saved.shapes.keys() != wanted.keys():
            differ = sorted(saved.shapes.keys() ^ wanted.keys())
            raise ValueError(f"{differ[0]} is {'missing' if differ[0] in wanted else 'one too many'}")
        for name, shape in saved.shapes.items():
            optimizer, p, key = wanted[name]
            if shape != (() if key == "step" else tuple(p.shape)):
                raise ValueError(f"{name} has shape {shape}")
            optimizer.state[p][key] = state = filled(saved, name, p, key)
            local = state.to_local() if is_sharded(state) else state
            if not is_finite(local):
                raise ValueError(f"{name} has numbers that are not finite")
            if key in NEVER_NEGATIVE and local.lt(0).any():
                raise ValueError(f"{name} has numbers below zero")
        if saved.scaler and scaler.is_enabled():
            scaler.load_state_dict({k: type(v)(saved.scaler[k]) for k, v in scaler.state_dict().items()})
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, SafetensorError) as e:
        raise UserError(f"{directory} cannot be read ({str(e)[:300] or type(e).__name__}); it was cut short or "
                        "altered, or belongs to another model or optimizer: continue from another checkpoint with "
                        "--resume_from=RUN/checkpoints/step-N") from e  # fmt: skip


def named(model: Transformer, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The parameters of an optimizer, with their names."""
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return ((name, p) for name, p in model.named_parameters() if id(p) in mine)


@torch.no_grad()
def filled(saved: Saved | OlderState, name: str, p: Tensor, key: str) -> Tensor:
    """One state tensor, in the layout of its parameter."""
    if key == "step":
        return saved.read(name, (), ()).to(p.device, torch.float32)
    state = torch.zeros_like(p, memory_format=torch.preserve_format)
    if not is_sharded(p):
        return state.copy_(saved.read(name, (0,) * p.ndim, tuple(p.shape)))
    local: Any = state
    local.to_local().copy_(saved.read(name, offset_of(p), tuple(local.to_local().shape)))
    return state


class Saved:
    """The files of all ranks, read part by part.

    Attributes: shapes of the whole tensors; scaler: GradScaler's state.
    """

    def __init__(self, directory: Path) -> None:
        index = read_record(directory / INDEX, Index)
        self.scaler = index.scaler
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.parts: dict[str, list[tuple[Any, tuple[int, ...], tuple[int, ...]]]] = {}
        if not 0 < index.ranks < 1 << 20:
            raise ValueError(f"{INDEX} says {index.ranks} ranks")
        for rank in range(index.ranks):
            files = self.read_header(directory / file_name(rank, index.ranks))
            for i in range(1, files):
                self.read_header(directory / file_name(rank, index.ranks, i))
        for name, parts in self.parts.items():
            if sum(math.prod(extent) for _, _, extent in parts) != math.prod(self.shapes[name]):
                raise ValueError(f"{name} is not whole")
        if len(self.shapes) != index.tensors:
            raise ValueError(f"{len(self.shapes)} tensors of {index.tensors}")

    def read_header(self, path: Path) -> int:
        """Read the header of a file; returns the number of files of its rank, 1 unless it says otherwise."""
        if not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path.name} is missing, or no file")
        file = safe_open(path, "pt")
        header = file.metadata() or {}
        where = json.loads(header.get("where", "null"))
        files = header.get("files", "1")
        if not is_a(where, dict[str, list[list[int]]]) or where.keys() != set(file.keys()) or not files.isdecimal():
            raise ValueError(f"{path.name} has a damaged header")
        for name, (shape, offset) in where.items():
            self.add(name, tuple(shape), tuple(offset), file)
        return int(files)

    def add(self, name: str, shape: tuple[int, ...], offset: tuple[int, ...], file: Any) -> None:
        """Register a part of a tensor; raises ValueError if it is not inside the whole tensor or overlaps another
        part.
        """
        found = file.get_slice(name)
        if found.get_dtype() not in DTYPES:
            raise ValueError(f"{name} has numbers of the kind {found.get_dtype()}")
        extent = tuple(found.get_shape())
        inside = len(shape) == len(offset) == len(extent) and all(
            o >= 0 and o + e <= s for o, e, s in zip(offset, extent, shape, strict=True)
        )
        parts = self.parts.setdefault(name, [])
        apart = all(not overlap(offset, extent, other, theirs) for _, other, theirs in parts)
        if not inside or not apart or self.shapes.setdefault(name, shape) != shape:
            raise ValueError(f"{name} is in parts that do not fit together")
        parts.append((file, offset, extent))

    def read(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A region of a tensor; only the parts in it are read."""
        out = torch.zeros(shape)
        for file, begins, extent in self.parts[name]:
            if not shape:
                return file.get_tensor(name)
            if (common := overlap(offset, shape, begins, extent)) is not None:
                theirs = tuple(slice(a - b, z - b) for (a, z), b in zip(common, begins, strict=True))
                ours = tuple(slice(a - o, z - o) for (a, z), o in zip(common, offset, strict=True))
                out[ours] = file.get_slice(name)[theirs]
        return out


def overlap(
    offset: tuple[int, ...], shape: tuple[int, ...], other: tuple[int, ...], extent: tuple[int, ...]
) -> list[tuple[int, int]] | None:
    """The intersection of two regions as (start, end) in each dimension; None if it is empty."""
    common = [(max(a, b), min(a + n, b + m)) for a, n, b, m in zip(offset, shape, other, extent, strict=True)]
    return common if all(a < z for a, z in common) else None
