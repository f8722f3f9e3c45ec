"""AdamW, Muon, and the learning rate over a run."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from miaobi.config import OptimConfig
from miaobi.model.families import qkv_widths
from miaobi.model.transformer import Transformer
from miaobi.train.layout import is_sharded, local_part, part_of, shards_of, whole
from miaobi.train.orthogonal import iteration_dtype, orthogonalize

ASYNCHRONOUS = ("cuda",)
"""Devices that compute while Python continues: reading a value from one waits for everything it was given."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Differs from torch.optim.Muon where it hurt here: fused q/k/v and gate/up matrices are orthogonalised part by
    part, matrices of one shape go through one batched product, and the iterations run in fp32 on hardware without
    bf16 (where torch's bf16-only iteration is about a hundred times slower).

    Param groups carry `parts`: for each parameter, the row counts to split it into.
    """

    found_inf: Tensor | None = None
    """A scalar on the parameters' device: 1 = skip the step. As in torch's fused optimizers."""

    def __init__(self, groups: list[dict], lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        """weight_decay: decoupled, as AdamW's (arXiv:1711.05101): a step takes lr x weight_decay of every weight, so
        that it follows the schedule of lr.
        """
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every matrix that has a gradient."""
        loss = closure() if closure is not None else None
        if self.found_inf is None:
            is_bad, share = None, torch.ones((), device=self.param_groups[0]["params"][0].device)
        else:
            is_bad, share = self.found_inf.bool(), 1 - self.found_inf
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, list[int]]]] = {}
            for p, parts in zip(group["params"], group["parts"], strict=True):
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append((p, parts))
            for alike in by_shape.values():
                # sharded matrices are whole for a moment: only as many at once as there are ranks to work on them
                at_once = world_size() if is_sharded(alike[0][0]) else len(alike)
                for i in range(0, len(alike), at_once):
                    self._move(alike[i : i + at_once], group, is_bad, share)
        return loss

    def _move(self, alike: list[tuple[Tensor, list[int]]], group: dict, is_bad: Tensor | None, share: Tensor):
        """Update parameters of one shape, each split into the same parts, with a few kernel launches for all of them.

        is_bad, share: `found_inf` as a bool, and its complement as a factor of the update, 0 or 1; float32 scalars.
        """
        lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
        params, parts = [p for p, _ in alike], alike[0][1]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        weights = [local_part(p) for p in params]
        buffers = [local_part(self.state[p]["momentum_buffer"]) for p in params]
        stacked = torch.stack([local_part(p.grad) for p in params])
        if is_bad is not None:  # towards itself a buffer does not move, and what follows is finite
            stacked = torch.where(is_bad, torch.stack(buffers), stacked)
        grads = stacked.unbind()
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        torch._foreach_lerp_(grads, buffers, momentum)
        if is_sharded(params[0]):
            stacked = torch.stack([whole(shards_of(g, p)) for g, p in zip(grads, params, strict=True)])
        pieces = stacked.split(parts, dim=1)  # (N, rows, C) each
        by_shape: dict[torch.Size, list[int]] = {}
        for i, piece in enumerate(pieces):
            by_shape.setdefault(piece.shape, []).append(i)
        moved = list(pieces)
        for shape, indices in by_shape.items():
            scale = math.sqrt(max(1.0, shape[1] / shape[2]))
            together = pieces[indices[0]] if len(indices) == 1 else torch.cat([pieces[i] for i in indices])
            orthogonal = shared_orthogonalize(together)
            factor = share if scale == 1.0 else scale * share
            orthogonal = orthogonal * factor.view(1, 1, 1)  # with dimensions it widens what was iterated in bf16
            for i, o in zip(indices, orthogonal.split(len(alike)), strict=True):
                moved[i] = o
        updates = (moved[0] if len(moved) == 1 else torch.cat(moved, dim=1)).unbind()
        if is_sharded(params[0]):
            updates = [local_part(part_of(update, p)) for update, p in zip(updates, params, strict=True)]
        if weight_decay:
            torch._foreach_mul_(weights, 1 - lr * weight_decay * (1 if is_bad is None else share))
        torch._foreach_add_(weights, updates, alpha=-lr)


def world_size() -> int:
    """Number of ranks of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shared_orthogonalize(g: Tensor) -> Tensor:
    """`orthogonalize` of g (N, R, C), with its matrices divided among the ranks."""
    ranks = world_size()
    if ranks == 1:
        return orthogonalize(g)
    each = -(-len(g) // ranks)
    rank = dist.get_rank()
    mine = torch.zeros(each, *g.shape[1:], dtype=iteration_dtype(g.device), device=g.device)
    share = g[rank * each : (rank + 1) * each]
    if len(share):
        mine[: len(share)] = orthogonalize(share)
    everyone = torch.empty(ranks * each, *g.shape[1:], dtype=mine.dtype, device=g.device)
    dist.all_gather(list(everyone.split(each)), mine)
    return everyone[: len(g)]


def make_optimizers(model: Transformer, cfg: OptimConfig, kind: str) -> list[torch.optim.Optimizer]:
    """AdamW over everything (`adamw`), or Muon for the blocks' matrices and AdamW for the rest (`muon`).

    AdamW decays parameters of two dimensions only, as nanoGPT does. `lr` of each group is its peak; `set_rate`
    scales it.
    """
    matrices = []
    if kind == "muon":
        for block in model.blocks:
            gated = 2 if block.mlp.gated else 1
            matrices += [
                (block.attn.qkv.weight, qkv_widths(block.attn)),
                (block.attn.proj.weight, [block.attn.proj.weight.shape[0]]),
                (block.mlp.up.weight, [block.mlp.up.weight.shape[0] // gated] * gated),
                (block.mlp.down.weight, [block.mlp.down.weight.shape[0]]),
            ]
    taken = {id(p) for p, _ in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken and p.requires_grad]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=fused)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        group = {"params": [p for p, _ in matrices], "parts": [parts for _, parts in matrices]}
        optimizers.append(Muon([group], cfg.muon_learning_rate, cfg.momentum, cfg.muon_weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def step_all(optimizers: list[torch.optim.Optimizer], norm: Tensor) -> None:
    """One step of all optimizers, or of none if `norm`, of all gradients on all ranks, is not finite.

    On a GPU this does not wait for the value: the optimizers get it as a tensor (torch's own `found_inf`).
    """
    found_inf = None
    if norm.device.type in ASYNCHRONOUS:
        found_inf = (~norm.isfinite()).float()
    elif not bool(norm.isfinite()):
        return
    for optimizer in optimizers:
        optimizer.found_inf = found_inf
        optimizer.step()


def rate(step: int, cfg: OptimConfig, at: float | None = None) -> float:
    """Learning rate of `step` (0-based) as a share of the peak; `cfg` is resolved.

    cosine is nanoGPT's get_lr; wsd (warm-up, stable, decay; arXiv:2404.06395) decays linearly at the end.

    at: position in the schedule after the warm-up, if it is not `step` (`schedule.share_of_rate`).
    """
    floor = cfg.min_lr / cfg.learning_rate
    if not cfg.decay_lr:  # nanoGPT's: neither decay nor warm-up
        return 1.0
    if cfg.warmup_iters and step < cfg.warmup_iters:
        return (step + 1) / (cfg.warmup_iters + 1)
    if cfg.schedule == "constant":
        return 1.0
    at = step if at is None else at
    if at >= cfg.lr_decay_iters:
        return floor
    if cfg.schedule == "cosine":
        done = (at - cfg.warmup_iters) / max(1, cfg.lr_decay_iters - cfg.warmup_iters)
        return floor + 0.5 * (1.0 + math.cos(math.pi * done)) * (1.0 - floor)
    decay_iters = max(1, round(cfg.decay_fraction * cfg.lr_decay_iters))
    left = (cfg.lr_decay_iters - at) / decay_iters
    return floor + min(1.0, left) * (1.0 - floor)


def set_rate(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Scale every group's peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
