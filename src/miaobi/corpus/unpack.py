"""Packed files as streams: unpacked piece by piece, with a bound on what they may grow to."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError, zipfile.BadZipFile)
DAMAGED += (RuntimeError, UnicodeDecodeError)
"""What the unpacking libraries raise (zipfile: RuntimeError for a password or an unknown version, UnicodeDecodeError
for broken names)."""
MAX_GROWTH, ANYWAY = 100, 64 << 20
"""How many times its size a packed file or an archive may become, or that many bytes: text becomes 2 to 20 times its
size, and what grows far more was made to fill disks and memories."""
XZ_MEMORY = 256 << 20
"""Bytes that an .xz may ask for to be unpacked; `xz -9` needs 65 MiB."""


def opened(path: Path, compression: str) -> BinaryIO:
    """The bytes of a file, unpacked: compression is gz, bz2, xz, zst or nothing. Raises what is in DAMAGED."""
    if compression == "gz":
        return gzip.open(path, "rb")
    if compression == "bz2":
        return bz2.open(path, "rb")
    if compression == "xz":
        return io.BufferedReader(Frames(path, lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY)))
    if compression == "zst":
        return io.BufferedReader(Frames(path, lambda: zstandard.ZstdDecompressor().decompressobj()))
    return open(path, "rb")


def most(size: int) -> int:
    """Bytes that a packed file of `size` bytes may become."""
    return max(ANYWAY, MAX_GROWTH * size)


def grows(name: str) -> str:
    """The error for a file that becomes more than `most`."""
    return (
        f"{name} becomes more than {MAX_GROWTH} times its size when it is unpacked, as nothing does that holds text: "
        "leave it out; if you know that it is right, unpack it and give what is in it"
    )


class Frames(io.RawIOBase):
    """The unpacked bytes of a .zst or .xz, frame after frame. (zstandard's own reader takes a frame that was cut short
    for the end of the file; lzma's knows no bound on memory.)
    """

    def __init__(self, path: Path, make: Callable[[], Any]) -> None:
        self.file, self.make = open(path, "rb"), make  # noqa: SIM115 - closed with this
        self.frame, self.packed, self.unpacked, self.given = None, b"", b"", 0

    def readinto(self, buffer: memoryview) -> int:
        while not self.unpacked:
            packed = self.packed or self.file.read(4096)  # of which zstd makes 128 MiB at most, xz 30
            if not packed and self.frame is not None:
                raise EOFError("the last frame has no end")
            if not packed:
                return 0
            if self.frame is None and not (packed := packed.lstrip(b"\0")):  # between frames of .xz
                self.packed = b""
                continue
            self.frame = self.frame or self.make()
            self.unpacked, self.packed = memoryview(self.frame.decompress(packed)), b""
            if self.frame.eof:
                self.frame, self.packed = None, self.frame.unused_data
        taken = min(len(buffer), len(self.unpacked))
        buffer[:taken], self.unpacked = self.unpacked[:taken], self.unpacked[taken:]
        self.given += taken
        return taken

    def tell(self) -> int:
        """How many bytes were unpacked."""
        return self.given

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()


def member_name(member: zipfile.ZipInfo) -> str:
    """Its name. Archives made on Chinese Windows have names in GBK, which zipfile takes for IBM's code page 437."""
    for encoding in () if member.flag_bits & 0x800 else ("utf-8", "gb18030"):  # the flag says UTF-8
        with contextlib.suppress(UnicodeError):
            return member.filename.encode("cp437").decode(encoding)
    return member.filename
