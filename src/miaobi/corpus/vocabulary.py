"""Vocabularies: learned from text, as `tokenizers` models that fall back to bytes; and how bytes spell a character."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from miaobi.corpus.characters import code_points, count_characters
from miaobi.errors import UserError

EOT, PAD, SEP, IM_START, IM_END = SPECIALS = ("<|endoftext|>", "<pad>", "<sep>", "<|im_start|>", "<|im_end|>")
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
N_RESERVED = len(SPECIALS) + len(BYTE_PIECES)
DEFAULT_BPE_VOCAB_SIZE = 8192

# Pieces that merges never cross: each newline and each digit alone, blanks, Han runs, other letters, the rest.
# A newline alone means that text cut after a newline gives the same ids as text in one go.
_PIECES = r"\n|[^\S\n]+|\p{N}|\p{Han}+|[\p{L}\p{M}&&[^\p{Han}]]+|[^\s\p{L}\p{M}\p{N}]+"


def of_characters(
    counts: Mapping[str, int], vocab_size: int | None = None, min_frequency: int = 1
) -> tokenizers.Tokenizer:
    """One token per character, most frequent first (ties by code point), the rest through byte pieces.

    Args:
        counts: character -> occurrences.
        vocab_size: at most this many tokens, specials and bytes included; None keeps every character.
        min_frequency: characters seen less often become bytes.

    Raises:
        UserError: `vocab_size` leaves no room besides the specials and bytes.
    """
    if vocab_size is not None and vocab_size <= N_RESERVED:
        raise UserError(_too_small(vocab_size))
    ordered = sorted((c for c, n in counts.items() if n >= min_frequency), key=lambda c: (-counts[c], c))
    if vocab_size is not None:
        ordered = ordered[: vocab_size - N_RESERVED]
    return _assemble(ordered, merges=[], pre_tokenizer=None)


def of_merges(
    texts: Iterable[str], vocab_size: int = DEFAULT_BPE_VOCAB_SIZE, min_frequency: int = 2
) -> tokenizers.Tokenizer:
    """Merges learned from `texts`. Half of the vocabulary at most goes to single characters, the rest to merges.

    Raises:
        UserError: `vocab_size` leaves no room besides the specials and bytes.
    """
    if vocab_size <= N_RESERVED:
        raise UserError(_too_small(vocab_size))
    room, texts = vocab_size - N_RESERVED, list(texts)
    alphabet = _commonest(texts, max(1, room // 2))
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    learner.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=room,
            min_frequency=max(min_frequency, 2),
            limit_alphabet=len(alphabet),  # by itself it takes any of equally rare characters
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    model = json.loads(learner.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    merges = [tuple(pair) for pair in model["merges"]]
    # The trainer may exceed its size by a small alphabet; a merge goes with the piece it makes.
    if len(pieces) > room:
        vocabulary = set(pieces[:room])
        pieces, merges = pieces[:room], [pair for pair in merges if "".join(pair) in vocabulary]
    return _assemble(pieces, merges, learner.pre_tokenizer)


def _commonest(texts: list[str], n: int) -> list[str]:
    """The n commonest characters, of equally common ones those that come first in Unicode."""
    counts = count_characters(code_points("".join(texts)))
    present = np.flatnonzero(counts)
    return [chr(c) for c in present[np.argsort(-counts[present], kind="stable")][:n].tolist()]


def _assemble(pieces: list[str], merges: list[tuple[str, str]], pre_tokenizer) -> tokenizers.Tokenizer:
    """Specials, bytes, then `pieces`, as a BPE model that falls back to bytes."""
    vocab = {token: id_ for id_, token in enumerate((*SPECIALS, *BYTE_PIECES, *pieces))}
    # The decoder Fuse after ByteFallback joins without spaces; no normalizer, so nothing is lost on the way in.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(list(SPECIALS))
    return backend


def _too_small(vocab_size: int) -> str:
    return (
        f"vocab_size={vocab_size} leaves no room for characters: {len(SPECIALS)} special tokens and 256 bytes come "
        f"first. Give more than {N_RESERVED}; Chinese text has 3,000 to 8,000 characters"
    )


def spell_in_bytes(
    ids: np.ndarray, missing: np.ndarray, code_points: np.ndarray, byte_ids: np.ndarray, absent: int
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces ids[missing], whose characters are `code_points`, by the ids of their UTF-8 bytes.

    Returns the longer ids and, per missing character, how many ids more it took than one.
    """
    spelled = code_points.astype("<u4").tobytes().decode("utf-32-le").encode("utf-8")
    extra = (code_points >= 0x80).astype(np.int64) + (code_points >= 0x800) + (code_points >= 0x10000)
    repeats = np.ones(len(ids), np.int64)
    repeats[missing] += extra
    longer = np.repeat(ids, repeats)
    longer[longer == absent] = byte_ids[np.frombuffer(spelled, np.uint8)]
    return longer, extra


def extra_before(missing: np.ndarray, extra: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many ids byte spelling added before each position of `ends`."""
    added = np.concatenate(([0], np.cumsum(extra)))
    return added[np.searchsorted(missing, ends, side="left")]
