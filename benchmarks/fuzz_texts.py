"""What `benchmarks.fuzz` feeds: texts, tables, settings and other projects' files, and the code that reads each."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import io
import json
import lzma
import pickle
import random
import shutil
import tarfile
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import zstandard

from benchmarks.fuzz_models import Format, sentences, written
from benchmarks.mutations import (
    Mutation,
    bytes_changed,
    json_changed,
    packed_changed,
    recoded,
    text_changed,
    zip_changed,
)
from miaobi import cli, command_line, seeds, settings
from miaobi.classify import config as classify_config
from miaobi.classify.ablation import train as classify_train
from miaobi.classify.data import read_labelled
from miaobi.classify.head import load as load_classifier
from miaobi.convert.nanogpt import convert as convert_nanogpt
from miaobi.convert.small_gpt import convert as convert_small_gpt
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.corpus.prepared import PreparedData
from miaobi.errors import UserError
from miaobi.settings import load_config


def other_projects(work: Path) -> list[Format]:
    """Checkpoints and data of nanoGPT and small-gpt."""
    text = "".join(sentences(200))
    characters = sorted(set(text))
    directory = work / "nanogpt"
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
    }
    pickled = written(directory / "meta.pkl", pickle.dumps(meta))
    ids = np.array([meta["stoi"][c] for c in text], np.uint16)
    for name in ("train.bin", "val.bin"):
        written(directory / name, ids.tobytes())
    C, state = 8, {}
    for name, shape in {
        "attn.c_attn": (24, C),
        "attn.c_proj": (C, C),
        "mlp.c_fc": (32, C),
        "mlp.c_proj": (C, 32),
    }.items():
        state[f"transformer.h.0.{name}.weight"] = torch.randn(shape)
    for name in ("transformer.h.0.ln_1", "transformer.h.0.ln_2", "transformer.ln_f"):
        state[f"{name}.weight"] = torch.ones(C)
    state["transformer.wte.weight"], state["transformer.wpe.weight"] = (
        torch.randn(len(characters), C),
        torch.randn(16, C),
    )
    args = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": C,
        "block_size": 16,
        "bias": False,
        "vocab_size": len(characters),
        "dropout": 0.0,
    }
    checkpoint = directory / "ckpt.pt"
    torch.save({"model": state, "model_args": args, "iter_num": 1, "best_val_loss": 1.0, "config": {}}, checkpoint)
    shapes = {
        "attention.W_q": (C, C),
        "attention.W_k": (C, C),
        "attention.W_v": (C, C),
        "attention.out_net": (C, C),
        "ffn.dense1": (32, C),
        "ffn.out_net": (C, 32),
    }
    small = {f"transformer.h.0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    small |= {f"transformer.{name}.weight": torch.ones(C) for name in ("h.0.ln1", "h.0.ln2", "ln_f")}
    small["transformer.wte.weight"] = torch.randn(len(characters) + 3, C)
    small["transformer.wpe.weight"] = state["transformer.wpe.weight"]
    corpus = written(work / "small" / "input.txt", text)
    sizes = {key: value for key, value in args.items() if key != "dropout"} | {"vocab_size": len(characters) + 3}
    torch.save({"state_dict": small, "global_step": 1, **sizes}, work / "small" / "model.pth")
    out = work / "converted"

    def data() -> object:
        found = PreparedData.open(directory)
        return found.train.read(0, len(found.train)).sum()

    return [
        Format("meta.pkl", pickled, bytes_changed, data),
        Format("ckpt.pt", checkpoint, zip_changed, lambda: convert_nanogpt(checkpoint, str(pickled), None, out)),
        Format(
            "model.pth",
            work / "small" / "model.pth",
            zip_changed,
            lambda: convert_small_gpt(work / "small" / "model.pth", str(corpus), work / "small" / "out"),
        ),
    ]


def labelled(work: Path, base: Path) -> list[Format]:
    """A classifier, its results, and the tables it learns from."""
    rows = [("1" if "赢" in text else "0", text + str(i)) for i, text in enumerate(sentences(60, 7))]
    out = io.StringIO()
    csv.writer(out).writerows([("label", "review"), *rows])
    table = written(work / "reviews.csv", out.getvalue())
    given = {
        "base_model": base,
        "data": table,
        "out_dir": work / "judge",
        "device": "cpu",
        "dtype": "float32",
        "max_epoch": 1,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "protocol": "corrected",
    }
    cfg = classify_config.load_config(None, [(key, str(value)) for key, value in given.items()])[0]
    classify_train(cfg)
    judge = next(file.parent for file in sorted((work / "judge").rglob("classifier.json")))
    stranger = Path(shutil.copytree(judge, work / "judged"))
    (stranger / "checksums.json").unlink(missing_ok=True)

    def judged() -> object:
        classifier = load_classifier(stranger, torch.device("cpu"), torch.float32)
        classifier.classifier.eval()
        return json.dumps(classifier.probabilities(["皇马赢得比赛", ""]).tolist(), allow_nan=False)

    result = next(iter(sorted((work / "judge").rglob("result.json"))))
    return [
        Format("classifier.json", stranger / "classifier.json", json_changed, judged),
        Format("config.json of a classifier", stranger / "config.json", json_changed, judged),
        Format("result.json", result, json_changed, lambda: classify_train(cfg)),
        Format("labelled .csv", table, recoded, lambda: read_labelled(cfg)),
    ]


def sources(work: Path) -> list[Format]:
    """Text that is to be prepared, in every format and packing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = sentences(40, 3)
    plain = "\n\n".join(texts).encode()
    chat = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairwise(texts)
    ]
    lines = "\n".join(json.dumps({"text": t, "n": i}, ensure_ascii=False) for i, t in enumerate(texts)).encode()
    cells = io.StringIO()
    csv.writer(cells).writerows([("text", "n"), *((t, i) for i, t in enumerate(texts))])
    parquet, zipped, tarred = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pq.write_table(pa.table({"text": texts, "n": list(range(40))}), parquet)
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("新闻.txt", plain)
        archive.writestr("b/c.jsonl", lines)
    with tarfile.open(fileobj=tarred, mode="w:gz") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(plain)
        archive.addfile(member, io.BytesIO(plain))

    def unpack_zst(data: bytes) -> bytes:
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)

    packings = {
        "gz": (gzip.compress, gzip.decompress),
        "bz2": (bz2.compress, bz2.decompress),
        "xz": (lzma.compress, lzma.decompress),
        "zst": (zstandard.compress, unpack_zst),
    }
    given: dict[str, tuple[bytes, Mutation, str]] = {
        "text.txt": (plain, recoded, "auto"),
        "lines.txt": (plain, bytes_changed, "lines"),
        "a.jsonl": (lines, by_line, "auto"),
        "array.json": (b"[" + lines.replace(b"\n", b",\n") + b"]", json_changed, "auto"),
        "a.csv": (cells.getvalue().encode(), recoded, "auto"),
        "a.tsv": (cells.getvalue().replace(",", "\t").encode(), text_changed, "auto"),
        "a.parquet": (parquet.getvalue(), bytes_changed, "auto"),
        "a.zip": (zipped.getvalue(), zip_changed, "auto"),
        "a.tar.gz": (tarred.getvalue(), bytes_changed, "auto"),
        "dialogue.txt": (
            "\n\n".join("\n".join(texts[i : i + 4]) for i in range(0, 40, 4)).encode(),
            text_changed,
            "dialogue",
        ),
        "messages.jsonl": ("\n".join(json.dumps(c, ensure_ascii=False) for c in chat).encode(), by_line, "dialogue"),
    }
    for name, (pack, unpack) in packings.items():
        given[f"packed.txt.{name}"] = pack(plain), functools.partial(packed_changed, pack=pack, unpack=unpack), "auto"
    found = []
    for name, (content, mutate, format) in given.items():
        path = written(work / "sources" / name.partition(".")[0] / name, content)
        cfg = PrepareConfig(out=work / "sources" / "out", workers=1, format=format)
        found.append(
            Format(
                f"{name} ({format})" if format != "auto" else name,
                path,
                mutate,
                functools.partial(prepare, [str(path)], cfg),
                name != "a.tar.gz",
            )
        )
    return found


def by_line(draw: random.Random, data: bytes) -> bytes:
    """JSON lines of which a few are changed."""
    lines = data.split(b"\n")
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(lines))
        lines[at] = json_changed(draw, lines[at]) if lines[at].startswith(b"{") else lines[at]
    return b"\n".join(lines)


def yaml() -> str:
    return (
        "# a run\ndata:\n  data: data\nmodel: &m\n  n_layer: 2\n  n_head: 2\n  n_embd: 32\noptim:\n"
        "  learning_rate: 1e-3\n  beta2: 0.95\ntrain:\n  max_iters: 20\n  out_dir: out\n  eval_interval: 10\n"
        "  device: cpu\n  seed: 1\n"
    )


def words() -> str:
    return "\n".join(
        [
            "config.yaml",
            "--n_layer=2",
            "--dropout",
            "0.1",
            "--compile=False",
            "--learning_rate=2e-5",
            "--json",
            "--init_from=scratch",
            "--seed=1",
        ]
    )


def parsed(file: Path) -> object:
    """The words of a command line, a line each, as every verb reads them, up to its settings; the last verb's error."""
    words, found = file.read_bytes().decode("utf-8", "surrogateescape").split("\n"), None
    for verb in cli.VERBS.values():
        kind, names = cli.imported(verb.settings), getattr(seeds, verb.names)
        try:
            line = command_line.split(kind, names, words)
            if not verb.load:
                found = settings.load(kind, names, "miaobi", command_line.place_words(kind, names, line))
            elif line.words != ["config.yaml"]:
                found = cli.imported(verb.load)(command_line.take_config(line.words), line.given)
            else:
                found = cli.imported(verb.load)(file.parent / "config.yaml", line.given)
        except UserError as e:
            error = e
    if found is None:
        raise error
    return found


def settings_of_commands(work: Path) -> list[Format]:
    """A configuration, and the words of a command line."""
    config = written(work / "config.yaml", yaml())
    return [
        Format("config.yaml", config, text_changed, lambda: load_config(config, [])),
        Format("command line", written(work / "words", words()), text_changed, lambda: parsed(work / "words")),
    ]
