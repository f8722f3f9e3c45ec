"""The numbers that a configuration leaves open."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from miaobi.config import RunConfig, TrainConfig
from miaobi.model.config import ModelConfig
from miaobi.train.recipe import CPU_TOKENS, micro_batch


@given(st.integers(1, 200), st.sampled_from([16, 256, 1024, 8192]), st.sampled_from([1, 2, 4]))
def test_a_cpu_takes_a_step_in_equal_pieces_of_bounded_size(rows, block, ranks):
    cfg = RunConfig(model=ModelConfig(block_size=block), train=TrainConfig(batch_size=rows * ranks))
    micro = micro_batch(cfg, torch.device("cpu"), ranks)
    assert micro == 1 or micro * block <= CPU_TOKENS
    pieces = [len(range(rows)[i : i + micro]) for i in range(0, rows, micro)]
    assert sum(pieces) == rows
    assert len(pieces) == -(-rows // max(1, min(rows, CPU_TOKENS // block))), "no more of them than are needed"
    assert micro_batch(cfg, torch.device("cuda"), ranks) == rows


def test_a_micro_batch_that_was_asked_for_is_taken():
    cfg = RunConfig(train=TrainConfig(batch_size=64, micro_batch_size=32))
    assert micro_batch(cfg, torch.device("cpu"), 1) == 32
    assert micro_batch(cfg, torch.device("cpu"), 4) == 16, "a rank has no more"
    nanogpts = RunConfig(train=TrainConfig(batch_size=4, gradient_accumulation_steps=8))
    assert micro_batch(nanogpts, torch.device("cpu"), 1) == 4
