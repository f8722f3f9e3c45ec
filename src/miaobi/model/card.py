"""README.md of a model directory: the hub's metadata, how the model was made, how good it is, what it writes.

Layout of the metadata: https://huggingface.co/docs/hub/model-cards. What a person wrote there is never replaced.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miaobi.console import log, shown
from miaobi.environment import environment
from miaobi.files import sha256
from miaobi.model.hub import HUB_NAME

CARD = "README.md"
_MARK = re.compile(r"\n<!-- written by miaobi; this line goes when you edit: ([0-9a-f]{64}) -->\n\Z")
SAMPLE_LENGTH = 800
"""Characters of a sample that a card shows."""

USAGE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # this directory, or the name of this model on the hub
model = AutoModelForCausalLM.from_pretrained(".")"""


@dataclass(frozen=True)
class Metric:
    """A figure of the model on a text. `kind` is the hub's id of it, such as accuracy."""

    kind: str
    name: str
    value: float


@dataclass(frozen=True)
class Card:
    """What a README says."""

    name: str
    summary: str
    """What the model is, in a sentence."""
    task: str = "text-generation"
    """The hub's pipeline_tag."""
    library: str = "transformers"
    tags: tuple[str, ...] = ()
    license: str | None = None
    base_model: str | None = None
    """MODEL that was tuned; in the metadata where it is a name of the hub."""
    data: str = "not told"
    """Name of the text that the metrics are of."""
    metrics: list[Metric] = field(default_factory=list)
    usage: str = ""
    """Python that loads the model."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What it was made from and how: what -> value."""
    sections: dict[str, str] = field(default_factory=dict)
    """What else there is to say: title -> Markdown."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Those that are not the defaults."""
    samples: list[str] = field(default_factory=list)


def write_card(directory: Path, card: Card, *before: Path | None) -> None:
    """Write README.md into a model directory whose other files are there already.

    before: directories in whose place, or after which, this one is written: where the README of one of them was
    edited by a person, it is taken over as it is, which is said. Raises OSError.
    """
    for place in dict.fromkeys(before):
        if place is not None and (kept := edited(place / CARD)) is not None:
            (directory / CARD).write_bytes(kept)
            log(f"{place / CARD} was edited: it is kept as it is, with its figures as they were")
            return
    text = render(card, directory)
    signed = f"{text}\n<!-- written by miaobi; this line goes when you edit: {digest(text)} -->\n"
    (directory / CARD).write_text(signed, encoding="utf-8", newline="\n")


def edited(file: Path) -> bytes | None:
    """A README that is not as `write_card` left it; None where it is, or where there is none."""
    if not file.is_file():
        return None
    content = file.read_bytes()
    try:
        text = content.decode("utf-8").replace("\r\n", "\n")  # git on Windows
    except UnicodeDecodeError:
        return content
    mark = _MARK.search(text)
    return None if mark and digest(text[: mark.start()]) == mark[1] else content


def summary_of(file: Path) -> str:
    """The sentence under the title of a card that `write_card` wrote; "" of another, or where there is none."""
    if not file.is_file() or edited(file) is not None:
        return ""
    parts = file.read_text(encoding="utf-8").partition("\n---\n")[2].strip().split("\n\n")
    return re.sub(r"\\([\\`*_\[\]<>|#~])", r"\1", parts[1]) if len(parts) > 1 else ""


def digest(text: str) -> str:
    """SHA-256 of what a card says."""
    return hashlib.sha256(text.encode()).hexdigest()


def render(card: Card, directory: Path) -> str:
    """The README. directory: the model's, with its tokenizer."""
    found = environment()
    made = {
        **card.facts,
        "tokenizer (SHA-256)": sha256(directory / "tokenizer.json"),
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        "code": f"git {found.git_commit}{' with changes' if found.git_dirty else ''}" if found.git_commit else None,
        "hardware": f"{', '.join(found.gpus) or found.cpu}, {found.cores} cores, {found.system}",
    }
    parts = [
        f"---\n{metadata(card)}\n---\n",
        f"# {inline(card.name)}\n\n{inline(card.summary)}\n",
        f"```python\n{card.usage}\n```\n" if card.usage else "",
        _section("指标 · Metrics", table({metric.name: f"{metric.value:.4f}" for metric in card.metrics})),
        _section("样本 · Samples", "\n\n".join(fenced(text[:SAMPLE_LENGTH]) for text in card.samples)),
        *(_section(title, content) for title, content in card.sections.items()),
        _section("由来 · How it was made", table(made)),
        _section("设置 · Settings", table(card.settings)),
    ]
    return "\n".join(part for part in parts if part)


def metadata(card: Card) -> str:
    """The YAML block, by the hub's own library."""
    from huggingface_hub import EvalResult, ModelCardData  # half a second

    results = [
        EvalResult(task_type=card.task, dataset_type="custom", dataset_name=plain(card.data), metric_type=metric.kind,
                   metric_name=metric.name, metric_value=round(metric.value, 6))
        for metric in card.metrics
    ]  # fmt: skip
    base = card.base_model if card.base_model and HUB_NAME.fullmatch(card.base_model) else None
    named = {"model_name": plain(card.name), "eval_results": results} if results else {}
    return ModelCardData(language="zh", license=card.license, library_name=card.library, pipeline_tag=card.task,
                         base_model=base, tags=["miaobi", *card.tags], **named).to_yaml()  # fmt: skip


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}\n" if content else ""


def table(rows: dict[str, Any]) -> str:
    """Two columns; what is None is left out."""
    lines = [f"| {cell(name)} | {cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def plain(text: str) -> str:
    """Text of others in one line, without signs that steer or hide, or that no file of UTF-8 holds."""
    return " ".join(shown(str(text)).encode("utf-8", "replace").decode().split())


def inline(text: Any) -> str:
    """Text in which nothing is markup."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", plain(text))


def cell(value: Any) -> str:
    """A value in a table."""
    text = plain(", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))
    return inline(text if len(text) <= 300 else f"{text[:300]}…")


def fenced(text: str) -> str:
    """Text of others as it is, in a block that it cannot end."""
    text = shown(text).encode("utf-8", "replace").decode()
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
