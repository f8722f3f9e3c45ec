"""The one decoder: GPT-2's block, Qwen3's and Llama's, switched by `ModelConfig.family`.

gpt2: learned positions, LayerNorm, GELU MLP, optional biases, dropout (Radford et al. 2019).
qwen3: RoPE (arXiv:2104.09864), RMSNorm (arXiv:1910.07467), QK-norm, SwiGLU (arXiv:2002.05202),
grouped key/value heads (arXiv:2305.13245).
llama: qwen3 without QK-norm. qwen2: llama with biases on q, k and v. Their angles may be stretched (`rope`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miaobi.model import cpu_attention
from miaobi.model.config import ModelConfig
from miaobi.model.rope import rope_table

VOCAB_MULTIPLE = 64  # matrix units like round widths; padding rows never leave this file


@dataclass
class KVCache:
    """Keys and values of one layer in a buffer of fixed size; `length` positions are filled.

    k, v: (B, H_kv, S, D).
    """

    k: Tensor
    v: Tensor
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H_kv, T, D) behind what is there; return all filled positions in their precision."""
        end = self.length + k.shape[2]
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end].to(k.dtype), self.v[:, :, :end].to(v.dtype)


def keys_and_values(caches: list[KVCache]) -> Tensor:
    """Those of all layers, (2, L, B, H_kv, S, D), where `Transformer.make_caches` has put them: one launch copies what
    would take two for each layer.
    """
    first, following = caches[0], caches[min(1, len(caches) - 1)]
    to_values = first.v.storage_offset() - first.k.storage_offset()
    to_next = following.k.storage_offset() - first.k.storage_offset()
    return first.k.as_strided((2, len(caches), *first.k.shape), (to_values, to_next, *first.k.stride()))


@dataclass
class RowCache(KVCache):
    """A cache whose rows are at different positions: `append` stores one token per row at `position_ids` (B,) and
    returns all positions up to `length`, the largest of them. The attention mask hides what a row must not see.
    """

    position_ids: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H_kv, 1, D); return the positions of the longest row in their precision."""
        rows, end = torch.arange(len(k), device=k.device), self.length + 1
        self.k[rows, :, self.position_ids] = k[:, :, 0].to(self.k.dtype)
        self.v[rows, :, self.position_ids] = v[:, :, 0].to(self.v.dtype)
        return self.k[:, :, :end].to(k.dtype), self.v[:, :, :end].to(v.dtype)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary position embedding of x (B, H, T, D) by rope (2, [B, 1,] T, D)."""
    a, b = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((-b, a), dim=-1) * rope[1]


def document_mask(documents: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Who may attend to whom in blocks of several documents: documents (B, T) numbers them -> (B, 1, T, T) bool.

    Causal and block-diagonal. dtype: as what is added to the scores, 0 or -inf. A GPU's kernels want that, and every
    layer would make it of a boolean mask for itself, and keep it for the backward pass.
    """
    T = documents.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()
    mask = (causal & (documents[:, :, None] == documents[:, None, :])).unsqueeze(1)
    return mask if dtype is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def document_block_mask(documents: Tensor):
    """`document_mask` for FlexAttention (arXiv:2412.05496): its compiled kernel skips what no token attends to.

    For CUDA; on the CPU it has no backward.
    """
    from torch.nn.attention.flex_attention import create_block_mask  # imports the compiler

    def same_document(b, h, q, k):
        return (q >= k) & (documents[b, q] == documents[b, k])

    B, T = documents.shape
    return create_block_mask(same_document, B, None, T, T, device=documents.device)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """What scaled_dot_product_attention computes, as two matrix products with a softmax between them.

    q: (B, H, T, D). k, v: (B, H_kv, T, D). mask: as in `document_mask`, broadcastable to (B, H, T, T); default causal.
    It keeps the (B, H, T, T) probabilities for the backward pass, and on CPUs is often faster for it: the backward of
    torch's fused kernel there computes them again, block by block, outside the matrix library.
    """
    B, H, T, D = q.shape
    groups = (B, k.shape[1], -1, D)  # heads that share a key are rows of one product
    scores = ((q * D**-0.5).reshape(groups) @ k.mT).view(B, H, T, -1)
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    shares = F.dropout(F.softmax(scores, dim=-1), dropout)
    return (shares.view(B, k.shape[1], -1, T) @ v).view(B, H, T, D)


def as_rows(q: Tensor, n_kv_head: int) -> Tensor:
    """Queries of one position, those that share a key as positions of one head: (B, H, 1, D) -> (B, H_kv, H/H_kv, D).

    Nothing is masked among them, so attention gives for each what it gives alone.
    """
    return q.reshape(len(q), n_kv_head, -1, q.shape[-1])


def head_dim(cfg: ModelConfig) -> int:
    """Width of one attention head."""
    return cfg.head_dim or cfg.n_embd // cfg.n_head


def intermediate_size(cfg: ModelConfig) -> int:
    """Width inside the MLP: 4C for GELU; 8C/3 for SwiGLU's three matrices, rounded down to 32."""
    if cfg.intermediate_size:
        return cfg.intermediate_size
    return 4 * cfg.n_embd if cfg.family == "gpt2" else max(32, 8 * cfg.n_embd // 3 // 32 * 32)


class RMSNorm(nn.RMSNorm):
    """torch's, its weight in the precision of the states.

    Under autocast those are bf16 while the weight is fp32; torch's fused kernel refuses the pair, with a warning, and
    takes five operations instead. Both compute in fp32 inside.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """torch's, weight and bias in the precision of the states: FSDP gives those of a block in bf16, states in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


def make_norm(cfg: ModelConfig, width: int) -> nn.Module:
    """LayerNorm (gpt2) or RMSNorm (others) over the last dimension."""
    if cfg.family == "gpt2":
        return LayerNorm(width, eps=cfg.norm_eps or 1e-5, bias=cfg.bias)
    return RMSNorm(width, eps=cfg.norm_eps or 1e-6)


class Attention(nn.Module):
    """Causal self-attention; q, k and v come from one fused projection."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.n_head = cfg.n_head
        self.n_kv_head = cfg.n_kv_head or cfg.n_head
        self.head_dim = head_dim(cfg)
        self.dropout = cfg.dropout
        self.kind = "fused"  # see `Transformer.use_attention`
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.qkv = nn.Linear(cfg.n_embd, width, bias=cfg.bias or cfg.family == "qwen2")
        self.proj = nn.Linear(self.n_head * self.head_dim, cfg.n_embd, bias=cfg.bias)
        if cfg.family == "qwen3":
            self.q_norm = make_norm(cfg, self.head_dim)
            self.k_norm = make_norm(cfg, self.head_dim)
        else:
            self.q_norm = self.k_norm = None

    def forward(self, x: Tensor, rope: Tensor | None, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, self.head_dim)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)  # (B, T, H, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if rope is not None:
            q, k = rotate(q, rope).to(v.dtype), rotate(k, rope).to(v.dtype)
        if cache is not None:
            k, v = cache.append(k, v)
        grouped = self.n_kv_head != self.n_head
        dropout = self.dropout if self.training else 0.0
        if grouped and T == 1 and q.is_cuda:  # heads of one key as rows: kernels that know a mask know no groups
            y = F.scaled_dot_product_attention(as_rows(q, self.n_kv_head), k, v, mask).reshape(B, self.n_head, 1, -1)
        elif self.kind == "tiled" and self.training and cache is None and cpu_attention.fits(q, mask, dropout):
            y = cpu_attention.attention(q, k, v)
        elif self.kind == "explicit" and self.training and cache is None and (mask is None or isinstance(mask, Tensor)):
            y = explicit_attention(q, k, v, mask, dropout)
        elif mask is None or isinstance(mask, Tensor):
            y = F.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=dropout, is_causal=mask is None and T > 1, enable_gqa=grouped
            )
        else:
            from torch.nn.attention.flex_attention import flex_attention

            y = flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """GELU (gpt2) or SwiGLU (others, gate and up projections fused)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        width = intermediate_size(cfg)
        self.gated = cfg.family != "gpt2"
        self.approximate = "tanh" if cfg.activation == "gelu_new" else "none"
        self.up = nn.Linear(cfg.n_embd, 2 * width if self.gated else width, bias=cfg.bias)
        self.down = nn.Linear(width, cfg.n_embd, bias=cfg.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = make_norm(cfg, cfg.n_embd)
        self.attn = Attention(cfg)
        self.mlp_norm = make_norm(cfg, cfg.n_embd)
        self.mlp = MLP(cfg)
        self.dropout = cfg.dropout

    def forward(
        self, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        x = x + F.dropout(self.attn(self.attn_norm(x), rope, mask, cache), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)


class Transformer(nn.Module):
    """Decoder-only language model.

    `cfg.family` and `cfg.vocab_size` must be resolved. Rows of the embedding beyond `vocab_size` pad it to a
    multiple of 64; no logit is ever computed for them.
    """

    end_ids: tuple[int, ...] = ()
    """Tokens that end a text, as said by the model directory that the weights came from."""
    quantized: str | None = None
    """int8 or int4 where the model directory holds those; here they are floats that stand for them."""
    generation: dict[str, Any] | None = None
    """What else its generation_config.json says, with its bos_token_id; None where there was no such directory."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.not_used: list[str] = []  # lines on what of its directory's settings is left out
        self.cfg = cfg
        rows = math.ceil(cfg.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.wte = nn.Embedding(rows, cfg.n_embd)
        self.wpe = nn.Embedding(cfg.block_size, cfg.n_embd) if cfg.family == "gpt2" else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg, cfg.n_embd)
        self.lm_head = None if cfg.tie_word_embeddings else nn.Linear(cfg.n_embd, rows, bias=False)
        self.rope = rope_table(cfg, head_dim(cfg)) if cfg.family != "gpt2" else None
        self.recompute = False  # activations in the backward pass, instead of keeping them (arXiv:1604.06174)
        self.init_weights()

    def _apply(self, fn, recurse: bool = True):
        """Keep the rotary table in float32 on the weights' device, whatever `.to` makes of the weights."""
        super()._apply(fn, recurse)
        if self.rope is not None:
            self.rope = rope_table(self.cfg, head_dim(self.cfg)).to(self.wte.weight.device)
        return self

    def init_weights(self) -> None:
        """Draw every weight from the global random state, in the parameters' order."""
        for name, p in self.named_parameters():
            self.init_parameter(name, p)

    @torch.no_grad()
    def init_parameter(self, name: str, p: Tensor) -> None:
        """GPT-2's: normal 0.02, residual projections by 1/sqrt(2 n_layer). Others: residual projections at zero,
        so that every block starts as the identity (modded-nanogpt; measured in docs/lab-notes.md).
        """
        if p.ndim < 2:  # norms and biases
            p.fill_(0.0 if name.endswith("bias") else 1.0)
            return
        if name.endswith(("attn.proj.weight", "mlp.down.weight")):
            std = 0.02 / math.sqrt(2 * self.cfg.n_layer) if self.cfg.family == "gpt2" else 0.0
        else:
            std = 0.02
        nn.init.normal_(p, std=std)

    def use_attention(self, kind: str) -> None:
        """How attention is computed in training: `fused` (torch's kernel), `explicit` (`explicit_attention`) or `tiled`
        (`cpu_attention`, where that fits). Which is faster is measured, not known (`train/measured.py`). Evaluation and
        generation keep no gradients and stay with torch's kernel.
        """
        for block in self.blocks:
            block.attn.kind = kind

    @property
    def head_weight(self) -> Tensor:
        """Output matrix without padding rows: (V, C)."""
        weight = self.wte.weight if self.lm_head is None else self.lm_head.weight
        return weight[: self.cfg.vocab_size]

    def num_parameters(self) -> int:
        """Parameters as nanoGPT counts them: without the position table and without padding rows."""
        total = sum(p.numel() for p in self.parameters())
        if self.wpe is not None:
            total -= self.wpe.weight.numel()
        tables = 1 if self.lm_head is None else 2
        return total - tables * (self.wte.num_embeddings - self.cfg.vocab_size) * self.cfg.n_embd

    def embed(self, ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """What goes into the first block: states (B, T, C), and the angles of rotary positions."""
        x = self.wte(ids)
        if self.wpe is not None:
            return F.dropout(x + self.wpe(position_ids), self.cfg.dropout, self.training), None
        rope = self.rope[:, position_ids]  # (2, T, D) or (2, B, T, D)
        return x, rope.unsqueeze(2) if rope.ndim == 4 else rope

    def hidden(
        self,
        ids: Tensor,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        """States after the last norm.

        ids: (B, T). position_ids: (T,) or (B, T), default counts on from the caches. mask: boolean,
        broadcastable to (B, H, T, S), True = may attend; default causal. Returns (B, T, C).
        """
        start = caches[0].length if caches else 0
        T = ids.shape[1]
        if start + T > self.cfg.block_size:
            raise ValueError(f"{start + T} positions, but block_size is {self.cfg.block_size}")
        if position_ids is None:
            position_ids = torch.arange(start, start + T, device=ids.device)
        if mask is None and start > 0 and T > 1:  # is_causal would align the mask with the first key
            S = start + T
            mask = torch.ones(T, S, dtype=torch.bool, device=ids.device).tril(S - T)
        x, rope = self.embed(ids, position_ids)
        return self.after_embedding(x, rope, mask, caches)

    def after_embedding(
        self, x: Tensor, rope: Tensor | None, mask: Tensor | None = None, caches: list[KVCache] | None = None
    ) -> Tensor:
        """The blocks and the last norm, of what `embed` gave; the other arguments as in `hidden`. Returns (B, T, C)."""
        for i, block in enumerate(self.blocks):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, caches[i] if caches else None)
        return self.norm(x)

    def forward(
        self,
        ids: Tensor,
        position_ids: Tensor | None = None,
        mask: Tensor | None = None,
        caches: list[KVCache] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V), or (B, 1, V) of the last position when `last_only`. Arguments as in `hidden`."""
        x = self.hidden(ids, position_ids, mask, caches)
        return F.linear(x[:, -1:] if last_only else x, self.head_weight)

    def make_caches(self, batch: int, length: int | None = None, dtype: torch.dtype | None = None) -> list[KVCache]:
        """Empty caches for `batch` streams of up to `length` (default block_size) positions, in the precision of the
        products or in `dtype`. Keys lie in one stretch of memory, layer by layer, and values in another behind it.
        """
        attn, weight = self.blocks[0].attn, self.wte.weight
        shape = (2, len(self.blocks), batch, attn.n_kv_head, length or self.cfg.block_size, attn.head_dim)
        if dtype is None:
            dtype = torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled() else weight.dtype
        return [KVCache(k, v) for k, v in zip(*weight.new_zeros(shape, dtype=dtype), strict=True)]
