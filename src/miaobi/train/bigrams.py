"""Initialisation of a new model from the bigrams of its text, which are counted and factorised.

A short run spends most of its steps on learning how often each token and each pair occurs, which counting finds in a
second. The association of a token with the one before it is factorised as in Levy and Goldberg 2014 (word vectors as a
factorised matrix of log ratios); the factors become columns of the tied embedding, and part of the first MLP turns a
token's factor into the logits of the next. The result is an ordinary model of its family; all of it is trained.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from miaobi.config import RunConfig
from miaobi.console import log
from miaobi.corpus.prepared import PreparedData, TokenStream
from miaobi.errors import UserError
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer, intermediate_size

SHORT = 0.1  # tokens trained per parameter: below, counting starts ahead of what training could reach
COUNTED = 1 << 24  # tokens at most; more pairs change the factors little
PRIOR = 30.0  # counts of the unigram distribution added to every context
POWER = 0.4  # of the ratios (Box-Cox); 0 would be their logarithm, which rare pairs dominate
SHRINK = 0.7  # low rank overstates what it keeps
LOG_P_SCALE = 2.0  # the channel of log-probabilities holds them divided by this
GATE = 4.0  # silu is nearly linear there
LONGEST = 0.6  # of an embedding's norm may say which token it is; the rest is the constant channel


def initial_weights(cfg: RunConfig, shape: ModelConfig, data: PreparedData) -> dict[str, Tensor] | None:
    """Weights of a new model initialised from bigrams; None if it is to be initialised at random.

    Every rank counts the same pairs, gets the same weights, and keeps its part. Raises UserError if bigrams were asked
    for and the model is too small.
    """
    if not wanted(cfg, shape, data):
        return None
    started = time.perf_counter()
    torch.manual_seed(cfg.train.seed)
    model = Transformer(shape)
    tokens = sample(data.train, COUNTED)
    start_from_bigrams(model, tokens)
    log(f"started from the bigrams of {len(tokens):,} tokens in {time.perf_counter() - started:.2f} s")
    return model.state_dict()


def wanted(cfg: RunConfig, shape: ModelConfig, data: PreparedData) -> bool:
    """Whether a new model of `shape` is initialised from bigrams: by bigram_init, or by the length of the run.

    Raises UserError if that was asked for and the model is too small.
    """
    setting = cfg.train.bigram_init
    rank = factor_rank(shape)
    fits = shape.family != "gpt2" and shape.tie_word_embeddings and rank >= 2
    if setting is True and not fits:
        raise UserError("bigram_init needs a qwen3 or llama from scratch with tied embeddings and n_embd of 6 or more; "
                        "leave bigram_init out")  # fmt: skip
    if setting != "auto":
        return bool(setting)
    return fits and not data.is_dialogue and is_short(cfg, shape, data)


def is_short(cfg: RunConfig, shape: ModelConfig, data: PreparedData) -> bool:
    """Whether the run trains on at most SHORT tokens per parameter."""
    with torch.device("meta"):
        parameters = Transformer(shape).num_parameters()
    tokens = cfg.train.max_iters * cfg.train.global_batch * shape.block_size
    tokens = min(tokens, (cfg.train.max_epochs or math.inf) * len(data.train))
    return tokens <= SHORT * parameters


def factor_rank(shape: ModelConfig) -> int:
    """Rank of the factorisation: a constant, log-probabilities and the factors of both sides share the embedding's
    columns.
    """
    return min((shape.n_embd - 2) // 2, intermediate_size(shape) - 1, shape.vocab_size)


def sample(stream: TokenStream, count: int) -> np.ndarray:
    """At most `count` tokens of a stream, in 64 pieces spread evenly over it. Returns (tokens,) int64."""
    if len(stream) <= count:
        return stream.read(0, len(stream))
    starts = np.linspace(0, len(stream) - count // 64, 64).astype(int).tolist()
    return np.concatenate([stream.read(start, start + count // 64) for start in starts])


def factorise(tokens: np.ndarray, vocab_size: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """log p (V,), before (V, r) and after (V, r): log p(j after i) is about log p[j] + before[i] . after[j] + c[i].

    The matrix that is factorised is sparse: what a context says of tokens never seen after it is the same for all of
    them, so it is subtracted, and softmax does not notice. Randomised SVD (Halko et al. 2011, arXiv:0909.4061), pairs
    weighted by (p_i p_j)^1/4.
    """
    V = vocab_size
    pairs, counts = np.unique(tokens[:-1] * V + tokens[1:], return_counts=True)
    i, j = torch.from_numpy(pairs // V), torch.from_numpy(pairs % V)
    seen = torch.from_numpy(np.bincount(tokens, minlength=V)).float() + 0.5
    p = seen / seen.sum()

    def bent(ratio: Tensor) -> Tensor:
        return (ratio**POWER - 1) / POWER

    unseen = PRIOR / (seen[i] + PRIOR)
    more = bent(torch.from_numpy(counts).float() / p[j] / (seen[i] + PRIOR) + unseen) - bent(unseen)
    weight = p**0.25
    matrix = torch.sparse_coo_tensor(torch.stack((i, j)), more * weight[i] * weight[j], (V, V), check_invariants=True)
    u, s, v = torch.svd_lowrank(matrix.coalesce(), q=min(V, rank + 10), niter=2)
    root = (SHRINK * s[:rank]).sqrt()
    return p.log(), u[:, :rank] * root / weight[:, None], v[:, :rank] * root / weight[:, None]


@torch.no_grad()
def start_from_bigrams(model: Transformer, tokens: np.ndarray) -> None:
    """Set embedding, norms and part of the first MLP of a new `model`, so that it predicts pairs as `tokens` has them.

    Columns of the embedding: 0 a constant, that MLPs and norms need; 1 log p; then r of `before`, r of `after`. With
    that constant each row has norm sqrt(C), so the first RMSNorm changes none. Hidden units of the first MLP, their
    gates held open by column 0, replace `after` of the token by its `before`, and log p by a constant; the last norm
    passes those columns on, and the tied embedding makes their products logits.
    """
    shape = model.cfg
    C, V, r = shape.n_embd, shape.vocab_size, factor_rank(shape)
    log_p, before, after = factorise(tokens, V, r)
    p = log_p.exp()
    own = torch.cat((((log_p - (p * log_p).sum()) / LOG_P_SCALE)[:, None], before, after), dim=1)  # (V, 1 + 2r)
    longest = LONGEST * math.sqrt(C)
    own *= longest / own.norm(dim=1, keepdim=True).clamp(min=longest)
    rows = torch.zeros(V, C)
    rows[:, 0] = (C - own.square().sum(dim=1)).sqrt()
    rows[:, 1 : 1 + own.shape[1]] = own
    model.wte.weight[:V] = rows
    gain = math.sqrt(C) / float((p * own.norm(dim=1)).sum())  # without the constant, inputs have this much less norm
    for block in model.blocks:
        for norm in (block.attn_norm, block.mlp_norm):
            norm.weight.fill_(gain)
            norm.weight[0] = 0.0
    mlp = model.blocks[0].mlp
    model.blocks[0].mlp_norm.weight[0] = 1.0
    gate, up = mlp.up.weight.chunk(2)
    units, constant = torch.arange(r), math.sqrt(C)
    gate[:, 0] = up[:, 0] = 0.0
    gate[: r + 1] = up[: r + 1] = 0.0
    gate[: r + 1, 0] = GATE / constant
    up[units, 2 + units] = 1 / gain
    up[units, 2 + r + units] = -1 / gain
    up[r, 0], up[r, 1] = LOG_P_SCALE / constant, -1 / gain
    opened = 1 / float(F.silu(torch.tensor(GATE)))
    mlp.down.weight[2 + r + units, units] = opened
    mlp.down.weight[1, r] = opened
    model.norm.weight.zero_()
    model.norm.weight[1] = 1.0
    model.norm.weight[2 + r : 2 + 2 * r] = 1.0
