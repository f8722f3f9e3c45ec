"""Our own attention for training on a CPU computes what torch's does, and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from miaobi import native
from miaobi.model import cpu_attention
from miaobi.model.config import ModelConfig
from miaobi.model.loss import linear_cross_entropy
from miaobi.model.transformer import Transformer

needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module", autouse=True)
def built():
    native.build.cache_clear()  # another test's cache may be gone
    return native.awaited(cpu_attention.SOURCE)


def parts(B: int, H: int, groups: int, T: int, D: int, scale: float) -> list[torch.Tensor]:
    """q, k, v as the decoder has them: views of one tensor."""
    kv = H // groups
    fused = torch.randn(B, T, H + 2 * kv, D) * scale
    return [part.transpose(1, 2).requires_grad_() for part in fused.split((H, kv, kv), dim=2)]


@needs_compiler
@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([(1, 1), (4, 1), (4, 2), (6, 3)]), st.integers(1, 200),
    st.sampled_from([16, 32, 48, 64, 128]), st.sampled_from([0.1, 1.0, 8.0]), st.integers(1, 3),
)  # fmt: skip
def test_states_and_gradients_are_those_of_attention_in_float64(B, heads, T, D, scale, threads):
    assert cpu_attention.is_ready(D)
    torch.manual_seed(T)
    q, k, v = parts(B, *heads, T, D, scale)
    grad = torch.randn(B, T, heads[0], D).transpose(1, 2)

    def with_gradients(y: torch.Tensor, to: torch.Tensor) -> list[torch.Tensor]:
        return [y, *torch.autograd.grad(y, (q, k, v), to)]

    def by_torch(*qkv: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=heads[1] > 1)

    exact = with_gradients(by_torch(q.double(), k.double(), v.double()), grad.double())
    torchs = with_gradients(by_torch(q, k, v), grad)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ours = with_gradients(cpu_attention.attention(q, k, v), grad)
    torch.set_num_threads(before)
    for found, other, right in zip(ours, torchs, exact, strict=True):
        assert found.shape == right.shape
        allowed = 5 * (other - right).abs().max() + 1e-5 * right.abs().max()  # large scores round by more in any fp32
        allowed += 4e-6 * max(1.0, scale**2)  # of what cancels out to nothing
        assert (found - right).abs().max() <= allowed


@needs_compiler
def test_torch_finds_the_operator_well_formed():
    q, k, v = (part.detach().requires_grad_() for part in parts(2, 4, 2, 20, 16, 1.0))
    torch.library.opcheck(cpu_attention._attention, (q, k, v))


@needs_compiler
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_decoder_trains_with_it_as_with_torchs_and_evaluates_with_torchs(family, monkeypatch):
    torch.manual_seed(0)
    cfg = ModelConfig(family=family, n_layer=2, n_head=4, n_kv_head=2 if family == "qwen3" else None, n_embd=64,
                      block_size=70, vocab_size=90)  # fmt: skip
    model = Transformer(cfg)
    ids = torch.randint(0, 90, (3, 70))

    def losses(kind: str) -> list[torch.Tensor]:
        model.use_attention(kind)
        loss = linear_cross_entropy(model.train().hidden(ids), model.head_weight, ids.roll(-1, 1))
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    for ours, theirs in zip(losses("tiled"), losses("fused"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(cpu_attention, "attention", None)
    with torch.no_grad():
        model.eval().hidden(ids)
    documents = torch.zeros(3, 1, 70, 70, dtype=torch.bool)
    model.train().hidden(ids, mask=documents | torch.eye(70, dtype=torch.bool))  # other masks are torch's, too


def test_heads_of_other_widths_are_left_to_torch():
    assert not cpu_attention.is_ready(24)
