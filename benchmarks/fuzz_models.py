"""What `benchmarks.fuzz` feeds: valid files of models, runs and prepared data, and the code that reads each."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.mutations import (
    Mutation,
    bytes_changed,
    json_changed,
    safetensors_changed,
    text_changed,
    zip_changed,
)
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.corpus.template import ChatTemplate
from miaobi.corpus.tokenizer import Tokenizer
from miaobi.files import pointed, sha256, write_json
from miaobi.generate.config import SampleRequest
from miaobi.generate.sample import sample
from miaobi.lock import read_holder
from miaobi.model.checkpoint import load_model
from miaobi.model.lora import load_adapter
from miaobi.settings import load_config
from miaobi.train.loop import train
from miaobi.train.mirror import Mirror
from miaobi.train.watch import Metrics

TINY = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "max_iters": 2,
    "eval_interval": 2,
    "eval_iters": 1,
    "sample_tokens": 0,
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
}


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
    who, did, what = (
        ["皇马", "曼联", "球迷", "裁判", "门将"],
        ["赢得", "输掉", "期待", "谈到"],
        ["比赛", "联赛", "冠军", "训练"],
    )
    return ["".join(draw.choice(words) for words in (who, did, what)) + draw.choice("。，！") for _ in range(count)]


def trained(out: Path, **values: object) -> dict[str, Any]:
    """A run of two steps, or the same again."""
    return train(*load_config(None, [(k, str(v)) for k, v in (TINY | {"out_dir": out} | values).items()]))


def written(path: Path, content: str | bytes) -> Path:
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
    return sample(
        SampleRequest(model=str(model), start="皇马", num_samples=1, max_new_tokens=3, device="cpu", seed=1), True
    )


def _talk(model: Path) -> list[int]:
    messages = [{"role": "user", "content": "皇马？"}, {"role": "assistant", "content": "赢了"}]
    return ChatTemplate.of(Tokenizer.load(model)).encode(messages)


def models(work: Path, data: Path) -> list[Format]:
    """Files of a model directory, as `sample` and `chat` read them."""
    trained(work / "run", data=data)
    model = _model_of(work / "run", work / "model")
    found = [
        Format(name, model / name, json_changed, functools.partial(_write_from, model))
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")
    ]
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
    index = written(sharded / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": where}))
    older = Path(shutil.copytree(pickled, work / "older"))
    torch.save(tensors, older / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    words = Path(shutil.copytree(model, work / "words-of-bert"))
    (words / "tokenizer.json").unlink()
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set("".join(sentences(60))))]
    dialogues = written(work / "talk.txt", "\n\n".join("\n".join(sentences(4, i)) for i in range(40)))
    prepare([str(dialogues)], PrepareConfig(out=work / "talk", format="dialogue", workers=1, template="chatml"))
    template = work / "talk" / "chat_template.jinja"
    if not template.is_file():
        raise SystemExit("the tokenizer has no chat_template.jinja of its own")
    return [
        *found,
        Format("model.safetensors.index.json", index, json_changed, functools.partial(_write_from, sharded)),
        Format(
            "pytorch_model.bin", pickled / "pytorch_model.bin", zip_changed, functools.partial(_write_from, pickled)
        ),
        Format(
            "pytorch_model.bin (old)", older / "pytorch_model.bin", bytes_changed, functools.partial(_write_from, older)
        ),
        Format(
            "vocab.txt",
            written(words / "vocab.txt", "\n".join(pieces)),
            text_changed,
            lambda: Tokenizer.load(words).encode("皇马赢得比赛"),
        ),
        Format("chat_template.jinja", template, text_changed, functools.partial(_talk, work / "talk")),
    ]


def runs(work: Path, data: Path) -> list[Format]:
    """Files of a run and of prepared data, as the same `train` command reads them again."""
    run = Path(shutil.copytree(work / "run", work / "again", symlinks=True))
    last = pointed(run / "checkpoints" / "last")
    again = functools.partial(trained, run, data=data)
    again()
    sums = Format("checksums.json", last / "checksums.json", json_changed, again)
    bare = Path(shutil.copytree(work / "run", work / "bare", symlinks=True))  # whose files may be changed
    (pointed(bare / "checkpoints" / "last") / "checksums.json").unlink()
    state = pointed(bare / "checkpoints" / "last") / "train_state"

    def go_on() -> object:
        """A copy goes on: what is taken, altered as it is, writes checkpoints that later cases must not find."""
        shutil.rmtree(work / "going", ignore_errors=True)
        return trained(Path(shutil.copytree(bare, work / "going", symlinks=True)), data=data)

    (own := work / "own" / "data").parent.mkdir()
    shutil.copytree(data, own)
    lora = {"data": data, "init_from": work / "run", "trainable": "lora", "lora_rank": 2}
    trained(work / "lora", **lora)
    adapter = Path(shutil.copytree(pointed(work / "lora" / "checkpoints" / "last") / "adapter", work / "adapter"))

    def learn(from_: Path = own) -> object:
        shutil.rmtree(work / "learned", ignore_errors=True)
        return trained(work / "learned", data=from_)

    (talk := work / "talked" / "data").parent.mkdir()
    shutil.copytree(work / "talk", talk)

    def learn_altered(data: Path) -> object:
        """Tokens and places that the manifest vouches for: somebody who alters data alters that as well."""
        manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
        for split in (manifest["train"], manifest["val"]):
            for entry in (*split["shards"], *split["beside"]):
                entry["sha256"] = sha256(data / entry["file"])
                if "bytes" in entry:
                    entry["bytes"] = (data / entry["file"]).stat().st_size
        split = manifest["train"]
        split["tokens"] = split["shards"][0]["tokens"] = (data / "train.bin").stat().st_size // 2
        write_json(data / "manifest.json", manifest)
        return learn(data)

    def read_metrics() -> None:
        metrics = Metrics(bare, 2)
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
        Format("manifest.json", own / "manifest.json", json_changed, learn),
        Format("train.bin", own / "train.bin", bytes_changed, functools.partial(learn_altered, own)),
        Format("train.idx", talk / "train.idx", bytes_changed, functools.partial(learn_altered, talk)),
        Format("train.turns", talk / "train.turns", bytes_changed, functools.partial(learn_altered, talk)),
        Format("adapter_config.json", adapter / "adapter_config.json", json_changed, adapted),
        Format("adapter_model.safetensors", adapter / "adapter_model.safetensors", safetensors_changed, adapted),
        Format("mirror: last", far / "last", bytes_changed, fetched),
        Format("mirror: config.yaml", far / "config.yaml", text_changed, fetched),
        Format(
            ".lock",
            written(
                work / ".lock", json.dumps({"pid": 1, "host": "a", "machine": "b", "started": "c", "command": "d"})
            ),
            json_changed,
            lambda: str(read_holder(work / ".lock")),
        ),
    ]
