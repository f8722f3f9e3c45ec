"""Weights from files of any origin, read without executing anything; a damaged file is refused with the reason."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file
from torch import Tensor

from miaobi.errors import UserError, brief
from miaobi.files import read_json, reason, refuse_pointers, unreadable
from miaobi.model.quantized import widened

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of model.safetensors or pytorch_model.bin (weights only: no code in it can run), whole or in shards;
    those that `miaobi convert quantize` wrote as float32.

    Raises UserError for files that are missing, cut short or altered.
    """
    return widened(read_files(path))


def read_files(path: Path) -> dict[str, Tensor]:
    """`read_tensors`, as they lie there."""
    for whole, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pickle)):
        index = path / f"{whole}.index.json"
        if (path / whole).is_file():
            return read(path / whole)
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(map(is_name, names.values())):
                raise UserError(f"{index.name} is damaged (it has no weight_map of file names); copy it again")
            tensors: dict[str, Tensor] = {}
            for name in sorted(set(names.values())):
                tensors |= read(path / Path(name).name)  # only ever a sibling
            if absent := names.keys() - tensors.keys():
                raise UserError(f"{index.name} names {brief(min(absent))}, which is in none of its files; copy the "
                                "model again")  # fmt: skip
            return tensors
    raise UserError("there is no model.safetensors or pytorch_model.bin")


def is_name(value: Any) -> bool:
    """Whether it could be the name of a file."""
    return isinstance(value, str) and 0 < len(value.encode("utf-8", "replace")) < 256 and "\0" not in value


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """Tensors of one .safetensors file. Raises UserError if it is not whole."""
    refuse_pointers([file])
    if not file.is_file():  # a pipe would be waited for
        raise UserError(f"{file.name} cannot be read: it is missing, or no file; copy it again")
    try:
        return load_file(file)
    except Exception as e:  # SafetensorError, and what a header makes of torch
        raise UserError(
            f"{file.name} cannot be read ({reason(e)}); it was cut short or altered: copy it again, "
            "or use another checkpoint (--checkpoint=last)"
        ) from e


def read_pickle(file: Path) -> dict[str, Tensor]:
    """Tensors of one .bin file. Raises UserError if it is not whole, or holds anything but tensors."""
    tensors = load_plain(file)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and is_plain(tensor) for name, tensor in tensors.items()
    ):
        raise UserError(f"{file.name} holds more than named tensors; it is not a Hugging Face model's")
    return dict(tensors)


def is_plain(value: Any) -> bool:
    """Whether it is a tensor whose numbers are all there: not sparse, quantized, nested, or one number for many."""
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def load_plain(file: Path, mmap: bool = False) -> Any:
    """What torch.save wrote, if that is plain values and tensors.

    mmap: tensors stay on the disk until they are used, where the file allows it. Raises UserError if the file is
    missing, cut short, or holds anything that would have to be executed.
    """
    refuse_pointers([file])
    if os.path.lexists(file) and not file.is_file():  # a pipe would be waited for
        raise UserError(f"{file} is not a file; copy it again")
    try:
        with file.open("rb") as opened:
            is_zip = opened.read(4) == b"PK\x03\x04"  # older files are bare pickles, which cannot be mapped
        if is_zip:
            with file.open("rb") as opened:
                refuse_bomb(opened, str(file))
        with ThreadPoolExecutor(1) as pool, warnings.catch_warnings():
            check = pool.submit(damaged_member, file) if is_zip else None
            warnings.simplefilter("ignore")  # asks to report things to torch's makers
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
            if check is not None and (name := check.result()):
                raise UserError(f"{file} is damaged ({brief(name)} is not what was written): copy it again")
        return found
    except UserError:
        raise
    except Exception as e:  # damaged bytes can raise anything in an unpickler
        raise unreadable(file, e) from e


def refuse_bomb(opened: BinaryIO, name: str) -> None:
    """Raise UserError for a zip that unpacks to more than it is; BadZipFile for what is none."""
    with zipfile.ZipFile(opened) as archive:  # torch stores, never compresses
        if sum(entry.file_size for entry in archive.infolist()) > opened.seek(0, io.SEEK_END):
            raise UserError(f"{name} unpacks to more than it is; torch does not write such files")


def damaged_member(file: Path) -> str:
    """The first entry of a zip that is not what its CRC-32 says, which torch writes and does not compare; "" for none.

    One of 0 was not computed, as torch can be told.
    """
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.CRC:
                try:
                    with archive.open(entry) as stream:
                        while stream.read(1 << 20):
                            pass
                except zipfile.BadZipFile:
                    return entry.filename
    return ""
