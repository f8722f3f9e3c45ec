"""The bars of the GPU path that can be counted without a GPU: launches, operations, waits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from miaobi import native

ROOT = Path(__file__).parents[2]
MUON_BEFORE = {"qwen3 40x512": (953, 1.6509), "gpt2 6x384": (270, 0.1019)}
"""Launches and TFLOP of a step before it was written for few of them, counted by this program."""


@pytest.fixture(scope="module")
def counted() -> dict[str, dict]:
    """What the program prints; a process of its own, since the device is registered before torch is imported."""
    if native.compiler() is None:
        pytest.skip("no C++ compiler")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.launches", "--json"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("shape", MUON_BEFORE)
def test_muon_in_few_launches(counted, shape):
    launches, tflop = MUON_BEFORE[shape]
    now = counted["items"][f"muon, {shape}"]
    assert now["launches"] <= (0.25 if shape.startswith("qwen3 40") else 0.51) * launches
    assert now["tflop"] <= 0.6 * tflop


def test_a_training_step_never_waits_for_the_card(counted):
    """Two micro-batches, dropout, clipping, averaged weights, a batch of an evaluation; AdamW in bf16, Muon in fp16
    with its scaler. Asking for a value would have ended the program; it says itself whether it would have seen that.
    """
    steps = {name: row for name, row in counted["items"].items() if name.startswith("training")}
    assert {row["waits"] for row in steps.values()} == {0}
    assert len(steps) == 2
    assert counted["seen"] == {"item": True, "bool": True, "list": True, "to the CPU": True, "from it": True,
                               "from it, without waiting": False}  # fmt: skip


@pytest.mark.parametrize(("family", "most"), [("gpt2", 9), ("qwen3", 14), ("qwen3, 2 heads of keys", 14)])
def test_a_layer_is_decoded_in_few_launches(counted, family, most):
    row = counted["items"][f"decoding, {family}"]
    assert row["per_layer"] <= most, row["by_name"]
    assert row["waits"] == 0


@pytest.mark.parametrize(("what", "most", "gigabytes"), [
    ("1 streams", 31, 0.0003), ("256 streams", 31, 0.05), ("all settings", 44, 0.6), ("the likeliest", 11, 0.0002),
])  # fmt: skip
def test_a_token_costs_the_host_two_replays_and_one_copy(counted, what, most, gigabytes):
    """Whatever the number of streams: nothing is copied to the card, nothing launched but what is recorded."""
    row = counted["items"][f"drawing, {what}"]
    assert row["outside"] == row["waits"] == 1
    assert row["recorded"] == 2
    assert row["launches"] <= most, row["by_name"]
    assert row["gigabytes"] <= gigabytes


def test_a_mask_is_made_once_for_all_layers(counted):
    """Not turned into what kernels add to the scores in every layer, nor kept by each for its backward pass."""
    plain, packed = (counted["items"][name] for name in ("forward and backward, qwen3 40x512",
                                                         "the same, packed dialogues"))  # fmt: skip
    assert packed["per_layer"] == plain["per_layer"]
    assert plain["launches"] < packed["launches"] <= plain["launches"] + 10
