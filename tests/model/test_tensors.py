"""Weights of strangers: what is whole is read, all else is refused by name, and nothing in it runs or fills memory."""

import contextlib
import io
import json
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.model.conftest import CFG

from miaobi.convert import nanogpt, small_gpt
from miaobi.corpus.nanogpt import read_characters
from miaobi.errors import UserError
from miaobi.model.checkpoint import load_model
from miaobi.model.families import to_hf
from miaobi.model.tensors import read_tensors
from miaobi.model.transformer import Transformer


def saved(value: object, **how: object) -> bytes:
    torch.save(value, buffer := io.BytesIO(), **how)
    return buffer.getvalue()


def rezipped(data: bytes, change, method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip whose members went through `change(name, bytes)`, which gives bytes or None."""
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out := io.BytesIO(), "w", method) as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
    return out.getvalue()


class Calls:
    """A pickle of this would call a function."""

    def __reduce__(self):
        return print, ("ran",)


def malformed() -> dict[str, bytes]:
    """155 and more files that are no weights of this model, though most of them once were."""
    model = to_hf(Transformer(CFG))
    good = {"zip": saved(model), "legacy": saved(model, _use_new_zipfile_serialization=False)}
    files = {
        "empty": b"",
        "zeros": bytes(999),
        "text": "皇马".encode() * 99,
        "pickle": pickle.dumps(3),
        "protocol": b"\x80\xff.",
        "pk": b"PK\x03\x04" + bytes(99),
        "zip of nothing": b"PK\x05\x06" + bytes(18),
    }
    draw = random.Random(0)
    for kind, data in good.items():
        for part in (1, 3, 10, 64, 100, 1000, len(data) // 2, len(data) - 400, len(data) - 30, len(data) - 1):
            files[f"{kind} cut at {part}"] = data[:part]
        for i in range(50):
            altered = bytearray(data)
            for _ in range(1 + i % 4):
                altered[draw.randrange(min(len(data), 3000))] ^= 1 << draw.randrange(8)
            files[f"{kind} flipped {i}"] = bytes(altered)
    first = next(iter(model))
    others = {
        "list": [1, 2],
        "number": 3,
        "none": None,
        "numbers": dict.fromkeys(model, 1.5),
        "strings": dict.fromkeys(model, "x"),
        "nested": {"model": model},
        "one no tensor": model | {first: [1.0]},
        "a name that is none": model | {7: model[first]},
        "calls": model | {"x": Calls()},
        "module": torch.nn.Linear(2, 2),
        "more": model | {"another": torch.zeros(3)},
        "less": {name: t for name, t in model.items() if name != first},
        "tuple": tuple(model.values()),
        "scalars": {name: torch.tensor(1.0) for name in model},
        "no numbers": {name: t[:0] for name, t in model.items()},
        "other shapes": {name: t[None] for name, t in model.items()},
        "one number for many": {name: torch.zeros(1).expand(t.shape) for name, t in model.items()},
        "one number for far too many": model | {first: torch.zeros(1).expand(1 << 40)},
        "bias of far too many": model | {"transformer.h.0.ln_1.bias": torch.zeros(1).expand(1 << 40)},
        "sparse": model | {first: model[first].to_sparse()},
        "meta": model | {first: model[first].to("meta")},
        "quantized": model | {first: torch.quantize_per_tensor(model[first], 0.1, 0, torch.qint8)},
        "nan": model | {first: model[first] * float("nan")},
        "inf": model | {first: model[first] + float("inf")},
        "opposite inf": model | {first: torch.full_like(model[first], float("inf")) * torch.tensor([1.0, -1.0] * 8)},
        "doubles beyond": model | {first: model[first].double() + 1e300},
    }
    kinds = (torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16)
    others |= {str(kind): {name: t.to(kind) for name, t in model.items()} for kind in kinds}
    for name, value in others.items():
        files[name] = saved(value)
        files[f"legacy {name}"] = saved(value, _use_new_zipfile_serialization=False)
    deep: list = []
    for _ in range(200):
        deep = [deep]
    files["deep"] = saved(deep)
    files["deeper"] = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    files["without a storage"] = rezipped(good["zip"], lambda n, b: None if n.endswith("data/1") else b)
    files["storage cut short"] = rezipped(good["zip"], lambda n, b: b[:8] if n.endswith("data/1") else b)
    files["storage of nothing"] = rezipped(good["zip"], lambda n, b: b"" if n.endswith("data/0") else b)
    files["without a pickle"] = rezipped(good["zip"], lambda n, b: None if n.endswith("data.pkl") else b)
    files["pickle is no pickle"] = rezipped(good["zip"], lambda n, b: b"hello" if n.endswith("data.pkl") else b)
    files["byte order"] = rezipped(good["zip"], lambda n, b: b"sideways" if n.endswith("byteorder") else b)
    files["bomb"] = rezipped(
        good["zip"], lambda n, b: bytes(1 << 26) if n.endswith("data/0") else b, zipfile.ZIP_DEFLATED
    )
    for name, old, new in (
        ("offset", b"K\x00(K", b"K\xff(K"),
        ("another storage", b"FloatStorage", b"ByteStorage\x00"),
        ("size", b"K\x10", b"K\xff"),
        ("stride", b"K\x01", b"K\xf0"),
    ):
        files[f"wrong {name}"] = rezipped(
            good["zip"], lambda n, b, old=old, new=new: b.replace(old, new) if n.endswith("data.pkl") else b
        )
    return files


@pytest.mark.filterwarnings("ignore")
def test_no_malformed_bin_ends_in_anything_but_a_reason(directory: Path, capsys):
    files = malformed()
    assert len(files) > 155
    (directory / "model.safetensors").unlink()
    said = {}
    for name, data in files.items():
        (directory / "pytorch_model.bin").write_bytes(data)
        try:
            found, _ = load_model(directory)
        except UserError as e:
            said[name] = str(e)
        else:  # bits of padding, names or numbers: a model all the same
            assert any(kind in name for kind in ("flipped", "byte order", "legacy cut", "wrong")), name
            assert all(t.isfinite().all() for t in found.state_dict().values()), name
    assert len(said) > len(files) // 2
    for name, message in said.items():
        assert str(directory) in message, name
        assert "weights_only" not in message, name
        assert len(message) < 900, name
    assert "ran" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("read", [small_gpt.read, small_gpt.read_shape, nanogpt.read, "convert"])
def test_no_malformed_checkpoint_ends_in_anything_but_a_reason(read, tmp_path: Path, capsys):
    model = to_hf(Transformer(CFG))
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 300}
    (tmp_path / "text.txt").write_text("皇马赢了\n球迷\n\n" * 9, encoding="utf-8")
    files = {name: data for i, (name, data) in enumerate(malformed().items()) if "flipped" not in name or i % 5 == 0}
    wrong = (None, [], {}, "x", -1, 0, 1 << 70, 1e9, True, float("nan"), torch.zeros(2), OrderedDict())
    for i, value in enumerate(wrong):
        for key in ("state_dict", "model", "model_args", "n_layer", "block_size", "vocab_size", "bias", "config"):
            whole = sizes | {"state_dict": model, "model": model, "model_args": sizes, "global_step": 3}
            files[f"{key} {i}"] = saved(whole | {key: value, "model_args": sizes | {key: value}})
    said = {}
    for name, data in files.items():
        (tmp_path / "x.pth").write_bytes(data)
        try:
            if read == "convert":
                nanogpt.convert(tmp_path / "x.pth", None, str(tmp_path), tmp_path / "out")
            else:
                read(tmp_path / "x.pth")
        except UserError as e:
            said[name] = str(e)
    assert said
    for name, message in said.items():
        assert len(message) < 900, name
        assert "weights_only" not in message, name
    assert "ran" not in capsys.readouterr().out


def meta(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError):
        read_characters(path)


def test_no_malformed_meta_ends_in_anything_but_a_reason(tmp_path: Path):
    path = tmp_path / "meta.pkl"
    good = pickle.dumps({"itos": dict(enumerate("皇马赢得比赛")), "stoi": {}, "vocab_size": 6})
    draw = random.Random(0)
    for cut in range(len(good)):
        meta(good[:cut], path)
    for _ in range(200):
        altered = bytearray(good)
        altered[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(altered)
        with contextlib.suppress(UserError):
            read_characters(path)
    for value in (
        None,
        3,
        [],
        {"itos": []},
        {"itos": {}},
        {"itos": {0: 1}},
        {"itos": {"0": "a"}},
        {"itos": {1: "a"}},
        {"itos": {0: "\ud800"}},
        {"itos": {0: "a" * 10**6}},
        {"itos": {0: "a", 1: "a"}},
        {"itos": {0: "a", 10**4000: "b"}},
        Calls(),
    ):
        meta(pickle.dumps(value), path)
    meta(b"\x80\x02Nr\xff\xff\xff\xff.", path)  # a memo of 4 billion places
    meta(b"Np99999999999\n.", path)
    meta(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", path)


def header(content: object, body: bytes = b"", size: int | None = None) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def test_no_malformed_safetensors_ends_in_anything_but_a_reason(directory: Path):
    file = directory / "model.safetensors"
    good = file.read_bytes()
    files = [good[:cut] for cut in (0, 1, 7, 8, 9, 100, len(good) // 2, len(good) - 1)] + [good + b"x"]
    draw = random.Random(0)
    for _ in range(150):
        altered = bytearray(good)
        altered[draw.randrange(1500)] ^= 1 << draw.randrange(8)
        files.append(bytes(altered))
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for change in (
        {"dtype": "F33"},
        {"dtype": 3},
        {"shape": [1 << 62, 4]},
        {"shape": [-2]},
        {"shape": "x"},
        {"shape": [2.0]},
        {"shape": [1 << 80]},
        {"data_offsets": [0, 1 << 60]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0]},
        {"data_offsets": None},
        {"shape": [0], "data_offsets": [0, 0]},
        {"dtype": "F8_E4M3", "shape": [8]},
        {"dtype": "F4", "shape": [16]},
        {"dtype": "C64", "shape": [1]},
        {"dtype": "BOOL", "shape": [8]},
    ):
        files.append(header({"x": one | change}, bytes(8)))
    files += [
        header({}, size=1 << 63),
        header({}, size=0),
        header(b"[" * 100_000),
        header(b'{"a":' * 100_000),
        header([]),
        header(b"\xff\xfe"),
        header({"__metadata__": 3}),
        header({"x": one, "y": one}, bytes(8)),
        header(b'{"x":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8)),
    ]
    said = []
    for data in files:
        file.write_bytes(data)
        try:
            model, _ = load_model(directory)
        except UserError as e:
            said.append(str(e))
        else:
            assert all(p.isfinite().all() for p in model.parameters())
    assert len(said) > 30
    assert max(map(len, said)) < 900


@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("form", ["safetensors", "bin", "half"])
def test_a_number_that_is_none_is_refused_by_the_tensors_name(directory: Path, form, value, where):
    tensors = read_tensors(directory)
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors[name].view(-1)[0 if where == "first" else -1] = value
    if form == "bin":
        torch.save(tensors, directory / "pytorch_model.bin")
        (directory / "model.safetensors").unlink()
    else:
        kind = torch.float16 if form == "half" else torch.float32
        save_file({k: t.to(kind) for k, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} has numbers that are not finite"):
        load_model(directory)


def test_large_finite_numbers_are_numbers(directory: Path):
    tensors = read_tensors(directory)
    tensors["transformer.h.0.mlp.c_fc.weight"].fill_(3e38)  # their sum is not finite
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    load_model(directory)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 1234567\n"


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "tokenizer_config.json",
        "bin",
        "shard",
    ],
)
def test_a_git_lfs_pointer_is_told_for_what_it_is(directory: Path, name: str):
    if name == "bin":
        (directory / "model.safetensors").unlink()
        name = "pytorch_model.bin"
    elif name == "shard":
        (directory / "model.safetensors").unlink()
        name = "model-00001-of-00001.safetensors"
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    (directory / name).write_text(POINTER)
    with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_model(directory)


def test_a_pointer_for_a_checkpoint(tmp_path: Path):
    for name, read in (("a.pth", small_gpt.read), ("ckpt.pt", nanogpt.read), ("meta.pkl", read_characters)):
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(UserError, match=rf"{name} is a Git LFS pointer"):
            read(tmp_path / name)


# --- bits that flipped -------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_bin_is_noticed(directory):
    """torch computes the CRC-32 of every entry, and compares none."""
    tensors = {name: t.detach().clone() for name, t in to_hf(load_model(directory)[0]).items()}
    (directory / "model.safetensors").unlink()
    file, draw = directory / "pytorch_model.bin", random.Random(0)
    torch.save(tensors, file)
    whole, flips = file.read_bytes(), 0
    assert len(read_tensors(directory)) == len(tensors)
    with zipfile.ZipFile(file) as archive:
        entries = [entry for entry in archive.infolist() if entry.file_size > 8]
    for entry in entries:
        content = bytearray(whole)
        header = whole[entry.header_offset :][:30]
        begin = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        content[begin + draw.randrange(entry.file_size)] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"copy it again|was not loaded"):
            read_tensors(directory)
        flips += 1
    assert flips > 12


def test_a_bin_without_checksums_is_read(directory):
    tensors = {name: t.detach().clone() for name, t in to_hf(load_model(directory)[0]).items()}
    (directory / "model.safetensors").unlink()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, directory / "pytorch_model.bin")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_tensors(directory).keys() == tensors.keys()
