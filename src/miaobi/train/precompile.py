"""Compile a model's training step and throw the model away: what the compilers made stays in torch's cache on the disk.

    python -m miaobi.train.precompile JOB

A run starts this beside its first, eager steps (`measured.compile_beside`). A process and not a thread: the compiler's
own Python would hold the interpreter while the run needs it.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from miaobi.config import ModelConfig
from miaobi.model.transformer import Transformer
from miaobi.train.layout import Objective
from miaobi.train.measured import Work, apply, checked


def main() -> None:
    """Compile every way of the job on the command line, at low priority."""
    if hasattr(os, "nice"):
        os.nice(10)
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])  # it is part of the code that is made
    model = Transformer(ModelConfig(**job["model"])).train()
    model.recompute = job["recompute"]
    rows, length = job["rows"], model.cfg.block_size
    ids = torch.zeros(rows, length, dtype=torch.int64)
    positions = torch.arange(length).expand(rows, length).contiguous() if job["positions"] else None
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool) if job["mask"] else None
    work = Work(Objective(model), (ids, ids, positions, mask), torch.device("cpu"), 1, 1)
    for way in job["ways"]:
        apply(work, checked(way))


if __name__ == "__main__":
    main()
