"""New rows of a model's vocabulary."""

import pytest
import torch
import torch.nn.functional as F

from miaobi.model.config import ModelConfig
from miaobi.model.rows import add_rows
from miaobi.model.transformer import VOCAB_MULTIPLE, Transformer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("vocab_size", "first", "n"), [(130, None, 2), (64, None, 1), (63, None, 2), (140, 130, 2), (140, 139, 3)]
)
def test_new_rows_leave_the_others_as_they_were(tied, vocab_size, first, n):
    torch.manual_seed(0)
    cfg = ModelConfig(family="qwen3", n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=vocab_size,
                      tie_word_embeddings=tied)  # fmt: skip
    model, ids = Transformer(cfg), torch.arange(8)[None]
    known = vocab_size if first is None else first
    with torch.no_grad():
        before = model(ids)
        add_rows(model, n, first)
        after = model(ids)
    assert model.cfg.vocab_size == after.shape[-1] == max(vocab_size, known + n)
    assert len(model.wte.weight) % VOCAB_MULTIPLE == 0
    torch.testing.assert_close(after[..., :known], before[..., :known])
    torch.testing.assert_close(model.wte.weight[known : known + n], model.wte.weight[:known].mean(0).expand(n, -1))
    torch.testing.assert_close(after[..., known], before[..., :known].mean(-1))
    assert (model.lm_head is None) == tied
    F.cross_entropy(model(torch.full((1, 8), known + n - 1))[0], torch.arange(8)).backward()
    assert model.wte.weight.grad[known + n - 1].abs().sum() > 0
    again = Transformer(model.cfg)
    again.load_state_dict(model.state_dict())
