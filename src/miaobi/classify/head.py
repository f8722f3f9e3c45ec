"""A decoder that judges: one of its states is pooled, and a linear layer without bias scores the labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import processors
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from miaobi.checksums import for_model, verifying
from miaobi.classify.data import Reading
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError, brief, not_finite
from miaobi.files import read_json, read_record, write_json
from miaobi.model.checkpoint import model_directory, save_tensors
from miaobi.model.config import ModelConfig
from miaobi.model.families import check_hf, load_hf, refuse_unusable, to_hf
from miaobi.model.hf_config import ARCHITECTURES, hf_config, model_config
from miaobi.model.lora import merged
from miaobi.model.tensors import read_tensors
from miaobi.model.transformer import Block, Transformer, rotate

OWN = "miaobi-classifier"
"""model_type of classifiers that transformers does not have: it refuses them instead of pooling another state."""
SETTINGS = "classifier.json"
CPU_TOKENS, GPU_TOKENS = 4096, 65536
MOST_CERTAIN = 1e-3
"""The least temperature of a classifier; training fits one from 1/8 to 8."""
SLACK = 0.6
"""On a CPU rows of one micro-batch are at least this share of its longest: padding costs as much as text."""


class Classifier(nn.Module):
    """`model` up to its last norm, pooled, and `score` (labels, C).

    pooling: mask = the state of the last real token, no_mask = of the last position, mean = the mean of the real
    tokens' states.
    """

    def __init__(self, model: Transformer, labels: int, pooling: str) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling
        self.score = nn.Linear(model.cfg.n_embd, labels, bias=False)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, labels).

        x: ids (B, T), padded at the right; or what `lower` made of them, (B, T, C); or `pooled` of that, (B, C).
        lengths: real tokens (B,).
        """
        if not x.is_floating_point():
            x = self.lower(x)
        if x.ndim == 3:
            x = self.pooled(x, lengths)
        return self.score(x).float()

    def lower(self, ids: Tensor) -> Tensor:
        """States (B, T, C) in front of the last block."""
        x, rope = self.model.embed(ids, torch.arange(ids.shape[1], device=ids.device))
        for block in self.model.blocks[:-1]:
            x = block(x, rope)
        return x

    def pooled(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The last block and norm of states x (B, T, C), pooled: (B, C). Padding at the right changes nothing before
        it, attention being causal.
        """
        T, rope, last = x.shape[1], self.model.rope, self.model.blocks[-1]
        rope = None if rope is None else rope[:, :T]
        if self.pooling == "mean":
            x = self.model.norm(last(x, rope))
            real = torch.arange(T, device=x.device) < lengths[:, None]  # (B, T)
            return (x * real.unsqueeze(-1)).sum(1) / lengths[:, None]
        at = lengths - 1 if self.pooling == "mask" else torch.full_like(lengths, T - 1)
        return self.model.norm(block_at(last, x, rope, at))


def block_at(block: Block, x: Tensor, rope: Tensor | None, at: Tensor) -> Tensor:
    """`block`'s output at one position of each row: x (B, T, C), at (B,) -> (B, C).

    Of the last block nothing else is pooled: it needs keys and values of all positions, but one query and MLP a row.
    """
    B, T, _ = x.shape
    attn, rows = block.attn, torch.arange(B, device=x.device)
    heads = attn.qkv(block.attn_norm(x)).view(B, T, -1, attn.head_dim)
    q, k, v = heads.split((attn.n_head, attn.n_kv_head, attn.n_kv_head), dim=2)
    q = q[rows, at].unsqueeze(1)  # (B, 1, H, D)
    if attn.q_norm is not None:
        q, k = attn.q_norm(q), attn.k_norm(k)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, 1 or T, D)
    if rope is not None:
        q, k = rotate(q, rope[:, at][:, :, None, None]).to(v.dtype), rotate(k, rope).to(v.dtype)
    seen = (torch.arange(T, device=x.device) <= at[:, None])[:, None, None]  # (B, 1, 1, T)
    dropout = attn.dropout if block.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, seen, dropout_p=dropout, enable_gqa=attn.n_kv_head != attn.n_head)
    y = F.dropout(attn.proj(y.transpose(1, 2).reshape(B, -1)), block.dropout, block.training)
    x = x[rows, at] + y
    return x + F.dropout(block.mlp(block.mlp_norm(x)), block.dropout, block.training)


# Batches


def buckets(lengths: np.ndarray, tokens: int, slack: float) -> list[np.ndarray]:
    """Indices of rows of like length: each bucket fits into `tokens` when padded (or holds one row), and its shortest
    row has at least `slack` of the longest's length. lengths: (R,). Longest first.
    """
    order, batches, begin = np.argsort(-lengths, kind="stable"), [], 0
    for end in range(1, len(order) + 1):
        longest = lengths[order[begin]]
        full = end < len(order) and ((end - begin + 1) * longest > tokens or lengths[order[end]] < slack * longest)
        if full or end == len(order):
            batches.append(order[begin:end])
            begin = end
    return batches


def token_budget(device: torch.device, requested: int | None) -> tuple[int, float]:
    """Tokens of a micro-batch, and the slack of `buckets`, that suit a device."""
    on_cpu = device.type == "cpu"
    return requested or (CPU_TOKENS if on_cpu else GPU_TOKENS), SLACK if on_cpu else 0.5


def padded(rows: list[Tensor], pad_id: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows (ids, states (T, C), or pooled states (C,)) as one batch, and their lengths (B,).

    length: rows of ids are padded to it, no_mask's way.
    """
    lengths = torch.tensor([len(row) for row in rows])
    if rows[0].ndim == 1 and rows[0].is_floating_point():
        return torch.stack(rows), lengths
    batch = pad_sequence(rows, batch_first=True, padding_value=0 if rows[0].ndim == 2 else pad_id)
    if length is not None and batch.shape[1] < length:
        batch = F.pad(batch, (0, length - batch.shape[1]), value=pad_id)
    return batch, lengths


@dataclass
class Judge:
    """A classifier with all that it needs to read texts."""

    classifier: Classifier
    tokenizer: Tokenizer
    reading: Reading
    labels: list[str]
    temperature: float = 1.0
    """Logits are divided by it before they become probabilities; fitted on the dev part (arXiv:1706.04599)."""
    dtype: torch.dtype = torch.float32
    micro_tokens: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.classifier.score.weight.device

    @property
    def full_length(self) -> int | None:
        """What rows are padded to, for no_mask."""
        return self.reading.block_size if self.classifier.pooling == "no_mask" else None

    def batch(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """`padded` on the device."""
        x, lengths = padded(rows, self.reading.pad_id, self.full_length)
        return x.to(self.device), lengths.to(self.device)

    def buckets(self, rows: list[Tensor]) -> list[np.ndarray]:
        """Rows that go through the model together; pooled states, all of them."""
        if rows[0].is_floating_point() and rows[0].ndim == 1:
            return [np.arange(len(rows))]
        lengths = np.array([self.full_length or len(row) for row in rows])
        return buckets(lengths, *token_budget(self.device, self.micro_tokens))

    def run(self, stage: Callable[[Tensor, Tensor], Tensor], rows: list[Tensor]) -> list[Tensor]:
        """`stage(batch, lengths)` without gradients, a tensor for each row in their order, on the CPU."""
        results: list[Any] = [None] * len(rows)
        with torch.no_grad():
            for chosen in self.buckets(rows):
                x, lengths = self.batch([rows[i] for i in chosen])
                with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                    out = stage(x, lengths).float().cpu()
                for i, value in zip(chosen, out, strict=True):
                    results[i] = value
        return results

    def logits(self, rows: list[Tensor], owner: np.ndarray, units: int) -> np.ndarray:
        """Logits (units, labels) float64: the mean over the rows of each. Puts the classifier into eval mode."""
        self.classifier.eval()
        logits = torch.stack(self.run(self.classifier, rows)).double().numpy()
        total = np.zeros((units, logits.shape[1]))
        np.add.at(total, owner, logits)
        return total / np.bincount(owner, minlength=units)[:, None]

    def probabilities(self, texts: list[str]) -> np.ndarray:
        """Calibrated probabilities (texts, labels). Raises UserError for logits that are not finite."""
        rows, owner = self.reading.rows(texts, self.tokenizer)
        logits = self.logits([torch.from_numpy(row) for row in rows], owner, len(texts))
        if not np.isfinite(logits).all():
            raise not_finite("the logits")
        return softmax(logits / self.temperature)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


# The directory


def save(directory: Path, judge: Judge) -> None:
    """Write a classifier into an existing directory.

    With `mask` it is what AutoModelForSequenceClassification loads, and its tokenizer wraps texts as ours does; other
    poolings get a model_type that transformers refuses, as it would pool another state. Raises OSError.
    """
    model, reading = merged(judge.classifier.model), judge.reading
    architecture = ARCHITECTURES[model.cfg.family].removesuffix("LMHeadModel").removesuffix("ForCausalLM")
    config = hf_config(model.cfg, model.end_ids) | {
        "architectures": [f"{architecture}ForSequenceClassification"],
        "tie_word_embeddings": True,  # there is no output layer to be read
        "num_labels": len(judge.labels),
        "id2label": {str(i): label for i, label in enumerate(judge.labels)},
        "label2id": {label: i for i, label in enumerate(judge.labels)},
        "problem_type": "single_label_classification",
        "pad_token_id": reading.pad_id,
    }
    if judge.classifier.pooling != "mask":
        config = {"model_type": OWN, "architectures": [OWN], "decoder": config}
    write_json(directory / "config.json", config)
    tensors = {name: t for name, t in to_hf(model).items() if name != "lm_head.weight"}
    tensors["score.weight"] = judge.classifier.score.weight.detach().contiguous()
    save_tensors(directory / "model.safetensors", {name: t.cpu() for name, t in tensors.items()})
    settings = dataclasses.asdict(reading) | {"pooling": judge.classifier.pooling, "temperature": judge.temperature,
                                              "labels": judge.labels}  # fmt: skip
    write_json(directory / SETTINGS, settings)
    wrapping(judge.tokenizer, reading).save(directory, model_max_length=reading.block_size)


@dataclass(frozen=True)
class Settings:
    """What `classifier.json` says: how texts are read (`Reading`), and what is made of the scores.

    Raises UserError for values that no classifier has.
    """

    block_size: int
    long_texts: str
    before: list[int]
    after: list[int]
    pad_id: int
    pooling: str
    temperature: float
    labels: list[str]

    def __post_init__(self) -> None:
        for key, known in (("long_texts", ("chunks", "truncate")), ("pooling", ("mask", "no_mask", "mean"))):
            if getattr(self, key) not in known:
                raise UserError(
                    f"{SETTINGS} has {key}={brief(getattr(self, key))}; it must be one of {', '.join(known)}"
                )
        if not MOST_CERTAIN <= self.temperature <= 1 / MOST_CERTAIN:
            raise UserError(f"{SETTINGS} has temperature={self.temperature}; it must lie from {MOST_CERTAIN:g} to "
                            f"{1 / MOST_CERTAIN:g}")  # fmt: skip
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise UserError(f"{SETTINGS} has labels={brief(self.labels)}; they must be two or more, each once")
        if self.block_size <= len(self.before) + len(self.after):
            raise UserError(f"{SETTINGS} has block_size={self.block_size}, which leaves no room for a text")

    def reading(self, decoder: ModelConfig) -> Reading:
        """How texts are read for `decoder`. Raises UserError for ids or lengths that it does not have."""
        for key, ids in (("before", self.before), ("after", self.after), ("pad_id", [self.pad_id])):
            if not all(0 <= id_ < decoder.vocab_size for id_ in ids):
                raise UserError(
                    f"{SETTINGS} has {key}={brief(ids)}, but the model's ids go to {decoder.vocab_size - 1}"
                )
        if self.block_size > decoder.block_size:
            raise UserError(f"{SETTINGS} has block_size={self.block_size}, but the model has {decoder.block_size}")
        return Reading(self.block_size, self.long_texts, tuple(self.before), tuple(self.after), self.pad_id)


def wrapping(tokenizer: Tokenizer, reading: Reading) -> Tokenizer:
    """A tokenizer that, in transformers, puts what stands around a text there by itself."""
    copy = Tokenizer.from_json(tokenizer.backend.to_str(), tokenizer.config)
    named = {id_: tokenizer.backend.id_to_token(id_) for id_ in (*reading.before, *reading.after)}
    around = ([named[i] for i in reading.before], [named[i] for i in reading.after])
    copy.backend.post_processor = processors.TemplateProcessing(
        single=[*around[0], "$A", *around[1]], special_tokens=[(token, id_) for id_, token in named.items()]
    )
    copy.config["pad_token"] = tokenizer.backend.id_to_token(reading.pad_id)
    return copy


def load(name: str | Path, device: torch.device, dtype: torch.dtype) -> Judge:
    """A classifier that `save` wrote: its directory, or a run of `miaobi classify train`.

    Raises UserError for files that are missing, damaged, or of a model that is no classifier.
    """
    path = model_directory(name)
    if not (path / SETTINGS).is_file():
        raise UserError(f"{path} is no classifier of miaobi (it has no {SETTINGS}); "
                        "train one with miaobi classify train --base_model=...")  # fmt: skip
    config = read_json(path / "config.json")
    try:
        settings = read_record(path / SETTINGS, Settings)
    except UserError as e:
        raise UserError(f"{path} is damaged ({e}); copy it again, or train it again") from e
    try:
        with verifying(path, lambda name: for_model(name) or name == SETTINGS):
            tensors = read_tensors(path)
        score = tensors.pop("score.weight")
        refuse_unusable("its head", {"score.weight": score})
        decoder = model_config(config.get("decoder", config), tensors)
        reading = settings.reading(decoder)
        tensors = check_hf(decoder, tensors, "its weights")
        model = Transformer(decoder)
        load_hf(model, tensors)
        classifier = Classifier(model, len(settings.labels), settings.pooling)
        classifier.score.weight.data.copy_(score)
        judge = Judge(classifier.to(device), Tokenizer.load(path), reading, settings.labels,
                      float(settings.temperature), dtype)  # fmt: skip
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{path} is damaged ({type(e).__name__}: {e}); copy it again, or train it again") from e
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    return judge
