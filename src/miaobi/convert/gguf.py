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
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from miaobi.console import log, warn
from miaobi.convert.config import GGUFConfig
from miaobi.convert.gguf_vocabulary import BLANK, ByScore, Vocabulary, vocabulary_of
from miaobi.corpus.prepared import PreparedData, is_prepared
from miaobi.corpus.template import CHATML_TEMPLATE, SEP_TEMPLATE, source_of
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError, number_of
from miaobi.files import aside_of, write_text
from miaobi.model.card import CARD, summary_of
from miaobi.model.checkpoint import load_model, model_directory
from miaobi.model.families import to_hf
from miaobi.model.generation import sampling_settings
from miaobi.model.transformer import Transformer, head_dim, intermediate_size
from miaobi.settings import read_yaml

if TYPE_CHECKING:
    import gguf

BLOCK = 32
"""Columns that Q8_0 and the Q4 and Q5 kinds quantize together."""
CARD_KEYS = ("license", "language", "tags", "pipeline_tag", "base_model", "datasets")
"""What a model card's metadata says that GGUF has a place for."""
LARGEST_CARD = 1 << 20
OLLAMA_TEMPLATES = {  # Ollama before 2026 does not read the file's own template
    SEP_TEMPLATE: "{{- range .Messages }}{{ .Content }}<sep>{{ end }}",
    CHATML_TEMPLATE: "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n",
}


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
        facts = facts_of(directory, gguf)
        facts.name = _name(config.model, directory)
        facts.set_gguf_meta_model(writer)
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
    if config.bpe == "compatible" and vocabulary.scores is not None and not tokenizer.by_character:
        result |= count_differing(sentences_of(config.model), tokenizer, vocabulary)
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


def facts_of(directory: Path, gguf) -> gguf.Metadata:
    """What the model card says, as GGUF's metadata: license, languages, tags, base model, data sets, a sentence.

    A card that cannot be read is left out, which is said: it may be anybody's.
    """
    file = directory / CARD
    try:
        if file.is_file() and file.stat().st_size > LARGEST_CARD:
            raise ValueError(f"it has {file.stat().st_size:,} bytes")
        card = gguf.Metadata.load_model_card(directory)
    except Exception as e:  # PyYAML has kinds of its own
        warn(f"{file} is left out of the GGUF file ({type(e).__name__}: {str(e)[:100]})")
        card = {}
    lists = {key: [value] if isinstance(value, str) else value for key, value in card.items() if key in CARD_KEYS}
    texts = {key: value for key, value in lists.items() if isinstance(value, list) and value
             and all(isinstance(item, str) for item in value)}  # fmt: skip
    if "license" in texts:
        texts["license"] = ",".join(texts["license"])
    facts = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), texts, None, None, 0)
    facts.description = summary_of(file) or None
    return facts


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
    writer.add_add_bos_token(bool(tokenizer.begin_ids))  # of a hub's; ours put nothing before a text
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if (template := source_of(tokenizer)) is not None:
        writer.add_chat_template(template)


def special_ids(tokenizer: Tokenizer, model: Transformer) -> dict[str, int]:
    """bos, eos, eot, pad and unk: eos ends a text, eot a turn."""
    ends = list(model.end_ids)
    fallback = tokenizer.pad_id if tokenizer.pad_id is not None else (ends[-1] if ends else 0)
    text_end = ends[-1] if ends else (tokenizer.eot_id if tokenizer.eot_id is not None else fallback)
    begin = tokenizer.begin_ids
    bos = begin[0] if begin else (model.generation or {}).get("bos_token_id")
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


def sentences_of(model: str) -> list[str]:
    """Up to 1,000 sentences of a run's validation text, where its prepared data still is, else SAMPLE's; cut after 200
    characters without a full stop.
    """
    text, run = SAMPLE, Path(model)
    with suppress(UserError, OSError):
        given = str(read_yaml(run / "config.yaml")[0].get("data", ""))
        place = next((place for place in (Path(given), run / "data") if given and is_prepared(place)), None)
        if place is not None:
            data = PreparedData.open(place)
            text = data.tokenizer.decode(data.val.read(0, min(len(data.val), 50_000))) or SAMPLE
    return [s for s in re.findall(r"[^。！？\n]{1,200}[。！？]?", text) if s.strip()][:1000]


def count_differing(sentences: list[str], tokenizer: Tokenizer, vocabulary: Vocabulary) -> dict[str, Any]:
    """How many of the sentences get other ids in llama.cpp; said in a line."""
    theirs = ByScore(vocabulary)
    differ = sum(theirs.encode(text) != tokenizer.encode(text) for text in sentences)
    warn(f"--bpe=compatible is approximate: {differ:,} of {number_of(len(sentences), 'sentence')} get other ids there "
         "than here; a llama.cpp of April 2026 or later gives the same with --bpe=exact")  # fmt: skip
    return {"sentences": len(sentences), "sentences_that_differ": differ}


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
