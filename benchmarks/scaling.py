"""Scaling on paper: tokens/s of 8, 64 and 512 GPUs, from one GPU's throughput and the bytes that a step moves.

    python -m benchmarks.scaling --throughput 180000 8000

Nothing is run on a GPU here. Without --throughput, one GPU does as many FLOP/s as others measured on H100s with a model
of about that size (`PUBLISHED`). docs/cluster.md has the formula and the table.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from benchmarks.common import machine, parse, report
from miaobi.console import log

GPUS_PER_NODE = 8
GPU_MEMORY = 80e9  # bytes
BYTES_PER_PARAMETER = 16  # kept in fp32: weights, gradients, AdamW's two moments
GRADIENT_BYTES, GATHERED_BYTES = 4, 2  # gradients are reduced in fp32, weights are gathered in bf16
BUCKET_BYTES = 25 << 20  # DDP's default
FORWARD, BACKWARD = 1 / 3, 2 / 3  # of a step's arithmetic
WAYS = ("ddp", "fsdp", "hsdp")


@dataclass(frozen=True)
class Model:
    """What matters of a model, and the tokens one GPU takes per step."""

    parameters: float
    n_layer: int
    n_embd: int
    block_size: int
    sequences: int
    """Per GPU and step."""

    @property
    def tokens(self) -> int:
        """Per GPU and step."""
        return self.sequences * self.block_size

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, attention included (PaLM, appendix B, arXiv:2204.02311)."""
        return 6 * self.parameters + 12 * self.n_layer * self.n_embd * self.block_size


MODELS = {
    "300M": Model(295.1e6, 26, 960, 256, sequences=64),  # configs/chat-300m.yaml
    "7B": Model(6.74e9, 32, 4096, 4096, sequences=2),  # Llama 2's shape
}


@dataclass(frozen=True)
class Published:
    """Tokens/s that somebody measured for one H100 of eight."""

    model: Model
    throughput: float
    source: str

    @property
    def flops(self) -> float:
        """FLOP/s of that GPU."""
        return self.throughput * self.model.flops_per_token


PUBLISHED = {
    "300M": Published(
        Model(124.4e6, 12, 768, 1024, sequences=64), 10e9 / (45 * 60) / 8,
        "llm.c's GPT-2 124M, 10B tokens in 45 minutes on 8 H100s (github.com/KellerJordan/modded-nanogpt, README)",
    ),
    "7B": Published(
        Model(7.5e9, 32, 4096, 8192, sequences=2), 6667.0,  # 8.03e9 but for the input embedding, which is looked up
        "torchtitan's Llama 3.1 8B, FSDP and torch.compile on 8 H100s (benchmarks/llama3_h100_202412_torchtitan.md)",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Links:
    """What joins the GPUs: bytes/s in one direction, and seconds that a step of a collective takes besides."""

    gpu: float
    """NVLink, per GPU."""
    node: float
    """Network, per node of 8 GPUs."""
    gpu_latency: float
    node_latency: float


# Latencies of RDMA and NVLink as NCCL's own estimate has them (src/graph/tuning.cc, ring, Simple); TCP: assumed.
NETWORKS = {
    "InfiniBand": Links(450e9, 8 * 50e9, 3.4e-6, 10e-6),  # 400 Gb/s for each GPU
    "Ethernet": Links(450e9, 12.5e9, 3.4e-6, 50e-6),  # 100 Gb/s for the node, TCP
}


@dataclass(frozen=True)
class Args:
    """Command line."""

    throughput: tuple[float, float] | None = None
    """Your own: measured tokens/s of one GPU, of the 300M and of the 7B."""
    link_efficiency: float = 0.8
    """Share of a link's bandwidth that collectives reach."""
    json: bool = False
    """Print one line of JSON as well."""


def once_around(size: float, calls: int, gpus: int, links: Links) -> float:
    """Seconds to all-gather or to reduce-scatter `size` bytes, in `calls` collectives, through rings over all GPUs.

    Each GPU sends (N-1)/N of the bytes in N-1 steps, and each node as much into its network, since a ring enters a node
    once (https://arxiv.org/abs/1802.05799).
    """
    nodes = nodes_of(gpus)
    rate = links.gpu if nodes == 1 else min(links.gpu, links.node)
    latency = (gpus - nodes) * links.gpu_latency + (nodes - 1) * links.node_latency
    return (gpus - 1) / gpus * size / rate + calls * latency


def all_reduce(size: float, calls: int, gpus: int, links: Links) -> float:
    """Seconds to all-reduce `size` bytes: a ring's bytes twice around, a tree's steps up and down."""
    nodes = nodes_of(gpus)
    rate = links.gpu if nodes == 1 else min(links.gpu, links.node)
    steps = (gpus // nodes - 1) * links.gpu_latency + math.log2(nodes) * links.node_latency
    return 2 * (gpus - 1) / gpus * size / rate + calls * 2 * steps


def nodes_of(gpus: int) -> int:
    """Nodes that `gpus` fill."""
    return max(1, gpus // GPUS_PER_NODE)


def exposed_seconds(way: str, model: Model, gpus: int, links: Links, arithmetic: float) -> float:
    """Seconds of a step in which the GPUs wait for each other's bytes: what arithmetic cannot hide.

    The gather for the forward pass hides behind the forward pass, everything else behind the backward pass.

    Args:
        way: ddp, fsdp, or hsdp (sharded within a node, replicated across nodes).
        arithmetic: seconds that a step computes.
    """
    gradients, weights = GRADIENT_BYTES * model.parameters, GATHERED_BYTES * model.parameters
    if way == "ddp":
        buckets = math.ceil(gradients / BUCKET_BYTES)
        return max(0.0, all_reduce(gradients, buckets, gpus, links) - BACKWARD * arithmetic)
    calls = model.n_layer + 1  # a block at a time, and what is outside the blocks
    members = gpus if way == "fsdp" else min(gpus, GPUS_PER_NODE)
    gather = once_around(weights, calls, members, links)
    reduce = once_around(gradients, calls, members, links)
    if members < gpus:  # each GPU all-reduces its shard with its like on other nodes; the 8 of a node share its network
        nodes = nodes_of(gpus)
        reduce += 2 * (nodes - 1) / nodes * gradients / links.node + calls * 2 * math.log2(nodes) * links.node_latency
    return max(0.0, gather - FORWARD * arithmetic) + max(0.0, gather + reduce - BACKWARD * arithmetic)


def efficiency(way: str, model: Model, gpus: int, links: Links, throughput: float) -> float:
    """Share of `gpus` times one GPU's tokens/s (`throughput`) that is left."""
    arithmetic = model.tokens / throughput
    return arithmetic / (arithmetic + exposed_seconds(way, model, gpus, links, arithmetic))


def state_bytes(way: str, parameters: float, gpus: int) -> float:
    """Weights, gradients and optimizer that each GPU keeps; activations come on top."""
    shards = {"ddp": 1, "fsdp": gpus, "hsdp": min(gpus, GPUS_PER_NODE)}[way]
    return BYTES_PER_PARAMETER * parameters / shards


def table(throughputs: dict[str, float], link_efficiency: float) -> list[list[str]]:
    """Rows: model, GPUs, network, then tokens/s and efficiency of each way."""
    rows = []
    for name, model in MODELS.items():
        for network, links in NETWORKS.items():
            slower = dataclasses.replace(links, gpu=links.gpu * link_efficiency, node=links.node * link_efficiency)
            for gpus in (8, 64, 512):
                if gpus == GPUS_PER_NODE and rows and rows[-1][0] == name:
                    continue  # one node needs no network
                row = [name, str(gpus), "NVLink" if gpus == GPUS_PER_NODE else network]
                for way in WAYS:
                    if state_bytes(way, model.parameters, gpus) > GPU_MEMORY:
                        row.append("does not fit")
                        continue
                    share = efficiency(way, model, gpus, slower, throughputs[name])
                    row.append(f"{gpus * throughputs[name] * share / 1e3:,.0f}k ({share:.0%})")
                rows.append(row)
    return rows


def main() -> None:
    """Compute and print."""
    args = parse("scaling", Args, __doc__)
    throughputs = dict(zip(MODELS, args.throughput or published(), strict=True))
    for name, value in throughputs.items():
        measured = PUBLISHED[name]
        origin = "given" if args.throughput else f"{measured.flops / 1e12:.0f} TFLOP/s, as {measured.source}"
        log(f"one GPU, {name}: {value:,.0f} tokens/s ({origin})")
    report("scaling", ["model", "GPUs", "network", *WAYS], table(throughputs, args.link_efficiency), {
        "machine": machine(), "settings": dataclasses.asdict(args), "tokens_per_second_of_one": throughputs,
    }, args.json)  # fmt: skip


def published() -> list[float]:
    """Tokens/s of one H100 for each model, at the FLOP/s that others measured."""
    return [PUBLISHED[name].flops / model.flops_per_token for name, model in MODELS.items()]


if __name__ == "__main__":
    main()
