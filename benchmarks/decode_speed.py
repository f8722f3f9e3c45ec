"""Decoding on a CPU against the fastest peers: one stream beside llama.cpp, many beside transformers: once all of one
length, and once prompts and continuations of many lengths, as requests are.

    python -m benchmarks.decode_speed --llama_python VENV/bin/python --trained RUN --text TEXT.txt

Same random weights of the gpt2 family on every side (speed does not depend on what they are), GGUF written from them
by `llama_side.py`, which runs in the interpreter that has llama-cpp-python and gguf. Before anything is timed, greedy
tokens in fp32 must equal transformers', and the logits of each precision are compared with our fp32 ones. With
`--trained` and `--text`, what the precisions cost a real model in bits per character, decoding token by token.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import sample_speed
from benchmarks.common import Worker, machine, parse, ratio, report, take_turns
from benchmarks.sample_speed import GREEDY, PROMPT, TEMPERATURE, TOP_K, Transformers, write_model
from miaobi.console import log
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.generate import cpu_step, engine
from miaobi.generate.config import SampleConfig, SamplingConfig
from miaobi.generate.slots import Slots, Stream

PAIRED = {"bfloat16": "bf16", "int8": "q8_0"}  # our precision -> llama.cpp's nearest
Requests = list[tuple[list[int], int]]  # ids of a prompt, and how many tokens follow
Written = tuple[list[list[int]], float]
FAR = {"bf16": 0.05, "q8_0": 0.2, "bfloat16": 0.05, "int8": 0.2}  # of the norm of fp32 logits: beyond is another model


@dataclass(frozen=True)
class Args:
    """Command line."""

    llama_python: Path | None = None
    """The interpreter of an environment with llama-cpp-python and gguf."""
    trained: Path | None = None
    """A trained model to measure what its precision costs, and what prompt lookup brings."""
    text: Path | None = None
    """Text that it was not trained on."""
    characters: int = 20_000
    """Of that text."""
    tokens: int = 200
    """Written by one stream in a turn."""
    streams: int = 16
    stream_tokens: int = 64
    """Written by each of many streams in a turn."""
    uneven: int = 32
    """Prompts of 4 to 64 tokens, each continued by 4 to 64; only these count."""
    slow_tokens: int = 2
    """The same for transformers in bf16, which takes seconds for each on a CPU without such units."""
    n_layer: int = 40
    n_head: int = 8
    n_embd: int = 512
    block_size: int = 256
    vocab_size: int = 5791
    threads: int = 2
    """Of each side."""
    pairs: int = 5
    """Turns of each side and case."""
    json: bool = False
    """Print one line of JSON as well."""


class Miaobi(sample_speed.Miaobi):
    """What `miaobi sample --device=cpu --dtype=...` loads and calls."""

    def __init__(self, weights: Path, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        super().__init__(weights, "cpu", dtype)
        wait_for_library()

    def uneven(self, requests: Requests, streams: int, temperature: float = TEMPERATURE) -> Written:
        """What follows each prompt, `streams` at a time, and the seconds it took."""
        started = time.perf_counter()
        slots, opened = self.lm.slots(streams), []
        coming = iter(requests)
        while len(opened) < len(requests) or slots.running:
            for ids, length in islice(coming, slots.free):
                cfg = SamplingConfig(max_new_tokens=length, temperature=temperature, top_k=TOP_K)
                opened.append(Stream(list(ids), cfg, self.lm.generator(len(opened))))
                slots.add(opened[-1])
            slots.advance()
        texts = [one.ids[len(ids) :] for one, (ids, _) in zip(opened, requests, strict=True)]
        return texts, time.perf_counter() - started

    def greedy_rate(self, prompts: list[str], tokens: int, guesses: bool) -> float:
        """Tokens per second of greedy continuations, one after another, with prompt lookup or without."""
        cfg = SampleConfig(max_new_tokens=tokens, temperature=0)
        with ExitStack() as stack:
            if not guesses:
                stack.enter_context(mock.patch.object(Slots, "propose", return_value=[]))
            started = time.perf_counter()
            written = sum(1 for prompt in prompts for _ in self.lm.tokens(prompt, cfg))
        return written / (time.perf_counter() - started)

    def logits(self, ids: list[int]) -> list[float]:
        """Of the token after `ids`, read one by one."""
        return next_logits(self.lm, torch.tensor([ids]))[-1][0].tolist()


class Batches(Transformers):
    """transformers on requests of many lengths: batches padded on the left, each as long as its longest text."""

    def uneven(self, requests: Requests, streams: int, temperature: float = TEMPERATURE) -> Written:
        """What follows each prompt, `streams` at a time, and the seconds it took."""
        started, texts = time.perf_counter(), []
        how = {"do_sample": True, "temperature": temperature, "top_k": TOP_K} if temperature else {"do_sample": False}
        for i in range(0, len(requests), streams):
            some = requests[i : i + streams]
            wide = max(len(ids) for ids, _ in some)
            padded = torch.tensor([[0] * (wide - len(ids)) + list(ids) for ids, _ in some])
            mask = torch.tensor([[0] * (wide - len(ids)) + [1] * len(ids) for ids, _ in some])
            with torch.inference_mode():
                out = self.model.generate(padded, attention_mask=mask, max_new_tokens=max(n for _, n in some),
                                          pad_token_id=0, **how)  # fmt: skip
            texts += [row[wide : wide + n].tolist() for row, (_, n) in zip(out, some, strict=True)]
        return texts, time.perf_counter() - started


class Llama:
    """llama_side.py in its own interpreter; answers like a Worker."""

    def __init__(self, python: Path, weights: Path, kind: str, threads: int) -> None:
        script = Path(__file__).with_name("llama_side.py")
        command = [str(python), str(script), str(weights), str(weights.parent), kind, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self.answer()

    def call(self, method: str, *given: Any) -> Any:
        """`Side.method(*given)` over there."""
        print(json.dumps([method, *given]), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp's side died with exit code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def wait_for_library() -> None:
    """Until the compiled step is there. Exits where it never will be."""
    for _ in range(600):
        if cpu_step.library() is not None:
            return
        time.sleep(0.1)
    raise SystemExit("no compiled step after a minute: is there a C++ compiler with OpenMP?")


@torch.inference_mode()
def next_logits(lm: engine.LanguageModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits (B, V) behind each position of ids (B, T), decoded one by one."""
    slots = lm.slots(len(ids))
    slots.reserve(ids.shape[1])
    return [slots.logits(column.tolist(), [t] * len(ids)) for t, column in enumerate(ids.T)]


def bits_per_character(run: Path, text: str, dtype: str, threads: int) -> float:
    """Of `text` in windows of a block each, as the decoder itself sees it: step after step."""
    torch.set_num_threads(threads)
    lm = engine.load(run, "cpu", dtype)
    wait_for_library()
    block = lm.model.cfg.block_size
    ids = torch.tensor(lm.tokenizer.encode(text))
    windows = ids[: len(ids) // block * block].view(-1, block)
    nats = 0.0
    for rows in windows.split(32):
        for t, logits in enumerate(next_logits(lm, rows)[:-1]):
            nats += torch.nn.functional.cross_entropy(logits.float(), rows[:, t + 1], reduction="sum").item()
    scored = windows.shape[0] * (block - 1)
    return nats / scored * len(ids) / len(text) / math.log(2)


def distance(logits: list[float], reference: list[float]) -> float:
    """Norm of the difference, as a share of the reference's."""
    a, b = torch.tensor(logits), torch.tensor(reference)
    return ((a - b).norm() / b.norm()).item()


def main() -> None:
    """Measure and print."""
    args = parse("decode_speed", Args, __doc__)
    rows, rates, ratios, distances, quality, llama_version = [], {}, {}, {}, {}, None
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        weights = Path(folder) / "weights"
        write_model(args, weights, "gelu_new")  # the GELU that llama.cpp's gpt2 has

        def start(make: type, *given: Any) -> Worker:
            return stack.enter_context(closing(Worker(make, weights, *given)))

        sides = {f"miaobi {dtype}": start(Miaobi, dtype, args.threads) for dtype in PAIRED}
        many = {f"transformers {dtype}": start(Batches, "cpu", dtype, args.threads)
                for dtype in ("float32", "bfloat16")}  # fmt: skip
        draw = random.Random(0)
        requests = [([draw.randrange(300, args.vocab_size) for _ in range(draw.randint(4, 64))], draw.randint(4, 64))
                    for _ in range(args.uneven)]  # fmt: skip
        ours = sides["miaobi bfloat16"].call("greedy", GREEDY)
        for name, side in many.items():
            if (theirs := side.call("greedy", GREEDY)) != ours:
                raise SystemExit(f"miaobi and {name} in fp32 differ in greedy decoding:\n{ours}\n{theirs}")
        log(f"greedy in fp32, {GREEDY} tokens, {len(set(ours))} of them distinct: equal to transformers'")
        if args.llama_python:
            for kind in PAIRED.values():
                side = stack.enter_context(closing(Llama(args.llama_python, weights, kind, args.threads)))
                sides[f"llama.cpp {kind}"], llama_version = side, side.version
        prompt = Tokenizer.load(weights).encode(PROMPT)
        ids = [*prompt, *ours[:30]]
        exact = start(Miaobi, "float32", args.threads)
        reference = exact.call("logits", ids)
        texts = [side.call("uneven", requests[:4], 3, 0.0)[0] for side in (exact, many["transformers float32"])]
        if texts[0] != texts[1]:
            raise SystemExit(f"miaobi and transformers in fp32 differ on prompts of many lengths:\n{texts}")
        exact.close()
        for name, side in sides.items():
            distances[name] = distance(side.call("logits", ids), reference)
            log(f"{name}: logits {distances[name]:.4f} from miaobi's in fp32")
            if not distances[name] < FAR[name.split()[1]]:
                raise SystemExit(f"{name} does not compute the same model")

        def turns(case: str, calls: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
            for call in calls.values():
                call()  # warm up
            rates[case] = take_turns(calls, args.pairs)
            ratios[case] = {b: ratio(rates[case][a], rates[case][b]) for a, b in pairs if b in calls}
            rows.extend([case, name, statistics.median(got), ratios[case].get(name, "")]
                        for name, got in rates[case].items())  # fmt: skip

        single = {}
        for dtype, kind in PAIRED.items():  # neighbours in time are those that are compared
            single[f"miaobi {dtype}"] = partial(sides[f"miaobi {dtype}"].call, "rate", 1, args.tokens)
            if args.llama_python:
                single[f"llama.cpp {kind}"] = partial(
                    sides[f"llama.cpp {kind}"].call, "rate", prompt, args.tokens, TEMPERATURE, TOP_K
                )
        turns(f"1x{args.tokens}", single, [(f"miaobi {a}", f"llama.cpp {b}") for a, b in PAIRED.items()])
        several = {"miaobi bfloat16": partial(sides["miaobi bfloat16"].call, "rate", args.streams, args.stream_tokens)}
        for name, side in many.items():
            length = args.slow_tokens if name.endswith("bfloat16") else args.stream_tokens
            several[name] = partial(side.call, "rate", args.streams, length)
        turns(f"{args.streams}x{args.stream_tokens}", several, [("miaobi bfloat16", name) for name in many])

        def useful(side: Worker) -> float:
            return sum(n for _, n in requests) / side.call("uneven", requests, args.streams)[1]

        mixed = {"miaobi bfloat16": sides["miaobi bfloat16"], "transformers float32": many["transformers float32"]}
        turns(f"{args.uneven} uneven, {args.streams} at a time", {k: partial(useful, v) for k, v in mixed.items()},
              [("miaobi bfloat16", "transformers float32")])  # fmt: skip
    if args.trained and args.text:
        text = args.text.read_text(encoding="utf-8")[: args.characters]
        prompts = [text[i : i + 120] for i in range(0, len(text) - 120, max(120, len(text) // 10))]
        with closing(Worker(Miaobi, args.trained, "bfloat16", args.threads)) as side:
            greedy = {name: partial(side.call, "greedy_rate", prompts, args.tokens, name == "with guesses")
                      for name in ("with guesses", "without")}  # fmt: skip
            turns(f"greedy, {len(prompts)} prompts of the text", greedy, [("with guesses", "without")])
        quality = {dtype: bits_per_character(args.trained, text, dtype, args.threads) for dtype in cpu_step.KINDS}
        for dtype, bits in quality.items():
            rows.append(["bits/char", dtype, f"{bits:.4f}", f"{bits - quality['float32']:+.4f}"])
    report("decode_speed", ["streams x tokens", "side", "tokens/s", "miaobi / side"], rows, {
        "machine": machine(), "settings": dataclasses.asdict(args), "llama_cpp_python": llama_version,
        "tokens_per_second": rates, "ratios": ratios, "distances": distances, "bits_per_character": quality,
    }, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
