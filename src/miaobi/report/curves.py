"""Curves and bars as inline SVG: text stays text in the page's own fonts, colours are the page's (light and dark)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from markupsafe import Markup

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 14, 26
MOST_POINTS = 400
"""Points per curve; if there are more, neighbours are averaged."""

NOTE_WIDTH, NOTE_HEIGHT = 48, 13
"""Size of a note beside a mark."""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """A curve. `css_class` is a class of the page's style sheet: a colour, s0 to s7, and thin or bold."""

    name: str
    points: Points
    css_class: str
    dots: bool = False


def downsampled(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points: means of neighbours, with the first and last point unchanged."""
    if len(points) <= most:
        return points
    size, inner = math.ceil((len(points) - 2) / (most - 2)), points[1:-1]
    groups = [inner[i : i + size] for i in range(0, len(inner), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [points[0], *means, points[-1]]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers between `low` and `high`: multiples of 1, 2 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    step = next(
        s
        for s in (m * 10.0**e for e in range(math.floor(math.log10(span / most)), 400) for m in (1, 2, 5))
        if span / s <= most
    )
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number for an axis: 1.2k, 3M, 0.001, 2e-05."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:.4g}"


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which this share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def limits(lines: list[Line], from_zero: bool, cut: float) -> tuple[float, float]:
    """Lowest and highest value of the axis. cut: share of a curve's points that may be cut off at the top; curves with
    dots are never cut.
    """
    ys = [y for line in lines for _, y in line.points]
    high = max(
        max(y for _, y in line.points) if line.dots else quantile((y for _, y in line.points), 1 - cut)
        for line in lines
    )
    low = 0.0 if from_zero else min(ys)
    if high <= low:
        low, high = low - abs(low) * 0.05 - (not low), high + abs(high) * 0.05 + (not high)
    margin = 0.06 * (high - low)
    return (0.0 if from_zero else low - margin), high + margin


def chart(
    lines: list[Line], label: str, from_zero: bool = False, cut: float = 0.0, marks: list[tuple[float, float, str]] = ()
) -> Markup:
    """Lines over steps. label: what a screen reader says. marks: (step, value, text, CSS class) that stand out.

    Empty where there is nothing to draw.
    """
    lines = [Line(line.name, downsampled(line.points), line.css_class, line.dots) for line in lines if line.points]
    if not lines:
        return Markup("")
    xs = [x for line in lines for x, _ in line.points]
    x_low, x_high = min(0.0, *xs), max(xs) or 1.0
    y_low, y_high = limits(lines, from_zero, cut)

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for y in ticks(y_low, y_high):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y_at(y) + 4:.1f}" text-anchor="end">{short(y)}</text>'
        )
    for x in ticks(x_low, x_high, 6):
        near_end = x_at(x) > WIDTH - RIGHT - 14
        anchor = "end" if near_end else "middle"
        parts.append(
            f'<text class="tick" x="{WIDTH - RIGHT if near_end else x_at(x):.1f}" y="{HEIGHT - 8}" '
            f'text-anchor="{anchor}">{short(x)}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    top = TOP - 4.0
    for line in lines:
        at = [(x_at(x), max(top, y_at(y))) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(
            f'<polyline class="curve {line.css_class}" points="{path}"><title>{escape(line.name)}</title></polyline>'
        )
        if line.dots and len(at) <= 60:
            parts += [f'<circle class="dot {line.css_class}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">'
                      f"<title>{escape(line.name)}: {short(step)} → {value:.4g}</title></circle>"
                      for (x, y), (step, value) in zip(at, line.points, strict=True)]  # fmt: skip
    notes: list[tuple[float, float]] = []
    for step, value, text, css_class in marks:
        x, y = x_at(step), y_at(value)
        anchor = "start" if x < LEFT + 60 else "end" if x > WIDTH - RIGHT - 60 else "middle"
        at = free_height(notes, x, y - 10 if y > TOP + 24 else y + 18)
        notes.append((x, at))
        parts.append(
            f'<circle class="mark {css_class}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
            f'<text class="note" x="{x:.1f}" y="{at:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
        )
    return Markup("".join([*parts, "</svg>"]))


def free_height(notes: list[tuple[float, float]], x: float, y: float) -> float:
    """The height nearest to `y` at which a note at `x` covers none of `notes`."""
    near = [other for at, other in notes if abs(at - x) < NOTE_WIDTH]
    heights = [y, *(other + side * NOTE_HEIGHT for other in near for side in (-1, 1))]
    free = [h for h in heights if all(abs(h - other) >= NOTE_HEIGHT for other in near)]
    return min([h for h in free if TOP <= h <= HEIGHT - BOTTOM] or free, key=lambda h: abs(h - y))


def bars(rows: list[tuple[str, int]], label: str) -> Markup:
    """Upright bars with a caption below each. Empty where there are none."""
    if not rows:
        return Markup("")
    most = max(n for _, n in rows) or 1
    width = (WIDTH - 16) / len(rows)
    every = max(1, math.ceil(len(rows) / 9))
    parts = [f'<svg viewBox="0 0 {WIDTH} 190" role="img" aria-label="{escape(label)}">']
    for i, (caption, n) in enumerate(rows):
        x, height = 8 + i * width, 130 * n / most
        parts.append(
            f'<rect class="bar" x="{x + 1.5:.1f}" y="{158 - height:.1f}" width="{max(1.0, width - 3):.1f}" '
            f'height="{height:.1f}" rx="2"><title>{escape(caption)}: {n:,}</title></rect>'
        )
        if width > 26:
            parts.append(
                f'<text class="tick" x="{x + width / 2:.1f}" y="{152 - height:.1f}" text-anchor="middle">'
                f"{short(n)}</text>"
            )
        if i % every == 0:
            parts.append(
                f'<text class="tick" x="{x + width / 2:.1f}" y="176" text-anchor="middle">{escape(caption)}</text>'
            )
    parts.append(f'<line class="axis" x1="8" x2="{WIDTH - 8}" y1="158" y2="158"/>')
    return Markup("".join([*parts, "</svg>"]))
