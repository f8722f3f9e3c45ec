"""A tokenizer in GGUF's words, and what llama.cpp makes of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass

from miaobi.corpus.tokenizer import BYTE_PIECES, Tokenizer
from miaobi.errors import UserError

BLANK = "\u2581"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}  # GPT-2's
NORMAL, CONTROL, UNUSED, BYTE = 1, 3, 5, 6  # llama.cpp's types of tokens


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's words; lists go by id."""

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None


def vocabulary_of(tokenizer: Tokenizer, rows: int, bpe: str = "exact") -> Vocabulary:
    """The tokenizer as llama.cpp reads it, for a model of `rows` rows.

    Raises UserError for kinds that llama.cpp has no exact counterpart for.
    """
    settings = json.loads(tokenizer.backend.to_str())
    added = {token["id"] for token in settings["added_tokens"]}
    pre_tokenizer = settings.get("pre_tokenizer") or {}
    is_bpe = settings["model"]["type"] == "BPE" and settings["normalizer"] is None
    byte_fallback = is_bpe and settings["model"]["byte_fallback"] and pre_tokenizer.get("type") in (None, "Split")
    byte_level = is_bpe and pre_tokenizer == BYTE_LEVEL | {"trim_offsets": pre_tokenizer.get("trim_offsets")}
    if (not byte_fallback and not byte_level) or len(tokenizer.begin_ids) > 1:
        kind = type(tokenizer.backend.model).__name__
        raise UserError(f"llama.cpp's tokenizers that are written here would give other ids than this {kind}; models "
                        "with miaobi's own (char, bpe) and with GPT-2's can be written. One of a hub, as it is there, "
                        "is for llama.cpp's convert_hf_to_gguf.py")  # fmt: skip
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


class ByScore:
    """Ids that llama.cpp's SentencePiece kind makes of a text: of all neighbours that are a piece together, those of
    the best score are joined, the leftmost first; characters without a piece are spelled in bytes.

    Source: llm_tokenizer_spm of llama.cpp's src/llama-vocab.cpp.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        by_type = {kind: {token: i for i, token in enumerate(vocabulary.tokens) if vocabulary.types[i] == kind}
                   for kind in (NORMAL, BYTE)}  # fmt: skip
        self.scores, self.known, self.spelled = vocabulary.scores, by_type[NORMAL], by_type[BYTE]

    def encode(self, text: str) -> list[int]:
        """Ids of a text; takes time with the square of its length."""
        pieces = list(text.replace(" ", BLANK))
        while True:
            joined = [self.known.get(left + right) for left, right in itertools.pairwise(pieces)]
            found = [(-self.scores[id_], i) for i, id_ in enumerate(joined) if id_ is not None]
            if not found:
                break
            at = min(found)[1]
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        ids = []
        for piece in pieces:
            known = self.known.get(piece)
            ids += [known] if known is not None else [self.spelled[BYTE_PIECES[byte]] for byte in piece.encode()]
        return ids
