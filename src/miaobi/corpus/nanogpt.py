"""nanoGPT's own data directories and vocabularies, read without executing what is in them."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, BinaryIO

import tokenizers
from tokenizers import decoders, models

from miaobi.corpus.tokenizer import BYTE_PIECES, Tokenizer
from miaobi.errors import UserError, brief
from miaobi.files import read_whole, refuse_pointers, unreadable

DTYPE = "uint16"  # of all its .bin files


def is_data(directory: Path) -> bool:
    """Whether a directory holds the tokens that one of nanoGPT's prepare.py writes, and none of ours."""
    names = ("train.bin", "val.bin")
    return all((directory / name).is_file() for name in names) and not (directory / "train.idx").exists()


def read_tokenizer(directory: Path) -> Tokenizer:
    """The characters of its meta.pkl with their ids, and the 256 bytes behind them, so that any text can be encoded.

    Raises UserError without a meta.pkl (tokens of GPT-2's BPE) or for one that is damaged.
    """
    if not (directory / "meta.pkl").is_file():
        raise UserError(
            f"{directory} has train.bin and val.bin but no meta.pkl: tokens of GPT-2's BPE, or of something else that "
            "nobody can tell. Prepare the text that they were made of: miaobi prepare input.txt --out=DIR (with "
            "--tokenizer=GPT2, a directory with GPT-2's tokenizer.json, for the same tokens)"
        )
    pieces = read_characters(directory / "meta.pkl")
    return character_tokenizer(pieces, [], first_byte=len(pieces), config={})


def read_characters(path: Path) -> list[str]:
    """The characters of a meta.pkl by id. Raises UserError when it is anything but a table of characters."""
    meta = read_plain_pickle(path)
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(itos, dict) or not itos:
        raise UserError(f"{path} has no table itos (id -> character); give the meta.pkl of nanoGPT's prepare.py")
    if set(itos) != set(range(len(itos))):
        raise UserError(f"{path}: its ids do not run from 0 to {len(itos) - 1}; it was altered, get it again")
    pieces = [itos[id_] for id_ in range(len(itos))]
    for piece in pieces:
        if not isinstance(piece, str) or len(piece) != 1 or "\ud800" <= piece < "\ue000":
            raise UserError(
                f"{path}: {brief(piece)} is not one character; only character models have a meta.pkl like that"
            )
    if len(set(pieces)) != len(pieces):
        raise UserError(f"{path}: some characters have two ids; it was altered, get it again")
    return pieces


def read_plain_pickle(path: Path) -> Any:
    """A pickle of dicts, strings and numbers. Raises UserError if it is missing, damaged, or names any class."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    refuse_pointers([path])
    try:
        data = read_whole(path)
        for code, argument, _ in pickletools.genops(data):
            if "PUT" in code.name and isinstance(argument, int) and argument > len(data):
                raise pickle.UnpicklingError("a memo far beyond its end")  # for which memory would be taken
        return _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as e:  # damaged bytes can raise anything in an unpickler
        raise unreadable(path, e) from e


class _PlainUnpickler(pickle.Unpickler):
    """What only opcodes build; a pickle that asks for a class or function gets none."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="utf-8")

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def character_tokenizer(
    pieces: list[str], specials: list[str], first_byte: int | None, config: dict[str, Any]
) -> Tokenizer:
    """One token per character, ids in the order of `pieces`.

    specials: those of `pieces` that are control tokens. first_byte: id of the first of the 256 byte pieces, or None:
    then what has no token becomes `<unk>`.
    """
    vocab = {piece: id_ for id_, piece in enumerate(pieces)}
    if first_byte is None:
        model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>")
    else:
        vocab |= {piece: first_byte + byte for byte, piece in enumerate(BYTE_PIECES)}
        model = models.BPE(vocab=vocab, merges=[], byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(specials)
    return Tokenizer(backend, config)
