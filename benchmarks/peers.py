"""The peers: nanoGPT from a copy of a checkout, transformers from its package, both given our weights.

Nothing of nanoGPT is kept in this repository; `--nanogpt` names a checkout of github.com/karpathy/nanoGPT.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.common import clock
from miaobi.corpus.dataset import IGNORE, batch
from miaobi.corpus.prepared import PreparedData
from miaobi.device import peak_memory, pick_device, pick_dtype, reset_peak_memory

TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face keeps them as Conv1D


def copy_nanogpt(checkout: str | Path, to: str | Path) -> Path:
    """Copy a checkout to a new directory `to`, so that nothing is ever written into it. Exits where it is none."""
    checkout, to = Path(checkout), Path(to)
    if not (checkout / "model.py").is_file() or not (checkout / "train.py").is_file():
        sys.exit(f"--nanogpt {checkout}: no model.py and train.py there; "
                 "git clone https://github.com/karpathy/nanoGPT and name that directory")  # fmt: skip
    shutil.copytree(checkout, to, ignore=shutil.ignore_patterns(".git", "*.bin", "out*", "__pycache__"))
    return to


def import_nanogpt(copy: str | Path) -> Any:
    """The module model.py of a copied checkout."""
    sys.path.insert(0, str(copy))
    return importlib.import_module("model")


def nanogpt_model(weights: str | Path) -> nn.Module:
    """The GPT of the copy beside `weights`, without biases, with the weights of that GPT-2 directory (zero biases)."""
    module = import_nanogpt(Path(weights).parent / "nanoGPT")
    hf = json.loads((Path(weights) / "config.json").read_text(encoding="utf-8"))
    sizes = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "block_size": "n_positions",
             "vocab_size": "vocab_size"}  # fmt: skip
    config = {theirs: hf[ours] for theirs, ours in sizes.items()}
    model = module.GPT(module.GPTConfig(bias=False, dropout=0.0, **config))
    state = {
        name: tensor.T if name.endswith(TRANSPOSED) else tensor
        for name, tensor in load_file(Path(weights) / "model.safetensors").items()
        if not name.endswith(".bias")
    }
    state["lm_head.weight"] = state["transformer.wte.weight"]  # one tied matrix under two names
    model.load_state_dict(state)
    return model


def transformers_model(weights: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """GPT2LMHeadModel of a model directory; its biases stay zero, so that it is the same model as the others."""
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(weights, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(".bias"))
    return model


class Trainer:
    """A peer's model in a plain PyTorch loop, on the batches that miaobi draws, made before the clock starts.

    kind: `nanogpt`, set up as its train.py does (fp32, not compiled on a CPU; bf16 or fp16, compiled and fused on a
    GPU), `transformers` (fp32), or `transformers-fast` (compiled, with the best precision of the device).
    """

    def __init__(self, kind: str, work: Path, device: str, rows: int, seed: int, optim: dict[str, float]) -> None:
        self.kind, self.rows, self.seed, self.clip = kind, rows, seed, optim["grad_clip"]
        self.device = pick_device(device)
        self.data = PreparedData.open(work / "data").train
        self.done = 0
        torch.set_float32_matmul_precision("high")  # TF32 on GPUs
        load = nanogpt_model if kind == "nanogpt" else transformers_model
        self.model = load(work / "weights").to(self.device).train()
        decay, rate, betas = optim["weight_decay"], optim["learning_rate"], (optim["beta1"], optim["beta2"])
        if kind == "nanogpt":
            self.optimizer = self.model.configure_optimizers(decay, rate, betas, self.device.type)
            self.block_size = self.model.config.block_size
        else:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            groups = [{"params": [p for p in trained if p.ndim >= 2], "weight_decay": decay},
                      {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
            self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
            self.block_size = self.model.config.n_positions
        self.dtype = torch.float32
        with torch.no_grad():
            self.first = self.loss(*self.batch(0)).item()
        if kind == "transformers-fast" or (kind == "nanogpt" and self.device.type == "cuda"):
            self.dtype = pick_dtype("auto", self.device)
            self.model = torch.compile(self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step on the device."""
        x, y = batch(self.data, self.block_size, self.rows, self.seed, step)
        if self.kind == "nanogpt":
            y = np.where(y == IGNORE, -1, y)  # the target that it does not score
        return torch.from_numpy(x).to(self.device), torch.from_numpy(y).to(self.device)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean nats per token."""
        if self.kind == "nanogpt":
            return self.model(x, y)[1]
        logits = self.model(input_ids=x, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), ignore_index=IGNORE)

    def about(self) -> dict[str, Any]:
        """What was chosen, and the loss of the first batch in fp32 before any step."""
        compiled = hasattr(self.model, "_orig_mod")
        return {"first_loss": self.first, "dtype": str(self.dtype).removeprefix("torch."), "compiled": compiled}

    def steps(self, count: int) -> tuple[float, float]:
        """(seconds, last loss) of `count` optimizer steps."""
        ready = [self.batch(self.done + i) for i in range(count)]
        start = clock(self.device)
        for x, y in ready:
            with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                loss = self.loss(x, y)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        self.done += count
        return clock(self.device) - start, loss.item()

    def memory(self, reset: bool = False) -> int:
        """Most bytes held at once since this was called with `reset`."""
        if reset:
            reset_peak_memory(self.device)
        return peak_memory(self.device)


class Scorer:
    """A checkpoint of nanoGPT's train.py under its own model, on the validation part that its prepare.py wrote."""

    def __init__(self, copy: Path, checkpoint: Path, data: Path) -> None:
        module = import_nanogpt(copy)
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        self.model = module.GPT(module.GPTConfig(**saved["model_args"]))
        self.model.load_state_dict(saved["model"])
        self.model.eval()
        train, val = (np.fromfile(data / f"{split}.bin", dtype=np.uint16) for split in ("train", "val"))
        tokens = np.concatenate((train[-1:], val))  # the token before is context: every token of val is scored
        self.tokens = tokens.astype(np.int64)

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        """Nats per token over non-overlapping windows, as `miaobi eval --stride=block` cuts them."""
        block, total = self.model.config.block_size, 0.0
        for at in range(0, len(self.tokens) - 1, block):
            piece = torch.from_numpy(self.tokens[at : at + block + 1])[None]
            total += self.model(piece[:, :-1], piece[:, 1:])[1].item() * (piece.shape[1] - 1)
        scored = len(self.tokens) - 1
        return {"loss": total / scored, "tokens": scored, "parameters": self.model.get_num_params()}
