"""`miaobi sample`: continuations of a prompt, at once or as they are written."""

from __future__ import annotations

import dataclasses
from typing import Any

from miaobi.console import warn_of_encoding
from miaobi.generate import engine
from miaobi.generate.config import SampleRequest


def sample(cfg: SampleRequest, as_json: bool = False) -> dict[str, Any] | None:
    """Returns samples (text, tokens, finish_reason of each) and tokens_per_second; None where --stream printed them.

    as_json: stdout is for the result alone. Raises UserError for a model or prompt that cannot be read.
    """
    if not as_json:
        warn_of_encoding()
    lm = engine.load(cfg.model, cfg.device, cfg.dtype, cfg.checkpoint)
    prompt = engine.read_prompt(cfg.start)
    if cfg.stream and not as_json:
        for i in range(cfg.num_samples):
            print(prompt, end="")
            for piece in lm.stream(prompt, cfg, seed=cfg.seed + i):
                print(piece, end="", flush=True)
            print("\n---------------")
        return None
    completions, speed = engine.timed(lm, prompt, cfg)
    return {"samples": [dataclasses.asdict(c) for c in completions], "tokens_per_second": speed}
