"""The processes of a run: collectives, agreement on settings, and errors when a rank is lost.

With one process nothing here communicates.
"""

from __future__ import annotations

import contextlib
import gc
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from miaobi.config import RunConfig, TrainConfig
from miaobi.corpus.dataset import IGNORE, Batch
from miaobi.errors import UserError
from miaobi.settings import flatten

FIRST_RANK_SECONDS = 5.0  # the failed rank reports first, for so long; torchrun ends the others within a second
REASONS = (None, "interrupted", "terminated")


@dataclass
class World:
    """The processes of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    hosts: list[tuple[str, str, int]] = field(default_factory=list)
    """Host, address and a port of every rank; the port accepts connections for as long as the process lives."""
    control: Any = None
    """Process group (gloo) for small collectives in the training loop."""
    slow: Any = None
    """Process group (gloo) for operations that may take hours: preparing data, writing checkpoints in the background.
    """
    alive: socket.socket | None = None
    left: bool = False
    """Whether `leave` was called."""
    restarted: bool = False
    """Whether torchrun has restarted the command: then --init_from=scratch has already been carried out."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which logs and writes."""
        return self.rank == 0

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 runs the body before the others do."""
        if self.size > 1 and not self.is_first:
            dist.barrier(group=self.slow)
        yield
        if self.size > 1 and self.is_first:
            dist.barrier(group=self.slow)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over the ranks of a CPU tensor, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def all_finite(self, value: Tensor, mine: Tensor) -> Tensor:
        """`value` if `mine` is finite on every rank, else NaN, on every rank, so that all decide alike.

        Scalars on the device of the run; does not wait for a GPU.
        """
        broken = (~mine.isfinite()).float()
        if self.size > 1:
            dist.all_reduce(broken)
        return torch.where(broken > 0, torch.nan, value)

    def agree(self, reason: str | None) -> str | None:
        """The most urgent of the ranks' reasons to stop; None if no rank has one."""
        if self.size == 1:
            return reason
        code = torch.tensor(REASONS.index(reason))
        dist.all_reduce(code, dist.ReduceOp.MAX, group=self.control)
        return REASONS[int(code)]

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """The values of all ranks, anything that JSON can hold, by rank. group: default `control`.

        (torch's all_gather_object would unpickle what comes over the network.)
        """
        if self.size == 1:
            return [value]
        group = group or self.control
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor(len(mine)), group=group)
        longest = int(max(lengths))
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=group)
        return [json.loads(bytes(text[:n].tolist())) for text, n in zip(texts, map(int, lengths), strict=True)]

    def rows(self, batch: int) -> slice:
        """This rank's rows of a global batch."""
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def share(self, windows: Batch) -> Batch:
        """This rank's rows of evaluation windows.

        Every rank has equally many (FSDP's forward passes are collective), padded with rows that are not scored.
        """
        rows = -(-len(windows.inputs) // self.size)
        index = np.arange(self.rank * rows, (self.rank + 1) * rows)
        mine = Batch(*(None if part is None else part[index % len(part)] for part in windows))
        mine.targets[index >= len(windows.inputs)] = IGNORE
        return mine

    def unreachable(self) -> list[str]:
        """Which other ranks cannot be reached, and why: tested by a new connection to each."""
        problems: dict[str, None] = {}
        for rank, (host, address, port) in enumerate(self.hosts):
            no_way = f"host {host} ({address}) cannot be reached"
            if rank == self.rank or no_way in problems:
                continue
            try:
                socket.create_connection((address, port), timeout=3).close()
            except ConnectionRefusedError:
                problems[f"the process of rank {rank} on {host} is gone"] = None
            except OSError:
                problems[no_way] = None
        return list(problems)

    def lost_ranks_error(self, why: str) -> UserError:
        """The error for ranks that no longer answer, with the names of those that are known."""
        problems = "; ".join(self.unreachable()) or "all processes still answer: one of them hangs, or was too slow"
        return UserError(f"{socket.gethostname()} lost the other ranks: {problems} ({why}). "
                         "docs/cluster.md says what to try")  # fmt: skip

    def answer(self) -> None:
        """Accept the connections by which other ranks test whether this process lives."""
        with contextlib.suppress(OSError):  # closed by `leave`
            while True:
                self.alive.accept()[0].close()

    def leave(self) -> None:
        """Close the connections and the process group."""
        self.left = True
        if self.alive is not None:
            self.alive.shutdown(socket.SHUT_RDWR)  # wakes `answer`
            self.alive.close()
        if dist.is_initialized():
            gc.collect()  # sharded modules are cycles that hold a group: destroyed at exit, its threads would abort
            dist.destroy_process_group()


def check_same(world: World, cfg: RunConfig, fingerprint: str) -> None:
    """Raise UserError naming the first rank whose settings or data differ from rank 0's."""
    mine = {key: str(value) for key, value in flatten(cfg).items()} | {"the prepared data (SHA-256)": fingerprint}
    settings = world.gather(mine)
    for rank, theirs in enumerate(settings):
        differ = [key for key, value in theirs.items() if value != settings[0][key]]
        if differ:
            if not world.is_first:
                time.sleep(FIRST_RANK_SECONDS)
                raise SystemExit(2)  # rank 0 says it
            key = differ[0]
            raise UserError(f"rank {rank} on {world.hosts[rank][0]} differs from rank 0: {key} is {theirs[key]}, "
                            f"rank 0 has {settings[0][key]}; all ranks need the same settings")  # fmt: skip


def check_batch(world: World, cfg: TrainConfig) -> None:
    """Raise UserError if the global batch is not divisible by the ranks, or the ranks by fsdp_shard_size."""
    batch, size = cfg.global_batch, world.size
    if batch % size:
        fits = sorted({batch // size * size or size, (batch // size + 1) * size})
        raise UserError(f"a batch of {batch} cannot be divided equally among {size} processes; "
                        f"try --batch_size={' or '.join(map(str, fits))}, or another number of processes")  # fmt: skip
    if cfg.fsdp_shard_size is not None and size % cfg.fsdp_shard_size:
        raise UserError(f"{size} processes cannot be divided into groups of fsdp_shard_size={cfg.fsdp_shard_size}")


@contextmanager
def explain_lost(world: World) -> Iterator[None]:
    """Turn a failed collective into a UserError that names the rank or host that no longer answers."""
    try:
        yield
    except RuntimeError as e:
        text = str(e)
        if world.size == 1 or not (isinstance(e, dist.DistError) or "gloo" in text or "NCCL" in text):
            raise
        time.sleep(FIRST_RANK_SECONDS)
        raise world.lost_ranks_error(first_line(e)) from e


def first_line(e: Exception) -> str:
    return str(e).partition("\n")[0]
