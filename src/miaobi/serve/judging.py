"""POST /classify: labels of texts, and what each character adds to them."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from miaobi.classify.head import Judge
from miaobi.serve.errors import APIError, refused
from miaobi.serve.schemas import ClassifyRequest
from miaobi.serve.served import Served

PIECES = 256  # of a text that are left out one by one; a longer one is cut into as many
EXPLAINED = 16  # texts of one request that are explained at most


async def classify(body: ClassifyRequest, served: Served) -> dict[str, Any]:
    """Label, probabilities and, where asked for, contributions of each text. Raises APIError."""
    if served.judge is None:
        raise APIError(404, "no classifier is served here; start miaobi serve with --classifier=DIR", "model_not_found",
                       "model")  # fmt: skip
    texts = [body.input] if isinstance(body.input, str) else body.input
    if body.explain and len(texts) > EXPLAINED:
        raise refused(f"explain is for {EXPLAINED} texts at a time; send fewer", "input")
    return {"model": served.judge_name, "data": await asyncio.to_thread(judged, served, texts, bool(body.explain))}


def judged(served: Served, texts: list[str], explain: bool) -> list[dict[str, Any]]:
    """One entry for each text."""
    judge, found = served.judge, []
    with served.judging:
        for i, values in enumerate(judge.probabilities(texts)):
            best = int(values.argmax())
            probs = {name: float(p) for name, p in zip(judge.labels, values, strict=True)}
            entry = {"index": i, "label": judge.labels[best], "probs": probs, "score": float(values[best])}
            if explain:
                entry["contributions"] = contributions(judge, texts[i], best, float(values[best]))
            found.append(entry)
    return found


def contributions(judge: Judge, text: str, label: int, whole: float) -> list[dict[str, Any]]:
    """Pieces of a text, a character each where it is not long, and what the label's probability loses without each."""
    size = max(1, math.ceil(len(text) / PIECES))
    places = range(0, len(text), size)
    without = [text[:at] + text[at + size :] for at in places]
    chances = judge.probabilities(without)[:, label] if without else []
    return [{"text": text[at : at + size], "score": whole - float(p)} for at, p in zip(places, chances, strict=True)]
