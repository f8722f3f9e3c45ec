"""What other labelled reviews do for the SVM: it trains on them too, on the corrected splits.

    python -m benchmarks.classify_svm --data ChnSentiCorp_htl_all.csv --extra labelled.jsonl

A classifier with intermediate training has read those reviews; this row says what the SVM makes of them.
`--without` of `miaobi classify train` leaves the evaluation's own out of them; here they are left out in the same way.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import machine, parse, report
from miaobi.classify.config import ClassifyConfig
from miaobi.classify.data import Labelled, Part, distinct, read_labelled, stratified
from miaobi.classify.evaluation import paired_interval, support_vectors


@dataclass(frozen=True)
class Args:
    """Command line."""

    data: Path
    """Labelled table that is judged."""
    extra: Path
    """Labelled table with the same labels that is only trained on."""
    seeds: int = 5
    """Splits."""
    seed: int = 114514
    """The first of them, as in configs/sentiment.yaml."""
    json: bool = False
    """Print one line of JSON as well."""


def part(data: Labelled, chosen: np.ndarray) -> Part:
    """Texts and labels alone: the SVM needs no tokens."""
    return Part([data.texts[i] for i in chosen], data.labels[chosen], [], np.empty(0, np.int64))


def main() -> None:
    """Measure and print."""
    args = parse("classify_svm", Args, __doc__)
    data = distinct(read_labelled(ClassifyConfig(data=str(args.data))))
    extra = read_labelled(ClassifyConfig(data=str(args.extra), without=str(args.data)))
    if extra.names != data.names:
        raise SystemExit(f"the labels differ: {data.names} and {extra.names}")
    accuracies: dict[str, list[float]] = {"SVM": [], "SVM, and the other reviews": []}
    for seed in range(args.seed, args.seed + args.seeds):
        chosen, _, tested = stratified(data.labels, data.names, seed)
        train, test = part(data, chosen), part(data, tested)
        more = Part(train.texts + extra.texts, np.concatenate([train.labels, extra.labels]), [], train.owner)
        for name, source in zip(accuracies, (train, more), strict=True):
            accuracies[name].append(float((support_vectors(source, test) == test.labels).mean()))
    alone, both = accuracies.values()
    gap, low, high = paired_interval(both, alone)
    rows = [[name, f"{np.mean(found):.2%}", f"{100 * statistics.stdev(found):.2f}" if len(found) > 1 else ""]
            for name, found in accuracies.items()]  # fmt: skip
    rows.append(["paired difference, 95% interval", f"{100 * gap:+.2f}", f"{100 * low:+.2f} to {100 * high:+.2f}"])
    report("classify_svm", ["trained on", "accuracy", "deviation"], rows, {
        "machine": machine(), "settings": dataclasses.asdict(args), "accuracies": accuracies,
        "extra_texts": len(extra.texts), "difference": gap, "low": low, "high": high,
    }, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
