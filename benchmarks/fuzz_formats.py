"""What `benchmarks.fuzz` feeds: valid files of every format that miaobi reads, and the code that reads each."""

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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import load_file, save_file

from benchmarks.mutations import (
    Mutation,
    bytes_changed,
    json_changed,
    packed_changed,
    recoded,
    safetensors_changed,
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
from miaobi.corpus.template import ChatTemplate
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.errors import UserError
from miaobi.files import pointed, sha256, write_json
from miaobi.generate.config import SampleRequest
from miaobi.generate.engine import LanguageModel
from miaobi.generate.sample import sample
from miaobi.lock import read_holder
from miaobi.model.checkpoint import load_model
from miaobi.model.lora import load_adapter
from miaobi.settings import load_config
from miaobi.train.loop import train
from miaobi.train.mirror import Mirror
from miaobi.train.watch import Metrics

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "max_iters": 2, "eval_interval": 2,
        "eval_iters": 1, "sample_tokens": 0, "device": "cpu", "dtype": "float32", "compile": False}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """One file of a valid whole, how it is spoilt, and who reads it."""

    name: str
    file: Path
    mutate: Mutation
    read: Callable[[], object]
    is_taken: bool = True
    """The valid file gives a result; False: it is refused, and clearly, whatever becomes of it."""


def sentences(count: int, seed: int = 0) -> list[str]:
    """Small Chinese documents."""
    draw = random.Random(seed)
    who, did, what = "皇马 曼联 球迷 裁判 门将".split(), "赢得 输掉 期待 谈到".split(), "比赛 联赛 冠军 训练".split()
    return ["".join(draw.choice(words) for words in (who, did, what)) + draw.choice("。，！") for _ in range(count)]


def trained(out: Path, **values: object) -> dict[str, Any]:
    """A run of two steps, or the same again."""
    return train(*load_config(None, [(k, str(v)) for k, v in (TINY | {"out_dir": out} | values).items()]))


def formats(work: Path) -> list[Format]:
    """Make one of everything in `work`; the formats, each with the file in it that is to be changed."""
    (text := work / "text.txt").write_text("\n\n".join(sentences(60)), encoding="utf-8")
    data = work / "data"
    prepare([str(text)], PrepareConfig(out=data, workers=1))
    return [
        *_models(work, data), *_runs(work, data), *_others(work), *_labelled(work, work / "model"), *_sources(work),
        Format("config.yaml", _file(work / "config.yaml", _yaml()), text_changed, lambda: load_config(work / "config.yaml", [])),
        Format("command line", _file(work / "words", _words()), text_changed, lambda: _parse(work / "words")),
    ]  # fmt: skip


def _file(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _model_of(run: Path, to: Path) -> Path:
    """A run's last model as a stranger would publish it: without checksums, which would refuse every change."""
    shutil.copytree(pointed(run / "checkpoints" / "last"), to)
    (to / "checksums.json").unlink()
    shutil.rmtree(to / "train_state")
    return to


def _write_from(model: Path) -> object:
    return sample(SampleRequest(model=str(model), start="皇马", num_samples=1, max_new_tokens=3, device="cpu", seed=1), True)


def _talk(model: Path) -> list[int]:
    messages = [{"role": "user", "content": "皇马？"}, {"role": "assistant", "content": "赢了"}]
    return ChatTemplate.of(Tokenizer.load(model)).encode(messages)


def _models(work: Path, data: Path) -> list[Format]:
    """Files of a model directory, as `sample` and `chat` read them."""
    trained(work / "run", data=data)
    model = _model_of(work / "run", work / "model")
    found = [Format(name, model / name, json_changed, functools.partial(_write_from, model))
             for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")]  # fmt: skip
    found.append(Format("model.safetensors", model / "model.safetensors", safetensors_changed, found[0].read))
    pickled, sharded = (Path(shutil.copytree(model, work / name)) for name in ("pickled", "sharded"))
    tensors = load_file(model / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(tensors, pickled / "pytorch_model.bin")
    (sharded / "model.safetensors").unlink()
    halves, names = ("model-1.safetensors", "model-2.safetensors"), sorted(tensors)
    where = {name: halves[i % 2] for i, name in enumerate(names)}
    for half in halves:
        save_file({name: tensors[name] for name in names if where[name] == half}, sharded / half, {"format": "pt"})
    index = _file(sharded / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": where}))
    older = Path(shutil.copytree(pickled, work / "older"))
    torch.save(tensors, older / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    words = Path(shutil.copytree(model, work / "words-of-bert"))
    (words / "tokenizer.json").unlink()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set("".join(sentences(60))))]
    dialogues = _file(work / "talk.txt", "\n\n".join("\n".join(sentences(4, i)) for i in range(40)))
    prepare([str(dialogues)], PrepareConfig(out=work / "talk", format="dialogue", workers=1, template="chatml"))
    template = work / "talk" / "chat_template.jinja"
    if not template.is_file():
        raise SystemExit("the tokenizer has no chat_template.jinja of its own")
    return [
        *found,
        Format("model.safetensors.index.json", index, json_changed, functools.partial(_write_from, sharded)),
        Format("pytorch_model.bin", pickled / "pytorch_model.bin", zip_changed, functools.partial(_write_from, pickled)),
        Format("pytorch_model.bin (old)", older / "pytorch_model.bin", bytes_changed, functools.partial(_write_from, older)),
        Format("vocab.txt", _file(words / "vocab.txt", "\n".join(pieces)), text_changed, lambda: Tokenizer.load(words).encode("皇马赢得比赛")),
        Format("chat_template.jinja", template, text_changed, functools.partial(_talk, work / "talk")),
    ]  # fmt: skip


def _runs(work: Path, data: Path) -> list[Format]:
    """Files of a run and of prepared data, as the same `train` command reads them again."""
    run = Path(shutil.copytree(work / "run", work / "again", symlinks=True))
    last = pointed(run / "checkpoints" / "last")
    again = functools.partial(trained, run, data=data)
    again()
    sums = Format("checksums.json", last / "checksums.json", json_changed, again)
    bare = Path(shutil.copytree(work / "run", work / "bare", symlinks=True))  # whose files may be changed
    (pointed(bare / "checkpoints" / "last") / "checksums.json").unlink()
    state = pointed(bare / "checkpoints" / "last") / "train_state"
    go_on = functools.partial(trained, bare, data=data)
    (own := work / "own" / "data").parent.mkdir()
    shutil.copytree(data, own)
    lora = {"data": data, "init_from": work / "run", "trainable": "lora", "lora_rank": 2}
    trained(work / "lora", **lora)
    adapter = Path(shutil.copytree(pointed(work / "lora" / "checkpoints" / "last") / "adapter", work / "adapter"))

    def read_data() -> object:
        found = PreparedData.open(own)
        text = Tokenizer.load(own).decode(found.train.read(0, len(found.train)).tolist())
        return text, found.train.starts, found.val.turns if found.is_dialogue else None

    def read_altered() -> object:
        """Tokens and places that the manifest vouches for: somebody who alters data alters that as well."""
        manifest = json.loads((own / "manifest.json").read_text(encoding="utf-8"))
        for split in (manifest["train"], manifest["val"]):
            for entry in (*split["shards"], *split["beside"]):
                entry["sha256"] = sha256(own / entry["file"])
                if "bytes" in entry:
                    entry["bytes"] = (own / entry["file"]).stat().st_size
        split = manifest["train"]
        split["tokens"] = split["shards"][0]["tokens"] = (own / "train.bin").stat().st_size // 2
        write_json(own / "manifest.json", manifest)
        shutil.rmtree(work / "learned", ignore_errors=True)
        return trained(work / "learned", data=own)

    def read_metrics() -> None:
        metrics = Metrics(bare, 2, None)
        metrics.log(3, train_loss=1.0)
        metrics.close()
        for file in bare.glob("events.*"):
            file.unlink()

    def adapted() -> None:
        load_adapter(adapter, load_model(work / "model")[0])

    far = work / "far"
    trained(work / "mirrored", data=data, mirror=far)

    def fetched() -> None:
        shutil.rmtree(work / "fetched", ignore_errors=True)
        Mirror(str(far)).pull(work / "fetched", lambda config: load_config(config, []))

    return [
        sums,
        Format("progress.json", state / "progress.json", json_changed, go_on),
        Format("optimizer.json", state / "optimizer.json", json_changed, go_on),
        Format("optimizer.safetensors", state / "optimizer-0-of-1.safetensors", safetensors_changed, go_on),
        Format("config.yaml of a run", bare / "config.yaml", text_changed, go_on),
        Format("metrics.jsonl", bare / "metrics.jsonl", text_changed, read_metrics),
        Format("manifest.json", own / "manifest.json", json_changed, read_data),
        Format("train.bin", own / "train.bin", bytes_changed, read_altered),
        Format("train.idx", own / "train.idx", bytes_changed, read_altered),
        Format("adapter_config.json", adapter / "adapter_config.json", json_changed, adapted),
        Format("adapter_model.safetensors", adapter / "adapter_model.safetensors", safetensors_changed, adapted),
        Format("mirror: last", far / "last", bytes_changed, fetched),
        Format("mirror: config.yaml", far / "config.yaml", text_changed, fetched),
        Format(".lock", _file(work / ".lock", json.dumps({"pid": 1, "host": "a", "machine": "b", "started": "c", "command": "d"})),
               json_changed, lambda: str(read_holder(work / ".lock"))),
    ]  # fmt: skip


def _others(work: Path) -> list[Format]:
    """Checkpoints and data of nanoGPT and small-gpt."""
    text = "".join(sentences(200))
    characters = sorted(set(text))
    directory = work / "nanogpt"
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": {c: i for i, c in enumerate(characters)}}
    pickled = _file(directory / "meta.pkl", pickle.dumps(meta))
    ids = np.array([meta["stoi"][c] for c in text], np.uint16)
    for name in ("train.bin", "val.bin"):
        _file(directory / name, ids.tobytes())
    C, state = 8, {}
    for name, shape in {"attn.c_attn": (24, C), "attn.c_proj": (C, C), "mlp.c_fc": (32, C), "mlp.c_proj": (C, 32)}.items():
        state[f"transformer.h.0.{name}.weight"] = torch.randn(shape)
    for name in ("transformer.h.0.ln_1", "transformer.h.0.ln_2", "transformer.ln_f"):
        state[f"{name}.weight"] = torch.ones(C)
    state["transformer.wte.weight"], state["transformer.wpe.weight"] = torch.randn(len(characters), C), torch.randn(16, C)
    args = {"n_layer": 1, "n_head": 2, "n_embd": C, "block_size": 16, "bias": False, "vocab_size": len(characters), "dropout": 0.0}
    checkpoint = directory / "ckpt.pt"
    torch.save({"model": state, "model_args": args, "iter_num": 1, "best_val_loss": 1.0, "config": {}}, checkpoint)
    shapes = {"attention.W_q": (C, C), "attention.W_k": (C, C), "attention.W_v": (C, C), "attention.out_net": (C, C),
              "ffn.dense1": (32, C), "ffn.out_net": (C, 32)}  # fmt: skip
    small = {f"transformer.h.0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    small |= {f"transformer.{name}.weight": torch.ones(C) for name in ("h.0.ln1", "h.0.ln2", "ln_f")}
    small["transformer.wte.weight"] = torch.randn(len(characters) + 3, C)
    small["transformer.wpe.weight"] = state["transformer.wpe.weight"]
    corpus = _file(work / "small" / "input.txt", text)
    sizes = {key: value for key, value in args.items() if key != "dropout"} | {"vocab_size": len(characters) + 3}
    torch.save({"state_dict": small, "global_step": 1, **sizes}, work / "small" / "model.pth")
    out = work / "converted"

    def data() -> object:
        found = PreparedData.open(directory)
        return found.train.read(0, len(found.train)).sum()

    return [
        Format("meta.pkl", pickled, bytes_changed, data),
        Format("ckpt.pt", checkpoint, zip_changed, lambda: convert_nanogpt(checkpoint, str(pickled), None, out)),
        Format("model.pth", work / "small" / "model.pth", zip_changed,
               lambda: convert_small_gpt(work / "small" / "model.pth", str(corpus), work / "small" / "out")),
    ]  # fmt: skip


def _labelled(work: Path, base: Path) -> list[Format]:
    """A classifier, its results, and the tables it learns from."""
    rows = [("1" if "赢" in text else "0", text + str(i)) for i, text in enumerate(sentences(60, 7))]
    out = io.StringIO()
    csv.writer(out).writerows([("label", "review"), *rows])
    table = _file(work / "reviews.csv", out.getvalue())
    given = {"base_model": base, "data": table, "out_dir": work / "judge", "device": "cpu", "dtype": "float32",
             "max_epoch": 1, "batch_size": 16, "learning_rate": 1e-2, "protocol": "corrected"}  # fmt: skip
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


def _sources(work: Path) -> list[Format]:
    """Text that is to be prepared, in every format and packing."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = sentences(40, 3)
    plain = "\n\n".join(texts).encode()
    chat = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in zip(texts, texts[1:], strict=False)]
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

    packings = {"gz": (gzip.compress, gzip.decompress), "bz2": (bz2.compress, bz2.decompress),
                "xz": (lzma.compress, lzma.decompress), "zst": (zstandard.compress, unpack_zst)}  # fmt: skip
    given: dict[str, tuple[bytes, Mutation, str]] = {
        "text.txt": (plain, recoded, "auto"), "lines.txt": (plain, bytes_changed, "lines"), "a.jsonl": (lines, _by_line, "auto"),
        "array.json": (b"[" + lines.replace(b"\n", b",\n") + b"]", json_changed, "auto"), "a.csv": (cells.getvalue().encode(), recoded, "auto"),
        "a.tsv": (cells.getvalue().replace(",", "\t").encode(), text_changed, "auto"), "a.parquet": (parquet.getvalue(), bytes_changed, "auto"),
        "a.zip": (zipped.getvalue(), zip_changed, "auto"), "a.tar.gz": (tarred.getvalue(), bytes_changed, "auto"),
        "dialogue.txt": ("\n\n".join("\n".join(texts[i : i + 4]) for i in range(0, 40, 4)).encode(), text_changed, "dialogue"),
        "messages.jsonl": ("\n".join(json.dumps(c, ensure_ascii=False) for c in chat).encode(), _by_line, "dialogue"),
    }  # fmt: skip
    for name, (pack, unpack) in packings.items():
        given[f"packed.txt.{name}"] = pack(plain), functools.partial(packed_changed, pack=pack, unpack=unpack), "auto"
    found = []
    for name, (content, mutate, format) in given.items():
        path = _file(work / "sources" / name.partition(".")[0] / name, content)
        cfg = PrepareConfig(out=work / "sources" / "out", workers=1, format=format)
        found.append(Format(f"{name} ({format})" if format != "auto" else name, path, mutate,
                            functools.partial(prepare, [str(path)], cfg), name != "a.tar.gz"))  # fmt: skip
    return found


def _by_line(draw: random.Random, data: bytes) -> bytes:
    """JSON lines of which a few are changed."""
    lines = data.split(b"\n")
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(lines))
        lines[at] = json_changed(draw, lines[at]) if lines[at].startswith(b"{") else lines[at]
    return b"\n".join(lines)


def _yaml() -> str:
    return ("# a run\ndata:\n  data: data\nmodel: &m\n  n_layer: 2\n  n_head: 2\n  n_embd: 32\noptim:\n  learning_rate: 1e-3\n"
            "  beta2: 0.95\ntrain:\n  max_iters: 20\n  out_dir: out\n  eval_interval: 10\n  device: cpu\n  seed: 1\n")  # fmt: skip


def _words() -> str:
    return "\n".join(["config.yaml", "--n_layer=2", "--dropout", "0.1", "--compile=False", "--learning_rate=2e-5",
                      "--json", "--init_from=scratch", "--seed=1"])  # fmt: skip


def _parse(file: Path) -> object:
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
