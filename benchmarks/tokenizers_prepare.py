"""nanoGPT's prepare.py with Hugging Face `tokenizers` for the characters: a peer of `prepare_speed`, a whole process.

    python -m benchmarks.tokenizers_prepare TEXT.txt DIRECTORY

Everything around the encoding is as cheap as it gets: the vocabulary is a Python set of the text, and the tokenizer is
the fastest of those that encode characters: BPE without merges over whole lines, `encode_batch_fast` (4 to 8 times as
fast as WordLevel, or BPE, behind a `Split` at every character).
"""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

LINES = 4096
"""Lines per call: an Encoding takes hundreds of bytes a character, so not all of them at once."""


def main(text: Path, out: Path) -> None:
    """Write train.bin and val.bin (uint16, cut at 90%) and tokenizer.json."""
    data = text.read_text(encoding="utf-8")
    vocab = {character: number for number, character in enumerate(sorted(set(data)))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    cut = int(len(data) * 0.9)
    for name, part in (("train", data[:cut]), ("val", data[cut:])):
        lines = part.splitlines(keepends=True)
        with (out / f"{name}.bin").open("wb") as file:
            for low in range(0, len(lines), LINES):
                encoded = tokenizer.encode_batch_fast(lines[low : low + LINES], add_special_tokens=False)
                np.fromiter(chain.from_iterable(e.ids for e in encoded), np.uint16).tofile(file)
    tokenizer.save(str(out / "tokenizer.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
