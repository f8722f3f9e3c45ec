"""Two network hosts on one machine: namespaces with a network, a name and an /etc/hosts of their own, joined by a cable
that can be cut."""

import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from tests import processes

from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.train import rendezvous, saving, world
from miaobi.train.run_directory import Progress

IP = shutil.which("ip") or shutil.which("ip", path="/usr/sbin:/sbin")
WAYS = [("--user", "--map-root-user"), ()]  # as any user; as root, where users may not make namespaces
KINDS = ("--net", "--uts", "--mount")
SUBNET = "10.77.0"

# small-gpt's train300M_ddp.yaml, its keys and comments' order, made tiny. Dropout is 0: its seed depends on the rank.
YAML = """
data_path: data/train.txt
train_percent: 0.8
block_size: 32
vocab_size: 400
n_layer: 2
n_head: 2
n_embd: 32
dropout: 0.0
bias: True
compile: False  # DDP模式下暂时禁用compile
max_epoch : 1
tensorboard_path :  ./tensorboard
device: cpu
eval_freq: 20
eval_steps: 4
train_batch: 4  # 总batch size，会在多个GPU之间自动分配
test_batch: 16
grad_clip: 1.0
ddp: True  # 启用分布式训练
local_rank: -1  # 本地进程排名，由 torch.distributed.launch 自动设置
world_size: 2  # 总进程数（GPU数量）
lr : 2e-3
warmup_steps: 10
decay_steps: 1000
min_lr: 1e-5
weight_decay : 1e-1
beta1: 0.9
beta2: 0.95
checkpoint_root: ./checkpoints
save_freq: 4000 # save when global_step % save_freq == 0
resume_from: NULL
seed :  114514
"""

# The README of small-gpt, but for the address and the counts; train.py is `-m miaobi train` here.
TWO_NODES = """torchrun --nnodes=2 --node_rank={rank} --nproc_per_node={count} \\
  --master_addr={address} --master_port=29500 \\
  -m miaobi train config/train300M_ddp.yaml"""
ELASTIC = """torchrun --nnodes=1:2 --nproc_per_node=1 --max-restarts=3 \\
  --rdzv_backend=c10d --rdzv_endpoint={address} \\
  --rdzv-conf=keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=3,read_timeout=10 \\
  -m miaobi train config/train300M_ddp.yaml"""

FLOAT32 = "--dtype=float32"  # losses are compared within 1e-4: not in what a CPU with bf16 units would take

pytestmark = pytest.mark.slow


class Host:
    """A network host: commands run in its namespaces, in a directory that both hosts share."""

    def __init__(self, number: int, inside: list[str], shared: Path) -> None:
        self.name, self.address = f"miaobi-{'ab'[number]}", f"{SUBNET}.{number + 1}"
        self.inside, self.shared = inside, shared

    def do(self, *command: object) -> None:
        """Run a command that must succeed."""
        subprocess.run([*self.inside, *map(str, command)], check=True, capture_output=True, text=True)

    def start(self, command: str, out: str, *flags: str) -> subprocess.Popen:
        """Start a command of the seed's in the shared directory; what it says goes to `out`-HOST.log there."""
        words = shlex.join([f"--checkpoint_root={out}", FLOAT32, *flags])
        shell = ["sh", "-c", f"cd {shlex.quote(str(self.shared))} && exec {command} {words}"]
        with self.log(out).open("w") as log:
            return subprocess.Popen([*self.inside, *shell], stdout=log, stderr=log, env=environment(),
                                    start_new_session=True)  # fmt: skip

    def log(self, out: str) -> Path:
        """What the host's command said."""
        return self.shared / f"{out}-{self.name}.log"


def environment() -> dict[str, str]:
    """torchrun and python are those of the tests; what an outer torchrun or a proxy may have set does not count."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {k: v for k, v in os.environ.items() if not k.startswith("GLOO_")} | {"PATH": path, "OMP_NUM_THREADS": "1"}


@contextmanager
def namespaces(*options: str, prefix: tuple[str, ...] = ()) -> Iterator[str]:
    """New namespaces, which last as long as the context; yields the id of the process that holds them."""
    command = [*prefix, "unshare", *options, "sh", "-c", "echo ready; exec sleep infinity"]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        if holder.stdout.readline() != "ready\n":
            raise OSError(holder.communicate()[1].strip())
        yield str(holder.pid)
    finally:
        holder.kill()
        holder.communicate()


@pytest.fixture(scope="module")
def way() -> tuple[str, ...]:
    """Options by which this system lets us make namespaces."""
    missing = [tool for tool in ("unshare", "nsenter") if not shutil.which(tool)] + ([] if IP else ["ip"])
    if missing:
        pytest.skip(f"network hosts cannot be made here: there is no {', '.join(missing)}")
    refusals = []
    for options in WAYS:
        try:
            with namespaces(*options, *KINDS):
                return options
        except OSError as e:
            refusals.append(str(e))
    pytest.skip(f"network hosts cannot be made here: {'; '.join(refusals)}")


@pytest.fixture(scope="module")
def hosts(way, shared) -> Iterator[tuple[Host, Host]]:
    """Hosts miaobi-a and miaobi-b, each of which gives its own name the address 127.0.1.1, as Debian does."""
    with ExitStack() as stack:
        a = stack.enter_context(namespaces(*way, *KINDS))
        enter = ["nsenter", f"--target={a}", *([("--user")] if way else []), "--net", "--uts", "--mount"]
        b = stack.enter_context(namespaces(*KINDS, prefix=("nsenter", f"--target={a}", "--user") if way else ()))
        two = Host(0, enter, shared), Host(1, [part.replace(a, b) for part in enter], shared)
        two[0].do(IP, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", b)
        for host, other in (two, two[::-1]):
            names = shared / f"hosts-{host.name}"
            names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{other.address} {other.name}\n")
            host.do("mount", "--bind", names, "/etc/hosts")
            host.do("hostname", host.name)
            host.do(IP, "address", "add", f"{host.address}/24", "dev", "cable")
            host.do(IP, "link", "set", "cable", "up")
            host.do(IP, "link", "set", "lo", "up")
        yield two


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A directory as the seed's: config/train300M_ddp.yaml and data/train.txt, dialogues with a blank line between."""
    folder = tmp_path_factory.mktemp("shared")
    draw, lines = random.Random(1), []
    for _ in range(300):
        who, what = draw.choice("皇马 曼联 巴萨 拜仁".split()), draw.choice("比赛 冠军 球迷 训练".split())  # noqa: SIM905
        lines += [f"{who}的{what}怎么样？", f"{who}的{what}很好。", ""]
    for name, text in {"data/train.txt": "\n".join(lines), "config/train300M_ddp.yaml": YAML}.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def alone(shared) -> float:
    """Validation loss of the same run in one process on one host."""
    command = f"-m miaobi train config/train300M_ddp.yaml --checkpoint_root=alone {FLOAT32}"
    done = processes.run(shlex.split(command), cwd=shared, env=environment())
    assert done.returncode == 0, done.stderr
    return ending(shared / "alone")


def ending(run: Path) -> float:
    """Validation loss at the end of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [r["val_loss"] for r in rows if "val_loss" in r][-1]


@contextmanager
def ended(*processes: subprocess.Popen) -> Iterator[None]:
    """Whatever happens, nothing is left running."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for_step(run: Path, step: int, *processes: subprocess.Popen) -> None:
    """Return once the run has a checkpoint of `step` steps or more."""
    give_up = time.monotonic() + 240
    while (last := pointed(run / "checkpoints" / "last")) is None or int(last.name.removeprefix("step-")) < step:
        assert all(p.poll() is None for p in processes), "the run ended early"
        assert time.monotonic() < give_up, "the run does not get there"
        time.sleep(0.005)


def test_the_seeds_commands_for_two_machines_end_with_the_loss_of_one_process(hosts, alone, shared):
    """Two processes on each; with one on each, below, a run is cut in two."""
    out = "two-by-two"
    running = [
        host.start(TWO_NODES.format(rank=rank, count=2, address=hosts[0].address), out)
        for rank, host in enumerate(hosts)
    ]
    with ended(*running):
        codes = [process.wait(timeout=240) for process in running]
    said = hosts[0].log(out).read_text()
    assert codes == [0, 0], said + hosts[1].log(out).read_text()
    assert "4 processes on 2 machines" in said
    assert ending(shared / out) == pytest.approx(alone, abs=1e-4)


@pytest.fixture(scope="module")
def cut_off(hosts, shared) -> dict[str, list[int | None]]:
    """Two runs whose cable is cut at once, since each then waits: one that cannot go on, one that may with one host.

    Returns the exit codes on both hosts; None where a command had to be ended. In the first run a checkpoint follows
    every step, so that the cable is cut while one is being written.
    """
    endless = ("--comm_timeout=10", "--max_epoch=100000", "--save_freq=1")
    fixed = [
        host.start(TWO_NODES.format(rank=rank, count=1, address=hosts[0].address), "cut", *endless)
        for rank, host in enumerate(hosts)
    ]
    with ended(*fixed):
        wait_for_step(shared / "cut", 1, *fixed)
        elastic = [host.start(ELASTIC.format(address=hosts[0].name), "elastic", "--comm_timeout=10") for host in hosts]
        with ended(*elastic):
            wait_for_step(shared / "elastic", 20, *fixed, *elastic)
            hosts[1].do(IP, "link", "set", "cable", "down")
            codes = {"cut": [process.wait(timeout=120) for process in fixed]}
            elastic[0].wait(timeout=180)
            codes["elastic"] = [process.poll() for process in elastic]
            hosts[1].do(IP, "link", "set", "cable", "up")
            return codes


def test_a_cut_cable_ends_the_run_with_the_name_of_the_host_that_is_out_of_reach(cut_off, hosts, shared):
    assert "2 processes on 2 machines" in hosts[0].log("cut").read_text()
    for host, other in (hosts, hosts[::-1]):
        said = host.log("cut").read_text()
        assert f"host {other.name} ({other.address}) cannot be reached" in said, said
    assert 0 not in cut_off["cut"]


def test_when_a_cable_is_cut_the_host_of_the_rendezvous_continues_alone(cut_off, hosts, alone, shared):
    said = hosts[0].log("elastic").read_text()
    assert cut_off["elastic"][0] == 0, said
    assert cut_off["elastic"][1] != 0, "the host that is cut off cannot have finished"
    assert f"host {hosts[1].name} ({hosts[1].address}) cannot be reached" in said
    assert "continuing from step" in said
    assert f"host {hosts[0].name} ({hosts[0].address}) cannot be reached" in hosts[1].log("elastic").read_text()
    assert ending(shared / "elastic") == pytest.approx(alone, abs=1e-4)


def test_processes_that_are_started_again_meet_in_a_store_without_the_addresses_of_the_dead(monkeypatch):
    """torchrun keeps its store. Whoever comes first must not take what the attempt before left there."""
    kept, late, patience = dist.TCPStore("127.0.0.1", 0, is_master=True), 0.5, timedelta(seconds=20)
    me = threading.local()

    def meet(rank: int, attempt: int) -> str:
        time.sleep(late * ((rank + attempt) % 2))
        me.store, me.rank = dist.TCPStore("127.0.0.1", kept.port, timeout=patience), rank
        store = rendezvous.fresh_store(patience)
        store.set(f"{rank}", f"attempt {attempt}")
        return store.get(f"{1 - rank}").decode()

    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(me.store, me.rank, 2)]))
    for attempt in range(4):
        with ThreadPoolExecutor(2) as ranks:
            assert list(ranks.map(meet, range(2), [attempt] * 2)) == [f"attempt {attempt}"] * 2
    me.store, me.rank = kept, 0
    with pytest.raises(dist.DistError, match="rank 1 did not come"):
        rendezvous.fresh_store(timedelta(seconds=0.2))


@pytest.fixture
def neighbour() -> Iterator[tuple[world.World, world.World]]:
    """Ranks 0 and 1, and whether the second still answers: `neighbour[1].leave()` ends that."""
    worlds = [world.World(rank, 2, alive=socket.create_server(("127.0.0.1", 0), backlog=1)) for rank in range(2)]
    for one in worlds:
        one.hosts = [(f"host-{w.rank}", *w.alive.getsockname()) for w in worlds]
        threading.Thread(target=one.answer, daemon=True).start()
    yield tuple(worlds)
    for one in worlds:
        if one.alive.fileno() != -1:
            one.leave()


def test_a_rank_that_waits_for_a_slow_disk_waits_on_until_another_rank_is_gone(neighbour, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "POLL_SECONDS", 0.01)
    plan = SimpleNamespace(world=neighbour[0], out=tmp_path, progress=Progress())  # what waiting needs of a plan
    saver = saving.Saver(plan)
    saver.thread = threading.Thread(target=time.sleep, args=(0.5,), daemon=True)
    saver.thread.start()
    saver.finish()
    saver.thread = threading.Thread(target=threading.Event().wait, daemon=True)
    saver.thread.start()
    neighbour[1].leave()
    with pytest.raises(
        UserError, match=r"lost the other ranks: the process of rank 1 on host-1 is gone.*a checkpoint was written"
    ):
        saver.finish()
