"""The formula of docs/cluster.md against values worked out by hand, and the table it prints."""

import re
from pathlib import Path

import pytest
import torch
from benchmarks.scaling import (
    MODELS,
    NETWORKS,
    PUBLISHED,
    Args,
    Links,
    Model,
    efficiency,
    exposed_seconds,
    published,
    state_bytes,
    table,
)

from miaobi.device import PEAK_FLOPS
from miaobi.model.transformer import Transformer
from miaobi.settings import load_config
from miaobi.train.recipe import resolve_model

ROOT = Path(__file__).parents[2]
SMALL = Model(1000, n_layer=1, n_embd=8, block_size=10, sequences=3)  # 4,000 bytes of gradients, 2,000 gathered
SLOW = Links(gpu=1000, node=500, gpu_latency=0.01, node_latency=0.1)


def test_ddp_in_one_node():
    # 2 * 7/8 * 4000 / 1000 = 7 s, one bucket with 2 * 7 * 0.01 s of steps, less 2/3 of 3 s
    assert exposed_seconds("ddp", SMALL, 8, SLOW, arithmetic=3) == pytest.approx(7 + 0.14 - 2)


def test_ddp_across_nodes_is_as_fast_as_a_nodes_network():
    # 2 * 31/32 * 4000 / 500 = 15.5 s; up and down a node and the tree of 4 nodes: 2 * (7 * 0.01 + 2 * 0.1)
    assert exposed_seconds("ddp", SMALL, 32, SLOW, arithmetic=3) == pytest.approx(15.5 + 0.54 - 2)


def test_fsdp_across_nodes():
    # 15 steps, one of them through the network: 0.24 s, for the block and for the rest.
    # Gather 15/16 * 2000 / 500 = 3.75, reduce 15/16 * 4000 / 500 = 7.5.
    # Forward: 3.75 + 0.48 - 1; backward: 3.75 + 0.48 + 7.5 + 0.48 - 2.
    assert exposed_seconds("fsdp", SMALL, 16, SLOW, arithmetic=3) == pytest.approx(3.23 + 10.21)


def test_hsdp_across_nodes():
    # Within the node: gather 7/8 * 2000 / 1000 + 2 * 7 * 0.01 = 1.89, reduce 7/8 * 4000 / 1000 + 0.14 = 3.64.
    # Across: 8 shards of 500 bytes, 2 * 1/2 * 4000 / 500 = 8, and 2 * 2 * 0.1.
    # Forward: 1.89 - 1; backward: 1.89 + 3.64 + 8.4 - 2.
    assert exposed_seconds("hsdp", SMALL, 16, SLOW, arithmetic=3) == pytest.approx(0.89 + 11.93)


def test_hsdp_in_one_node_is_fsdp():
    assert exposed_seconds("hsdp", SMALL, 8, SLOW, 3) == exposed_seconds("fsdp", SMALL, 8, SLOW, 3)


def test_efficiency():
    # 30 tokens at 10/s: 3 s of arithmetic and 5.14 s of waiting
    assert efficiency("ddp", SMALL, 8, SLOW, throughput=10) == pytest.approx(3 / 8.14)
    assert efficiency("ddp", SMALL, 8, SLOW, throughput=0.1) == 1  # all of it hidden


def test_what_a_gpu_keeps():
    assert state_bytes("ddp", 1e9, 64) == 16e9
    assert state_bytes("fsdp", 1e9, 64) == 0.25e9
    assert state_bytes("hsdp", 1e9, 64) == 2e9


def test_the_300m_model_is_the_one_that_is_shipped():
    cfg, _ = load_config(ROOT / "configs" / "chat-300m.yaml", [])
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(resolve_model(cfg.model, cfg.model.vocab_size)).parameters())
    assert MODELS["300M"].parameters == pytest.approx(parameters, rel=2e-3)  # positions are left out
    assert MODELS["300M"].flops_per_token == pytest.approx(6 * 295.1e6 + 12 * 26 * 960 * 256)


def test_published_speeds_are_shares_of_an_h100s_peak_that_their_authors_know():
    """torchtitan says 39% for the 8B with torch.compile."""
    assert [round(PUBLISHED[name].flops / PEAK_FLOPS["H100"], 2) for name in MODELS] == [0.40, 0.39]


def test_torchtitans_fsdp_on_128_gpus_is_as_efficient_as_it_says():
    """Llama 3.1 8B, two sequences of 8,192 a GPU, December 2024: 6,667 tokens/s a GPU on 8, 6,514 on 128."""
    llama = Model(8.03e9, 32, 4096, 8192, sequences=2)
    assert efficiency("fsdp", llama, 128, NETWORKS["InfiniBand"], 6667) == pytest.approx(6514 / 6667, abs=0.03)


def test_the_page_shows_what_is_printed():
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    shown = [
        re.split(r"\s*\|\s*", line.strip("| \n")) for line in page.splitlines() if re.match(r"\| (300M|7B) \|", line)
    ]
    printed = table(dict(zip(MODELS, published(), strict=True)), Args().link_efficiency)
    assert shown == printed
    assert [int(row[1]) for row in printed] == [8, 64, 512, 64, 512] * 2
