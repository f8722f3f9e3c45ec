"""What a model directory's generation_config.json says: what ends a text, and how its makers want it sampled.

What is not usable, or not used, is said once, by file, name and value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miaobi.console import warn_once
from miaobi.errors import UserError, brief
from miaobi.files import read_json

GENERATION_CONFIG = "generation_config.json"
WRITTEN_ANEW = ("eos_token_id", "transformers_version", "_from_model_config")
IDS = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
       "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")  # fmt: skip
"""Settings that hold token ids, or lists of them."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What of it is used to sample, under the names that transformers and our own settings share."""
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "typical_p", "length_penalty",
                     "guidance_scale", "encoder_repetition_penalty"), 1),
    "max_length": 20,  # transformers wrote it into every file
}  # fmt: skip
"""Values, besides 0 and nothing, with which a setting of transformers changes no text."""
NO_MATTER = {
    *WRITTEN_ANEW, *SAMPLING, "do_sample", "bos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache",
    "cache_implementation", "cache_config", "max_cache_len", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate", "low_memory", "use_mtp", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    "prompt_lookup_num_tokens", "max_matching_ngram_size", "compile_config", "disable_compile",
    "continuous_batching_config", "prefill_chunk_size", "renormalize_logits", "remove_invalid_values",
    "trust_remote_code",
}  # fmt: skip
"""Settings that are used, or change no text: they say how transformers computes."""


def check_sampling(name: str, value: float) -> None:
    """Raises UserError for a number that SAMPLING's `name` cannot be."""
    if name == "temperature" and not 0.0 <= value < math.inf:
        raise UserError(f"temperature is {value}; give a finite number of 0 (greedy) or more")
    if name == "top_k" and value < 0:
        raise UserError(f"top_k is {value}; give 0 for no limit or a positive number")
    if name == "top_p" and not 0.0 < value <= 1.0:
        raise UserError(f"top_p is {value}; give a probability in (0, 1]")
    if name == "min_p" and not 0.0 <= value < 1.0:
        raise UserError(f"min_p is {value}; give a share from 0 up to below 1")
    if name == "repetition_penalty" and not 0.01 <= value <= 100.0:  # far beyond, logits overflow
        raise UserError(f"repetition_penalty is {value}; give one from 0.01 to 100 (1 = none)")


def end_ids(path: Path, vocab_size: int = 1 << 31, notes: list[str] | None = None) -> tuple[int, ...]:
    """Tokens that end a text or a turn, as a model directory says; often more than one in a chat model.

    generation_config.json is asked first, then config.json. What is no id of the model is left out, and said in a line,
    which is added to `notes`. Raises UserError for a damaged file.
    """
    for file in (GENERATION_CONFIG, "config.json"):
        named = read_json(path / file).get("eos_token_id")
        listed = named if isinstance(named, list) else [] if named is None else [named]
        ids = tuple(id_ for id_ in listed if is_id(id_, vocab_size))
        if len(ids) < len(listed):
            others = [id_ for id_ in listed if not is_id(id_, vocab_size)] if isinstance(named, list) else named
            _note(notes, f"{path / file}: eos_token_id has {brief(others)}, no id of the model's 0 to "
                         f"{vocab_size - 1}: not used")  # fmt: skip
        if ids:
            return ids
    return ()


def is_id(value: Any, vocab_size: int) -> bool:
    """Whether it is the id of a token that the model has."""
    return type(value) is int and 0 <= value < vocab_size


def generation_settings(path: Path, vocab_size: int, notes: list[str] | None = None) -> dict[str, Any]:
    """What generation_config.json says besides what ends a text, and the bos_token_id.

    Left out, with a line each: ids that the model does not have, and values with which nothing can be sampled. One line
    says which other settings would change the text in transformers, and do not here. The lines are added to `notes`.
    Raises UserError if damaged.
    """
    file = path / GENERATION_CONFIG
    generation = read_json(file)
    settings = {"bos_token_id": read_json(path / "config.json").get("bos_token_id")}
    settings |= {key: value for key, value in generation.items() if key not in WRITTEN_ANEW}
    for key in IDS:
        if settings.get(key) is not None and not _all_ids(settings[key], vocab_size):
            where = file if key in generation else path / "config.json"
            _note(notes, f"{where}: {key} is {brief(settings[key])}, not of the model's ids 0 to {vocab_size - 1}: "
                         "not used")  # fmt: skip
            settings[key] = None
    for key in (*SAMPLING, "do_sample"):
        if settings.get(key) is not None and (problem := _problem(key, settings[key])):
            _note(notes, f"{file}: {problem}: not used")
            del settings[key]
    others = {key: value for key, value in settings.items()
              if key not in NO_MATTER and value and value != NEUTRAL.get(key)}  # fmt: skip
    if others:
        unused = ", ".join(f"{brief(key)[1:-1]}={brief(value)}" for key, value in list(others.items())[:10])
        _note(notes, f"{file}: {unused}{' and more' * (len(others) > 10)}: not used; texts are drawn token by token, "
                     f"with {', '.join(SAMPLING)}")  # fmt: skip
    return settings


def _note(notes: list[str] | None, line: str) -> None:
    warn_once(line)
    if notes is not None:
        notes.append(line)


def _all_ids(value: Any, vocab_size: int) -> bool:
    if not isinstance(value, list):
        return is_id(value, vocab_size)
    flat = [part for item in value for part in (item if isinstance(item, list) else [item])]
    return all(is_id(part, vocab_size) for part in flat)


def _problem(key: str, value: Any) -> str:
    """Why a setting cannot be used, or ""."""
    if key == "do_sample":
        return "" if isinstance(value, bool) else f"do_sample is {brief(value)}, neither true nor false"
    if type(value) not in ((int,) if key == "top_k" else (int, float)):
        return f"{key} is {brief(value)}, not a {'whole ' * (key == 'top_k')}number"
    if not -(1 << 31) < value < 1 << 31:
        return f"{key} is {brief(value)}, not a number to sample with"
    try:
        check_sampling(key, value)
    except UserError as e:
        return str(e).partition(";")[0] + ", with which nothing can be sampled"
    return ""


def sampling_settings(generation: Mapping[str, Any] | None) -> dict[str, float | int]:
    """How a model's makers want it to be sampled, of what `generation_settings` gave: those of SAMPLING that are
    stated; do_sample=false is a temperature of 0.
    """
    settings = generation or {}
    stated = {key: settings[key] for key in SAMPLING if settings.get(key) is not None}
    return stated | ({"temperature": 0.0} if settings.get("do_sample") is False else {})
