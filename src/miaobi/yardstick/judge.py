"""`miaobi eval`: figures of a model on a text, or on the suite: bits per character by genre, and of what it writes."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from miaobi.corpus.dialogue import encode_lines
from miaobi.corpus.foreign import without_panic
from miaobi.corpus.template import SEP_TEMPLATE
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.device import explain_memory, keep_allocations, pick_device, pick_dtype
from miaobi.generate import measures
from miaobi.generate.chat import UNKNOWN, model_settings, replies
from miaobi.generate.config import ChatConfig, SampleConfig
from miaobi.generate.engine import Completion, LanguageModel, load
from miaobi.model.checkpoint import ends_documents, load_model
from miaobi.model.transformer import Transformer
from miaobi.train.config import EvalConfig
from miaobi.train.evaluate import evaluate
from miaobi.train.score import MemoryStream, begin_ids, raw_tokens, score, score_dialogues, stride_tokens
from miaobi.yardstick import suite
from miaobi.yardstick.suite import Genre

UNKNOWN_NATS = math.log(0x110000)
"""Nats charged for a character for which a vocabulary has only `<unk>`: the token does not say which of all characters
it is. Vocabularies with byte tokens spell it, and pay for each byte."""
PROMPT = 12
"""Characters of a document that are given as the prompt."""
LONGEST = 200
"""Characters of a continuation that are evaluated, and tokens that are generated: a token has at least one
character."""
SEED = 1337


def judge(cfg: EvalConfig) -> dict[str, Any]:
    """`miaobi eval`: what `score` returns; with --suite

    genres (name -> documents, sha256, seen where --trained_on asks for it; loss, bits_per_char, bits_per_byte, tokens,
    characters, unknown), bits_per_char (the mean of the genres), written and people (see `compared`), parameters,
    seconds. With --suite_out and no MODEL: genres and suite_out alone.

    Raises UserError as `score` does, and for files of the suite that are missing or others.
    """
    if not cfg.suite:
        return score(cfg)
    started = time.perf_counter()
    listed = suite.genres()
    texts = {genre.genre: suite.read(genre, Path(cfg.suite).expanduser()) for genre in listed}
    rows: dict[str, dict[str, Any]] = {
        genre.genre: {"documents": genre.documents, "characters": genre.characters, "sha256": genre.sha256}
        for genre in listed
    }
    result: dict[str, Any] = {"genres": rows}
    if cfg.suite_out:
        suite.write(texts, Path(cfg.suite_out).expanduser())
        result["suite_out"] = cfg.suite_out
    if cfg.trained_on:
        for genre, count in suite.seen(texts, cfg.trained_on, cfg.field).items():
            rows[genre]["seen"] = count
    if cfg.model:
        result |= _judged(cfg, listed, texts, rows)
    return result | {"seconds": time.perf_counter() - started}


def _judged(
    cfg: EvalConfig, listed: list[Genre], texts: dict[str, list[str]], rows: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The figures of the model; adds to the rows of the genres."""
    keep_allocations()
    where = pick_device(cfg.device)
    model, tokenizer = load_model(cfg.model, cfg.checkpoint)
    parameters = sum(weights.numel() for weights in model.parameters())
    with explain_memory(where, f"try a smaller --batch_size than {cfg.batch_size}"):
        model = model.to(where)
        for genre in listed:
            rows[genre.genre] |= scored(cfg, model, tokenizer, genre, texts[genre.genre])
    result = {
        "bits_per_char": sum(row["bits_per_char"] for row in rows.values()) / len(rows),
        "parameters": parameters,
    }
    if not cfg.suite_samples:
        return result
    del model
    lm = load(cfg.model, cfg.device, cfg.dtype, cfg.checkpoint)
    with explain_memory(lm.device, f"try fewer --suite_samples than {cfg.suite_samples}"):
        return result | compared(lm, listed, texts, cfg.suite_samples)


def scored(
    cfg: EvalConfig, model: Transformer, tokenizer: Tokenizer, genre: Genre, documents: list[str]
) -> dict[str, Any]:
    """`score_batches` on a genre's documents, plus unknown: the number of characters for which the vocabulary has
    neither token nor bytes; each costs UNKNOWN_NATS in addition to its `<unk>`.

    Scored as `miaobi eval` would score a file of them: for a chit-chat model, dialogues in its own template; otherwise
    documents with end tokens, or, for a model without an end token, lines of one stream, whose newlines do not count as
    characters.
    """
    steps, precision = stride_tokens(cfg.stride, model.cfg.block_size), pick_dtype(cfg.dtype, model.wte.weight.device)
    if genre.format == "dialogue" and tokenizer.config.get("chat_template") == SEP_TEMPLATE:
        stream = MemoryStream(encode_lines(tokenizer, documents))
        found = score_dialogues(model, tokenizer, stream, cfg.batch_size, precision, list(genre.files))
    else:
        ends = ends_documents(cfg.model, cfg.checkpoint) and tokenizer.eot_id is not None
        tokens, _, _ = raw_tokens(documents if ends else (f"{text}\n" for text in documents), tokenizer, ends)
        characters, text_bytes = sum(map(len, documents)), sum(len(text.encode()) for text in documents)
        found = evaluate(model, tokens, characters, text_bytes, steps, precision, cfg.batch_size, begin_ids(tokenizer))
    unknown = unknown_characters(tokenizer, documents)
    extra = unknown * UNKNOWN_NATS / math.log(2)
    return found | {
        "unknown": unknown,
        "bits_per_char": found["bits_per_char"] + extra / found["characters"],
        "bits_per_byte": found["bits_per_byte"] + extra / sum(len(text.encode()) for text in documents),
    }


def unknown_characters(tokenizer: Tokenizer, documents: list[str]) -> int:
    """Number of characters of the documents that a foreign vocabulary encodes as `<unk>`."""
    named = tokenizer.config.get("unk_token")
    names = {named.get("content") if isinstance(named, dict) else named, *UNKNOWN}
    ids = {tokenizer.token_to_id(name) for name in names if isinstance(name, str)} - {None, tokenizer.eot_id}
    if not ids:
        return 0
    with without_panic():
        encodings = tokenizer.backend.encode_batch(documents, add_special_tokens=False)
    return sum(
        end - start
        for encoding in encodings
        for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
        if id_ in ids
    )


def compared(lm: LanguageModel, listed: list[Genre], texts: dict[str, list[str]], count: int) -> dict[str, Any]:
    """written and people: `measures.figures` by genre and over `all`, of the model's continuations of the first `count`
    documents, and of the documents' own continuations, up to the same length.

    Continuations are sampled as by `miaobi sample`, replies of a model with a chat template as by `miaobi chat`.
    """
    written: dict[str, list[Completion]] = {}
    people: dict[str, list[Completion]] = {}
    for genre in listed:
        own = texts[genre.genre]
        if genre.format == "dialogue":
            lines = [text.split("\n") for text in own if "\n" in text][:count]
            written[genre.genre] = _answers(lm, [turns[0] for turns in lines])
            people[genre.genre] = [_judged_part(turns[1], ended=True) for turns in lines]
        else:
            some = [text for text in own if len(text) > 2 * PROMPT][:count]
            cfg = SampleConfig(max_new_tokens=LONGEST, seed=SEED)
            completions = lm.complete([text[:PROMPT] for text in some], cfg)
            written[genre.genre] = [_judged_part(one.text[PROMPT:], one.finish_reason == "stop") for one in completions]
            people[genre.genre] = [_judged_part(text[PROMPT:], ended=True) for text in some]
    return {"written": _by_genre(written), "people": _by_genre(people)}


def _answers(lm: LanguageModel, openings: list[str]) -> list[Completion]:
    """Replies; for a model without a chat template, the next line."""
    if isinstance(lm.tokenizer.config.get("chat_template"), str):
        cfg = model_settings(ChatConfig(max_new_tokens=LONGEST, seed=SEED), lm.model.generation, ("max_new_tokens",))
        drawn = replies(lm, ([{"role": "user", "content": opening}] for opening in openings), cfg)
        return [_judged_part(one.text, one.finish_reason == "stop") for one in drawn]
    cfg = SampleConfig(max_new_tokens=LONGEST, seed=SEED, stop=("\n",))
    drawn = lm.complete([f"{opening}\n" for opening in openings], cfg)
    return [_judged_part(one.text[len(opening) + 1 :], one.finish_reason == "stop")
            for opening, one in zip(openings, drawn, strict=True)]  # fmt: skip


def _judged_part(text: str, ended: bool) -> Completion:
    """The first LONGEST characters, and whether the text ended within them."""
    return Completion(text[:LONGEST], 0, "stop" if ended and len(text) <= LONGEST else "length")


def _by_genre(completions: dict[str, list[Completion]]) -> dict[str, dict[str, float]]:
    everything = {**completions, "all": [one for some in completions.values() for one in some]}
    return {
        name: measures.figures([one.text for one in some], [one.finish_reason == "stop" for one in some])
        for name, some in everything.items()
    }
