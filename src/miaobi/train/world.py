"""Several processes on one run: how they meet, what they agree on, and what is said when one is lost.

torchrun starts the processes, and starts them again; here they meet, over gloo between CPUs and nccl between GPUs.
With one process nothing here communicates.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Thread
from typing import Any
from uuid import uuid4

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from miaobi.config import RunConfig, TrainConfig
from miaobi.console import log, quiet
from miaobi.corpus.dataset import IGNORE, Batch
from miaobi.device import pick_device
from miaobi.errors import UserError
from miaobi.settings import flatten

LONG = timedelta(days=1)  # for rank 0 to prepare the data, for the slowest disk to take a checkpoint
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

    def agree(self, reason: str | None) -> str | None:
        """The gravest of the ranks' reasons to stop; None if no rank has one."""
        if self.size == 1:
            return reason
        code = torch.tensor(REASONS.index(reason))
        dist.all_reduce(code, dist.ReduceOp.MAX, group=self.control)
        return REASONS[int(code)]

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """What every rank has, in the order of ranks. group: default `control`."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group or self.control)
        return values

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
        found: dict[str, None] = {}
        for rank, (host, address, port) in enumerate(self.hosts):
            no_way = f"host {host} ({address}) cannot be reached"
            if rank == self.rank or no_way in found:
                continue
            try:
                socket.create_connection((address, port), timeout=3).close()
            except ConnectionRefusedError:
                found[f"the process of rank {rank} on {host} is gone"] = None
            except OSError:
                found[no_way] = None
        return list(found)

    def lost(self, why: str) -> UserError:
        """What to raise when the other ranks do not answer any more: which of them, as far as can be told."""
        found = "; ".join(self.unreachable()) or "all processes still answer: one of them is stuck, or was too slow"
        return UserError(f"{socket.gethostname()} lost the other ranks: {found} ({why}). "
                         "docs/cluster.md says what to try")  # fmt: skip

    def answer(self) -> None:
        """Take the connections by which others see that this process lives, as long as it does."""
        with contextlib.suppress(OSError):  # closed by `leave`
            while True:
                self.alive.accept()[0].close()

    def leave(self) -> None:
        """Close the connections."""
        global _world
        _world = None
        if self.alive is not None:
            self.alive.shutdown(socket.SHUT_RDWR)  # wakes `answer`
            self.alive.close()
        if dist.is_initialized():
            gc.collect()  # sharded modules are cycles that hold a group: destroyed at exit, its threads would abort
            dist.destroy_process_group()


_world: World | None = None


def join(cfg: TrainConfig) -> World:
    """Meet the processes that torchrun started; asked again, the same world.

    Raises UserError where torchrun started several and `parallel` is none.
    """
    global _world
    if _world is not None:
        return _world
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size > 1 and cfg.parallel == "none":
        raise UserError(f"parallel=none, but torchrun started {size} processes, which would all write one run; "
                        "leave --parallel out, or start miaobi train without torchrun")  # fmt: skip
    if rank:
        quiet()
    backend = "cpu:gloo,cuda:nccl" if pick_device(cfg.device).type == "cuda" else "gloo"
    timeout = timedelta(seconds=cfg.comm_timeout)
    address, store, restarted = "127.0.0.1", dist.HashStore(), False
    try:
        if size > 1 or "TORCHELASTIC_RUN_ID" in os.environ:
            store = fresh_store(timeout)
            # torchrun's own counter differs between machines, and does not count machines that come and go
            restarted = rank == 0 and store.underlying_store.add("meetings", 1) > 1
        if size == 1 and cfg.parallel != "fsdp":
            _world = World(restarted=restarted)
            return _world
        if size > 1:
            address = own_address(store, rank, size)
            choose_interface(address)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (dist.DistError, ValueError) as e:  # ValueError: RANK or MASTER_ADDR is missing
        master = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(f"cannot meet the other processes at {master} ({first_line(e)}); is the address right, "
                        "the port free and open in the firewall? torchrun sets all of it: see docs/cluster.md"
                        ) from e  # fmt: skip
    alive = socket.create_server((address, 0), backlog=size)
    world = World(
        rank, size, int(os.environ.get("LOCAL_RANK", "0")),
        control=dist.new_group(backend="gloo", timeout=timeout), slow=dist.new_group(backend="gloo", timeout=LONG),
        alive=alive, restarted=restarted,
    )  # fmt: skip
    world.hosts = world.gather((socket.gethostname(), address, alive.getsockname()[1]))
    if size > 1:
        machines = len({host for host, _, _ in world.hosts})
        log(f"{size} processes on {machines} {'machine' if machines == 1 else 'machines'}")
    Thread(target=world.answer, daemon=True).start()
    _world = world
    return world


def fresh_store(timeout: timedelta) -> dist.Store:
    """The store by which the processes meet, without what an earlier attempt left in it. Raises DistError.

    torchrun's store outlives the processes that it starts again (torch 2.13), and gloo and nccl would read in it where
    the dead ones listened. So rank 0 makes up a name for this attempt and answers it to every rank that asks now.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    name = uuid4().hex
    if rank:
        store.set(f"question/{rank}", name)
        name = store.get(f"answer/{name}").decode()
        store.set(f"{name}/heard/{rank}", "")
        return dist.PrefixStore(name, store)
    missing, give_up = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > give_up:
            raise dist.DistStoreError(f"rank {min(missing)} did not come within {timeout.total_seconds():.0f} s")
        for other in missing:
            if store.check([f"question/{other}"]):  # perhaps that of a dead process: answered again until heard
                store.set(f"answer/{store.get(f'question/{other}').decode()}", name)
        time.sleep(0.02)
        missing = {other for other in missing if not store.check([f"{name}/heard/{other}"])}
    return dist.PrefixStore(name, store)


def own_address(store: dist.Store, rank: int, size: int) -> str:
    """The address by which the other machines reach this one."""
    address = address_towards(os.environ["MASTER_ADDR"])
    store.set(f"address/{rank}", address)
    if address.startswith("127."):
        # Beside rank 0, whose machine may call itself 127.0.1.1 in /etc/hosts, as Debian's do
        others = (store.get(f"address/{other}").decode() for other in range(size))
        address = next((address_towards(other) for other in others if not other.startswith("127.")), address)
    return address


def address_towards(host: str) -> str:
    """This machine's address on the way to `host`; 127.0.0.1 where there is none in IPv4."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect((host, 9))  # sends nothing: only picks the route
            return s.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def choose_interface(address: str) -> None:
    """Have gloo use the interface with `address`: left alone it takes what the host's name resolves to."""
    if "GLOO_SOCKET_IFNAME" in os.environ or sys.platform != "linux":
        return
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an IPv4 address
                found = fcntl.ioctl(s.fileno(), 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                if socket.inet_ntoa(found[20:24]) == address:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return


def rank_device(name: str, world: World) -> torch.device:
    """The device of this rank: with several ranks, GPU number `local_rank`.

    Raises UserError where torchrun started more processes than the machine has GPUs.
    """
    device = pick_device(name)
    if device.type != "cuda" or world.size == 1:
        return device
    there = torch.cuda.device_count()
    if world.local_rank >= there:
        raise UserError(f"rank {world.rank} has no GPU of its own: this machine has {there}; "
                        f"start torchrun with --nproc_per_node={there}")  # fmt: skip
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def check_same(world: World, cfg: RunConfig, fingerprint: str) -> None:
    """Raise UserError naming the first rank that was told something else than rank 0, or has other data."""
    mine = {key: str(value) for key, value in flatten(cfg).items()} | {"the prepared data (SHA-256)": fingerprint}
    told = world.gather(mine)
    for rank, theirs in enumerate(told):
        differ = [key for key, value in theirs.items() if value != told[0][key]]
        if differ:
            if not world.is_first:
                time.sleep(LAST_WORD)
                raise SystemExit(2)  # rank 0 tells it
            key = differ[0]
            raise UserError(f"rank {rank} on {world.hosts[rank][0]} differs from rank 0: {key} is {theirs[key]}, "
                            f"rank 0 has {told[0][key]}; all must be told the same")  # fmt: skip


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
        raise world.lost(first_line(e)) from e


def first_line(e: Exception) -> str:
    return str(e).partition("\n")[0]
