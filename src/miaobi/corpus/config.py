"""How text becomes tokens: a frozen dataclass whose attribute docstrings are the help of `miaobi prepare`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from miaobi.errors import UserError
from miaobi.kinds import Location, Positional


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """How text is read, divided and turned into tokens, by `prepare` and by `train` alike."""

    tokenizer: Location = "char"
    """char, bpe, or a directory (or tokenizer.json) whose tokenizer is reused."""
    format: Literal["auto", "text", "lines", "files", "jsonl", "csv", "dialogue"] = "auto"
    """What a document is: text = split at blank lines, lines = one per line, files = one per file,
    jsonl / csv = one per record (see --field), dialogue = one utterance a line, blank line between dialogues; or, in
    .jsonl, .json and .parquet files, records with messages (OpenAI), conversations (ShareGPT) or
    instruction/input/output (Alpaca). auto decides by the file's name."""
    template: Literal["auto", "sep", "chatml"] = "auto"
    """Dialogues: sep = chit-chat, both speakers alike; chatml = system, user and assistant. auto = the tokenizer's own
    template, else chatml for .jsonl and sep for text."""
    loss: Literal["auto", "all", "assistant"] = "auto"
    """Dialogues: which turns are learned; auto = all of them with sep, the assistant's elsewhere."""
    enable_thinking: bool | None = None
    """Dialogues: for templates that ask (Qwen3's), whether the model thinks before it answers; kept in the template.
    Default: as the template has it."""
    field: str = "text"
    """Field of a .jsonl, .json, .csv, .tsv or .parquet record that holds the text."""
    delimiter: str = ""
    """Character between the cells of a .csv; default: guessed from its first lines, and said."""
    without: tuple[Location, ...] = ()
    """Files whose texts must not be learned (an evaluation set): documents that share text with them are dropped."""
    dedup: Literal["none", "exact", "near"] = "exact"
    """Drop repeated documents: exact = same text, near = MinHash over character 5-grams as well."""
    split: Literal["hash", "tail"] = "hash"
    """hash = whole documents, chosen by their content, so that adding files moves none;
    tail = nanoGPT's cut: the last part of the characters, no document handling at all (dialogues: the last ones)."""
    val: Location | None = None
    """A file, directory or glob whose documents are the validation part, in place of a share of the sources; documents
    of the sources that are in it as well are dropped (not with --split=tail, which knows no documents)."""
    val_fraction: float = 0.1
    """Share of the documents (hash) or characters (tail) kept for validation."""

    def corpus(self) -> dict[str, Any]:
        """These settings alone, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(Corpus)}


MOST_ROWS = 1 << 20
"""Of an embedding, that prepared data may ask for: the largest vocabulary in use, XLM-V's, has 901,629."""


@dataclass(frozen=True)
class PrepareConfig(Corpus):
    """Text of any encoding and format -> tokens on disk."""

    out: Path
    """Directory for train.bin, val.bin, tokenizer.json and manifest.json."""
    sources: Positional[tuple[Location, ...]] = ()
    """Files, directories, globs; .txt .jsonl .csv .tsv .parquet, also .gz .xz .zst .zip of them."""
    vocab_size: int | None = None
    """Rows of the embedding. char: at most this many tokens, rarest characters become bytes. bpe: default 8192."""
    min_frequency: int = 1
    """char: characters seen less often than this become byte tokens. bpe: least count of a merged pair."""
    weights: tuple[float, ...] = ()
    """How much of each SOURCE is taken: 0.3 = that share of its documents, 2 = each twice per epoch; default 1."""
    near_threshold: float = 0.8
    """Jaccard similarity from which --dedup=near calls two documents the same."""
    normalize: Literal["none", "nfkc"] = "none"
    """Unicode normalisation of the text before anything else."""
    simplify: bool = False
    """Convert Traditional to Simplified Chinese."""
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
        if self.vocab_size is not None and self.vocab_size > MOST_ROWS:
            raise UserError(f"vocab_size is {self.vocab_size:,}; an embedding of more than {MOST_ROWS:,} rows is not "
                            "made")  # fmt: skip
        if self.min_frequency < 1:
            raise UserError(f"min_frequency is {self.min_frequency}; the smallest is 1")
