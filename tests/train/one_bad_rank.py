"""`miaobi train`, where what one rank computes is not finite: `python one_bad_rank.py WHAT RANK STEPS ARGUMENTS...`.

WHAT: `loss` (its gradient is fine), `gradient` (as it goes back through the model), or `norm` (what that rank alone
finds after all have shared their gradients). STEPS: 0-based, as 4,8,9; each goes wrong once.
"""

import os
import sys

import torch
from torch import nn

from miaobi.cli import main
from miaobi.train.layout import Objective
from miaobi.train.loop import Run

what, rank, steps = sys.argv[1], sys.argv[2], set(map(int, sys.argv[3].split(",")))
forward, step, clip = Objective.forward, Run.step, nn.utils.clip_grad_norm_
bad = False


def counted(self: Run, n: int):
    global bad
    bad = n in steps and os.environ["RANK"] == rank
    steps.discard(n)
    return step(self, n)


def computed(self: Objective, *args):
    loss = forward(self, *args)
    if bad and self.training and what == "gradient":
        loss.register_hook(lambda g: g * torch.nan)
    return loss + torch.inf if bad and self.training and what == "loss" else loss


def clipped(*args):
    norm = clip(*args)
    return norm * torch.nan if bad and what == "norm" else norm


Run.step, Objective.forward, nn.utils.clip_grad_norm_ = counted, computed, clipped
main(["train", *sys.argv[4:]])
