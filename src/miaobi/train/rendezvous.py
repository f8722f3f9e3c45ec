"""How the processes of a run meet: torchrun starts them, and restarts them; CPUs communicate by gloo, GPUs by nccl."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import time
from datetime import timedelta
from threading import Thread
from uuid import uuid4

import torch
import torch.distributed as dist

from miaobi.config import TrainConfig
from miaobi.console import log, quiet
from miaobi.device import pick_device
from miaobi.errors import UserError
from miaobi.train.world import World, first_line

LONG = timedelta(days=1)  # for rank 0 to prepare the data, for the slowest disk to take a checkpoint
_world: World | None = None


def join(cfg: TrainConfig) -> World:
    """Join the processes that torchrun started; further calls return the same world.

    Raises UserError if torchrun started several processes and `parallel` is none.
    """
    global _world
    if _world is not None and not _world.left:
        return _world
    size, rank = whole_number("WORLD_SIZE", 1), whole_number("RANK", 0)
    if size > 1 and cfg.parallel == "none":
        raise UserError(f"parallel=none, but torchrun started {size} processes, which would all write one run; "
                        "leave --parallel out, or start miaobi train without torchrun")  # fmt: skip
    if rank:
        quiet()
    on_gpus = pick_device(cfg.device).type == "cuda" and dist.is_nccl_available()  # Windows has none: gloo moves both
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
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
        rank, size, whole_number("LOCAL_RANK", 0),
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


def whole_number(name: str, default: int) -> int:
    """An environment variable that torchrun sets. Raises UserError if it is not a whole number."""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UserError(f"{name} is {text[:40]!r} in the environment; torchrun sets a whole number: unset it, or start "
                        "miaobi train with torchrun")  # fmt: skip
    return int(text)


def fresh_store(timeout: timedelta) -> dist.Store:
    """The store through which the processes meet, without entries of an earlier attempt. Raises DistError.

    torchrun's store outlives the processes that it restarts (torch 2.13), and gloo and nccl would find addresses of
    dead processes in it. So rank 0 chooses a new prefix for this attempt and answers it to every rank that asks now.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    name = uuid4().hex
    if rank:
        store.set(f"question/{rank}", name)
        name = store.get(f"answer/{name}").decode()
        store.set(f"{name}/joined/{rank}", "")
        return dist.PrefixStore(name, store)
    missing, give_up = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > give_up:
            raise dist.DistStoreError(f"rank {min(missing)} did not come within {timeout.total_seconds():.0f} s")
        for other in missing:
            if store.check([f"question/{other}"]):  # perhaps that of a dead process: answered again until it joins
                store.set(f"answer/{store.get(f'question/{other}').decode()}", name)
        time.sleep(0.02)
        missing = {other for other in missing if not store.check([f"{name}/joined/{other}"])}
    return dist.PrefixStore(name, store)


def own_address(store: dist.Store, rank: int, size: int) -> str:
    """The address by which other machines reach this one."""
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
                reply = fcntl.ioctl(s.fileno(), 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                if socket.inet_ntoa(reply[20:24]) == address:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return


def rank_device(name: str, world: World) -> torch.device:
    """The device of this rank: with several ranks, GPU number `local_rank`.

    Raises UserError where torchrun started more processes than the machine has GPUs.
    """
    device = pick_device(name)
    if device.type != "cuda" or world.size == 1:
        return device
    gpus = torch.cuda.device_count()
    if world.local_rank >= gpus:
        raise UserError(f"rank {world.rank} has no GPU of its own: this machine has {gpus}; "
                        f"start torchrun with --nproc_per_node={gpus}")  # fmt: skip
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)
