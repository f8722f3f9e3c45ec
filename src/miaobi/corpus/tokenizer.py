"""Text <-> token ids: one class for characters, trained BPE, and tokenizers from the hub.

Every kind keeps the promise that no text is lost: what the vocabulary lacks goes through the 256 byte pieces
`<0x00>`..`<0xFF>`, which are ordinary vocabulary. Special tokens are only ever inserted by templates and by
`prepare`; a literal `<sep>` or `<0x41>` in text stays text.
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models

from miaobi.corpus import vocabulary
from miaobi.corpus.characters import N_CODE_POINTS, code_points
from miaobi.corpus.foreign import MOST_TEXT, backend_of, join_word_pieces, read_config, read_foreign, without_panic
from miaobi.corpus.vocabulary import (  # noqa: F401 - the names of the specials are found here as well
    BYTE_PIECES,
    DEFAULT_BPE_VOCAB_SIZE,
    EOT,
    IM_END,
    IM_START,
    N_RESERVED,
    PAD,
    SEP,
    SPECIALS,
)  # fmt: skip
from miaobi.errors import UserError
from miaobi.files import json_of, read_whole

_OWN_CONFIG = {"eos_token": EOT, "pad_token": PAD}
_SENTENCE_PIECE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_DROP_FIRST_BLANK = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
_CONTEXT = 32
"""Ids in front of a continuation that are decoded with it: more than the last word of any text has."""
_SLICE = 1 << 15
"""Characters looked up at a time: NumPy widens indices to 64 bits, and this many stay in the second-level cache."""


class Tokenizer:
    """A `tokenizers.Tokenizer` with special-token parsing off, and a NumPy path for character vocabularies.

    Attributes:
        eot_id, pad_id, sep_id: ids of the specials, None where a foreign tokenizer has none.
        vocab_size: number of ids, specials included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, object] | None = None):
        """Wraps `backend`; `config` is its tokenizer_config.json, which knows a foreign tokenizer's eos and pad."""
        self.backend = backend
        self.backend.encode_special_tokens = True  # text never turns into special tokens
        self.backend.no_truncation()  # as some of the hub's ask for
        self.backend.no_padding()
        self.config = dict(config or {})
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self.eot_id = self._special(EOT, "eos_token")
        self.pad_id = self._special(PAD, "pad_token")
        self.sep_id = self._special(SEP, "sep_token")
        self._word_pieces = None
        if isinstance(backend.model, models.WordPiece):  # BERT's: [SEP] ends a text, and text is joined anew
            self._word_pieces = {id_: token for token, id_ in backend.get_vocab(with_added_tokens=True).items()}
            self._specials = frozenset(t.content for t in backend.get_added_tokens_decoder().values() if t.special)
            self.eot_id = self.sep_id if self.eot_id is None else self.eot_id
        self._dtype = np.uint16 if self.vocab_size <= 65535 else np.uint32
        self._absent = np.iinfo(self._dtype).max  # in the table: no token of its own
        self._table = self._character_table()

    @classmethod
    def train_char(cls, counts: Mapping[str, int], vocab_size: int | None = None, min_frequency: int = 1) -> Tokenizer:
        """See `vocabulary.of_characters`."""
        return cls(vocabulary.of_characters(counts, vocab_size, min_frequency), _OWN_CONFIG)

    @classmethod
    def train_bpe(
        cls, texts: Iterable[str], vocab_size: int = DEFAULT_BPE_VOCAB_SIZE, min_frequency: int = 2
    ) -> Tokenizer:
        """See `vocabulary.of_merges`."""
        return cls(vocabulary.of_merges(texts, vocab_size, min_frequency), _OWN_CONFIG)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a directory that holds tokenizer.json (or that file), BERT's vocab.txt, or GPT-2's vocab.json and
        merges.txt.

        Raises:
            UserError: no such file there, or one that the tokenizers library cannot read.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            if (foreign := read_foreign(path)) is not None:
                return cls(*foreign)
            raise UserError(f"{path}: no tokenizer.json there, nor vocab.txt, nor vocab.json with merges.txt; give a "
                            "directory that miaobi prepare or train wrote, or a whole model of the hub")  # fmt: skip
        config = read_config(file.parent)
        try:
            return cls.from_json(read_whole(file, MOST_TEXT).decode(), config)
        except ValueError as error:
            raise UserError(f"{file} is not a tokenizer the tokenizers library can read: {error}") from error

    @classmethod
    def from_json(cls, text: str, config: Mapping[str, object] | None = None) -> Tokenizer:
        """From the content of a tokenizer.json. Raises ValueError when it is not one, or one made to do harm."""
        return cls(backend_of(text), config)

    def with_added(self, names: Sequence[str]) -> Tokenizer:
        """The same with more control tokens, behind its last one."""
        longer = tokenizers.Tokenizer.from_str(self.backend.to_str())
        longer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
        return Tokenizer(longer, self.config)

    def __reduce__(self) -> tuple:
        return _rebuild, (self.backend.to_str(), self.config)

    def save(self, directory: str | Path, model_max_length: int | None = None) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers.AutoTokenizer loads with the same ids,
        and chat_template.jinja where there is a template."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        template = self.config.get("chat_template")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],  # a GPT-2 would add BERT's token_type_ids as tokens
            # A literal special in text stays text, there too; but transformers renders templates to text first.
            "split_special_tokens": template is None,
            **{
                key: value for key, value in self.config.items() if key != "chat_template" or not isinstance(value, str)
            },
        }
        if isinstance(template, str):
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        (directory / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        text = json_of(config, indent=2) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no special token is added or recognised. Raises UserError on a lone surrogate."""
        if self._table is not None and len(text) > 64:
            return self.encode_array(text).tolist()
        _reject_surrogates(text)
        with without_panic():
            return self.backend.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """What a foreign tokenizer's post-processor puts before and behind every text: `<s>`; `[CLS]` and `[SEP]`."""
        framed, bare = (self.backend.encode("a", add_special_tokens=special).ids for special in (True, False))
        at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
        before, behind = framed[:at], framed[at + len(bare) :]
        has = [self.config.get(key) is not False for key in ("add_bos_token", "add_eos_token")]
        return before if has[0] else [], behind if has[1] else []

    @property
    def begin_ids(self) -> list[int]:
        """What stands before every text: the model was trained with it there. Not what stands behind: a prompt goes on
        (transformers' own generation writes BERT's `[SEP]` there, and what then follows is another text)."""
        return self.frame[0]

    def encode_prompt(self, text: str) -> list[int]:
        """`encode`, behind what the tokenizer puts before every text. Raises UserError on a lone surrogate."""
        return [*self.begin_ids, *self.encode(text)]

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as (n,) uint32. Raises UserError on a lone surrogate."""
        ids, _ = self.encode_documents([text], end_id=None)
        return ids.astype(np.uint32)

    def encode_documents(
        self, documents: Sequence[str], end_id: int | None, newline_id: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Many documents in one array; those that end also begin, with `begin_ids`.

        Args:
            documents: texts.
            end_id: id put after each document, None for none.
            newline_id: id that stands for each newline instead of its own (dialogues: `<sep>`).

        Returns:
            ids (n,) uint16 or, with more than 65,535 of them, uint32; and starts (documents,) int64,
            where each document begins in ids.

        Raises:
            UserError: a document has a lone surrogate.
        """
        if not documents:
            return np.empty(0, self._dtype), np.empty(0, np.int64)
        if self._table is None:
            return self._encode_documents_slowly(documents, end_id, newline_id)
        gap = 0 if end_id is None else 1
        # Documents are joined by newlines, one token each, whose places then take end_id.
        points = _code_points("\n".join([*documents, ""]) if gap else "".join(documents))
        lengths = np.fromiter((len(document) + gap for document in documents), np.int64, len(documents))
        return self.encode_points(points, np.cumsum(lengths), end_id, newline_id)

    @property
    def by_character(self) -> bool:
        """Whether each character has an id of its own or is spelled in bytes, so that `encode_points` works."""
        return self._table is not None

    @property
    def forgets_blanks(self) -> bool:
        """Whether blanks have no ids, as in BERT's vocabularies."""
        return self._word_pieces is not None

    def encode_points(
        self, points: np.ndarray, ends: np.ndarray, end_id: int | None, newline_id: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`encode_documents` of text that is already code points; for vocabularies that are `by_character`.

        Args:
            points: (n,) uint16 or uint32; where there is an end_id, with one newline behind each document.
            ends: (documents,) int64, where each document, and that newline, ends.
            end_id, newline_id: see `encode_documents`.
        """
        ids = np.empty(len(points), self._dtype)
        for low in range(0, len(ids), _SLICE):
            np.take(self._table, points[low : low + _SLICE], out=ids[low : low + _SLICE], mode="clip")
        if newline_id is not None:
            ids[points == ord("\n")] = newline_id
        if end_id is not None:
            ids[ends - 1] = end_id
        if len(ids) and ids.max() == self._absent:
            missing = np.flatnonzero(ids == self._absent)
            ids, extra = vocabulary.spell_in_bytes(ids, missing, points[missing], self._byte_ids, self._absent)
            ends = ends + vocabulary.extra_before(missing, extra, ends)
        return ids, np.concatenate(([0], ends[:-1]))[: len(ends)]

    def _encode_documents_slowly(
        self, documents: Sequence[str], end_id: int | None, newline_id: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        for document in documents:
            _reject_surrogates(document)
        if newline_id is None:
            with without_panic():
                rows = [e.ids for e in self.backend.encode_batch_fast(documents, add_special_tokens=False)]
        else:
            rows = []
            for document in documents:
                with without_panic():
                    lines = self.backend.encode_batch_fast(document.split("\n"), add_special_tokens=False)
                row = lines[0].ids
                for line in lines[1:]:
                    row += [newline_id, *line.ids]
                rows.append(row)
        head = self.begin_ids if end_id is not None and newline_id is None else []
        tail = [] if end_id is None else [end_id]
        arrays = [np.array(head + row + tail, self._dtype) for row in rows]
        ends = np.cumsum([len(array) for array in arrays])
        return np.concatenate(arrays), np.concatenate(([0], ends[:-1])).astype(np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray, before: Sequence[int] = ()) -> str:
        """The text of `ids`, specials written out; bytes that form no character become U+FFFD.

        The library's ByteFallback spoils a whole run of bytes for one that does not fit; here only that one is lost.

        before: ids of the text that it goes on from, whole characters. BERT and SentencePiece write the first word of
            a text without the blank that parts it from the word before.
        """
        ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if self._token_bytes is not None:
            return self._bytes(ids, before).decode("utf-8", "replace")
        if not before:
            return self._written(ids)
        context = list(before[-_CONTEXT:])
        return self._written(context + ids)[len(self._written(context)) :]

    def bytes_of(self, ids: np.ndarray) -> list[bytes] | None:
        """The UTF-8 bytes of each id, maybe of a part of a character; None where a token's text depends on others."""
        table = self._token_bytes
        return None if table is None else [table.get(id_, b"") for id_ in ids.tolist()]

    def decode_stable(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
        """`decode` without what may still change when more ids follow: a character whose last bytes are missing.

        For streaming: the text of more ids always starts with the text of fewer.
        """
        if self._token_bytes is not None:
            return codecs.getincrementaldecoder("utf-8")("replace").decode(self._bytes(ids, before))
        text = self.decode(ids, before)
        return text if self.forgets_blanks else text.rstrip("\ufffd")

    def _bytes(self, ids: Sequence[int], before: Sequence[int]) -> bytes:
        data = b"".join([self._token_bytes.get(id_, b"") for id_ in ids])
        return data.removeprefix(b" ") if _DROP_FIRST_BLANK in self._decoders and not before else data

    def _written(self, ids: list[int]) -> str:
        if self._word_pieces is None:
            return self.backend.decode(ids, skip_special_tokens=False)
        known = (self._word_pieces[id_] for id_ in ids if id_ in self._word_pieces)
        return join_word_pieces(known, self._specials)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name, None when there is no such token."""
        return self.backend.token_to_id(token)

    def is_control(self, id_: int) -> bool:
        """Whether `id_` is a token that no text turns into."""
        return id_ in self.backend.get_added_tokens_decoder()

    def _special(self, ours: str, role: str) -> int | None:
        """A foreign tokenizer names its end-of-text and padding in its config, ours by fixed names."""
        named = self.config.get(role)
        name = named.get("content") if isinstance(named, dict) else named
        id_ = self.token_to_id(name) if isinstance(name, str) else None
        return self.token_to_id(ours) if id_ is None else id_

    def _character_table(self) -> np.ndarray | None:
        """(0x110000,) code point -> id when this is a character vocabulary as train_char makes it, else None."""
        byte_ids = [self.token_to_id(piece) for piece in BYTE_PIECES]
        model = self.backend.model
        if not (isinstance(model, models.BPE) and model.byte_fallback and None not in byte_ids):
            return None
        if self.backend.normalizer is not None or self.backend.pre_tokenizer is not None:
            return None
        if json.loads(self.backend.to_str())["model"]["merges"]:
            return None
        self._byte_ids = np.array(byte_ids, self._dtype)
        table = np.full(N_CODE_POINTS, self._absent, self._dtype)
        for token, id_ in self.backend.get_vocab(with_added_tokens=False).items():
            if len(token) == 1:
                table[ord(token)] = id_
        return table

    @functools.cached_property
    def _decoders(self) -> list[dict]:
        """The steps of the library's decoder, if it has several."""
        decoder = json.loads(self.backend.to_str()).get("decoder") or {}
        return decoder.get("decoders", [])

    @functools.cached_property
    def _token_bytes(self) -> dict[int, bytes] | None:
        """What each id decodes to behind others, for decoders of ByteFallback and Fuse: ours, and those of Llama and
        Gemma, where `▁` stands for a blank and the first one may be dropped; else None.

        Spare rows of a model's embedding have no entry and decode to nothing, as in the library.
        """
        rest = [part["type"] for part in self._decoders if part not in (_SENTENCE_PIECE, _DROP_FIRST_BLANK)]
        if rest != ["ByteFallback", "Fuse"]:
            return None
        blank = "▁" if _SENTENCE_PIECE in self._decoders else " "
        vocab = self.backend.get_vocab(with_added_tokens=True)
        table = {id_: token.replace(blank, " ").encode() for token, id_ in vocab.items()}
        for byte, piece in enumerate(BYTE_PIECES):
            if (id_ := self.token_to_id(piece)) is not None:
                table[id_] = bytes((byte,))
        return table


def _rebuild(text: str, config: dict) -> Tokenizer:
    return Tokenizer.from_json(text, config)


def _code_points(text: str) -> np.ndarray:
    """`code_points`. Raises UserError on a lone surrogate."""
    points = code_points(text)
    if (points >> 11 == 0xD800 >> 11).any():
        _reject_surrogates(text)
    return points


def _reject_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(_surrogate(text, error)) from error


def _surrogate(text: str, error: UnicodeEncodeError) -> str:
    return (
        f"the text has half a character (lone surrogate U+{ord(text[error.start]):04X}) at character {error.start}: it "
        "was cut inside an emoji, or decoded wrongly; remove it"
    )
