"""A step without values against real ones: what autograd keeps, what tensors take."""

import dataclasses
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from miaobi.config import OptimConfig
from miaobi.model.config import LoraConfig, ModelConfig
from miaobi.model.lora import add_lora
from miaobi.model.transformer import Transformer
from miaobi.plan.memory import MemoryTracker, StepSpec, kv_cache, largest_micro, step_memory
from miaobi.train import orthogonal
from miaobi.train.layout import Objective
from miaobi.train.recipe import resolve_optim

TINY = {"n_layer": 3, "n_head": 2, "n_embd": 48, "block_size": 32, "vocab_size": 200}


def work(family: str = "qwen3", **changes) -> StepSpec:
    shape = {key: changes.pop(key) for key in list(changes) if key in ModelConfig.__dataclass_fields__}
    model = ModelConfig(**TINY | {"family": family} | shape)
    usual = StepSpec(model, resolve_optim(OptimConfig(), family, 100), None, "cpu", torch.float32, 4, 1)
    return dataclasses.replace(usual, **changes)


def kept(one: StepSpec) -> int:
    """Bytes that autograd keeps for the backward pass of a real model, parameters not counted."""
    model = Transformer(one.shape)
    if one.lora:
        add_lora(model, one.lora)
    model.recompute = one.recompute
    own = {p.untyped_storage().data_ptr() for p in model.parameters()} | {model.wte.weight.untyped_storage().data_ptr()}
    found: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    ids = torch.randint(0, 200, (one.micro, one.shape.block_size))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = Objective(model.train())(ids, ids, None, None)
    assert loss.isfinite()
    return sum(found.values())


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "llama"])
def test_activations_are_what_autograd_keeps(family, dropout, recompute):
    one = work(family, dropout=dropout, recompute=recompute)
    assert step_memory(one).activations == pytest.approx(kept(one), rel=0.08)


def test_activations_of_adapters_are_what_autograd_keeps():
    one = work("qwen3", lora=LoraConfig(lora_rank=4), optim=resolve_optim(OptimConfig(), "qwen3", 100, "lora"))
    told = step_memory(one)
    assert told.activations == pytest.approx(kept(one), rel=0.08)
    model = Transformer(one.shape)
    whole = sum(p.numel() for p in model.parameters())
    add_lora(model, one.lora)
    thin = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert told.weights == pytest.approx(4 * (whole + thin), rel=0.03)  # and the table of angles
    assert told.gradients == 4 * thin


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_weights_gradients_and_moments_are_four_bytes_each(family):
    one = work(family)
    model = Transformer(one.shape)
    parameters = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    told = step_memory(one)
    assert told.gradients == 4 * parameters
    assert told.weights == pytest.approx(4 * parameters, rel=0.05)  # and the table of angles
    moments = 8 * parameters if family == "gpt2" else 8 * (parameters - matrices) + 4 * matrices
    assert told.optimizer == pytest.approx(moments, rel=0.01)
    several = step_memory(dataclasses.replace(one, pieces=2))
    parts = (several.weights, several.gradients, several.optimizer, several.activations, several.working)
    assert several.peak == sum(parts)


def test_what_saves_memory_saves_it_and_what_takes_it_takes_it():
    usual = step_memory(work(n_layer=6))
    assert step_memory(work(n_layer=6, recompute=True)).peak < usual.peak
    assert step_memory(work(n_layer=6, micro=8)).activations == pytest.approx(2 * usual.activations, rel=0.05)
    assert step_memory(work(n_layer=6, dropout=0.1)).activations > usual.activations
    half = step_memory(work(n_layer=6, device="cuda", dtype=torch.bfloat16))
    assert half.activations < 0.85 * usual.activations
    drops = work(n_layer=6, device="cuda", dtype=torch.bfloat16, dropout=0.1, block_size=256)
    on_cpu = dataclasses.replace(drops, device="cpu")
    assert step_memory(drops).activations < step_memory(on_cpu).activations, "its kernel keeps no probabilities"


# What others published of GPUs. A layer of a GPT-2 keeps s*b*h*(34 + 5as/h) bytes in 16 bits with dropout: 16 values of
# s*b*h and 2 masks of bytes; and of its attention 2 values and a mask of a*s*s*b, which a kernel that computes it anew
# does not keep (Korthikanti et al., arXiv 2205.05198, equation 2 and section 5).
VALUES, MASKS, ATTENTION_VALUES, ATTENTION_MASKS = 16, 2, 2, 1
MICRO, HEADS, WIDTH, LENGTH = 4, 4, 256, 128


def bytes_of_a_layer(device: str, dropout: float, dtype: torch.dtype) -> float:
    """Activations that a layer adds, in units of s*b*h."""
    shape = {"n_head": HEADS, "n_embd": WIDTH, "block_size": LENGTH, "dropout": dropout}
    told = [step_memory(work("gpt2", n_layer=n, device=device, dtype=dtype, micro=MICRO, **shape)) for n in (2, 6)]
    return (told[1].activations - told[0].activations) / 4 / (MICRO * LENGTH * WIDTH)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_layer_on_a_gpu_keeps_what_the_published_formula_says(dtype, dropout):
    """Within 1%: that leaves out means, deviations and the sums of the attention's rows."""
    expected = VALUES * dtype.itemsize + MASKS * (dropout > 0)
    if dtype == torch.bfloat16:  # Megatron computes in 16 bits throughout; autocast keeps what is added up, and read by
        expected += 2 * 2  # the two norms, in 32, and a copy in 16 of the 12 h*h weights
        expected += 2 * 12 * WIDTH / (MICRO * LENGTH)
    assert bytes_of_a_layer("cuda", dropout, dtype) == pytest.approx(expected, rel=0.01)


def test_attention_probabilities_take_the_memory_of_the_published_formula():
    """Ours on a CPU with dropout, whose masks take as much as values."""
    expected = 4 * (VALUES + MASKS + (ATTENTION_VALUES + ATTENTION_MASKS) * HEADS * LENGTH / WIDTH)
    assert bytes_of_a_layer("cpu", 0.1, torch.float32) == pytest.approx(expected, rel=0.01)


def test_the_states_of_gpt2_xl_are_16_bytes_a_parameter():
    """24 GB for "1.5B": ZeRO (Rajbhandari et al., arXiv 1910.02054), section 3.1; within 5%, as there are 1.56B."""
    shape = {"n_head": 25, "n_embd": 1600, "block_size": 1024, "vocab_size": 50257, "micro": 1}
    states = []
    for layers in (1, 2):  # of 48 alike
        told = step_memory(work("gpt2", n_layer=layers, device="cuda", dtype=torch.bfloat16, **shape))
        states.append(told.weights + told.gradients + told.optimizer)
    assert states[0] + 47 * (states[1] - states[0]) == pytest.approx(24e9, rel=0.05)


def test_packed_dialogues_have_a_mask():
    assert step_memory(work(documents=True, block_size=128)).peak > step_memory(work(block_size=128)).peak


@pytest.mark.parametrize("micro", [1, 4, 11, 32])
def test_the_largest_micro_batch_fits_and_one_more_does_not(micro):
    """Whatever the plan's own micro-batch, where the search begins."""
    one = work(micro=micro, pieces=8)
    told = step_memory(dataclasses.replace(one, micro=11, pieces=3))
    free = told.peak + told.fragments + 1000
    found = largest_micro(one, 32, free)
    assert found == 11
    assert largest_micro(one, 8, 1 << 40) == 8
    assert largest_micro(one, 8, 1000) == 0


def test_products_block_by_block_need_the_memory_of_whole_ones(monkeypatch):
    """Why a plan may trace them whole."""

    def peak(block: int) -> int:
        monkeypatch.setattr(orthogonal, "BLOCK", block)
        with FakeTensorMode(), MemoryTracker() as tracker:
            orthogonal.orthogonalize(torch.empty(2, 512, 1024))
        return tracker.peak

    assert peak(128) == peak(sys.maxsize)


def test_keys_and_values_are_those_that_the_model_makes():
    shape = ModelConfig(**TINY, family="qwen3", n_kv_head=1)
    caches = Transformer(shape).make_caches(3)
    assert kv_cache(shape, torch.float32, streams=3) == sum(c.k.nbytes + c.v.nbytes for c in caches)
