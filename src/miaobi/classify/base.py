"""The model that is tuned, and how texts are laid out for it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import torch

from miaobi.classify import head
from miaobi.classify.config import ClassifyConfig
from miaobi.classify.data import Reading
from miaobi.console import log
from miaobi.corpus.dataset import derive
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.model.checkpoint import load_model, model_directory
from miaobi.model.transformer import VOCAB_MULTIPLE, Transformer

MARKS = ("<start>", "<extract>")


def open_base(cfg: ClassifyConfig) -> str:
    """The MODEL that `cfg.base_model` means; a small-gpt .pth is converted first.

    Raises UserError where none is given, or it cannot be converted.
    """
    if not cfg.base_model:
        raise UserError("which model is to be tuned? give a run or model directory: --base_model=out")
    if Path(cfg.base_model).suffix == ".pth":
        from miaobi.convert.small_gpt import converted

        return str(converted(Path(cfg.base_model), cfg.corpus))
    return cfg.base_model


def prepare_base(cfg: ClassifyConfig, base: str, seed: int) -> tuple[Transformer, Tokenizer, Reading]:
    """The base model, its tokenizer, and how texts are laid out for it.

    as-published: `<start>` text `<extract>`, two tokens that the model never saw, drawn as torch draws embeddings
    (standard deviation 1), as small-gpt does. corrected: the text in its tokenizer's own frame (`<s>`, `[CLS]` and
    `[SEP]`); where that puts nothing behind, the token that ended texts in pretraining; none that is the padding, which
    transformers would not pool. A base that is a classifier itself reads on as it did.

    Raises UserError for a tokenizer without padding, and what `load_model` raises.
    """
    trained = base_classifier(base)
    model, tokenizer = (trained.classifier.model, trained.tokenizer) if trained else load_model(base)
    if model.quantized:
        log(f"{base}: its weights are {model.quantized}; they are tuned in full precision")
    size = min(cfg.block_size or model.cfg.block_size, model.cfg.block_size)
    if cfg.block_size is not None and cfg.block_size > size:
        raise UserError(f"block_size is {cfg.block_size}, but {base} reads {size} tokens at most; leave block_size out")
    pad = tokenizer.eot_id if tokenizer.pad_id is None else tokenizer.pad_id
    if pad is None:
        raise UserError(f"the tokenizer of {base} has neither a padding nor an end token; choose another base_model")
    has_marks = trained and tokenizer.token_to_id(MARKS[0]) in trained.reading.before
    if trained and (has_marks or cfg.protocol == "corrected"):
        return model, tokenizer, dataclasses.replace(trained.reading, block_size=size, long_texts=cfg.long_texts)
    if cfg.protocol == "as-published":
        tokenizer, (start, extract) = with_marks(tokenizer, model, seed)
        return model, tokenizer, Reading(size, cfg.long_texts, (start,), (extract,), pad)
    before, behind = tokenizer.frame
    ends = [id_ for id_ in (*reversed(model.end_ids), tokenizer.eot_id, tokenizer.sep_id) if id_ not in (None, pad)]
    after = tuple(id_ for id_ in behind if id_ != pad) or tuple(ends[:1])
    return model, tokenizer, Reading(size, cfg.long_texts, tuple(before), after, pad)


def base_classifier(base: str) -> head.Judge | None:
    """The classifier that `base` is, None for a language model.

    One may be tuned on: intermediate training on other labelled texts first (STILTs, arXiv:1811.01088).
    """
    path = model_directory(base)
    return head.load(path, torch.device("cpu"), torch.float32) if (path / head.SETTINGS).is_file() else None


def with_marks(tokenizer: Tokenizer, model: Transformer, seed: int) -> tuple[Tokenizer, tuple[int, int]]:
    """The tokenizer with MARKS behind its last token, rows for them in `model`'s embedding, and their ids.

    Raises UserError for a tokenizer whose vocabulary is not a table.
    """
    settings = json.loads(tokenizer.backend.to_str())
    vocab, first = settings["model"].get("vocab"), tokenizer.vocab_size
    if not isinstance(vocab, dict):
        raise UserError("protocol=as-published adds two tokens, which this model's tokenizer has no room for; "
                        "use --protocol=corrected")  # fmt: skip
    ids = (first, first + 1)
    vocab |= dict(zip(MARKS, ids, strict=True))  # into the vocabulary itself: an added token's id is not ours to choose
    marked = Tokenizer.from_json(json.dumps(settings), tokenizer.config)
    marked.backend.add_special_tokens(list(MARKS))
    draw = torch.Generator().manual_seed(derive(seed, "marks"))
    rows = max(model.cfg.vocab_size, first + 2)
    table = torch.nn.Embedding(math.ceil(rows / VOCAB_MULTIPLE) * VOCAB_MULTIPLE, model.cfg.n_embd)
    with torch.no_grad():
        table.weight.zero_()
        table.weight[: model.cfg.vocab_size] = model.wte.weight[: model.cfg.vocab_size]
        table.weight[first : first + 2] = torch.randn(2, model.cfg.n_embd, generator=draw)
    model.wte, model.lm_head = table, None  # the output layer is of no more use
    model.cfg = dataclasses.replace(model.cfg, vocab_size=rows, tie_word_embeddings=True)
    return Tokenizer.from_json(marked.backend.to_str(), tokenizer.config), ids
