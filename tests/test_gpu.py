"""What only a card can answer: `pytest -m gpu`, which `python -m benchmarks.gpu` runs as well."""

import pytest
import torch
from tests.conftest import tiny

from miaobi.model.checkpoint import load_model
from miaobi.settings import load_config
from miaobi.train import symmetric
from miaobi.train.loop import Run
from miaobi.train.setup import set_up
from miaobi.train.world import World

pytestmark = pytest.mark.gpu
CARD = torch.device("cuda")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_step_waits_for_nothing(prepared, tmp_path, optimizer):
    """What is counted on tensors without values (benchmarks/launches.py), as CUDA itself sees it."""
    given = tiny(data=prepared(), out_dir=tmp_path / "run", device="cuda", optimizer=optimizer, dropout=0.1)
    cfg, origin = load_config(None, [tuple(flag[2:].split("=", 1)) for flag in given])
    run = Run(set_up(cfg, origin, World(), CARD, torch.float16))
    run.model.train()
    run.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", ["float32", "auto", "float16"])
def test_a_run_in_two_parts_ends_in_the_weights_of_one(train, prepared, tmp_path, dtype):
    """The same bits: no kernel of a step adds up in any order."""
    told = {"data": prepared(), "device": "cuda", "dtype": dtype, "schedule": "constant", "warmup_iters": 0}
    for name, steps in (("whole", 20), ("parts", 10), ("parts", 20)):
        train(out_dir=tmp_path / name, max_iters=steps, **told)
    one, other = (load_model(tmp_path / name, "last")[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_muons_kernel_is_used_where_triton_is():
    pytest.importorskip("triton")
    symmetric.works.cache_clear()
    assert symmetric.works(CARD, torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16)
