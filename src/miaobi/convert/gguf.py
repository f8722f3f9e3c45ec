"""Model directories as GGUF files, for llama.cpp, Ollama and LM Studio.

llama.cpp's own converter knows tokenizers by a list and refuses every newly trained one. Ours need nothing special:

- A character vocabulary is llama.cpp's SentencePiece kind ("llama"): no piece of two characters, so nothing merges, and
  what is missing goes through the pieces `<0xNN>`.
- Our BPE is its kind "gpt2" on raw UTF-8 ("sarvam-moe" is the pre-tokenizer that does that, in llama.cpp since April
  2026). It splits less than ours does, which changes nothing: our merges never cross the borders of our pieces.

Both write blanks as `▁` (U+2581). Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import models

from miaobi.console import log, warn
from miaobi.convert.config import GGUFConfig
from miaobi.corpus.template import CHATML_TEMPLATE, SEP_TEMPLATE, source_of
from miaobi.corpus.tokenizer import BYTE_PIECES, Tokenizer
from miaobi.errors import UserError, number_of
from miaobi.files import aside_of, write_text
from miaobi.model.checkpoint import load_model, model_directory
from miaobi.model.families import to_hf
from miaobi.model.generation import sampling_settings
from miaobi.model.transformer import Transformer, head_dim, intermediate_size

if TYPE_CHECKING:
    import gguf

BLANK = "\u2581"
NORMAL, CONTROL, UNUSED, BYTE = 1, 3, 5, 6  # llama.cpp's types of tokens
BLOCK = 32
"""Columns that Q8_0 and the Q4 and Q5 kinds quantize together."""
OLLAMA_TEMPLATES = {  # Ollama before 2026 does not read the file's own template
    SEP_TEMPLATE: "{{- range .Messages }}{{ .Content }}<sep>{{ end }}",
    CHATML_TEMPLATE: "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n",
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's words; lists go by id."""

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None


def convert(config: GGUFConfig) -> dict[str, Any]:
    """Write the file. Returns out, bytes, parameters, quantize, tokenizer, and what differs from our own engine.

    Raises UserError for models and tokenizers that llama.cpp cannot run as they are.
    """
    gguf = _library()
    directory = model_directory(config.model, config.checkpoint)
    model, tokenizer = load_model(directory)
    out = config.out or Path(f"{_name(config.model, directory)}-{config.quantize}.gguf")
    if out.is_dir():
        raise UserError(f"--out={out} is a directory; give the name of a file")
    vocabulary = vocabulary_of(tokenizer, model.cfg.vocab_size, config.bpe)
    temporary = aside_of(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(temporary, model.cfg.family)
    try:
        writer.add_name(_name(config.model, directory))
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[config.quantize]])
        write_shape(writer, model, gguf)
        write_tokenizer(writer, vocabulary, tokenizer, model)
        unaligned = write_tensors(writer, model, config.quantize, gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    result = {
        "out": str(out),
        "bytes": out.stat().st_size,
        "parameters": model.num_parameters(),
        "quantize": config.quantize,
        "tokenizer": vocabulary.model + (f"/{vocabulary.pre}" if vocabulary.pre else ""),
        "kept_in_f16": unaligned,
    } | differences(model, tokenizer, vocabulary)
    if unaligned:
        log(
            f"{number_of(len(unaligned), 'matrix')} with rows that are no multiple of {BLOCK}, staying f16: "
            f"{unaligned[0]}{' and others' if len(unaligned) > 1 else ''}"
        )
    if config.ollama:
        result["modelfile"] = str(write_modelfile(out, tokenizer, model))
    return result


_FILE_TYPES = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q5_1": "MOSTLY_Q5_1",
    "q5_0": "MOSTLY_Q5_0", "q4_1": "MOSTLY_Q4_1", "q4_0": "MOSTLY_Q4_0",
}  # fmt: skip


def _library():
    try:
        import gguf
    except ImportError as e:
        raise UserError("writing GGUF needs the package gguf: pip install 'miaobi[gguf]'") from e
    return gguf


def _name(model: str, directory: Path) -> str:
    """A run's or a model's own name; not that of its checkpoint."""
    return Path(model).resolve().name if Path(model).exists() else model.rpartition("/")[2] or directory.name


def vocabulary_of(tokenizer: Tokenizer, rows: int, bpe: str = "exact") -> Vocabulary:
    """The tokenizer as llama.cpp reads it, for a model of `rows` rows.

    Raises UserError for kinds that llama.cpp has no exact counterpart for.
    """
    settings = json.loads(tokenizer.backend.to_str())
    added = {token["id"] for token in settings["added_tokens"]}
    byte_fallback = isinstance(tokenizer.backend.model, models.BPE) and tokenizer.backend.model.byte_fallback
    byte_level = (settings.get("pre_tokenizer") or {}).get("type") == "ByteLevel"
    if not (byte_fallback and settings["normalizer"] is None) and not byte_level:
        kind = type(tokenizer.backend.model).__name__
        raise UserError(f"llama.cpp has no tokenizer that gives the same ids as this {kind}; models with miaobi's own "
                        "tokenizers (char, bpe) and with GPT-2's can be written")  # fmt: skip
    by_id = {id_: token for token, id_ in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    tokens, types = [], []
    for id_ in range(rows):
        token = by_id.get(id_)
        if token is None:
            tokens.append(f"<unused {id_}>")
            types.append(UNUSED)
        elif id_ in added:
            tokens.append(token)
            types.append(CONTROL)
        elif byte_fallback and token == BYTE_PIECES[ord(" ")] and " " not in by_id.values():
            tokens.append(BLANK)  # a text's blanks have become this sign before they could become bytes
            types.append(NORMAL)
        elif byte_fallback and token in BYTE_PIECES:
            tokens.append(token)
            types.append(BYTE)
        elif byte_fallback and BLANK in token:
            # in these files ▁ is a blank; the character itself goes through its bytes
            tokens.append(f"<literal {id_}>")
            types.append(UNUSED)
        else:
            tokens.append(token.replace(" ", BLANK) if byte_fallback else token)
            types.append(NORMAL)
    if byte_level:
        return Vocabulary("gpt2", "gpt-2", tokens, types, None, [" ".join(pair) for pair in _merges(settings)])
    if tokenizer.by_character:
        return Vocabulary("llama", None, tokens, types, [0.0] * rows, None)
    merges = [
        tuple(part.replace(" ", BLANK) for part in pair) for pair in _merges(settings) if BLANK not in "".join(pair)
    ]
    if bpe == "exact":
        return Vocabulary("gpt2", "sarvam-moe", tokens, types, None, [" ".join(pair) for pair in merges])
    rank = {left + right: -float(i) for i, (left, right) in reversed(list(enumerate(merges)))}
    scores = [rank.get(token, -float(len(merges))) if types[i] == NORMAL else 0.0 for i, token in enumerate(tokens)]
    return Vocabulary("llama", None, tokens, types, scores, None)


def _merges(settings: dict) -> list[tuple[str, str]]:
    """Pairs of a BPE model; older files write them with a blank between."""
    return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in settings["model"]["merges"]]


def write_shape(writer: gguf.GGUFWriter, model: Transformer, gguf) -> None:
    """Sizes of the model, and how its positions turn."""
    cfg = model.cfg
    writer.add_block_count(cfg.n_layer)
    writer.add_context_length(cfg.block_size)
    writer.add_embedding_length(cfg.n_embd)
    writer.add_feed_forward_length(intermediate_size(cfg))
    writer.add_head_count(cfg.n_head)
    writer.add_vocab_size(cfg.vocab_size)
    if cfg.family == "gpt2":
        writer.add_layer_norm_eps(cfg.norm_eps or 1e-5)
        return
    writer.add_head_count_kv(cfg.n_kv_head or cfg.n_head)
    writer.add_layer_norm_rms_eps(cfg.norm_eps or 1e-6)
    writer.add_key_length(head_dim(cfg))
    writer.add_value_length(head_dim(cfg))
    writer.add_rope_dimension_count(head_dim(cfg))
    writer.add_rope_freq_base(cfg.rope_theta)
    if cfg.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(cfg.rope_factor)
    elif cfg.rope_type != "default":
        raise UserError(f"rope_type {cfg.rope_type!r} cannot be written as GGUF here; only default and linear can")


def write_tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary, tokenizer: Tokenizer, model: Transformer) -> None:
    """Every id and switch by name: what is left out has a default that is wrong here."""
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    ends = special_ids(tokenizer, model)
    for role, id_ in ends.items():
        getattr(writer, f"add_{role}_token_id")(id_)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if (template := source_of(tokenizer)) is not None:
        writer.add_chat_template(template)


def special_ids(tokenizer: Tokenizer, model: Transformer) -> dict[str, int]:
    """bos, eos, eot, pad and unk: eos ends a text, eot a turn."""
    ends = list(model.end_ids)
    fallback = tokenizer.pad_id if tokenizer.pad_id is not None else (ends[-1] if ends else 0)
    text_end = ends[-1] if ends else (tokenizer.eot_id if tokenizer.eot_id is not None else fallback)
    bos = (model.generation or {}).get("bos_token_id")
    return {
        "bos": bos if isinstance(bos, int) else text_end,
        "eos": text_end,
        "eot": ends[0] if ends else text_end,
        "pad": fallback,
        "unk": fallback,
    }


def write_tensors(writer: gguf.GGUFWriter, model: Transformer, quantize: str, gguf) -> list[str]:
    """All weights under GGUF's names. Returns the matrices whose rows do not fit the kind and stay f16."""
    cfg = model.cfg
    kinds = gguf.GGMLQuantizationType
    small = quantize.startswith(("q4", "q5"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[cfg.family.upper()], cfg.n_layer)
    unaligned = []
    for name, weight in to_hf(model).items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UserError(f"GGUF has no name for the tensor {name} of a {cfg.family} model")
        weight = weight.float()
        if cfg.family == "gpt2" and ".c_" in name and weight.ndim == 2:
            weight = weight.T  # Hugging Face's GPT-2 keeps its Conv1D transposed
        if cfg.family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = _interleaved(weight, head_dim(cfg))
        array = np.ascontiguousarray(weight.numpy())
        if array.ndim == 1 or "position_embd" in gguf_name or quantize == "f32":
            writer.add_tensor(gguf_name, array)
            continue
        kind = kinds["Q8_0" if small and "embd" in gguf_name else quantize.upper()]
        if quantize.startswith("q") and array.shape[1] % BLOCK:
            kind = kinds.F16
            unaligned.append(gguf_name)
        writer.add_tensor(gguf_name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    return unaligned


def _interleaved(weight: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of q or k in the order in which llama.cpp's `llama` turns them: pairs side by side, not half by half."""
    return weight.view(-1, 2, width // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


SAMPLE = "中国队在比赛中取得了胜利，记者昨天从北京了解到，今年的经济增长超过了预期。他说：“这是我们的机会！”"


@torch.no_grad()
def differences(model: Transformer, tokenizer: Tokenizer, vocabulary: Vocabulary) -> dict[str, Any]:
    """What llama.cpp computes otherwise, measured, and said in a line each."""
    report: dict[str, Any] = {}
    if model.cfg.family == "gpt2" and model.cfg.activation == "gelu":
        ids = torch.tensor([tokenizer.encode(SAMPLE)[: model.cfg.block_size]])
        exact = model(ids)
        for block in model.blocks:
            block.mlp.approximate = "tanh"
        tanh = model(ids)
        report["gelu_logit_difference"] = (exact - tanh).abs().max().item()
        warn("llama.cpp computes GELU by its tanh approximation, this model was trained with the exact one: logits "
             f"differ by up to {report['gelu_logit_difference']:.4f} on a sentence")  # fmt: skip
    literal = sum(token.startswith("<literal ") for token in vocabulary.tokens)
    if literal:
        report["pieces_left_out"] = literal
        warn(
            f"{number_of(literal, 'piece')} with the character {BLANK}, which stands for a blank there: texts with it "
            "get other ids"
        )
    return report


def write_modelfile(out: Path, tokenizer: Tokenizer, model: Transformer) -> Path:
    """Ollama's Modelfile next to the file. Returns its path."""
    template = source_of(tokenizer)
    lines = [f"FROM ./{out.name}"]
    if template in OLLAMA_TEMPLATES:
        lines.append(f'TEMPLATE """{OLLAMA_TEMPLATES[template]}"""')
    names = {id_: token for token, id_ in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    lines += [f"PARAMETER stop {json.dumps(names[id_], ensure_ascii=False)}" for id_ in model.end_ids if id_ in names]
    settings = sampling_settings(model.generation)
    known = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repeat_penalty"}
    lines += [f"PARAMETER {theirs} {settings[ours]}" for ours, theirs in known.items() if ours in settings]
    lines.append(f"PARAMETER num_ctx {model.cfg.block_size}")
    path = out.with_name("Modelfile")
    write_text(path, "\n".join(lines) + "\n")
    return path
