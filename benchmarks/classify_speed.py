"""Fine-tuning a classifier, chunks a second: miaobi against small-gpt's own sentimentalTrain.py, in turns. And predict.

    python -m benchmarks.classify_speed --data ChnSentiCorp_htl_all.csv --small_gpt DIR

Both sides tune the same random weights on the same chunks (protocol as-published). small-gpt's script runs unchanged
with its sentimental.yaml but for the device, the sizes of the model and, if asked, the compiler; only its progress bar
is replaced by one that counts, times and waits. It needs pandas below 3, which miaobi does not.
predict runs a 12M model of random weights over the reviews as `miaobi classify predict` does.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any, Literal

import torch

from benchmarks.common import Worker, clock, git_version, machine, parse, ratio, report, take_turns
from miaobi.classify import predict
from miaobi.classify.base import prepare_base
from miaobi.classify.config import ClassifyConfig, PredictConfig, load_config
from miaobi.classify.data import Reading, Row, make_split, read_labelled, shuffled
from miaobi.classify.finetune import Cell, Finetuning, build
from miaobi.classify.head import Classifier, Judge, save
from miaobi.console import log
from miaobi.convert.small_gpt import convert
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.device import keep_allocations, pick_device, pick_dtype
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer
from miaobi.settings import read_yaml


@dataclass(frozen=True)
class Args:
    """Command line."""

    data: Path
    """ChnSentiCorp_htl_all.csv: label,review."""
    small_gpt: Path | None = None
    """A checkout of small-gpt; without it predict alone is measured."""
    n_layer: int = 6
    """Size of the model that both tune, as are the next two."""
    n_head: int = 6
    n_embd: int = 384
    pooling: Literal["mask", "no_mask"] = "mask"
    """small-gpt's use_mask; it pads to 256 either way."""
    trainable: Literal["full", "last_block"] = "full"
    """small-gpt's frozen."""
    steps: int = 2
    """Optimizer steps of 24 chunks in a turn."""
    pairs: int = 5
    """Turns of each side."""
    predict_texts: int = 512
    """Reviews that predict judges in a turn."""
    device: str = "auto"
    """auto, cpu, cuda."""
    compile: bool = True
    """Whether small-gpt compiles its model, as its configuration says."""
    json: bool = False
    """Print one line of JSON as well."""


class SmallGPT:
    """small-gpt's sentimentalTrain.py in a thread; its progress bar hands over one batch at a time."""

    def __init__(self, args: Args, work: Path) -> None:
        sys.path.insert(0, str(work / "small-gpt"))
        os.chdir(work / "small-gpt")
        os.environ["TQDM_DISABLE"] = "1"
        self.device = pick_device(args.device)
        settings = settings_of(args, work) | {"device": self.device.type, "compile": args.compile,
                                              "eval_freq": 10**9, "save_freq": 10**9}  # fmt: skip
        self.wanted: Queue[int] = Queue()
        self.told: Queue[Any] = Queue()
        module = importlib.import_module("sentimentalTrain")
        module.tqdm = self.bar
        threading.Thread(target=self._train, args=(module, SimpleNamespace(**settings)), daemon=True).start()

    def _train(self, module: Any, config: Any) -> None:
        try:
            module.main(config)
        except BaseException as e:
            self.told.put(e)
            raise

    def bar(self, loader: Any) -> Any:
        """What the script iterates over: batches, as many as were asked for, timed."""

        class Bar:
            def __iter__(bar):  # noqa: N805
                batches = itertools.chain.from_iterable(itertools.repeat(loader))
                while True:
                    count, chunks, start = self.wanted.get(), 0, clock(self.device)
                    for _ in range(count):
                        batch = next(batches)
                        chunks += len(batch[0])
                        yield batch
                    self.told.put((chunks, clock(self.device) - start))

            def set_description(bar, text: str) -> None:  # noqa: N805
                pass

        return Bar()

    def steps(self, count: int) -> tuple[int, float]:
        """(chunks, seconds) of `count` optimizer steps."""
        self.wanted.put(count)
        told = self.told.get()
        if isinstance(told, BaseException):
            raise told
        return told


class Miaobi:
    """The cell that `miaobi classify train config/sentimental.yaml` trains."""

    def __init__(self, args: Args, work: Path) -> None:
        keep_allocations()
        self.device = pick_device(args.device)
        given = {"base_model": work / "base", "data": args.data.resolve(), "pooling": args.pooling,
                 "trainable": args.trainable, "device": args.device}  # fmt: skip
        path = work / "small-gpt" / "config" / "sentimental.yaml"
        cfg, _ = load_config(path, [(key, str(value)) for key, value in given.items()])
        data = read_labelled(cfg)
        model, tokenizer, reading = prepare_base(cfg, cfg.base_model, cfg.seed)
        cell = Cell(cfg.pooling, cfg.trainable, cfg.seed)
        classifier = build(cfg, cell, model, 2).to(self.device)
        judge = Judge(classifier, tokenizer, reading, data.names, dtype=pick_dtype("auto", self.device))
        started = time.perf_counter()
        self.run = Finetuning(cfg, cell, judge, make_split(data, cfg, cfg.seed, reading, tokenizer))
        self.run.rows(self.run.split.train)  # states of frozen layers are made once
        self.cached = time.perf_counter() - started
        self.order = itertools.chain.from_iterable(self.run.order() for _ in itertools.count())

    def steps(self, count: int) -> tuple[int, float]:
        """(chunks, seconds) of `count` optimizer steps."""
        chunks, start = 0, clock(self.device)
        self.run.classifier.train()
        for chosen in itertools.islice(self.order, count):
            self.run.step(chosen)
            chunks += len(chosen)
        return chunks, clock(self.device) - start

    def about(self) -> float:
        """Seconds that went into the states of frozen layers, before the first step."""
        return self.cached


class Predictor:
    """`miaobi classify predict` on a 12M model of random weights."""

    def __init__(self, args: Args, work: Path) -> None:
        self.texts, _ = shuffled(read_labelled(ClassifyConfig(data=str(args.data.resolve()))), 0)
        counts = {c: i for i, c in enumerate(sorted(set("".join(self.texts))))}
        tokenizer = Tokenizer.train_char(counts, vocab_size=4096)
        model = Transformer(ModelConfig(family="qwen3", vocab_size=4096))
        self.parameters = model.num_parameters()
        reading = Reading(256, "truncate", (), (tokenizer.eot_id,), tokenizer.pad_id)
        path = work / "classifier"
        path.mkdir()
        save(path, Judge(Classifier(model, 2, "mask"), tokenizer, reading, ["0", "1"]))
        self.cfg = PredictConfig(str(path), device=args.device)
        self.judge = predict.load(self.cfg.model, self.cfg)
        self.count, self.done = args.predict_texts, 0

    def turn(self) -> tuple[int, float]:
        """(reviews, seconds) of the next reviews of the table."""
        chosen = [self.texts[(self.done + i) % len(self.texts)] for i in range(self.count)]
        self.done += self.count
        start = clock(self.judge.device)
        for _ in predict.predictions(self.judge, (Row("", text) for text in chosen), self.cfg):
            pass
        return self.count, clock(self.judge.device) - start

    def about(self) -> int:
        """Parameters."""
        return self.parameters


def settings_of(args: Args, work: Path) -> dict[str, Any]:
    """small-gpt's sentimental.yaml with what is asked for."""
    settings, _ = read_yaml(work / "small-gpt" / "config" / "sentimental.yaml")
    return settings | {
        "data_path": str(work / "train.txt"), "sentimental_data_path": str(args.data.resolve()),
        "base_model": str(work / "base.pth"), "n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.n_embd,
        "vocab_size": int((work / "vocab_size").read_text()), "use_mask": args.pooling == "mask",
        "frozen": args.trainable == "last_block", "tensorboard_path": str(work / "tensorboard"),
        "checkpoint_root": str(work / "checkpoints"),
    }  # fmt: skip


def make_base(args: Args, work: Path) -> None:
    """Random weights as small-gpt's checkpoint and, converted, as ours; the vocabulary is that of the reviews."""
    shutil.copytree(args.small_gpt, work / "small-gpt", ignore=shutil.ignore_patterns(".git", "*.pth", "__pycache__"))
    texts = read_labelled(ClassifyConfig(data=str(args.data))).texts
    corpus = "\n\n".join(" ".join(text.split()) for text in texts if text.strip())
    (work / "train.txt").write_text(corpus, encoding="utf-8")
    vocab_size = 3 + len(set(corpus) - {"\n"})
    (work / "vocab_size").write_text(str(vocab_size))
    sys.path.insert(0, str(work / "small-gpt"))
    sizes = {"block_size": 256, "vocab_size": vocab_size, "n_layer": args.n_layer, "n_head": args.n_head,
             "n_embd": args.n_embd, "bias": True}  # fmt: skip
    model = importlib.import_module("model").GPT(dropout=0.05, **sizes)
    torch.save({"global_step": 0, "global_epoch": 0, **sizes, "dataset": "", "state_dict": model.state_dict(),
                "optimizer": {}}, work / "base.pth")  # fmt: skip
    convert(work / "base.pth", str(work / "train.txt"), work / "base")


def main() -> None:
    """Measure and print."""
    args = parse("classify_speed", Args, __doc__)
    kinds: dict[str, Any] = {"miaobi": Miaobi, "small-gpt": SmallGPT} if args.small_gpt else {}
    rates: dict[str, list[float]] = {}
    cached = 0.0
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        work = Path(name)
        if kinds:
            make_base(args, work)
            sides = {k: stack.enter_context(closing(Worker(kind, args, work))) for k, kind in kinds.items()}
            for side_name, side in sides.items():
                started = time.perf_counter()
                side.call("steps", 1)
                log(f"{side_name}: first step, with what is read and compiled, {time.perf_counter() - started:.0f} s")
            cached = sides["miaobi"].call("about")

            def turn(side: str) -> float:
                chunks, seconds = sides[side].call("steps", args.steps)
                return chunks / seconds

            rates = take_turns({side: partial(turn, side) for side in sides}, args.pairs)
        predictor = stack.enter_context(closing(Worker(Predictor, args, work)))
        parameters = predictor.call("about")
        predictor.call("turn")
        predicted = [count / seconds for count, seconds in (predictor.call("turn") for _ in range(args.pairs))]
    times = ratio(rates["miaobi"], rates["small-gpt"]) if kinds else None
    columns = ["side", "chunks/s", "miaobi / side"]
    rows = [[side, statistics.median(rates[side]), str(times) if side == "small-gpt" else ""] for side in rates]
    rows.append([f"predict, {parameters / 1e6:.1f}M", statistics.median(predicted), ""])
    report("classify_speed", columns, rows, {
        "machine": machine(args.device), "settings": dataclasses.asdict(args),
        "small_gpt": git_version(args.small_gpt) if args.small_gpt else None, "chunks_per_second": rates,
        "seconds_for_frozen_states": cached, "predict_reviews_per_second": predicted,
        "ratios": {"small-gpt": times} if times else {},
    }, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
