"""Schedules against nanoGPT's formula, Muon against torch's and against itself in parts."""

import copy
import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miaobi.config import OptimConfig
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer
from miaobi.train import optimizer
from miaobi.train.optimizer import Muon, make_optimizers, rate, set_rate, step_all
from miaobi.train.recipe import resolve_optim

# --- learning rate -----------------------------------------------------------------------------------------------


def nanogpt_get_lr(it: int, learning_rate: float, min_lr: float, warmup_iters: int, lr_decay_iters: int) -> float:
    """The published schedule, as its README describes it: linear warm-up, cosine, floor."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


@given(
    st.integers(0, 3000),
    st.floats(1e-6, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 500),
    st.integers(1, 2000),
)
def test_cosine_is_nanogpts(step, learning_rate, share, warmup, decay):
    cfg = OptimConfig(learning_rate=learning_rate, min_lr=share * learning_rate, schedule="cosine",
                      warmup_iters=warmup, lr_decay_iters=warmup + decay)  # fmt: skip
    cfg = resolve_optim(cfg, "gpt2", 5000)
    expected = nanogpt_get_lr(step, learning_rate, share * learning_rate, warmup, warmup + decay)
    assert rate(step, cfg) * learning_rate == pytest.approx(expected, rel=1e-9)


@given(st.integers(10, 2000), st.integers(0, 9), st.sampled_from([0.0, 0.1]), st.sampled_from([0.1, 0.5, 1.0]))
def test_wsd_warms_up_stays_and_falls_in_a_line(steps, warmup, floor, fraction):
    cfg = OptimConfig(schedule="wsd", learning_rate=1.0, min_lr=floor, warmup_iters=warmup, decay_fraction=fraction)
    cfg = resolve_optim(cfg, "qwen3", steps)
    rates = [rate(step, cfg) for step in range(steps + 2)]
    decay = max(1, round(fraction * steps))
    assert rates[:warmup] == pytest.approx([(s + 1) / (warmup + 1) for s in range(warmup)])
    assert rates[warmup : steps - decay + 1] == pytest.approx([1.0] * max(0, steps - decay + 1 - warmup))
    falling = rates[max(warmup, steps - decay) : steps + 1]
    assert falling == sorted(falling, reverse=True)
    slopes = {round(a - b, 9) for a, b in pairwise(falling)}
    assert all(slope == pytest.approx((1 - floor) / decay, abs=1e-8) for slope in slopes)
    assert rates[steps] == rates[steps + 1] == pytest.approx(floor)


def test_a_constant_rate_only_warms_up():
    cfg = resolve_optim(OptimConfig(learning_rate=1e-3, warmup_iters=4, schedule="constant"), "gpt2", 100)
    assert [rate(s, cfg) for s in range(200)] == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 196)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_without_decay_lr_the_rate_is_constant_from_the_first_step_as_in_nanogpt(family):
    """`lr = get_lr(iter_num) if decay_lr else learning_rate`; its finetune configurations rely on it."""
    cfg = resolve_optim(OptimConfig(learning_rate=1e-3, warmup_iters=4, decay_lr=False), family, 100)
    assert {rate(s, cfg) for s in range(200)} == {1.0}


def test_set_rate_scales_every_groups_own_peak():
    model = Transformer(TINY)
    cfg = resolve_optim(OptimConfig(learning_rate=3e-3, muon_learning_rate=0.02), "qwen3", 10)
    optimizers = make_optimizers(model, cfg, "muon")
    for share in (1.0, 0.25, 0.5):
        set_rate(optimizers, share)
        assert {g["lr"] for g in optimizers[0].param_groups} == {3e-3 * share}
        assert {g["lr"] for g in optimizers[1].param_groups} == {0.02 * share}


# --- which parameter goes where ----------------------------------------------------------------------------------

TINY = ModelConfig(family="qwen3", n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=16, vocab_size=70)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_every_parameter_is_moved_once_and_only_matrices_decay(family, kind):
    cfg = dataclasses.replace(TINY, family=family, bias=family == "gpt2", n_kv_head=None)
    model = Transformer(cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, resolve_optim(OptimConfig(weight_decay=0.3), family, 10), kind)
    groups = [group for o in optimizers for group in o.param_groups]
    moved = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(moved) == sorted(names.values())
    decayed = {names[id(p)] for group in groups if group.get("weight_decay") for p in group["params"]}
    matrices = {n for n, p in model.named_parameters() if p.ndim >= 2}
    assert decayed == (matrices if kind == "adamw" else {n for n in matrices if not n.startswith("blocks.")})


def test_the_recipe_of_each_family():
    gpt2, qwen3 = (resolve_optim(OptimConfig(), family, 4000) for family in ("gpt2", "qwen3"))
    assert (gpt2.optimizer, gpt2.schedule, gpt2.learning_rate, gpt2.min_lr) == ("adamw", "cosine", 1e-3, 1e-4)
    assert (qwen3.optimizer, qwen3.schedule, qwen3.learning_rate, qwen3.min_lr) == ("muon", "wsd", 3e-3, 0.0)
    assert gpt2.warmup_iters == 200
    assert qwen3.warmup_iters == 10
    assert gpt2.lr_decay_iters == qwen3.lr_decay_iters == 4000


@pytest.mark.parametrize(("n_embd", "expected"), [(64, 3e-3), (256, 3e-3), (512, 3e-3 / 2**0.5), (1024, 1.5e-3)])
def test_wider_models_take_smaller_steps_with_muons_adamw(n_embd, expected):
    wide = resolve_optim(OptimConfig(), "qwen3", 4000, n_embd=n_embd)
    assert wide.learning_rate == pytest.approx(expected)
    assert wide.muon_learning_rate == 0.02
    assert resolve_optim(OptimConfig(), "gpt2", 4000, n_embd=n_embd).learning_rate == 1e-3
    assert resolve_optim(OptimConfig(learning_rate=4e-3), "qwen3", 4000, n_embd=n_embd).learning_rate == 4e-3


# --- Muon --------------------------------------------------------------------------------------------------------


@pytest.mark.bf16
def test_a_zero_gradient_moves_nothing():
    p = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = Muon([{"params": [p], "parts": [[8]]}], lr=0.1, momentum=0.95)
    p.grad = torch.zeros(8, 8)
    optimizer.step()
    assert (p == 1).all()


def gradients(shape: tuple[int, int], steps: int = 4) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=g) for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], grads: list[list[torch.Tensor]]) -> None:
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()


@pytest.mark.bf16
@pytest.mark.parametrize("parts", [[16, 16, 16], [16, 8, 8], [24]])
def test_a_fused_matrix_moves_as_its_parts_would_alone(parts):
    rows = sum(parts)
    fused = torch.nn.Parameter(torch.zeros(rows, 16))
    separate = [torch.nn.Parameter(torch.zeros(n, 16)) for n in parts]
    grads = gradients((rows, 16))
    run(Muon([{"params": [fused], "parts": [parts]}], 0.02, 0.95), [fused], [[g] for g in grads])
    alone = Muon([{"params": separate, "parts": [[n] for n in parts]}], 0.02, 0.95)
    run(alone, separate, [list(g.split(parts)) for g in grads])
    torch.testing.assert_close(fused.data, torch.cat([p.data for p in separate]), atol=1e-3, rtol=1e-2)
    if len(parts) > 1:
        whole = torch.nn.Parameter(torch.zeros(rows, 16))
        run(Muon([{"params": [whole], "parts": [[rows]]}], 0.02, 0.95), [whole], [[g] for g in grads])
        assert not torch.allclose(whole, fused, atol=1e-3), "orthogonalising the fused matrix is something else"


@pytest.mark.bf16
@pytest.mark.parametrize("shape", [(32, 32), (64, 16)])
def test_muon_goes_where_torchs_goes(shape):
    ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    grads = [[g] for g in gradients(shape)]
    run(Muon([{"params": [ours], "parts": [[shape[0]]]}], lr=0.02, momentum=0.95), [ours], grads)
    run(torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.0), [theirs], grads)
    cosine = torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
    assert cosine > 0.999
    assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=0.03)


def test_muons_state_survives_saving():
    params = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(2)]
    grads = [[g] for g in gradients((8, 8), 6)]

    def new(p: torch.nn.Parameter) -> Muon:
        return Muon([{"params": [p], "parts": [[8]]}], 0.02, 0.95)

    first = new(params[0])
    run(first, params[:1], grads[:3])
    second = new(params[1])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    params[1].data.copy_(params[0].data)
    run(first, params[:1], grads[3:])
    run(second, params[1:], grads[3:])
    torch.testing.assert_close(params[1], params[0], atol=0, rtol=0)


# --- gradients that are not finite -------------------------------------------------------------------------------


def everything(model, optimizers) -> list[torch.Tensor]:
    states = [s for o in optimizers for p in model.parameters() for s in o.state.get(p, {}).values()]
    return [t.detach().clone() for t in (*model.parameters(), *states)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["wte.weight", "blocks.1.mlp.up.weight", "norm.weight"])
def test_one_bad_gradient_leaves_all_optimizers_where_they_are(monkeypatch, bad, where):
    """AdamW's and Muon's alike, moments and steps too; and a device that nobody waits for computes the same bits."""
    torch.manual_seed(0)
    cfg = ModelConfig(family="qwen3", n_layer=2, n_head=2, n_embd=32, block_size=8, vocab_size=40)
    start, sides = Transformer(cfg), {}
    for waiting in (True, False):
        monkeypatch.setattr(optimizer, "ASYNCHRONOUS", () if waiting else ("cpu",))
        model, draw = copy.deepcopy(start), torch.Generator().manual_seed(1)
        optimizers = make_optimizers(model, resolve_optim(OptimConfig(), "qwen3", 10), "muon")
        for step in range(5):
            for name, p in model.named_parameters():
                p.grad = torch.randn(p.shape, generator=draw)
                if step in (0, 3) and name == where:
                    p.grad.view(-1)[-1] = bad
            before = everything(model, optimizers)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            step_all(optimizers, norm)
            now = everything(model, optimizers)
            if step == 3:
                assert all(map(torch.equal, before, now))
            elif step:
                assert not any(map(torch.equal, before, now))
            else:  # moments may be there by now, but they are nothing yet
                assert all(map(torch.equal, before, now))
                assert not any(map(torch.any, now[len(before) :]))
        sides[waiting] = now
    assert all(map(torch.equal, sides[True], sides[False]))
