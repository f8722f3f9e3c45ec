"""Settings of `miaobi eval`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from miaobi.config import ModelChoice, Where
from miaobi.errors import UserError
from miaobi.kinds import Location, Positional


@dataclass(frozen=True)
class EvalConfig(ModelChoice, Where):
    """A model, and the text that it is scored on."""

    data: Positional[tuple[Location, ...]] = ()
    """Prepared directory (its validation part), or raw text: files, directories, globs."""
    split: Literal["val", "train"] = "val"
    """Part of a prepared directory."""
    format: Literal["auto", "text", "lines", "files", "jsonl", "csv", "dialogue"] = "auto"
    """Raw text: what a document is, as in `miaobi prepare`; auto takes text for dialogues where the model is a
    chit-chat model. Dialogues with roles are scored on the assistant's turns."""
    field: str = "text"
    """Raw text: column (csv, parquet) or key (jsonl) that holds it."""
    skip_bad: bool = False
    """Raw text: leave out files and records that cannot be read, replace bytes that cannot, and count them."""
    stride: str = "half"
    """Tokens scored per window: half (a block's half; each has at least that much context), block (as nanoGPT
    scores), or a number."""
    batch_size: int = 16
    """Windows scored at once."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = dataclasses.field(default="float32", kw_only=True)
    """Arithmetic; float32 makes figures comparable across machines."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; it must be at least 1")
        if not self.data:
            raise UserError("eval needs text: a prepared directory, or files")
