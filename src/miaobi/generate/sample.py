"""`miaobi sample`: continuations of a prompt, at once or as they are written."""

from __future__ import annotations

import dataclasses
from typing import Any

from miaobi.console import log, warn_of_encoding
from miaobi.generate import engine
from miaobi.generate.config import SampleRequest, SamplingConfig
from miaobi.model.generation import GENERATION_CONFIG, sampling_settings
from miaobi.released import released


def sample(cfg: SampleRequest, as_json: bool = False) -> dict[str, Any] | None:
    """Returns samples (text, tokens, finish_reason of each) and tokens_per_second, and what of the model's settings is
    not used; None where --stream printed them.

    as_json: stdout is for the result alone. Raises UserError for a model or prompt that cannot be read.
    """
    if not as_json:
        warn_of_encoding()
    lm = engine.load(cfg.model or released("base")[0], cfg.device, cfg.dtype, cfg.checkpoint)
    say_unused(cfg, lm.model.generation, "sample")
    prompt = engine.read_prompt(cfg.start)
    if cfg.stream and not as_json:
        for i in range(cfg.num_samples):
            print(prompt, end="")
            for piece in lm.stream(prompt, cfg, seed=cfg.seed + i):
                print(piece, end="", flush=True)
            print("\n---------------")
        return None
    completions, speed = engine.timed(lm, prompt, cfg)
    found = {"samples": [dataclasses.asdict(c) for c in completions], "tokens_per_second": speed}
    return found | ({"not_used": lm.model.not_used} if lm.model.not_used else {})


def say_unused(cfg: SamplingConfig, generation: dict[str, Any] | None, what: str) -> None:
    """One line on how a model's makers want it sampled, where `what` does not: text is continued by our own settings,
    conversations by the model's.
    """
    stated = sampling_settings(generation)
    others = [f"{name}={value}" for name, value in stated.items() if value != getattr(cfg, name)]
    if others:
        ours = ", ".join(f"{name}={getattr(cfg, name)}" for name in stated)
        log(f"the model's {GENERATION_CONFIG} says {', '.join(others)}, which chat follows; {what} draws with {ours}")
