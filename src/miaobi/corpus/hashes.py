"""How the manifest knows its sources: a hash of each file, of bytes that were read anyway wherever that can be."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from xxhash import xxh3_128

from miaobi.corpus import blocks
from miaobi.corpus.blocks import Block
from miaobi.corpus.records import is_in_order
from miaobi.corpus.sources import NotTextError, Source

HASH = "xxh3_128"
"""How the manifest knows a source: what `xxh128sum` prints. SHA-256 would add a seventh to --split=tail."""


class Hashes(dict[Path, str]):
    """The hashes of files. Those of large plain files come with their last block, as the blocks pass in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.digest, self.position = None, xxh3_128(), 0

    def data(self, block: Block) -> bytes | None:
        """The bytes of a block, which count for the hash of its file; None where that is known, or found otherwise."""
        source = block.source
        is_piece = block.encoding is not None and block.data is None and block.records is None
        if not is_piece or source.compression or source.path in self:
            return None
        if source.path != self.path:
            self.path, self.digest, self.position = source.path, xxh3_128(), 0
        with source.opened() as file:
            file.seek(self.position)
            data = file.read(block.end - self.position)
        self.digest.update(data)
        mark, self.position = block.start - self.position, block.end
        if self.position == source.size:
            self[source.path] = self.digest.hexdigest()
        return data[mark:]


def file_hash(path: Path) -> str:
    """The hash of a file that is read in another way: packed, a table."""
    digest = xxh3_128()
    with contextlib.suppress(OSError), open(path, "rb") as file:  # the reading says what is wrong
        while data := file.read(blocks.BLOCK_BYTES):
            digest.update(data)
        return digest.hexdigest()
    return ""


def _is_one_block(source: Source) -> bool:
    return not source.compression and source.size <= blocks.BLOCK_BYTES and not is_in_order(source)


def with_data(block: Block, passing: Hashes | None) -> tuple[Block, str]:
    """A block with its bytes where they were read for a hash: that of a whole small file is given, too."""
    if passing is not None and (data := passing.data(block)) is not None:
        return dataclasses.replace(block, data=data), ""
    if block.encoding is not None or block.data is not None or not _is_one_block(block.source):
        return block, ""
    try:
        with block.source.opened() as file:
            data = file.read()
    except NotTextError:  # as the reading will say
        return block, ""
    return dataclasses.replace(block, data=data), xxh3_128(data).hexdigest()
