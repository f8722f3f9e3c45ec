"""Cross-entropy of a linear layer without keeping its logits.

The output layer of a small Chinese model is its widest matrix: 8,192 tokens by 4,391 characters are 144 MB of
fp32 logits, as much again for their log-softmax and for their gradient. Here rows are handled in chunks that stay
in cache, and each chunk's gradient is taken while its logits are at hand (the idea of Liger Kernel,
arXiv:2410.10989, and Cut Cross-Entropy, arXiv:2411.09009). torch's own `linear_cross_entropy` is newer than the
oldest torch we support.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miaobi.corpus.dataset import IGNORE

CPU_CHUNK = 1 << 22  # logits per chunk: 16 MB in fp32, half of a server's L3
GPU_CHUNK = 1 << 27


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        N, V = x.shape[0], weight.shape[0]
        w = weight.to(dtype)
        train = any(ctx.needs_input_grad[:2])
        needs_weight_grad = ctx.needs_input_grad[1]  # not so under LoRA: a third of the work less
        grad_x = torch.empty_like(x) if train else None
        grad_w = torch.zeros_like(w, dtype=torch.float32) if needs_weight_grad else None  # sums over chunks need fp32
        total = x.new_zeros((), dtype=torch.float32)
        rows = max(1, (CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK) // V)
        for i in range(0, N, rows):
            x_i, t_i = x[i : i + rows].to(dtype), targets[i : i + rows]
            log_p = F.log_softmax(x_i @ w.T, dim=-1, dtype=torch.float32)  # (rows, V)
            scored = t_i != IGNORE
            index = t_i.clamp(min=0).unsqueeze(1)
            total -= (log_p.gather(1, index).squeeze(1) * scored).sum()
            if train:
                grad = log_p.exp_()
                grad.scatter_add_(1, index, grad.new_full((), -1.0).expand_as(index))
                grad = grad.mul_(scored.unsqueeze(1)).to(dtype)
                grad_x[i : i + rows] = grad @ w
                if not needs_weight_grad:
                    continue
                if dtype == torch.float32:
                    grad_w.addmm_(grad.T, x_i)
                else:
                    grad_w += grad.T @ x_i
        ctx.save_for_backward(grad_x, grad_w)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        grad_x, grad_w = ctx.saved_tensors
        to_weight = None if grad_w is None else grad_w.to(ctx.weight_dtype) * grad_output
        return grad_x * grad_output, to_weight, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(x W^T)[target] in nats over targets that are not IGNORE.

    x: (N, C) or (B, T, C). weight: (V, C). targets: (N,) or (B, T), int64. Returns a float32 scalar.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), dtype)
