"""The decoder: caches, masks, padding and counts change nothing that they should not."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miaobi.model.config import ModelConfig
from miaobi.model.loss import linear_cross_entropy
from miaobi.model.transformer import (
    Transformer,
    as_rows,
    document_block_mask,
    document_mask,
    explicit_attention,
    rotate,
)

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 70}
CONFIGS = {
    "gpt2": ModelConfig(family="gpt2", **SIZES),
    "gpt2-bias": ModelConfig(family="gpt2", bias=True, activation="gelu_new", **SIZES),
    "gpt2-untied": ModelConfig(family="gpt2", tie_word_embeddings=False, **SIZES),
    "qwen3": ModelConfig(family="qwen3", **SIZES),
    "qwen3-grouped": ModelConfig(family="qwen3", n_kv_head=2, head_dim=16, tie_word_embeddings=False, **SIZES),
}


def random_model(cfg: ModelConfig, seed: int = 0) -> Transformer:
    """Weights far from their initial ones, biases and norms included."""
    torch.manual_seed(seed)
    model = Transformer(cfg).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.2)
    return model


def ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS, scope="module")
def model(request: pytest.FixtureRequest) -> Transformer:
    return random_model(CONFIGS[request.param])


@torch.no_grad()
def test_decoding_with_a_cache_gives_the_logits_of_a_full_forward(model):
    x = ids(3, 16)
    whole = model(x)
    for pieces in ([16], [1] * 16, [10, 1, 1, 1, 3], [1, 15]):
        caches, out, at = model.make_caches(3), [], 0
        for n in pieces:
            out.append(model(x[:, at : at + n], caches=caches))
            at += n
        torch.testing.assert_close(torch.cat(out, dim=1), whole, atol=1e-4, rtol=1e-4)
    last = model(x[:, -1:], caches=[_shortened(c) for c in caches], last_only=True)
    torch.testing.assert_close(last, whole[:, -1:], atol=1e-4, rtol=1e-4)


def _shortened(cache):
    cache.length -= 1
    return cache


@torch.no_grad()
def test_no_position_sees_what_comes_after_it(model):
    x = ids(1, 16)
    before = model(x)
    for t in range(1, 16):
        changed = x.clone()
        changed[0, t] = (x[0, t] + 1) % 70
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(after[:, t:], before[:, t:], atol=1e-3)


@torch.no_grad()
def test_left_padding_under_a_mask_changes_nothing(model):
    x, pad = ids(1, 9), 5
    padded = torch.cat((torch.zeros(1, pad, dtype=torch.long), x), dim=1)
    positions = torch.cat((torch.zeros(pad, dtype=torch.long), torch.arange(9)))[None]
    mask = torch.ones(14, 14, dtype=torch.bool).tril()
    mask[:, :pad] = False
    mask |= torch.eye(14, dtype=torch.bool)  # a row without any key would be NaN
    out = model(padded, position_ids=positions, mask=mask)
    torch.testing.assert_close(out[:, pad:], model(x), atol=1e-4, rtol=1e-4)


def test_padding_rows_of_the_vocabulary_are_invisible(model):
    assert model.wte.num_embeddings == 128
    x, y = ids(2, 16), ids(2, 16, seed=2)

    def everything() -> tuple[torch.Tensor, torch.Tensor, int]:
        loss = linear_cross_entropy(model.hidden(x), model.head_weight, y)
        return model(x), loss, model.num_parameters()

    logits, loss, count = everything()
    assert logits.shape == (2, 16, 70)
    with torch.no_grad():
        model.wte.weight[70:] = 1e9
        if model.lm_head is not None:
            model.lm_head.weight[70:] = 1e9
    again, loss_again, count_again = everything()
    torch.testing.assert_close(again, logits, atol=0, rtol=0)
    assert loss_again == loss
    assert count_again == count
    loss_again.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.zero_grad()


def test_the_seed_counts_128_84_million():
    cfg = ModelConfig(family="gpt2", n_layer=40, n_head=8, n_embd=512, block_size=256, vocab_size=5791, bias=False)
    with torch.device("meta"):
        model = Transformer(cfg)
    assert f"{model.num_parameters() / 1e6:.2f}" == "128.84"


@given(st.integers(1, 4), st.sampled_from([8, 16, 24]), st.integers(1, 200), st.booleans(), st.booleans())
@settings(max_examples=15)
def test_gpt2_counts_as_the_formula(n_layer, width, vocab_size, bias, tied):
    cfg = ModelConfig(family="gpt2", n_layer=n_layer, n_head=2, n_embd=width, block_size=8, vocab_size=vocab_size,
                      bias=bias, tie_word_embeddings=tied)  # fmt: skip
    matrices, norms = 12 * width**2, 2 * width
    if bias:
        matrices, norms = matrices + 3 * width + width + 4 * width + width, norms * 2
    tables = vocab_size * width * (1 if tied else 2)
    with torch.device("meta"):
        model = Transformer(cfg)
    assert model.num_parameters() == tables + n_layer * (matrices + norms) + width * (2 if bias else 1)


def test_the_two_families_have_about_as_many_parameters():
    sizes = {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 4391}
    with torch.device("meta"):
        gpt2, qwen3 = (Transformer(ModelConfig(family=f, **sizes)).num_parameters() for f in ("gpt2", "qwen3"))
    assert abs(gpt2 - qwen3) / gpt2 < 0.01


@torch.no_grad()
def test_a_new_qwen3_is_the_identity_between_embedding_and_head():
    model = Transformer(CONFIGS["qwen3"])
    x = ids(2, 16)
    expected = torch.nn.functional.rms_norm(model.wte(x), (32,), eps=1e-6) @ model.wte.weight[:70].T
    torch.testing.assert_close(model(x), expected)


def test_a_new_gpt2_has_the_published_spread():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(family="gpt2", n_layer=8, n_head=4, n_embd=128, block_size=64, vocab_size=512))
    for name, p in model.named_parameters():
        if p.ndim < 2:
            assert (p == 1).all()
        else:
            residual = name.endswith(("attn.proj.weight", "mlp.down.weight"))
            assert p.std().item() == pytest.approx(0.02 / 4 if residual else 0.02, rel=0.05), name


def test_rotation_is_multiplication_by_a_complex_phase():
    torch.manual_seed(0)
    model = Transformer(CONFIGS["qwen3"])
    x = torch.randn(1, 1, 16, 8)
    angle = torch.arange(16)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rotate(x, model.rope), torch.cat((turned.real, turned.imag), dim=-1))


def test_the_rotary_table_stays_float32_whatever_the_weights_become():
    model = Transformer(CONFIGS["qwen3"])
    before = model.rope.clone()
    model.to(torch.bfloat16)
    assert model.rope.dtype == torch.float32
    torch.testing.assert_close(model.rope, before, atol=0, rtol=0)
    with torch.device("meta"):
        empty = Transformer(CONFIGS["qwen3"])
    torch.testing.assert_close(empty.to_empty(device="cpu").rope, before, atol=0, rtol=0)


@torch.no_grad()
def test_dropout_acts_in_training_and_follows_the_seed():
    for family in ("gpt2", "qwen3"):
        model = random_model(ModelConfig(family=family, dropout=0.3, **SIZES))
        x = ids(2, 16)
        torch.testing.assert_close(model(x), model(x), atol=0, rtol=0)
        model.train()
        outs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outs.append(model(x))
        torch.testing.assert_close(outs[0], outs[1], atol=0, rtol=0)
        assert not torch.allclose(outs[0], outs[2])


@torch.no_grad()
def test_flex_attention_sees_what_the_plain_mask_sees(model):
    documents = torch.tensor([[0] * 5 + [1] * 2 + [2] * 4 + [-1] * 1, [0] * 12])
    positions = torch.arange(12).expand(2, -1)
    plain = model.hidden(ids(2, 12), positions, document_mask(documents))
    flex = model.hidden(ids(2, 12), positions, document_block_mask(documents))
    torch.testing.assert_close(flex, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_norms_under_autocast_warn_of_nothing_and_are_those_of_fp32(family):
    """torch warns "Mismatch dtype between input and weight" where they differ, and leaves its fused kernel."""
    model = random_model(ModelConfig(family=family, **SIZES))
    x = ids(2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.hidden(x)
            hidden.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.blocks.parameters())
    torch.testing.assert_close(hidden.float(), model.hidden(x), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "qwen3-grouped"])
def test_explicit_attention_has_the_logits_and_gradients_of_the_fused_kernel(name, masked):
    model = random_model(CONFIGS[name]).train()
    x = ids(3, 13)
    mask = document_mask(torch.tensor([[0] * 5 + [1] * 8, [0] * 13, [0, 1, 2] * 4 + [3]])) if masked else None
    results = []
    for explicit in (False, True):
        model.use_attention("explicit" if explicit else "fused")
        model.zero_grad(set_to_none=True)
        logits = model(x, mask=mask)
        logits.square().mean().backward()
        results.append((logits.detach(), [p.grad for p in model.parameters()]))
    (fused, theirs), (explicit, ours) = results
    assert not torch.equal(fused, explicit) or name == "gpt2"  # it was another computation
    torch.testing.assert_close(explicit, fused, atol=1e-4, rtol=1e-4)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_explicit_attention_drops_the_share_that_it_is_told():
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 64, 8), torch.zeros(2, 4, 64, 8)  # all keys alike: every share of row t is 1 / (t + 1)
    y = explicit_attention(q, k, torch.ones(2, 4, 64, 8), None, 0.25)
    assert y[:, :, 32:].mean().item() == pytest.approx(1.0, abs=0.02)
    assert set((y[:, :, 0] / (1 / 0.75)).unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("masked", [False, True])
def test_queries_that_share_a_key_may_go_as_rows_of_one_head(masked):
    """What a decoding step does on a GPU, against torch's own grouping."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 1, 8), torch.randn(3, 2, 11, 8), torch.randn(3, 2, 11, 8)
    mask = (torch.arange(11) <= torch.tensor([[3], [7], [10]]))[:, None, None] if masked else None
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    ours = torch.nn.functional.scaled_dot_product_attention(as_rows(q, 2), k, v, mask).reshape(3, 6, 1, 8)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["fused", "explicit"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "qwen3-grouped"])
def test_a_mask_that_is_added_hides_what_a_boolean_one_hides(name, kind):
    """What a GPU gets: forward and backward, to the rounding of a sum."""
    model = random_model(CONFIGS[name]).train()
    model.use_attention(kind)
    documents, found = torch.tensor([[0] * 5 + [1] * 8, [0] * 13, [0, 1, 2] * 4 + [-1]]), []
    for dtype in (None, torch.float32):
        mask = document_mask(documents, dtype)
        assert mask.dtype == (dtype or torch.bool)
        model.zero_grad()
        out = model.hidden(ids(3, 13), None, mask)
        out.sum().backward()
        found.append((out, [p.grad for p in model.parameters() if p.grad is not None]))
    model.use_attention("fused")
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)
