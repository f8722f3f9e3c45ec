"""small-gpt's checkpoints (`.pth`). They have no vocabulary: it is rebuilt from the text they were trained on."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from miaobi.config import RunConfig
from miaobi.console import log, warn
from miaobi.convert import reading
from miaobi.convert.config import SmallGPTConfig
from miaobi.corpus import nanogpt
from miaobi.corpus.blocks import with_progress
from miaobi.corpus.characters import N_CODE_POINTS, code_points, count_characters
from miaobi.corpus.dataset import IGNORE
from miaobi.corpus.documents import iter_blocks, read_block
from miaobi.corpus.sources import find_sources
from miaobi.corpus.template import SEP_TEMPLATE
from miaobi.corpus.tokenizer import BYTE_PIECES, PAD, SEP, Tokenizer
from miaobi.errors import UserError, brief, number_of
from miaobi.files import pointed
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer
from miaobi.settings import Origin, flatten, with_values

UNKNOWN = "<unk>"
SPECIALS = [UNKNOWN, SEP, PAD]
"""Ids 0, 1 and 2."""
LAYER = {
    "attn_norm": ("ln1",),
    "attn.qkv": ("attention.W_q", "attention.W_k", "attention.W_v"),
    "attn.proj": ("attention.out_net",),
    "mlp_norm": ("ln2",),
    "mlp.up": ("ffn.dense1",),
    "mlp.down": ("ffn.out_net",),
}
MASK = "attention.attention.mask"
DIALOGUES_SCORED, TOKENS_SCORED = 8, 64
"""Enough to tell the right vocabulary from a wrong one, and seconds on a model of 300M."""


def convert(
    path: Path, corpus: str | None, out: Path, exact: bool = False, license: str | None = None
) -> dict[str, Any]:
    """Write the model directory `out` from a checkpoint and the text it was trained on.

    exact: no byte tokens; a character that the vocabulary lacks becomes `<unk>`, as in small-gpt.

    Returns out, parameters, vocab_size, characters (in the vocabulary), spare_rows, step, loss (nats per token on the
    first dialogues of the corpus), and doubt: why the corpus may be another one, or None. Raises UserError for files
    that are missing, damaged or of something else.
    """
    checkpoint, text = read(path), find_corpus(corpus, path)
    reading.check_out(out)
    cfg = model_config(checkpoint, path)
    rows = cfg.vocab_size
    pieces, entropy = vocabulary(text)
    if len(pieces) > rows:
        raise UserError(
            f"{text} has {len(pieces):,} different tokens, but {path} has room for {rows:,}: it was trained on another "
            f"text ({brief(checkpoint.get('dataset'))} in its own words); give that one as --corpus"
        )
    model = reading.build(cfg, checkpoint["state_dict"], LAYER, MASK, path)
    tokenizer = character_tokenizer(pieces, None if exact else rows)
    if not exact:  # no text has <unk>, so its row is one that the model does not expect
        reading.append_rows(model, model.wte.weight[0].detach().clone(), len(BYTE_PIECES))
    loss, spare = score(model, tokenizer, text), rows - len(pieces)
    doubts = doubt(loss, entropy, spare, text, checkpoint.get("dataset"))
    if doubts is not None:
        warn(doubts)
    record = {
        "project": "small-gpt",
        "exact": exact,
        "doubt": doubts,
        "checkpoint": reading.fingerprint(path),
        "corpus": reading.fingerprint(text),
    }
    reading.write(out, model, tokenizer, (tokenizer.sep_id, tokenizer.pad_id), record, license)
    return {
        "out": str(out),
        "parameters": model.num_parameters(),
        "vocab_size": model.cfg.vocab_size,
        "characters": len(pieces) - len(SPECIALS),
        "spare_rows": spare,
        "step": checkpoint.get("global_step"),
        "loss": round(loss, 4),
        "doubt": doubts,
    }


def doubt(loss: float, entropy: float, spare: int, text: Path, dataset: Any) -> str | None:
    """Why `text` is probably not what the model was trained on; None where nothing speaks for that.

    With another text's vocabulary its tokens mean other characters: then it foretells this one worse than a model that
    knows no more than how often each character occurs. That is a bar that a checkpoint of a few hundred steps passes.

    loss, entropy: nats per token, of the model on the first dialogues and of such a model on the whole text.
    """
    if loss <= entropy:
        return None
    return (
        f"{text} is probably not the text that this model was trained on ({brief(dataset)} in its own words), and the "
        f"vocabulary rebuilt from it the wrong one: {loss:.2f} nats a token, where counting characters alone gives "
        f"{entropy:.2f}; without a character: {number_of(spare, 'row')} of its vocabulary. Unless it hardly "
        "learned, give that text"
    )


def convert_checkpoint(cfg: SmallGPTConfig) -> dict[str, Any]:
    """`miaobi convert small-gpt`; see `convert`."""
    return convert(cfg.checkpoint, cfg.corpus, cfg.directory, cfg.exact, cfg.license)


def converted(path: Path, corpus: str | None) -> Path:
    """The model directory next to `path`, X.miaobi for X.pth, converted anew if checkpoint or corpus changed.

    Raises what `convert` raises.
    """
    out = path.with_suffix(".miaobi")
    record = reading.read_record(out)
    if path.is_file() and record.get("exact") is False and reading.is_unchanged(path, record.get("checkpoint")):
        text = Path(corpus or "").expanduser()
        if not text.is_file() or reading.is_unchanged(text, record.get("corpus")):
            if isinstance(record.get("doubt"), str):
                warn(record["doubt"])
            return out
    result = convert(path, corpus, out)
    log(f"{path} -> {out}: {result['parameters'] / 1e6:.1f}M parameters, "
        f"{number_of(result['characters'], 'character')}, "
        f"{number_of(result['spare_rows'], 'row')} spare, {result['loss']:.2f} nats a token on {corpus}")  # fmt: skip
    return out


def start_from_checkpoint(cfg: RunConfig, origin: Origin) -> tuple[RunConfig, Origin]:
    """A configuration whose `resume_from` names a `.pth`, with `init_from` the converted model instead; else as it is.

    Of several processes one converts. Raises UserError where the configuration's sizes are not the checkpoint's, and
    what `convert` raises.
    """
    path = Path(cfg.train.resume_from or "")
    if path.suffix != ".pth":
        return cfg, origin
    from miaobi.train.rendezvous import join

    with join(cfg.train).first():
        return _start_from(path, cfg, origin)


def _start_from(path: Path, cfg: RunConfig, origin: Origin) -> tuple[RunConfig, Origin]:
    """`start_from_checkpoint`, in one process."""
    if cfg.train.init_from == "scratch" and origin.get("init_from") == "command line":
        log(f"--init_from=scratch: {path} is left alone")
        return with_values(cfg, {"resume_from": None}), origin
    stored, wanted = flatten(with_values(RunConfig(), read_shape(path))), flatten(cfg)
    for key in ("family", *reading.SIZES, "bias"):
        if wanted[key] != stored[key] and not origin.get(key, "default").startswith(("default", "auto")):
            raise UserError(f"{path} has {key}={stored[key]}, but {key}={wanted[key]} was asked for ({origin[key]}); "
                            f"write {key}={stored[key]} there, or leave it out")  # fmt: skip
    model = converted(path, cfg.data.data)
    if pointed(Path(cfg.train.out_dir) / "checkpoints" / "last") is None:  # else the run goes on from its own
        log(f"{path}: its weights are taken, by way of {model}; its optimizer is not, and steps count from 0")
    rows = f"the checkpoint's {stored['vocab_size']} and {len(BYTE_PIECES)} bytes"
    values = {"init_from": str(model), "resume_from": None, "vocab_size": stored["vocab_size"] + len(BYTE_PIECES)}
    return with_values(cfg, values), origin | {"init_from": f"converted from {path}", "vocab_size": rows}


def read(path: Path) -> dict[str, Any]:
    """A checkpoint of small-gpt. Raises UserError when it is damaged or not small-gpt's."""
    checkpoint = reading.read_checkpoint(path)
    if "state_dict" not in checkpoint:
        hint = "; it looks like nanoGPT's: miaobi convert nanogpt" if "model_args" in checkpoint else ""
        raise UserError(f"{path} is not a checkpoint of small-gpt, it has no state_dict{hint}")
    return checkpoint


def model_config(checkpoint: dict[str, Any], path: Path) -> ModelConfig:
    """The decoder that a checkpoint describes. Raises UserError for sizes that make no sense."""
    sizes = reading.read_sizes(checkpoint, path, "small-gpt")
    try:
        return ModelConfig(family="gpt2", bias=reading.read_bias(checkpoint, False, path), **sizes)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def read_shape(path: Path) -> dict[str, Any]:
    """The keys of ModelConfig that a checkpoint decides."""
    cfg = model_config(read(path), path)
    return {key: getattr(cfg, key) for key in ("family", *reading.SIZES, "bias")}


def find_corpus(corpus: str | None, path: Path) -> Path:
    """The text file that the vocabulary is rebuilt from. Raises UserError when there is none."""
    needs = f"{path} has no vocabulary of its own: it is rebuilt from the text that the model was trained on"
    if corpus is None:
        raise UserError(f"{needs}; give that file as --corpus=data/train.txt")
    text = Path(corpus).expanduser()
    if not text.is_file():
        raise UserError(f"{corpus}: no such file. {needs}; put it there, or name it (--corpus, or data_path in YAML)")
    return text


def vocabulary(corpus: Path) -> tuple[list[str], float]:
    """small-gpt's tokens in the order of their ids: `<unk>`, `<sep>`, `<pad>`, then characters by falling frequency,
    those equally frequent as they first occur. A newline is `<sep>`, or the end of a dialogue, and no character.
    And the entropy of how often they occur, in nats per token, newlines included.
    """
    listed = find_sources([str(corpus)], "text")  # whatever its name ends in
    sources = [replace(source, is_exact=True) for source in listed]  # small-gpt counts every character
    total, in_order = np.zeros(N_CODE_POINTS, np.int64), []
    contents = (((block,), read_block(block, whole=True)) for block in iter_blocks(sources, whole=True))
    for (block,), content in with_progress(contents, sources, "reading the corpus"):
        text = content.raw
        if content.encoding == "utf-8-sig" and block.start < 4:
            text = "\ufeff" + text  # open(path) keeps the byte order mark as a character
        counts = count_characters(code_points(text))
        fresh = np.flatnonzero((counts > 0) & (total[: len(counts)] == 0))
        in_order += sorted(map(chr, fresh.tolist()), key=text.find)
        total[: len(counts)] += counts
    characters = sorted((c for c in in_order if c != "\n"), key=lambda c: -total[ord(c)])
    shares = total[total > 0] / max(1, total.sum())
    return SPECIALS + characters, float(-(shares * np.log(shares)).sum())


def character_tokenizer(pieces: list[str], first_byte: int | None) -> Tokenizer:
    """The tokenizer of a chit-chat model; see `nanogpt.character_tokenizer`."""
    config = {"eos_token": PAD, "pad_token": PAD, "sep_token": SEP, "chat_template": SEP_TEMPLATE}
    if first_byte is None:
        config["unk_token"] = UNKNOWN
    return nanogpt.character_tokenizer(pieces, SPECIALS, first_byte, config)


@torch.no_grad()
def score(model: Transformer, tokenizer: Tokenizer, corpus: Path) -> float:
    """Nats per token at the start of the corpus' first dialogues, as small-gpt lays them out."""
    blocks = iter_blocks(find_sources([str(corpus)], "text"))
    documents = chain.from_iterable(read_block(block).documents for block in blocks)
    rows = []
    for dialogue in islice(documents, DIALOGUES_SCORED):
        ids, _ = tokenizer.encode_documents([dialogue], end_id=tokenizer.pad_id, newline_id=tokenizer.sep_id)
        rows.append(torch.from_numpy(ids[: min(TOKENS_SCORED, model.cfg.block_size) + 1].astype(np.int64)))
    if not rows:
        raise UserError(f"{corpus} has no dialogues; give the text that the model was trained on")
    inputs = pad_sequence([row[:-1] for row in rows], batch_first=True)
    targets = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=IGNORE)
    return F.cross_entropy(model.eval()(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE).item()
