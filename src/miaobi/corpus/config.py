"""How text becomes tokens: a frozen dataclass whose attribute docstrings are the help of `miaobi prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from miaobi.config import Location, Positional
from miaobi.errors import UserError


@dataclass(frozen=True)
class PrepareConfig:
    """Text of any encoding and format -> tokens on disk."""

    out: Path
    """Directory for train.bin, val.bin, tokenizer.json and manifest.json."""
    sources: Positional[tuple[Location, ...]] = ()
    """Files, directories, globs; .txt .jsonl .csv .tsv .parquet, also .gz .xz .zst .zip of them."""
    tokenizer: Location = "char"
    """char, bpe, or a directory (or tokenizer.json) whose tokenizer is reused."""
    vocab_size: int | None = None
    """Rows of the embedding. char: at most this many tokens, rarest characters become bytes. bpe: default 8192."""
    min_frequency: int = 1
    """char: characters seen less often than this become byte tokens. bpe: least count of a merged pair."""
    format: Literal["auto", "text", "lines", "files", "jsonl", "csv", "dialogue"] = "auto"
    """What a document is: text = split at blank lines, lines = one per line, files = one per file,
    jsonl / csv = one per record (see --field), dialogue = one utterance a line, blank line between dialogues; or, in
    .jsonl files, records with messages (OpenAI), conversations (ShareGPT) or instruction/input/output (Alpaca).
    auto decides by the file's name."""
    template: Literal["auto", "sep", "chatml"] = "auto"
    """Dialogues: sep = chit-chat, both speakers alike; chatml = system, user and assistant. auto = the tokenizer's own
    template, else chatml for .jsonl and sep for text."""
    loss: Literal["auto", "all", "assistant"] = "auto"
    """Dialogues: which turns are learned; auto = all of them with sep, the assistant's elsewhere."""
    weights: tuple[float, ...] = ()
    """How much of each SOURCE is taken: 0.3 = that share of its documents, 2 = each twice per epoch; default 1."""
    field: str = "text"
    """Field of a .jsonl, .csv, .tsv or .parquet record that holds the text."""
    dedup: Literal["none", "exact", "near"] = "exact"
    """Drop repeated documents: exact = same text, near = MinHash over character 5-grams as well."""
    near_threshold: float = 0.8
    """Jaccard similarity from which --dedup=near calls two documents the same."""
    normalize: Literal["none", "nfkc"] = "none"
    """Unicode normalisation of the text before anything else."""
    simplify: bool = False
    """Convert Traditional to Simplified Chinese."""
    split: Literal["hash", "tail"] = "hash"
    """hash = whole documents, chosen by their content, so that adding files moves none;
    tail = nanoGPT's cut: the last part of the characters, no document handling at all (dialogues: the last ones)."""
    val_fraction: float = 0.1
    """Share of the documents (hash) or characters (tail) kept for validation."""
    val: str = ""
    """A file, directory or glob whose documents are the validation part, in place of a share of the sources; documents
    of the sources that are in it as well are dropped (not with --split=tail, which knows no documents)."""
    workers: int = 0
    """Processes that read and encode; 0 = one per core (of the whole cluster with --backend=ray)."""
    backend: Literal["processes", "ray"] = "processes"
    """processes = on this machine; ray = on the Ray cluster that RAY_ADDRESS names, or the one this machine is part of.
    Every machine of the cluster then reads the sources under the same path: put them on a shared disk."""
    skip_bad: bool = False
    """Skip and count records and files that cannot be read instead of stopping."""

    def __post_init__(self) -> None:
        if not 0.0 < self.val_fraction < 1.0:
            raise UserError(f"val_fraction is {self.val_fraction}; give a share between 0 and 1, such as 0.1")
        if not 0.0 < self.near_threshold <= 1.0:
            raise UserError(f"near_threshold is {self.near_threshold}; give a similarity in (0, 1], such as 0.8")
        if self.workers < 0:
            raise UserError(f"workers is {self.workers}; give 0 for one per core, or a positive number")
        if any(not 0 < weight <= 100 for weight in self.weights):
            raise UserError(f"weights are {self.weights}; give a positive number up to 100 for every source")
        if self.min_frequency < 1:
            raise UserError(f"min_frequency is {self.min_frequency}; the smallest is 1")
