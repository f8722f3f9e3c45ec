"""The processes of one run: what they share, what they agree on, and what is said when one is lost.

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

LAST_WORD = 5.0  # seconds in which the rank that failed speaks first; torchrun ends the others within one
REASONS = (None, "interrupted", "terminated")


@dataclass
class World:
    """The processes of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    hosts: list[tuple[str, str, int]] = field(default_factory=list)
    """Of every rank: host, address, and a port that takes connections as long as the process lives."""
    control: Any = None
    """Process group (gloo) for small agreements in the loop."""
    slow: Any = None
    """Process group (gloo) for what may take hours: preparing data, writing checkpoints in the background."""
    alive: socket.socket | None = None
    left: bool = False
    """Whether `leave` was called."""
    restarted: bool = False
    """Whether torchrun has repeated its command, as it was: what that moved aside the first time is now the run."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks and writes."""
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
        """`value` where what each rank has as `mine` is finite, else NaN, on every rank: all take the same decision.

        Scalars on the device of the run; nobody waits for a GPU.
        """
        broken = (~mine.isfinite()).float()
        if self.size > 1:
            dist.all_reduce(broken)
        return torch.where(broken > 0, torch.nan, value)

    def agree(self, reason: str | None) -> str | None:
        """The gravest of the ranks' reasons to stop; None if no rank has one."""
        if self.size == 1:
            return reason
        code = torch.tensor(REASONS.index(reason))
        dist.all_reduce(code, dist.ReduceOp.MAX, group=self.control)
        return REASONS[int(code)]

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """What every rank has, anything that JSON can hold, in the order of ranks. group: default `control`.

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

        Equally many on every rank (FSDP's forward passes are collective), filled up with rows in which nothing counts.
        """
        rows = -(-len(windows.inputs) // self.size)
        index = np.arange(self.rank * rows, (self.rank + 1) * rows)
        mine = Batch(*(None if part is None else part[index % len(part)] for part in windows))
        mine.targets[index >= len(windows.inputs)] = IGNORE
        return mine

    def unreachable(self) -> list[str]:
        """What is wrong with the other ranks, as far as a new connection to each can tell."""
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
        """The error that the other ranks do not answer any more: which of them, as far as is known."""
        problems = "; ".join(self.unreachable()) or "all processes still answer: one of them is stuck, or was too slow"
        return UserError(f"{socket.gethostname()} lost the other ranks: {problems} ({why}). "
                         "docs/cluster.md says what to try")  # fmt: skip

    def answer(self) -> None:
        """Take the connections by which others see that this process lives, as long as it does."""
        with contextlib.suppress(OSError):  # closed by `leave`
            while True:
                self.alive.accept()[0].close()

    def leave(self) -> None:
        """Close the connections."""
        self.left = True
        if self.alive is not None:
            self.alive.shutdown(socket.SHUT_RDWR)  # wakes `answer`
            self.alive.close()
        if dist.is_initialized():
            gc.collect()  # sharded modules are cycles that hold a group: destroyed at exit, its threads would abort
            dist.destroy_process_group()


def check_same(world: World, cfg: RunConfig, fingerprint: str) -> None:
    """Raise UserError naming the first rank whose settings are not rank 0's, or has other data."""
    mine = {key: str(value) for key, value in flatten(cfg).items()} | {"the prepared data (SHA-256)": fingerprint}
    settings = world.gather(mine)
    for rank, theirs in enumerate(settings):
        differ = [key for key, value in theirs.items() if value != settings[0][key]]
        if differ:
            if not world.is_first:
                time.sleep(LAST_WORD)
                raise SystemExit(2)  # rank 0 says it
            key = differ[0]
            raise UserError(f"rank {rank} on {world.hosts[rank][0]} differs from rank 0: {key} is {theirs[key]}, "
                            f"rank 0 has {settings[0][key]}; all ranks need the same settings")  # fmt: skip


def check_batch(world: World, cfg: TrainConfig) -> None:
    """Raise UserError for a global batch that does not divide over the ranks, or ranks that do not over the shards."""
    batch, size = cfg.global_batch, world.size
    if batch % size:
        fits = sorted({batch // size * size or size, (batch // size + 1) * size})
        raise UserError(f"a batch of {batch} does not divide over {size} processes; "
                        f"try --batch_size={' or '.join(map(str, fits))}, or another number of processes")  # fmt: skip
    if cfg.fsdp_shard_size is not None and size % cfg.fsdp_shard_size:
        raise UserError(f"{size} processes do not divide into groups of fsdp_shard_size={cfg.fsdp_shard_size}")


@contextmanager
def explain_lost(world: World) -> Iterator[None]:
    """Turn a failed collective into a UserError that says which rank or host no longer answers."""
    try:
        yield
    except RuntimeError as e:
        text = str(e)
        if world.size == 1 or not (isinstance(e, dist.DistError) or "gloo" in text or "NCCL" in text):
            raise
        time.sleep(LAST_WORD)
        raise world.lost_ranks_error(first_line(e)) from e


def first_line(e: Exception) -> str:
    return str(e).partition("\n")[0]
