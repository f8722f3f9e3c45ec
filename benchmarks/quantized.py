"""Weights of 8 and 4 bits for our own engine: size on the disk, decoding speed, bits per character lost.

    python -m benchmarks.quantized RUN TEXT

RUN is written as int8 and int4 by `miaobi convert quantize`, and as float32 beside them. Each directory is scored by
`miaobi eval` on the first characters of TEXT (float32 arithmetic on the widened weights), and writes one stream on a
CPU as `miaobi sample` does, the sides in turns: float32, bfloat16, int8, and int4, which is decoded in bfloat16.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import miaobi
from benchmarks.common import machine, parse, ratio, report, take_turns
from miaobi.convert.config import QuantizeConfig
from miaobi.convert.quantize import convert
from miaobi.generate.config import SampleConfig
from miaobi.generate.engine import LanguageModel, timed
from miaobi.kinds import Positional
from miaobi.model.checkpoint import model_directory


@dataclass(frozen=True)
class Args:
    """Command line."""

    model: Positional[str]
    """A run or a model directory."""
    text: Positional[Path]
    """Text that the model has not learned."""
    characters: int = 20_000
    """Of the text, from its beginning."""
    tokens: int = 200
    pairs: int = 3
    """Turns of each side."""
    json: bool = False
    """Print one line of JSON as well."""


def rate(lm: LanguageModel, tokens: int) -> float:
    """Tokens per second of one stream; an end of text does not end it."""
    lm.end_ids = ()
    return timed(lm, "中国", SampleConfig(num_samples=1, max_new_tokens=tokens, seed=1))[1]


def main() -> None:
    """Print the table."""
    args = parse("quantized", Args, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        piece = work / "text.txt"
        piece.write_text(args.text.read_text(encoding="utf-8")[: args.characters], encoding="utf-8")
        shutil.copytree(model_directory(args.model), work / "float32")
        for kind in ("int8", "int4"):
            convert(QuantizeConfig(args.model, dtype=kind, out=work / kind))
        stored = {kind: (work / kind / "model.safetensors").stat().st_size for kind in ("float32", "int8", "int4")}
        bits = {kind: miaobi.evaluate(work / kind, piece, device="cpu")["bits_per_char"] for kind in stored}
        models = {"float32": ("float32", "float32"), "bfloat16": ("float32", "bfloat16"), "int8": ("int8", None),
                  "int4": ("int4", None)}  # fmt: skip
        loaded = {side: miaobi.load(str(work / kind), "cpu", dtype) for side, (kind, dtype) in models.items()}
        rates = take_turns({side: partial(rate, lm, args.tokens) for side, lm in loaded.items()}, args.pairs)
    rows: list[list[Any]] = []
    for side, (kind, _) in models.items():
        size = stored[kind] // (2 if side == "bfloat16" else 1)
        lost = bits[kind] - bits["float32"]
        rows.append([side, f"{size / 1e6:.2f}", f"{size / stored['float32']:.3f}",
                     "" if side == "bfloat16" else f"{bits[kind]:.4f}", "" if side == "bfloat16" else f"{lost:+.4f}",
                     max(rates[side]), str(ratio(rates[side], rates["float32"]))])  # fmt: skip
    columns = ["weights", "MB", "of float32", "bits/char", "lost", "tokens/s", "times float32"]
    result = {"machine": machine(), "bytes": stored, "bits_per_char": bits, "tokens_per_second": rates}
    report("quantized", columns, rows, result, args.json)


if __name__ == "__main__":
    main()
