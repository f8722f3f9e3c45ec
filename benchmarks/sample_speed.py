"""Decoding speed of one gpt2-family model: miaobi, nanoGPT and transformers, same weights, in turns.

    python -m benchmarks.sample_speed --nanogpt DIR

Cases are STREAMSxTOKENS. nanoGPT writes one stream at a time, so it takes part in cases of one stream, as its
sample.py samples. transformers keeps a cache but cannot go past the block of learned positions, so it takes part in
cases that fit. Speed does not depend on what the weights are; here they are random.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.common import Worker, clock, git_version, machine, parse, ratio, report, take_turns
from benchmarks.peers import copy_nanogpt, nanogpt_model, transformers_model
from miaobi.console import log
from miaobi.corpus.tokenizer import N_RESERVED, Tokenizer
from miaobi.device import pick_device
from miaobi.generate import engine
from miaobi.generate.config import SampleConfig
from miaobi.model.checkpoint import save_model
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer

TEMPERATURE, TOP_K = 0.8, 200  # sample.py's defaults, and ours
PROMPT = "皇马"
GREEDY = 50  # tokens that miaobi and transformers must agree on


@dataclass(frozen=True)
class Args:
    """Command line."""

    nanogpt: Path | None = None
    """A checkout of nanoGPT to compare with."""
    cases: tuple[str, ...] = ("1x200", "1x500", "10x200", "16x200")
    """STREAMSxTOKENS, several of them."""
    n_layer: int = 40
    n_head: int = 8
    n_embd: int = 512
    block_size: int = 256
    vocab_size: int = 5791
    pairs: int = 3
    """Turns of each side and case."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    transformers_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of transformers' weights in the timed turns."""
    json: bool = False
    """Print one line of JSON as well."""


def write_model(args: Any, at: Path, activation: str = "gelu") -> None:
    """A random model over a vocabulary of Chinese characters. Its blocks are louder than at birth: otherwise the
    likeliest next token is the last one again, and greedy decoding would check little."""
    room = args.vocab_size - N_RESERVED
    counts = {chr(0x4E00 + i): 1 for i in range(room)} | dict.fromkeys(PROMPT, 2)
    tokenizer = Tokenizer.train_char(counts, vocab_size=args.vocab_size)
    sizes = {key: getattr(args, key) for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")}
    torch.manual_seed(0)
    model = Transformer(ModelConfig(family="gpt2", activation=activation, **sizes))
    with torch.no_grad():
        for block in model.blocks:
            for matrix in (block.attn.qkv, block.attn.proj, block.mlp.up, block.mlp.down):
                matrix.weight.normal_(std=0.1)
    log(f"number of parameters: {model.num_parameters() / 1e6:.2f}M")
    at.mkdir()
    save_model(at, model, tokenizer, end_ids=())


class Miaobi:
    """What `miaobi sample` loads and calls."""

    def __init__(self, weights: Path, device: str, dtype: str = "auto") -> None:
        self.weights, self.device = weights, device
        self.lm = engine.load(weights, device, dtype)
        self.lm.tokenizer.eot_id = None  # random weights should not end a text early
        self.seed = 0

    def greedy(self, tokens: int) -> list[int]:
        """The likeliest continuation in fp32."""
        lm = engine.load(self.weights, self.device, "float32")
        return list(lm.tokens(PROMPT, SampleConfig(max_new_tokens=tokens, temperature=0)))

    def rate(self, streams: int, tokens: int) -> float:
        """Tokens per second over all streams, prompt to text."""
        self.seed += 1
        cfg = SampleConfig(num_samples=streams, max_new_tokens=tokens, temperature=TEMPERATURE, top_k=TOP_K,
                           seed=self.seed)  # fmt: skip
        return engine.timed(self.lm, PROMPT, cfg)[1]


class Transformers:
    """`generate` of GPT2LMHeadModel with its cache."""

    def __init__(self, weights: Path, device: str, dtype: str, threads: int | None = None) -> None:
        torch.set_num_threads(threads or torch.get_num_threads())
        self.device, self.dtype = pick_device(device), getattr(torch, dtype)
        self.model = transformers_model(weights).eval().to(self.device)
        self.prompt = torch.tensor([Tokenizer.load(weights).encode(PROMPT)], device=self.device)

    def greedy(self, tokens: int) -> list[int]:
        """The likeliest continuation in fp32; the model then takes the precision of the timed turns."""
        written = self.generate(tokens, do_sample=False)[0].tolist()
        self.model.to(self.dtype)
        return written

    def rate(self, streams: int, tokens: int) -> float:
        """Tokens per second over all streams."""
        start = clock(self.device)
        written = self.generate(
            tokens, do_sample=True, temperature=TEMPERATURE, top_k=TOP_K, num_return_sequences=streams
        )
        return written.numel() / (clock(self.device) - start)

    @torch.inference_mode()
    def generate(self, tokens: int, **how) -> torch.Tensor:
        """New tokens (streams, tokens)."""
        mask = torch.ones_like(self.prompt)
        out = self.model.generate(self.prompt, attention_mask=mask, max_new_tokens=tokens, pad_token_id=0, **how)
        return out[:, self.prompt.shape[1] :]


class NanoGPT:
    """`generate` as sample.py calls it: fp32 on a CPU, bf16 autocast on a GPU."""

    def __init__(self, weights: Path, device: str) -> None:
        self.device = pick_device(device)
        self.model = nanogpt_model(weights).eval().to(self.device)
        self.prompt = torch.tensor([Tokenizer.load(weights).encode(PROMPT)], device=self.device)

    def rate(self, streams: int, tokens: int) -> float:
        """Tokens per second of one stream after another."""
        start = clock(self.device)
        on_gpu = self.device.type == "cuda"
        with torch.no_grad(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on_gpu):
            for _ in range(streams):
                self.model.generate(self.prompt, tokens, temperature=TEMPERATURE, top_k=TOP_K)
        return streams * tokens / (clock(self.device) - start)


def main() -> None:
    """Measure and print."""
    args = parse("sample_speed", Args, __doc__)
    cases = [tuple(int(n) for n in case.split("x")) for case in args.cases]
    rates, ratios, rows = {}, {}, []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        weights = Path(folder) / "weights"
        write_model(args, weights)

        def start(make: type, *given: str) -> Worker:
            return stack.enter_context(closing(Worker(make, weights, args.device, *given)))

        sides = {"miaobi": start(Miaobi), "transformers": start(Transformers, args.transformers_dtype)}
        if args.nanogpt:
            copy_nanogpt(args.nanogpt, Path(folder) / "nanoGPT")
            sides["nanoGPT"] = start(NanoGPT)
        length = min(GREEDY, args.block_size - len(PROMPT))
        ours, theirs = (sides[name].call("greedy", length) for name in ("miaobi", "transformers"))
        log(f"greedy, {length} tokens, {len(set(ours))} of them distinct: {'equal' if ours == theirs else 'DIFFERENT'}")
        for streams, tokens in cases:
            fits = len(PROMPT) + tokens <= args.block_size
            here = [n for n in sides if n == "miaobi" or (fits if n == "transformers" else streams == 1)]
            turns = {name: partial(sides[name].call, "rate", streams, tokens) for name in here}
            for name in here:
                sides[name].call("rate", streams, 8)  # warm up
            case = f"{streams}x{tokens}"
            rates[case] = take_turns(turns, args.pairs)
            ratios[case] = {n: ratio(rates[case]["miaobi"], rates[case][n]) for n in here if n != "miaobi"}
            rows += [[case, n, statistics.median(rates[case][n]), ratios[case].get(n, "")] for n in here]
    report("sample_speed", ["streams x tokens", "side", "tokens/s", "miaobi / side"], rows, {
        "machine": machine(args.device), "settings": dataclasses.asdict(args),
        "nanogpt": git_version(args.nanogpt) if args.nanogpt else None, "tokens_per_second": rates, "ratios": ratios,
        "greedy_equal": ours == theirs,
    }, args.json)  # fmt: skip
    if ours != theirs:
        raise SystemExit(f"miaobi and transformers differ in greedy decoding:\n{ours}\n{theirs}")


if __name__ == "__main__":
    main()
