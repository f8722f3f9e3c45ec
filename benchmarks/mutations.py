"""Valid files made invalid: bytes, lines, JSON values and what is inside safetensors and zip files change at random.

Each function takes a `random.Random` and the bytes of a valid file, and returns others; the same draw, the same bytes.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

DEEP = 100_000
WORDS = (
    "",
    "0",
    "-1",
    "1e999",
    "nan",
    "null",
    "~",
    "!!int abc",
    "!!python/object/apply:os.system ['true']",
    "<<: *a",
    "&a [*a, *a]",
    "2024-13-45",
    "\0",
    "\x1b]0;x\x07",
    "[bold]x[/bold]",
    "\ud800",
    "../../x",
    "/etc/passwd",
    "{{ x",
    "9" * 5000,
    "妙" * 3000,
    "\u202e",
    "=cmd",
    "<unk>",
    "\ufdd0",
    "step-1\n",
    "*",
    "{}",
    "[",
    '"',
    "CON",
    "%s%n",
)
NUMBERS = (
    0,
    -1,
    1,
    2,
    255,
    65_536,
    2**31 - 1,
    2**31,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e300,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
)


def value(draw: random.Random, depth: int = 0) -> Any:
    """Something that a JSON file may hold, and hardly anybody expects."""
    kind = draw.randrange(10)
    if kind < 3:
        return draw.choice(NUMBERS)
    if kind < 6:
        return draw.choice(WORDS)
    if kind == 6:
        return draw.choice((None, True, False))
    if kind == 7 or depth > 2:
        return draw.choice(([], {}, [[]], [None], {"": None}))
    if kind == 8:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(WORDS): value(draw, depth + 1) for _ in range(draw.randrange(3))}


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a tree of lists and dicts."""
    found, waiting = [], [tree]
    while waiting:
        box = waiting.pop()
        for key in list(box) if isinstance(box, dict) else range(len(box)) if isinstance(box, list) else ():
            found.append((box, key))
            waiting.append(box[key])
    return found


def tree_changed(draw: random.Random, tree: Any) -> Any:
    """One to three values replaced, removed, copied elsewhere, or renamed."""
    for _ in range(draw.randint(1, 3)):
        there = places(tree)
        if not there:
            return value(draw)
        # what lies near the root is asked for more often than the ten-thousandth merge of a tokenizer
        box, key = draw.choice(there[: draw.choice((8, 40, len(there)))])
        kind = draw.randrange(8)
        if kind < 4:
            box[key] = value(draw)
        elif kind == 4:
            del box[key]
        elif kind == 5:
            other, name = draw.choice(there)
            box[key] = json.loads(json.dumps(other[name])) if name in other or isinstance(other, list) else None
        elif isinstance(box, dict):
            box[draw.choice(WORDS)] = box.pop(key) if kind == 6 else value(draw)
        else:
            box.insert(key, value(draw))
    return tree


def json_changed(draw: random.Random, data: bytes) -> bytes:
    """A JSON file with other values, now and then one that is no longer JSON."""
    kind = draw.randrange(12)
    if kind == 0:
        return bytes_changed(draw, data)
    if kind == 1:
        return draw.choice(
            (b"[" * DEEP, b'{"a":' * DEEP, b"9" * 100_000, b"", b"null", b"[]", b'"\\ud800"', b"\xff\xfe{}")
        )
    try:
        tree = tree_changed(draw, json.loads(data))
    except IndexError:
        return b"[]"
    text = json.dumps(tree)  # ASCII: half a character passes
    if kind == 2:  # one value nested too deeply for a recursive reader
        there = places(tree)
        if there:
            box, key = draw.choice(there)
            box[key] = "@"
            opening, closing = draw.choice((("[", "]"), ('{"a":', "}")))
            depth = draw.choice((200, 5_000, DEEP))
            text = json.dumps(tree).replace('"@"', opening * depth + "1" + closing * depth, 1)
    if kind == 3 and text.startswith("{") and len(text) > 2:  # a key twice
        text = '{"' + draw.choice(list(tree) or ["a"]).replace('"', "") + '": 1, ' + text[1:]
    return text.encode()


def bytes_changed(draw: random.Random, data: bytes) -> bytes:
    """Some bytes flipped, cut out, repeated, or put in."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5, 20))):
        at, kind = draw.randrange(len(found) + 1), draw.randrange(7)
        if kind < 2 and at < len(found):
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del found[at : at + draw.choice((1, 2, 8, 100))]
        elif kind == 3:
            found[at:at] = draw.randbytes(draw.choice((1, 2, 8)))
        elif kind == 4:
            found[at:at] = draw.choice(WORDS).encode("utf-8", "surrogatepass")
        elif kind == 5:
            found[at:at] = found[at : at + 50] * draw.choice((1, 3, 100))
        elif at < len(found):
            found[at : at + 8] = struct.pack(
                "<q", int(draw.choice([n for n in NUMBERS if type(n) is int and abs(n) < 2**63]))
            )
    if draw.randrange(8) == 0:
        del found[draw.randrange(len(found) + 1) :]
    return bytes(found)


def text_changed(draw: random.Random, data: bytes) -> bytes:
    """Lines removed, repeated, swapped, or with a strange word in them."""
    lines = data.split(b"\n")
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(len(lines)), draw.randrange(7)
        word = draw.choice(WORDS).encode("utf-8", "surrogatepass")
        if kind == 0:
            lines[at : at + 1] = []
        elif kind == 1:
            lines[at:at] = [lines[at]] * draw.choice((1, 2, 50))
        elif kind == 2:
            other = draw.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3:
            lines[at] = lines[at].partition(b":")[0] + b": " + word
        elif kind == 4:
            cut = draw.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + word + lines[at][cut:]
        elif kind == 5:
            lines[at] = b" " * draw.choice((1, 2, 4)) + lines[at]
        else:
            lines.insert(at, word)
        lines = lines or [b""]
    text = b"\n".join(lines)
    return bytes_changed(draw, text) if draw.randrange(4) == 0 else text


def recoded(draw: random.Random, data: bytes) -> bytes:
    """UTF-8 text in another encoding, with or without a byte order mark, cut or mixed, then changed."""
    text = data.decode("utf-8", "replace")
    name = draw.choice(
        ("gb18030", "gbk", "big5", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "hz")
    )
    found = text.encode(name, "replace")
    if draw.randrange(3) == 0:
        found = found[: draw.randrange(len(found) + 1)] + data
    return bytes_changed(draw, found) if draw.randrange(2) else found


def safetensors_changed(draw: random.Random, data: bytes) -> bytes:
    """The JSON header of a safetensors file changed, and its length told right, mostly."""
    if draw.randrange(4) == 0:
        return bytes_changed(draw, data)
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json_changed(draw, data[8 : 8 + length]), data[8 + length :]
    told = len(header) if draw.randrange(8) else draw.choice((0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001))
    return struct.pack("<Q", told) + header + (rest if draw.randrange(6) else rest[: draw.randrange(len(rest) + 1)])


def zip_changed(draw: random.Random, data: bytes) -> bytes:
    """A member of a zip changed, renamed, removed, doubled, or packed; or the zip's own bytes."""
    if draw.randrange(4) == 0:
        return bytes_changed(draw, data)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        members = old.infolist()
        chosen, kind = draw.choice(members), draw.randrange(6)
        if draw.randrange(2):  # the pickle of a .bin, which the rest hangs on
            chosen = next((m for m in members if m.filename.endswith("data.pkl")), chosen)
        for member in members:
            content, name, packing = old.read(member), member.filename, zipfile.ZIP_STORED
            if member is chosen:
                if kind == 0:
                    continue
                if kind == 1:
                    name = draw.choice(WORDS).replace("\0", "").encode("utf-8", "replace").decode()[:1000] or name
                elif kind == 2:
                    packing = zipfile.ZIP_DEFLATED
                else:
                    content = bytes_changed(draw, content)
            if name not in new.NameToInfo or kind == 5:
                new.writestr(zipfile.ZipInfo(name), content, packing)
    return out.getvalue()


def packed_changed(draw: random.Random, data: bytes, pack: Callable[[bytes], bytes], unpack: Callable) -> bytes:
    """A packed file: what is in it changed, or its own bytes, or one packed file behind another."""
    kind = draw.randrange(4)
    if kind == 0:
        return pack(recoded(draw, unpack(data)))
    if kind == 1:
        return data + bytes_changed(draw, data)
    return bytes_changed(draw, data)
