"""Settings of `miaobi convert`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from miaobi.config import ModelChoice, check_license
from miaobi.kinds import Location, Positional


@dataclass(frozen=True)
class ConvertConfig:
    """A checkpoint of another project, and where its model directory goes."""

    checkpoint: Positional[Path]
    """The .pth or .pt file."""
    out: Path | None = None
    """Model directory to write; default: the checkpoint's name with .miaobi, next to it."""

    license: str | None = field(default=None, kw_only=True)
    """License of the model, for its card, by the hub's id: apache-2.0, mit, cc-by-4.0, ..."""

    def __post_init__(self) -> None:
        check_license(self.license)

    @property
    def directory(self) -> Path:
        """`out`, or its default."""
        return self.out or self.checkpoint.parent / f"{self.checkpoint.stem}.miaobi"


@dataclass(frozen=True)
class SmallGPTConfig(ConvertConfig):
    """A .pth of small-gpt."""

    corpus: Location | None = None
    """The text file it was trained on; the checkpoint has no vocabulary of its own, it is rebuilt from that."""
    exact: bool = False
    """No byte tokens: a character outside the vocabulary becomes <unk>, as in small-gpt."""


@dataclass(frozen=True)
class NanoGPTConfig(ConvertConfig):
    """A ckpt.pt of nanoGPT."""

    meta: Location | None = None
    """meta.pkl of a character model, from nanoGPT's data/NAME."""
    tokenizer: Location | None = None
    """Directory with GPT-2's tokenizer.json, or vocab.json and merges.txt, for a model of GPT-2's BPE."""


@dataclass(frozen=True)
class GGUFConfig(ModelChoice):
    """A MODEL as one file of llama.cpp, Ollama and LM Studio."""

    out: Path | None = None
    """File to write; default: the model's name, the kind and .gguf, in the current directory."""
    quantize: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "bf16"
    """How matrices are stored. Norms, biases and positions stay f32; below 8 bits the embedding is q8_0."""
    bpe: Literal["exact", "compatible"] = "exact"
    """BPE only. exact = the same ids as here, for a llama.cpp of April 2026 or later; compatible = any llama.cpp, with
    other ids for some texts (the command counts them)."""
    ollama: bool = False
    """Write a Modelfile next to it: `ollama create NAME -f Modelfile`."""


@dataclass(frozen=True)
class QuantizeConfig(ModelChoice):
    """A MODEL whose weights are whole numbers of 8 or 4 bits, for miaobi's own engine."""

    dtype: Literal["int8", "int4"] = "int8"
    """int8 = a quarter of the size of float32, next to nothing lost; int4 = about a seventh, and a loss to be measured
    with `miaobi eval`. It computes as fast as int8 at most: 4 bits are widened when the model is read."""
    out: Path | None = None
    """Model directory to write; default: the model's name and the kind, in the current directory."""
    license: str | None = None
    """License of the model, for its card, by the hub's id: apache-2.0, mit, cc-by-4.0, ..."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_license(self.license)
