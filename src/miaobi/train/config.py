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
    suite: Location = ""
    """In place of DATA: the directory with the files of the suite, fixed held-out texts of six genres; bits/char of
    each, and how varied, repetitive and finished what the model writes there is."""
    suite_samples: int = 16
    """Suite: continuations (of dialogues: replies) of each genre that are drawn; 0 = none."""
    suite_out: Location = ""
    """Suite: write its texts into this directory, GENRE.jsonl each, for `miaobi prepare --without`; no MODEL needed."""
    trained_on: tuple[Location, ...] = ()
    """Suite: what the model was trained on; how many of the suite's documents share 20 letters in a row with it is
    counted."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = dataclasses.field(default="float32", kw_only=True)
    """Arithmetic; float32 makes figures comparable across machines."""

    def __post_init__(self) -> None:
        if not self.suite_out:
            super().__post_init__()
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.suite_samples < 0:
            raise UserError(f"suite_samples is {self.suite_samples}; give 0 for none, or a positive number")
        if self.suite and self.data:
            raise UserError(f"eval scores DATA or the suite, not both: leave out {self.data[0]}, or --suite")
        if not self.suite and (self.suite_out or self.trained_on):
            raise UserError("suite_out and trained_on go with --suite=DIRECTORY, the files of the suite")
        if not self.data and not self.suite:
            raise UserError("eval needs text: a prepared directory, or files; or --suite=DIRECTORY")
