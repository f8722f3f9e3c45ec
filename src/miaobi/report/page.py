"""Runs of `miaobi train` as one self-contained HTML page: no script, nothing fetched, every text of others escaped."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from miaobi import __version__
from miaobi.console import log, shown, warn
from miaobi.errors import UserError
from miaobi.files import text_written_whole
from miaobi.report.config import ReportConfig
from miaobi.report.curves import Line, bars, chart, short
from miaobi.report.reading import RunRecord, Sample, read_run
from miaobi.report.verdict import Verdict, judge
from miaobi.train.summary import read_summary

REPORT = "report.html"
SAMPLES = 6
SAMPLE_LENGTH = 600
"""Samples that are shown, and characters of each."""
COLOURS = 8
"""Colours of the style sheet; a ninth run gets the first one again."""


@dataclass(frozen=True)
class RunView:
    """A run with what the page shows of it."""

    run: RunRecord
    verdict: Verdict
    curves: dict[str, Markup]
    samples: list[Sample]
    lengths: Markup
    colour: str
    name: str
    """Its name, with its directory if two runs have the same name."""


def report(cfg: ReportConfig) -> dict[str, Any]:
    """`miaobi report`: write the page. Returns out, bytes, runs: [{run, verdict, best_step, best_val_bits_per_char,
    stopped, missing}, ...].

    Raises UserError for a path that is no run, or a damaged run.
    """
    runs = [read_run(name) for name in dict.fromkeys(cfg.runs)]
    out = cfg.out or (runs[0].path / REPORT if len(runs) == 1 else Path(REPORT))
    if out.is_dir():
        raise UserError(f"--out={out} is a directory; give the name of a file")
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {out.parent}; make it first")
    page = render(runs)
    with text_written_whole(out) as file:
        file.write(page)
    entries = [
        {
            "run": str(run.path),
            "verdict": judge(run).headline.en,
            "stopped": run.summary.stopped if run.summary else None,
            "best_step": run.best.step if run.best else None,
            "best_val_bits_per_char": run.best.val_bits if run.best else None,
            "missing": run.missing,
        }
        for run in runs
    ]
    return {"out": str(out), "bytes": out.stat().st_size, "runs": entries}


@contextmanager
def writing_report(out_dir: str | Path) -> Iterator[None]:
    """Write the run's report after the body, which trains it, however that ended; an error is only logged.

    A run that the body did not train (it was locked, or of another configuration) is not touched.
    """
    run, began = Path(out_dir), time.time()
    try:
        yield
    finally:
        try:
            if (
                os.environ.get("RANK", "0") == "0"
                and (summary := read_summary(run)) is not None
                and summary.ended >= began
            ):
                log(f"report: {report(ReportConfig((str(run),)))['out']}")
        except Exception as e:
            warn(f"the report was not written ({e}); try again with: miaobi report {run}")


def render(runs: list[RunRecord]) -> str:
    """The page."""
    names = [run.name for run in runs]
    views = [view(run, i, str(run.path) if names.count(run.name) > 1 else run.name) for i, run in enumerate(runs)]
    style = resource("page.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return template().render(
        views=views, style=Markup(style), style_hash=digest, version=__version__, curves=curves_of(views),
        differing=differing_settings(runs), written=time.strftime("%Y-%m-%d %H:%M"), title=", ".join(names[:3]),
    )  # fmt: skip


@functools.cache
def template() -> Any:
    """The page's template. Values are inserted as text: escaped, without control characters or invisible ones."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              finalize=plain)  # fmt: skip
    environment.filters |= {"commands": code_markup, "size": size, "duration": duration, "compact": compact,
                            "value": value, "visible": visible, "chinese": chinese,
                            "percent": "{:.2%}".format}  # fmt: skip
    return environment.from_string(resource("page.html.jinja"))


def resource(name: str) -> str:
    """A file of this package."""
    return resources.files("miaobi.report").joinpath(name).read_text(encoding="utf-8")


def plain(value: Any) -> Any:
    """Text as it is inserted into the page; markup stays as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return shown(value).encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no UTF-8


def code_markup(text: str) -> Markup:
    """Text whose parts between backquotes become <code>."""
    parts = re.split("`([^`]*)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(plain(part)) if i % 2 else escape(plain(part)) for i, part in enumerate(parts)
    )


def compact(count: int) -> str:
    """A count with three digits: 682k, 4.79M; small counts in full."""
    for unit, n in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= 10 * n or (count >= n and unit != "k"):
            return f"{count / n:.{max(0, 3 - len(str(int(count / n))))}f}{unit}"
    return f"{count:,}"


def size(count: int | None) -> str:
    """A number of bytes with its unit."""
    for unit, n in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count and count >= 1 << n:
            return f"{count / (1 << n):.{0 if count >= 100 << n else 1}f} {unit}"
    return "?" if not count else f"{count} B"


def duration(seconds: float) -> str:
    """A duration: 3 h 12 min, 4 min 10 s, 12.3 s."""
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s" if seconds >= 60 else f"{seconds:.1f} s"


def value(found: Any) -> str:
    """A setting's value as text."""
    text = "—" if found is None else ", ".join(map(str, found)) if isinstance(found, (list, tuple)) else str(found)
    return text if len(text) <= 200 else f"{text[:200]}…"


def chinese(text: str) -> str:
    """Chinese for the common origins of values and execution modes."""
    known = {"command line": "命令行", "default": "默认", "not measured: the run is short": "没有试：这次训练不长"}
    return known.get(text) or re.sub(r", line (\d+)$", r"，第 \1 行", text)


def visible(character: str) -> str:
    """A character as it is listed: white space by a symbol."""
    return {" ": "␠", "\n": "↵", "\t": "⇥", "\u3000": "全角␠", "\r": "␍"}.get(character, character)


def view(run: RunRecord, number: int, name: str) -> RunView:
    """The view of a run."""
    lengths = [(f"{short(low)}", n) for low, _, n in run.text.lengths] if run.text else []
    return RunView(
        run=run, verdict=judge(run), curves={}, samples=chosen_samples(run), colour=f"s{number % COLOURS}", name=name,
        lengths=bars(lengths, "lengths of the documents"),
    )  # fmt: skip


def chosen_samples(run: RunRecord) -> list[Sample]:
    """Evenly spaced samples from first to last, with that of the best model among them."""
    found = run.samples
    if len(found) > SAMPLES:
        wanted = {round(i * (len(found) - 1) / (SAMPLES - 1)) for i in range(SAMPLES)}
        best = run.best.step if run.best else None
        of_best = next((i for i, sample in enumerate(found) if sample.step == best), None)
        if of_best is not None and of_best not in wanted:
            inner = sorted(wanted)[1:-1]
            wanted = wanted - {min(inner, key=lambda i: abs(i - of_best))} | {of_best}
        found = [found[i] for i in sorted(wanted)]
    return [Sample(s.step, s.text if len(s.text) <= SAMPLE_LENGTH else f"{s.text[:SAMPLE_LENGTH]}…") for s in found]


def curves_of(views: list[RunView]) -> dict[str, Markup]:
    """The four charts, with all runs in each."""
    several, bits, marks = len(views) > 1, [], []
    for v in views:
        per_nat, best = v.run.bits_per_nat, v.run.best
        if per_nat is not None:
            train = [(step, per_nat * loss) for step, loss in v.run.curves["train_loss"]]
            bits.append(Line(f"{v.name}: train", train, f"{v.colour} thin" if several else "train thin"))
        val = v.run.curves["val_bits_per_char"]
        bits.append(Line(f"{v.name}: validation", val, f"{v.colour} bold", dots=True))
        if best is not None:
            marks.append((best.step, best.val_bits, f"{best.val_bits:.3f}", v.colour))

    def plain_chart(metric: str, label: str, **how: Any) -> Markup:
        return chart([Line(v.name, v.run.curves[metric], f"{v.colour} mid") for v in views], label, **how)

    return {
        "bits": chart(bits, "bits per character over steps", cut=0.1, marks=marks),
        "learning_rate": plain_chart("learning_rate", "learning rate over steps", from_zero=True),
        "grad_norm": plain_chart("grad_norm", "norm of the gradient over steps", from_zero=True, cut=0.02),
        "tokens_per_second": plain_chart("tokens_per_second", "tokens per second over steps", from_zero=True),
    }


def differing_settings(runs: list[RunRecord]) -> list[tuple[str, list[Any]]]:
    """Settings in which the runs differ, with the value of each run."""
    if len(runs) < 2:
        return []
    keys = [s.key for s in runs[0].settings if s.key not in ("out_dir", "wandb_run_name")]
    rows = [(key, [run.value(key) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if any(v != values[0] for v in values)]
