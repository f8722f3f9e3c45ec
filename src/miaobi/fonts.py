"""Which installed fonts have Chinese characters, for matplotlib's plots; pages take the reader's own fonts."""

from __future__ import annotations

import contextlib

CHINESE = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN",
    "PingFang SC", "Hiragino Sans GB", "Heiti SC", "STHeiti", "Microsoft YaHei", "SimHei", "SimSun", "DengXian",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "AR PL UMing CN", "Arial Unicode MS", "Noto Serif CJK SC",
    "Noto Serif CJK JP",
)  # fmt: skip
"""Families with simplified Chinese, those of Linux, macOS and Windows. (Of a collection, matplotlib reads the first
family alone: Noto's is called JP, and has all characters.)"""


def chinese_fonts() -> list[str]:
    """Installed families with Chinese characters, by matplotlib's names for them.

    matplotlib remembers its list of fonts for good: where it knows none, those installed since are looked for.
    """
    from matplotlib.font_manager import findSystemFonts, fontManager  # its list takes a second to make, the first time

    found = _known()
    if not found:
        seen = {font.fname for font in fontManager.ttflist}
        for file in findSystemFonts():
            if file not in seen:
                with contextlib.suppress(OSError, RuntimeError, ValueError):  # damaged, or of a kind it does not read
                    fontManager.addfont(file)
        found = _known()
    return found


def _known() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [name for name in CHINESE if name in installed]


def plot_fonts() -> dict[str, list[str]]:
    """matplotlib's settings for plots whose texts may be Chinese."""
    return {"font.family": ["DejaVu Sans", *chinese_fonts()]}
