"""Tokenizers of the hub that come without tokenizer.json: BERT's vocab.txt, GPT-2's vocab.json and merges.txt.

The Chinese GPT-2s of the hub use BERT's vocabulary. It loses what it does not know (`[UNK]`), line breaks and runs of
blanks: a model with it never saw them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from miaobi.errors import UserError
from miaobi.files import read_json, read_whole

Json = dict[str, Any]
MAX_CONTROL_CHARACTERS = 256
"""Longest control token: real ones have some forty, and templates look for every part of them."""
MOST_TEXT = 48 << 20
"""Bytes of a tokenizer's file: Gemma 3's tokenizer.json has 33 million."""
MOST_AROUND = 64
"""Control tokens that a post-processor puts around a text at most."""
MAX_IDS = 1 << 24
_MAX_GROWTH = 64
"""How many times longer a text may become by all `Replace` steps of a tokenizer together, in characters."""
BERT_SPECIALS = {
    "unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
}  # fmt: skip
GPT2_SPECIALS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


def read_config(directory: Path) -> Json:
    """tokenizer_config.json, with the special tokens that older directories name in special_tokens_map.json, and the
    template of chat_template.jinja. Raises UserError for special tokens that are no text.
    """
    config = _json(directory / "special_tokens_map.json") | _json(directory / "tokenizer_config.json")
    for role in (*BERT_SPECIALS, "bos_token", "eos_token"):
        if config.get(role):
            _name(config[role])
    template = directory / "chat_template.jinja"
    return config | ({"chat_template": text_of(template)} if template.is_file() else {})


def text_of(file: Path) -> str:
    """The UTF-8 text of one of a tokenizer's files. Raises UserError for other bytes."""
    try:
        return read_whole(file, MOST_TEXT).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error}); copy it again") from error


def _json(file: Path) -> Json:
    """`read_json`. Raises UserError also for what is nested too deeply."""
    try:
        return read_json(file)
    except RecursionError as error:
        raise UserError(f"{file} is nested too deeply; copy it again") from error


def read_foreign(directory: Path) -> tuple[tokenizers.Tokenizer, Json] | None:
    """The tokenizer that vocab.txt, or vocab.json and merges.txt, make in `directory`, and its configuration.

    None where there are no such files. Raises UserError for damaged ones, and for those of another kind of tokenizer.
    """
    config = read_config(directory)
    if (directory / "vocab.txt").is_file():
        backend, config = _bert(directory / "vocab.txt", config)
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        kind = str(config.get("tokenizer_class", "GPT2Tokenizer"))
        if not kind.startswith("GPT2"):  # Qwen's and others split words as only their tokenizer.json says
            raise UserError(f"{directory}: a {kind} needs its tokenizer.json; write it with "
                            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)")  # fmt: skip
        backend, config = _gpt2(directory, config)
    else:
        return None
    _add_tokens(backend, config, _json(directory / "added_tokens.json"), directory)
    return backend, config


def backend_of(text: str) -> tokenizers.Tokenizer:
    """The tokenizer in the content of a tokenizer.json.

    Raises:
        ValueError: it is none, or one whose text would grow without end.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError("it has no model")
    _check_growth(content)
    backend = _guarded(lambda: tokenizers.Tokenizer.from_str(text))
    backend.no_truncation()  # as some of the hub's ask for
    backend.no_padding()  # to as many tokens as the file says, whatever the memory
    ids = _guarded(lambda: backend.get_vocab(with_added_tokens=True)).values()
    if not ids or max(ids) >= MAX_IDS:
        raise ValueError(f"it has the id {max(ids):,}; the largest is {MAX_IDS - 1:,}" if ids else "it has no tokens")
    for token in backend.get_added_tokens_decoder().values():
        check_control(token.content)
    _guarded(lambda: backend.encode("a1你\n\U0010fffd", add_special_tokens=False))  # no unknown token, and the like
    around = _guarded(lambda: backend.num_special_tokens_to_add(is_pair=False))
    if around > MOST_AROUND:
        raise ValueError(f"it puts {around:,} control tokens around a text, more than {MOST_AROUND}")
    if strangers := set(_guarded(lambda: backend.encode("")).ids).difference(ids):
        raise ValueError(f"it puts the id {min(strangers):,} around a text, which is no token of it")
    return backend


def check_control(name: str) -> None:
    """Raises ValueError for the name of a control token that breaks the rules by which text is kept apart from it."""
    if len(name) > MAX_CONTROL_CHARACTERS:
        raise ValueError(f"a control token has {len(name):,} characters, more than {MAX_CONTROL_CHARACTERS}")
    if match := re.search("[\ufdd0-\ufdef]", name):
        raise ValueError(f"a control token has U+{ord(match[0]):04X}, which is not a character")


@contextmanager
def without_panic() -> Iterator[None]:
    """Raises UserError for a panic of the tokenizers library, which is no Exception: its patterns give up on a text."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the patterns in tokenizer.json give up on this text ({error}); use a model with another "
                        "tokenizer, or leave out what repeats itself thousands of times") from error  # fmt: skip


def _guarded(make: Callable[[], Any]) -> Any:
    """What `make` gives. Raises ValueError for all errors of the library, whose panics are no Exceptions."""
    try:
        return make()
    except Exception as error:  # the library raises nothing more special
        raise ValueError(str(error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library gives up on it ({error})") from error


def _check_growth(content: Json) -> None:
    """Raises ValueError for steps that would blow up every text: a few `Replace` in a row fill any memory."""
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth, waiting = 1.0, [content.get(part)]
        while waiting:
            step = waiting.pop()
            if isinstance(step, list):
                waiting += step
            elif isinstance(step, dict):
                waiting += [step.get(key) for key in ("normalizers", "pretokenizers", "decoders")]
                growth *= _growth(step)
        if growth > _MAX_GROWTH:
            raise ValueError(f"its {part} makes text more than {_MAX_GROWTH} times as long")


def _growth(step: Json) -> float:
    """How many times longer one step makes a text, at most."""
    written = step.get("content", step.get("prepend"))
    if step.get("type") not in ("Replace", "Prepend") or not isinstance(written, str):
        return 1.0
    pattern = step.get("pattern")
    searched = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1.0, len(written.encode("utf-8", "replace")) / max(1, len(searched.encode("utf-8", "replace")))
               if isinstance(searched, str) else float(len(written)))  # fmt: skip


def _bert(file: Path, config: Json) -> tuple[tokenizers.Tokenizer, Json]:
    """As transformers' BertTokenizer: words and single Chinese characters, cut into the longest known pieces."""
    config = {"tokenizer_class": "BertTokenizer"} | BERT_SPECIALS | config
    lines = text_of(file).split("\n")
    vocab = {line.rstrip("\r"): id_ for id_, line in enumerate(lines if lines[-1] else lines[:-1])}
    unknown = _name(config["unk_token"])
    if unknown not in vocab:
        raise UserError(f"{file} has no {unknown}, so it is not BERT's kind of vocabulary; "
                        "take a model with tokenizer.json")  # fmt: skip
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token=unknown, max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    around = [(name, vocab[name]) for name in map(_name, (config["cls_token"], config["sep_token"])) if name in vocab]
    if len(around) == 2:
        backend.post_processor = processors.BertProcessing(around[1], around[0])
    return backend, config


def _gpt2(directory: Path, config: Json) -> tuple[tokenizers.Tokenizer, Json]:
    """As transformers' GPT2Tokenizer: byte-level BPE."""
    config = {"tokenizer_class": "GPT2Tokenizer"} | GPT2_SPECIALS | config
    vocab = _json(directory / "vocab.json")
    lines = text_of(directory / "merges.txt").split("\n")
    merges = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip() and not line.startswith("#version")]
    try:
        backend = _guarded(lambda: tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges)))
    except (ValueError, TypeError) as error:
        raise UserError(f"{directory}: vocab.json and merges.txt do not fit together ({error})") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space", False))
    backend.decoder = decoders.ByteLevel()
    return backend, config


def _add_tokens(backend: tokenizers.Tokenizer, config: Json, added: Json, directory: Path) -> None:
    """Mark the special tokens, and append those of added_tokens.json at the ids it gives them."""
    more = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    if not all(isinstance(id_, int) for id_ in added.values()) or not isinstance(more, list | dict):
        raise UserError(f"{directory}: added_tokens.json or tokenizer_config.json does not hold what it should; "
                        "copy the tokenizer's files again")  # fmt: skip
    named = [config.get(role) for role in (*BERT_SPECIALS, "bos_token", "eos_token")]
    specials = [_name(token) for token in (*named, *more) if token]
    known = [name for name in specials if backend.token_to_id(name) is not None]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(known)])
    for name, id_ in sorted(added.items(), key=lambda item: item[1]):
        token = AddedToken(name, special=name in specials, normalized=False)
        (backend.add_special_tokens if name in specials else backend.add_tokens)([token])
        if backend.token_to_id(name) != id_:
            raise UserError(f"{directory}: added_tokens.json puts {name} at {id_}, the vocabulary ends at "
                            f"{backend.get_vocab_size() - 1}; copy the tokenizer's files again")  # fmt: skip


def _name(token: str | Json) -> str:
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str):
        raise UserError(f"a special token of the tokenizer is {type(name).__name__}, not text; copy its files again")
    return name


def _spaced(character: str) -> bool:
    """A letter or digit of a script that puts blanks between words: neither Chinese nor Japanese."""
    return character.isalnum() and (character < "\u2e80" or "\uac00" <= character <= "\ud7a3")


def _parted(before: str, after: str) -> bool:
    """Whether a blank stands between two words that end and begin so: a b, "a, b", but 3,000 and 你好 without."""
    return _spaced(after) and (_spaced(before) or (before != "" and before in ",;!?" and after.isalpha()))


def join_word_pieces(tokens: Iterable[str], specials: frozenset[str]) -> str:
    """Text of WordPiece tokens: `##` continues a word, Chinese has no spaces, Latin words keep them.

    Whether a space stands before a token depends on it and the one before it alone, so the text of more tokens
    always starts with the text of fewer. (The library puts a space before every token, and later takes some back.)
    """
    parts: list[str] = []
    before = ""
    for token in tokens:
        if token.startswith("##") and len(token) > 2:
            token = token[2:]
        elif not specials.intersection((before, token)) and _parted(before[-1:], token[:1]):
            parts.append(" ")
        parts.append(token)
        before = token or before
    return "".join(parts)
