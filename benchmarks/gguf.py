"""GGUF files against our own engine: the same ids, the same greedy text, their size, and bits per character.

    python -m benchmarks.gguf --text TEXT

Trains four small models (char and BPE, gpt2 and qwen3) on TEXT, writes each as GGUF in several kinds, and asks
llama.cpp (the package xllamacpp) for its probabilities of a piece of the validation text, token by token.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xllamacpp

import miaobi
from benchmarks.common import machine, parse, report, version
from miaobi.console import log
from miaobi.convert.config import GGUFConfig
from miaobi.convert.gguf import convert
from miaobi.corpus.prepared import PreparedData
from miaobi.generate.engine import LanguageModel

LIKELIEST = 200
"""Tokens whose probabilities are asked for first: a whole vocabulary is 300 kB of JSON."""
GREEDY = 100
"""Tokens of greedy text that are compared."""


@dataclass(frozen=True)
class Args:
    """Command line."""

    text: Path
    """What the models learn, and are asked about."""
    kinds: tuple[str, ...] = ("f32", "bf16", "q8_0", "q4_0")
    """Kinds of files; the first one is compared id by id and text by text."""
    sentences: int = 1000
    """Sentences whose ids are compared."""
    pieces: int = 2
    """Pieces of one block each whose tokens are scored."""
    characters: int = 400_000
    """Of the text, from its beginning, that the models learn."""
    models: tuple[str, ...] = ("gpt2-char", "qwen3-char", "gpt2-bpe", "qwen3-bpe")
    """Families and tokenizers."""
    max_iters: int = 100
    n_layer: int = 4
    n_embd: int = 128
    block_size: int = 128
    json: bool = False
    """Print one line of JSON as well."""


class LlamaCpp:
    """A file loaded by llama.cpp, asked over loopback."""

    def __init__(self, file: Path, context: int = 128) -> None:
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), context, 1
        params.warmup, params.verbosity, params.cpuparams.n_threads = False, -1, 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # as ours
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it sums in fp16
        self.server = xllamacpp.Server(params)

    def post(self, path: str, **body: object) -> dict:
        """The JSON that a path of llama.cpp's server answers."""
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a control token."""
        return self.post("/tokenize", content=text, add_special=False, parse_special=False)["tokens"]

    def continuation(
        self, ids: list[int], count: int, probabilities: int = 0, cached: bool = False, **more: object
    ) -> dict:
        """`count` greedy tokens behind `ids`, each with the log-probabilities of its likeliest."""
        return self.post(
            "/completion", prompt=ids, n_predict=count, temperature=0, return_tokens=True, n_probs=probabilities,
            cache_prompt=cached, **more,
        )  # fmt: skip

    def nats(self, ids: list[int], vocabulary: int) -> float:
        """Nats of all ids but the first, each behind those before it."""
        return -sum(self.log_probability(ids[:i], ids[i], vocabulary) for i in range(1, len(ids)))

    def log_probability(self, before: list[int], id_: int, vocabulary: int) -> float:
        """That of one id. The server lists the likeliest only: more are asked for until it is among them.

        It lists none where what it draws is an end of text or a part of a character: it is made to draw a whole one,
        which leaves the probabilities as they are.
        """
        whole = [[self.encode("的")[-1], 1000]]
        for count in (LIKELIEST, vocabulary):
            told = self.continuation(before, 1, count, True, logit_bias=whole)["completion_probabilities"][0]
            found = [entry["logprob"] for entry in told["top_logprobs"] if entry["id"] == id_]
            if found:
                return found[0]
        raise LookupError(f"llama.cpp gives no probability of id {id_}")


def our_nats(lm: LanguageModel, ids: list[int]) -> float:
    """The same, of our own engine."""
    logits = lm.logits(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    return -logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum().item()


def compare(run: Path, data: Path, sentences: list[str], args: Args, work: Path) -> dict[str, Any]:
    """One model: shares of equal ids and of equal greedy tokens; size and bits/char of every kind of file."""
    lm = miaobi.load(str(run), "cpu", "float32")
    tokens = PreparedData.open(data).val.read(0, args.pieces * args.block_size).tolist()
    pieces = [tokens[i : i + args.block_size] for i in range(0, len(tokens) - args.block_size + 1, args.block_size)]
    characters = sum(len(lm.tokenizer.decode(piece[1:])) for piece in pieces)
    bits = 1 / math.log(2) / characters
    found: dict[str, Any] = {"ours": sum(our_nats(lm, piece) for piece in pieces) * bits, "kinds": {}}
    for kind in args.kinds:
        made = convert(GGUFConfig(str(run), out=work / f"{run.name}-{kind}.gguf", quantize=kind))
        llama = LlamaCpp(Path(made["out"]), args.block_size)
        if kind == args.kinds[0]:
            found["ids equal"] = same_ids(llama, lm, sentences)
            prompt = lm.tokenizer.encode("中国")
            length = min(GREEDY, args.block_size - len(prompt))
            theirs = llama.continuation(prompt, length)["content"]
            ours = lm.generate("中国", num_samples=1, max_new_tokens=length, temperature=0)[0].text.removeprefix("中国")
            same = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), len(ours))
            found["text equal"] = f"{same}/{len(ours)}"
        nats = sum(llama.nats(piece, lm.model.cfg.vocab_size) for piece in pieces)
        found["kinds"][kind] = {"bytes": made["bytes"], "bits_per_char": nats * bits}
        log(f"{run.name} {kind}: {made['bytes']:,} bytes, {nats * bits:.4f} bits/char (ours {found['ours']:.4f}), ids "
            f"equal {found['ids equal']}, text equal {found['text equal']}")  # fmt: skip
        del llama
    if not lm.tokenizer.by_character:
        made = convert(GGUFConfig(str(run), out=work / f"{run.name}-compatible.gguf", bpe="compatible"))
        found["ids equal, bpe=compatible"] = same_ids(LlamaCpp(Path(made["out"])), lm, sentences)
    return found


def same_ids(llama: LlamaCpp, lm: LanguageModel, sentences: list[str]) -> int:
    """Sentences that become the same ids here and there."""
    return sum(llama.encode(text) == lm.tokenizer.encode(text) for text in sentences)


def main() -> None:
    """Print the table."""
    args = parse("gguf", Args, __doc__)
    told, rows = {}, []
    text = args.text.read_text(encoding="utf-8")
    sentences = [s for s in re.findall(r"[^。！？\n]+[。！？]?", text) if s.strip()][-args.sentences :]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "text.txt").write_text(text[: args.characters], encoding="utf-8")
        for tokenizer in ("char", "bpe"):
            data = work / tokenizer
            size = {"vocab_size": 3000} if tokenizer == "bpe" else {}
            miaobi.prepare(work / "text.txt", out=data, tokenizer=tokenizer, **size)
            for family in ("gpt2", "qwen3"):
                run = work / f"{family}-{tokenizer}"
                if run.name not in args.models:
                    continue
                miaobi.train_run(
                    data=data, out_dir=run, family=family, n_layer=args.n_layer, n_head=4, n_embd=args.n_embd,
                    block_size=args.block_size, batch_size=16, max_iters=args.max_iters, eval_iters=4,
                    eval_interval=args.max_iters, sample_tokens=0, device="cpu", dtype="float32", compile=False,
                )  # fmt: skip
                found = told[run.name] = compare(run, data, sentences, args, work)
                for kind, file in found["kinds"].items():
                    first = kind == args.kinds[0]
                    rows.append([
                        f"{run.name} {kind}", f"{found['ids equal']}/{len(sentences)}" if first else "",
                        f"{found['text equal']}" if first else "", f"{file['bytes'] / 1e6:.2f}",
                        f"{file['bits_per_char']:.4f}", f"{file['bits_per_char'] - found['ours']:+.4f}",
                    ])  # fmt: skip
                if (same := found.get("ids equal, bpe=compatible")) is not None:
                    rows.append([f"{run.name} bf16, bpe=compatible", f"{same}/{len(sentences)}", *[""] * 4])
    columns = ["file", "ids equal", "greedy text equal", "MB", "bits/char", "more than ours"]
    result = {"machine": machine(), "xllamacpp": version("xllamacpp"), "models": told}
    report("gguf", columns, rows, result, args.json)


if __name__ == "__main__":
    main()
