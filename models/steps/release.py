"""The last stage of models/retrain.sh: finished runs become the models that come with miaobi, with cards and GGUF.

    python -m models.steps.release WORK            # WORK: where retrain.sh worked; writes models/base, chat, sentiment
    python -m models.steps.release WORK --out=DIR  # elsewhere, to look at it first

Weights become whole numbers of 8 bits (miaobi's own format); GGUF files lie beside them as long as all together stays
within LARGEST. Every text that a model learned from must have a licence in models/sources.csv.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from models.steps import preference

import miaobi
from benchmarks import verbatim
from miaobi.classify.ablation import RESULT
from miaobi.command_line import parse
from miaobi.console import log
from miaobi.convert import gguf, quantize
from miaobi.convert.config import GGUFConfig, QuantizeConfig
from miaobi.corpus.prepared import PreparedData
from miaobi.errors import UserError
from miaobi.files import read_json
from miaobi.generate import engine
from miaobi.kinds import Location, Positional
from miaobi.model.card import Card, Metric, cell, write_card
from miaobi.model.checkpoint import model_directory
from miaobi.released import NAMES
from miaobi.train.summary import read_summary

HERE = Path(__file__).parents[1]
LARGEST = 20_000_000
"""Most bytes of all released files together."""
LICENSE = "cc-by-sa-4.0"
"""The strictest of the texts' licences."""
OPENINGS = ("你好", "今天天气真好", "你喜欢吃什么？", "我最近睡不好")


@dataclass(frozen=True)
class Args:
    """Command line."""

    work: Positional[Path]
    """Where models/retrain.sh worked: base_data, base_run, chat_data, chat_run, chat_preferred and sentiment_run lie in
    it."""
    out: Location = str(HERE)
    """Directory for base, chat and sentiment; those of an earlier release in it are replaced."""
    dtype: Literal["int8", "int4"] = "int8"
    samples: int = 1000
    """Texts that each language model generates, to be searched for copies of the training text."""


@dataclass(frozen=True)
class Family:
    """What the cards of a release have in common."""

    args: Args
    base_data: PreparedData
    chat_data: PreparedData
    texts: dict[Path, list[str]]
    """Training texts of both."""
    licences: dict[str, tuple[str, str]]
    """File -> source and licence."""

    @property
    def sources(self) -> str:
        """The section of a card on the training texts."""
        lines = ["| 文件 file | 来源 source | 许可 licence | 字符 characters | 取用 taken |", "|---|---|---|---|---|"]
        for source, share in shares(self.base_data):
            name = Path(source["path"]).name
            row = (name, *self.licences[name], f"{source['characters']:,}", f"{share:.0%}")
            lines.append("| " + " | ".join(map(cell, row)) + " |")
        return "\n".join(lines)


def shares(data: PreparedData) -> list[tuple[dict[str, Any], float]]:
    """The sources of prepared data, and the share of its documents that was taken from each."""
    sources, weights = data.manifest["sources"], data.manifest["settings"]["weights"]
    return list(zip(sources, weights or [1.0] * len(sources), strict=True))


def main() -> None:
    """Write the release. Raises UserError for texts without a licence, and for more than LARGEST bytes."""
    args = parse(Args, "python -m models.steps.release", __doc__)
    try:
        release(args)
    except UserError as e:
        raise SystemExit(f"models.steps.release: {e}") from e


def release(args: Args) -> int:
    """Write models, cards and GGUF files; returns the bytes of all of them."""
    with (HERE / "sources.csv").open(encoding="utf-8", newline="") as file:
        licences = {row["file"]: (row["source"], row["licence"]) for row in csv.DictReader(file)}
    data = [PreparedData.open(args.work / name) for name in ("base_data", "chat_data")]
    for source in (source for part in data for source in part.manifest["sources"]):
        if Path(source["path"]).name not in licences:
            raise UserError(f"{source['path']} has no line in models/sources.csv: only what has a licence that lets "
                            "weights ship may be learned")  # fmt: skip
    with stage("training texts"):
        texts = {part.path: verbatim.corpus_of([part]) for part in data}
    family = Family(args, *data, texts, licences)
    for name, card_of in {"base": base_card, "chat": chat_card, "sentiment": sentiment_card}.items():
        with stage(f"{NAMES[name]}: {args.dtype}"):
            place = write_quantized(args, name)
        with stage(f"{NAMES[name]}: card"):
            write_card(place, card_of(family, place))
    for name in ("base", "chat"):
        with stage(f"{NAMES[name]}: GGUF"):
            write_gguf(args, name)
    total = size(args.out)
    log(f"released: {total / 1e6:.2f} MB in {args.out}")
    if total > LARGEST:
        raise UserError(
            f"{total / 1e6:.1f} MB are more than {LARGEST / 1e6:.0f}; take --dtype=int4, or a smaller model"
        )
    return total


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Log what was done and how long it took."""
    started = perf_counter()
    yield
    log(f"{what}: {perf_counter() - started:.0f} s")


def weights(args: Args, name: str) -> Path:
    """The model that is released under a name, before quantization."""
    return args.work / ("chat_preferred" if name == "chat" else f"{name}_run")


def write_quantized(args: Args, name: str) -> Path:
    """Write the quantized directory of a model."""
    place = Path(args.out) / name
    shutil.rmtree(place, ignore_errors=True)
    quantize.convert(QuantizeConfig(str(weights(args, name)), dtype=args.dtype, out=place, license=LICENSE))
    return place


def write_gguf(args: Args, name: str) -> None:
    """Write the model as an 8-bit GGUF file, unless that would exceed LARGEST."""
    file = Path(args.out) / name / f"{NAMES[name]}-q8_0.gguf"
    gguf.convert(GGUFConfig(str(weights(args, name)), out=file, quantize="q8_0"))
    if size(args.out) > LARGEST:
        file.unlink()
        log(f"{file.name} is left out: with it there would be more than {LARGEST / 1e6:.0f} MB")


def size(out: str) -> int:
    """Bytes of the released directories."""
    return sum(file.stat().st_size for name in NAMES for file in (Path(out) / name).rglob("*") if file.is_file())


def base_card(family: Family, place: Path) -> Card:
    """The card of the model that continues texts."""
    lm = engine.load(place)
    samples = [lm.generate(start, num_samples=1, max_new_tokens=80)[0].text for start in ("中国", "皇马", "话说")]
    return language_model(family, place, lm, [family.base_data], samples, "续写中文 continues Chinese texts", "sample")


def chat_card(family: Family, place: Path) -> Card:
    """The card of the model that talks."""
    lm = engine.load(place)
    said = verbatim.replies(lm, list(OPENINGS), max_new_tokens=60, seed=1337)
    samples = ["\n".join(f">>>{opening}\n{reply}" for opening, reply in zip(OPENINGS, said, strict=True))]
    data = [family.chat_data, family.base_data]
    return language_model(family, place, lm, data, samples, "闲聊 makes small talk in Chinese", "chat")


def language_model(
    family: Family, place: Path, lm: engine.LanguageModel, data: list[PreparedData], samples: list[str], does: str,
    verb: str,
) -> Card:  # fmt: skip
    """The card of a language model. data: what it was trained on, the latest part first."""
    args, shape = family.args, lm.model.cfg
    run = args.work / f"{place.name}_run"
    after, before = (
        miaobi.evaluate(m, data[0].path, device="cpu", stride="block") for m in (place, weights(args, place.name))
    )
    corpus = [text for part in data for text in family.texts[part.path]]
    copied = verbatim.measure(verbatim.write(lm, data[0], verbatim.Args(str(place), samples=args.samples)), corpus)
    talks = verb == "chat"
    tuned = f", tuned from {NAMES['base']}" if talks else ""
    return Card(
        name=NAMES[place.name],
        summary=f"{does}. {lm.model.num_parameters() / 1e6:.1f}M parameters ({shape.family}, {shape.n_layer} layers × "
        f"{shape.n_embd}, {shape.block_size} tokens of context){tuned}; comes with miaobi 妙笔 and answers where "
        f"`miaobi {verb}` names no MODEL.",
        library="miaobi",
        tags=(shape.family, args.dtype, *(("conversational",) if talks else ())),
        license=LICENSE,
        data=f"validation part of {data[0].path.name}",
        metrics=[
            Metric("bits_per_character", "validation bits per character (blocks side by side)", after["bits_per_char"])
        ],
        usage=f'import miaobi\n\nmodel = miaobi.load(".")  # this directory; in a shell: miaobi {verb}',
        facts=facts(run) | {"weights": args.dtype, "bits per character before that": f"{before['bits_per_char']:.4f}"},
        sections={
            "来源与许可 · Sources and licences": family.sources + (share_of_chats(family) if talks else ""),
            **({"回答的好坏 · Quality of replies": quality(args)} if talks else {}),
            "局限 · Limits": card_text("limits", block=shape.block_size),
            "不要用来 · Not for": card_text("not_for"),
            "逐字重复 · Verbatim overlap": overlap(copied),
        },
        samples=samples,
    )


def share_of_chats(family: Family) -> str:
    """The dialogues that the chat model was tuned on."""
    taken = [
        f"{cell(Path(source['path']).name)} ({source['characters']:,} × {share:.0%})"
        for source, share in shares(family.chat_data)
    ]
    return f"\n\n对话微调 · tuned on dialogues of (characters × share taken): {', '.join(taken)}"


def quality(args: Args) -> str:
    """The effect of preference tuning."""
    found = read_json(weights(args, "chat") / preference.RESULT)
    columns, rows = preference.table(found["figures"])
    lines = [columns, ["---"] * len(columns), *rows]
    return (
        f"{found['pairs']:,} 对模型自己的好坏回复，用 DPO 调过。before 是调之前，as it says 是带着挑出来的采样。"
        f"Tuned by DPO on {found['pairs']:,} pairs of its own good and bad replies "
        "(`python -m models.steps.preference`); replies to openings set aside, and talks of five turns.\n\n"
        + "\n".join("| " + " | ".join(cell(str(value)) for value in line) + " |" for line in lines)
    )


def card_text(name: str, **figures: Any) -> str:
    """Text of all releases' cards, from models/cards."""
    return (HERE / "cards" / f"{name}.md").read_text(encoding="utf-8").strip().format(**figures)


def facts(run: Path) -> dict[str, Any]:
    """Steps, tokens, time and seed of a training run."""
    summary, log_lines = (
        read_summary(run),
        [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")],
    )
    steps = max(line["step"] for line in log_lines)
    return {
        "steps": f"{steps:,}",
        "tokens learned": f"{steps * summary.batch_tokens:,} (of a text of {summary.train_tokens:,})",
        "training took": f"{summary.wall_seconds / 3600:.2f} h on {summary.cpu}, beside other programs",
        "seed": seed_of(run),
        "license": LICENSE,
    }


def seed_of(run: Path) -> str:
    """The seed of a run."""
    from miaobi.settings import read_yaml

    return str(read_yaml(run / "config.yaml")[0]["seed"])


def overlap(copied: dict[str, Any]) -> str:
    """The section on copied text."""
    lines = ["| 连续字数 characters in a row | 占多少篇 share of the texts |", "|---|---|"]
    lines += [f"| {length} | {share:.1%} |" for length, share in copied["shares"].items()]
    return (
        f"{copied['samples']:,} 篇、共 {copied['characters']:,} 字的生成文本里，与训练语料（{copied['searched']:,} 字）"
        f"逐字相同的最长一段有 **{copied['longest']}** 字：{cell(copied['longest_text'])}\n\n"
        f"Of {copied['samples']:,} texts that it wrote, the longest run that also stands in the training text has "
        f"{copied['longest']} characters (`python -m benchmarks.verbatim`).\n\n" + "\n".join(lines)
    )


def sentiment_card(family: Family, place: Path) -> Card:
    """The card of the classifier."""
    run = family.args.work / "sentiment_run"
    row = read_json(model_directory(run) / RESULT)["row"]
    baselines = {b["name"]: b for b in read_json(run / "baselines" / f"{row['seed']}.json")["rows"]}
    judge = read_json(place / "classifier.json")
    figures = "\n".join(
        ["| | accuracy | macro-F1 |", "|---|---|---|"]
        + [f"| {name} | {found['accuracy']:.1%} | {found['macro_f1']:.3f} |" for name, found in
           (("这个模型 this model", row), ("最多的一类 commonest label", baselines["majority"]),
            ("TF-IDF + 线性 SVM linear SVM", baselines["svm"]))]
    )  # fmt: skip
    return Card(
        name=NAMES["sentiment"],
        summary="判断一条新闻是好消息、不好不坏还是坏消息 tells the tone of a piece of news: "
        f"{', '.join(judge['labels'])}. "
        f"A head on {NAMES['base']}; comes with miaobi 妙笔 and answers where `miaobi classify predict` names no "
        "MODEL.",
        task="text-classification",
        library="miaobi",
        tags=(family.args.dtype,),
        license=LICENSE,
        data="test part of INEWS (corrected protocol)",
        metrics=[Metric("accuracy", "test accuracy", row["accuracy"]), Metric("f1", "test macro F1", row["macro_f1"]),
                 Metric("expected_calibration_error", "test calibration error", row["calibration_error"])],
        usage="",
        facts={"use": "miaobi classify predict --input=TEXT", "seed": row["seed"], "weights": family.args.dtype,
               "trained on": f"{row['train_rows']:,} texts", "tested on": f"{row['test_units']:,} texts",
               "training took": f"{row['seconds'] / 60:.1f} minutes", "pooling": row["pooling"],
               "trainable": row["trainable"], "license": LICENSE},
        sections={
            "它判断什么 · What it tells": card_text("news_tone"),
            "对照 · Beside simpler ones": figures,
            "来源与许可 · Sources and licences": f"{cell('inews_sentiment.jsonl.xz')}, and what its base read:\n\n"
            + family.sources,
            "局限 · Limits": card_text("limits", block=judge["block_size"]),
            "不要用来 · Not for": card_text("not_for"),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
