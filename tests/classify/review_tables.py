"""Reviews of matches, won (1) or lost (0), in the characters that the tiny models know."""

import csv
import random
from pathlib import Path

WHO = ["皇马", "曼联", "国家队", "主教练", "球迷"]
WHAT = ["比赛", "联赛", "冠军"]


def reviews(count: int = 120, seed: int = 0, long: int = 0) -> list[tuple[str, str]]:
    """(label, text), all different; every eighth is about `long` characters."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        label = "1" if draw.random() < 0.6 else "0"
        verb = "赢得" if label == "1" else "输掉"
        sentences = long // 7 if long and len(found) % 8 == 0 else draw.randint(1, 3)
        text = "，".join(draw.choice(WHO) + verb + draw.choice(WHAT) for _ in range(sentences))
        found.setdefault(text, (label, text + draw.choice("。！，")))
    return list(found.values())


def write(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("label", "review")) -> Path:
    """A CSV, quoted where it must be."""
    with path.open("w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([header, *rows])
    return path
