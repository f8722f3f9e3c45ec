"""miaobi 妙笔: a small Chinese GPT, from raw text to a model that continues it."""

from __future__ import annotations

import typing

if typing.TYPE_CHECKING:
    from miaobi.generate.engine import LanguageModel

__version__ = "0.1.0"


def load(name: str, device: str | None = None, dtype: str | None = None) -> LanguageModel:
    """Load a run directory or a Hugging Face model directory; see `miaobi.generate.engine.LanguageModel`."""
    from miaobi.generate.engine import load as load_language_model  # torch is imported only when a model is

    return load_language_model(name, device, dtype)
