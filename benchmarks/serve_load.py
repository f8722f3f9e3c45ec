"""`miaobi serve` under load, from another process over loopback: many streams against one after another, against
llama.cpp's server (xllamacpp) and `transformers serve`; time to the first token; what HTTP costs; and a soak.

    python -m benchmarks.serve_load --size=13M
    python -m benchmarks.serve_load --size=tiny --minutes=10

Same random weights on every side (speed does not depend on what they are), a character vocabulary, one conversation of
`--prompt` characters for each client, each another one, so that no side has read it before.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from benchmarks.common import machine, parse, ratio, report, version
from miaobi.console import log
from miaobi.corpus.template import CHATML_TEMPLATE
from miaobi.corpus.tokenizer import IM_END, Tokenizer
from miaobi.model.checkpoint import save_model
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer

SIZES = {
    "tiny": {"n_layer": 2, "n_head": 4, "n_embd": 64},
    "13M": {"n_layer": 6, "n_head": 6, "n_embd": 384},
    "128M": {"n_layer": 40, "n_head": 8, "n_embd": 512},
}
LETTERS = [chr(0x4E00 + i) for i in range(5500)]
HEAD = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n")  # fmt: skip
BROKEN = (b"{", b"\xff", b'{"model": "weights", "messages": 7}', b'{"model": "other", "messages": []}',
          b'{"model": "weights", "messages": [{"role": "user", "content": "a"}], "max_tokens": -1}')  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Command line."""

    size: Literal["tiny", "13M", "128M"] = "13M"
    streams: int = 16
    tokens: int = 64
    """Of each reply."""
    prompt: int = 32
    """Characters of each message."""
    turns: int = 3
    """Of each side."""
    llama: bool = True
    """Measure llama.cpp's server too (xllamacpp)."""
    transformers: bool = True
    """Measure `transformers serve --continuous-batching` too."""
    transformers_tokens: int = 16
    """Of each reply there, which is slow; only the rate is compared."""
    dtype: str = "auto"
    """Of ours."""
    threads: int = 2
    """Of each side."""
    minutes: float = 0.0
    """Soak: so long `clients` ask, go away and send what is broken."""
    clients: int = 32
    json: bool = False
    """Print one line of JSON as well."""


def write_model(place: Path, size: str) -> Path:
    """A chat model with random weights."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train_char(dict.fromkeys(LETTERS, 9))
    tokenizer.config["chat_template"] = CHATML_TEMPLATE
    model = Transformer(ModelConfig(family="qwen3", block_size=256, vocab_size=tokenizer.vocab_size, **SIZES[size]))
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02)
    place.mkdir()
    save_model(place, model, tokenizer, (tokenizer.token_to_id(IM_END),))
    return place


def free_port() -> int:
    """One that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def message(draw: random.Random, length: int) -> str:
    """Something that nobody has said."""
    return "".join(draw.choice(LETTERS) for _ in range(length))


# The client: sockets, so that it costs little of the cores that the servers need


@dataclass
class Reply:
    """What a client saw."""

    text: str
    tokens: int
    first: float
    """Seconds until the first text."""
    seconds: float


async def ask(port: int, body: dict[str, Any], leave_after: float | None = None) -> Reply:
    """A streamed chat. leave_after: hang up after so many seconds. Raises RuntimeError for another answer than 200."""
    data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began, first, text, chunks, usage = time.perf_counter(), 0.0, "", 0, None
    try:
        writer.write(HEAD % len(data) + data)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError((status + await reader.read())[-400:].decode(errors="replace"))
        async for line in reader:
            if leave_after is not None and time.perf_counter() - began > leave_after:
                break
            if not line.startswith(b"data: {"):
                if line.startswith(b"data: [DONE]"):
                    break
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(str(chunk["error"]))
            usage = chunk.get("usage") or usage
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = first or time.perf_counter() - began
                text, chunks = text + chunk["choices"][0]["delta"]["content"], chunks + 1
    finally:
        writer.close()
    tokens = usage["completion_tokens"] if usage else chunks
    return Reply(text, tokens, first, time.perf_counter() - began)


def body(args: Args, model: str, draw: random.Random, tokens: int) -> dict[str, Any]:
    """A request of a client. `transformers serve`, whose model is a path, takes OpenAI's fields alone."""
    said = [{"role": "user", "content": message(draw, args.prompt)}]
    own = {"top_k": 200, "repetition_penalty": 1.0, "repeat_penalty": 1.0, "ignore_eos": True}
    return {"model": model, "messages": said, "max_tokens": tokens, "temperature": 0.8, "top_p": 1.0,
            "seed": draw.randrange(1 << 30), **({} if "/" in model else own)}  # fmt: skip


async def together(port: int, bodies: list[dict[str, Any]]) -> tuple[float, list[Reply]]:
    """Tokens per second of all at once, and the replies."""
    began = time.perf_counter()
    replies = await asyncio.gather(*(ask(port, one) for one in bodies))
    return sum(reply.tokens for reply in replies) / (time.perf_counter() - began), replies


async def one_by_one(port: int, bodies: list[dict[str, Any]]) -> float:
    """Tokens per second of one after another."""
    began, tokens = time.perf_counter(), 0
    for one in bodies:
        tokens += (await ask(port, one)).tokens
    return tokens / (time.perf_counter() - began)


# The sides


@contextlib.contextmanager
def process(command: list[str], port: int, path: str, threads: int) -> Iterator[psutil.Process]:
    """A server, from when it answers 200 at `path`."""
    import os
    import urllib.error
    import urllib.request

    threading = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as said:
        started = subprocess.Popen(command, env=os.environ | threading, stdout=said, stderr=said)
        try:
            for _ in range(1200):
                if started.poll() is not None:
                    said.seek(0)
                    raise SystemExit(f"{' '.join(command[:4])} ended:\n{said.read()[-2000:]}")
                with (
                    contextlib.suppress(urllib.error.URLError, OSError),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5),
                ):
                    break
                time.sleep(0.1)
            yield psutil.Process(started.pid)
        finally:
            started.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(20)
            started.kill()


def ours(args: Args, weights: Path, port: int) -> list[str]:
    """`miaobi serve`."""
    return [sys.executable, "-m", "miaobi", "serve", str(weights), f"--port={port}", "--device=cpu",
            f"--dtype={args.dtype}", f"--max_queue={4 * args.clients}"]  # fmt: skip


def llama(args: Args, weights: Path, port: int) -> list[str]:
    """llama.cpp's server in a process of its own: bf16, as many slots as streams, their batching on."""
    file = weights.with_suffix(".gguf")
    if not file.exists():
        command = [sys.executable, "-m", "miaobi", "convert", "gguf", str(weights), f"--out={file}", "--quantize=bf16"]
        subprocess.run(command, check=True, capture_output=True)
    script = (
        "import sys, time, xllamacpp as x\n"
        "p = x.CommonParams()\n"
        "p.model.path, p.port, p.n_parallel, p.cpuparams.n_threads = sys.argv[1], *map(int, sys.argv[2:5])\n"
        "p.cpuparams_batch.n_threads, p.n_ctx, p.cont_batching = int(sys.argv[4]), 256 * p.n_parallel, True\n"
        "p.warmup, p.verbosity = True, -1\n"
        "server = x.Server(p)\n"
        "while True: time.sleep(60)\n"
    )
    return [sys.executable, "-c", script, str(file), str(port), str(args.streams), str(args.threads)]


def hugging_face(args: Args, weights: Path, port: int) -> list[str]:
    """`transformers serve`, in fp32, the faster of its precisions on a CPU without bf16 units."""
    return [sys.executable, "-m", "transformers.cli.transformers", "serve", str(weights), "--continuous-batching",
            "--port", str(port), "--device", "cpu", "--dtype", "float32"]  # fmt: skip


# What is measured


def under_load(args: Args, port: int, model: str, tokens: int, draw: random.Random) -> tuple[list[float], list[float]]:
    """Tokens per second of all streams, and seconds to the first token, over the turns."""
    rates, firsts = [], []
    asyncio.run(together(port, [body(args, model, draw, 4) for _ in range(2)]))  # warm up
    for _ in range(args.turns):
        rate, replies = asyncio.run(together(port, [body(args, model, draw, tokens) for _ in range(args.streams)]))
        rates.append(rate)
        firsts += [reply.first for reply in replies]
    return rates, firsts


def sampled(args: Args, weights: Path) -> float:
    """Tokens per second of one stream of `miaobi sample`."""
    start = message(random.Random(1), args.prompt)
    command = [sys.executable, "-m", "miaobi", "sample", str(weights), "--device=cpu", f"--dtype={args.dtype}",
               "--json", "--num_samples=1", "--max_new_tokens=200", f"--start={start}"]  # fmt: skip
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(told)["tokens_per_second"]


async def soak(args: Args, port: int, server: psutil.Process) -> dict[str, Any]:
    """Clients that ask, hang up, and send what is broken, for `minutes`. A seed's reply must be what it was alone."""
    draw = random.Random(0)
    known = [body(args, "weights", draw, 24) for _ in range(8)]
    expected = [(await ask(port, one)).text for one in known]
    until, counts = (
        time.monotonic() + 60 * args.minutes,
        dict.fromkeys(("right", "wrong", "left", "broken", "failed"), 0),
    )
    memory = []

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < until:
            what = draw.random()
            try:
                if what < 0.6:
                    which = draw.randrange(len(known))
                    said = (await ask(port, known[which])).text
                    counts["right" if said == expected[which] else "wrong"] += 1
                elif what < 0.8:
                    await ask(port, body(args, "weights", draw, 200), leave_after=draw.random() / 4)
                    counts["left"] += 1
                else:
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    data = draw.choice(BROKEN)
                    writer.write(HEAD % len(data) + data)
                    status = await reader.readline()
                    counts["broken" if b" 40" in status else "failed"] += 1
                    writer.close()
            except (RuntimeError, OSError) as e:
                log(f"client {number}: {e}")
                counts["failed"] += 1

    async def watch() -> None:
        while time.monotonic() < until:
            memory.append(server.memory_info().rss)
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(client(i) for i in range(args.clients)))
    settled = memory[len(memory) // 5 :]
    spread = (max(settled) - min(settled)) / statistics.mean(settled) / 2
    return counts | {"memory_mb": statistics.mean(settled) / 1e6, "memory_spread": spread}


def main() -> None:
    """Measure and print."""
    args = parse("serve_load", Args, __doc__)
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        weights, draw = write_model(Path(folder) / "weights", args.size), random.Random(7)
        port = free_port()
        with process(ours(args, weights, port), port, "/health", args.threads) as server:
            rates, firsts = under_load(args, port, "weights", args.tokens, draw)
            few = [body(args, "weights", draw, args.tokens) for _ in range(max(4, args.streams // 4))]
            single = [asyncio.run(one_by_one(port, few)) for _ in range(args.turns)]
            p95 = statistics.quantiles(firsts, n=20)[-1]
            one = [asyncio.run(one_by_one(port, [body(args, "weights", draw, 200)])) for _ in range(args.turns)]
            if args.minutes:
                found["soak"] = asyncio.run(soak(args, port, server))
                rows += [[f"soak, {args.minutes:g} min, {args.clients} clients: {name}", value, ""]
                         for name, value in found["soak"].items()]  # fmt: skip
        alone = [sampled(args, weights) for _ in range(args.turns)]
        name = f"{args.streams} streams"
        rows[:0] = [[f"{name}, tokens/s", statistics.median(rates), ""],
                    ["one after another, tokens/s", statistics.median(single), ratio(rates, single)],
                    [f"p95 time to first token, {name}, s", f"{p95:.3f}", ""],
                    ["one stream of 200, tokens/s", statistics.median(one), ""],
                    ["miaobi sample, tokens/s", statistics.median(alone), ratio(one, alone)]]  # fmt: skip
        found |= {"rates": rates, "single": single, "p95": p95, "one": one, "sample": alone}
        for side, wanted, make, path, model, tokens in (
            ("llama.cpp's server bf16", args.llama, llama, "/health", "weights", args.tokens),
            (
                "transformers serve fp32",
                args.transformers,
                hugging_face,
                "/health",
                str(weights),
                args.transformers_tokens,
            ),
        ):
            if wanted:
                port = free_port()
                with process(make(args, weights, port), port, path, args.threads):
                    theirs, firsts = under_load(args, port, model, tokens, draw)
                rows.append([f"{side}, {name}, tokens/s", statistics.median(theirs), ratio(rates, theirs)])
                found[side] = theirs
    report("serve_load", [f"{args.size}, {args.threads} threads", "figure", "ours / theirs"], rows, {
        "machine": machine(), "settings": dataclasses.asdict(args), "xllamacpp": version("xllamacpp"),
        "transformers": version("transformers"), **found,
    }, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
