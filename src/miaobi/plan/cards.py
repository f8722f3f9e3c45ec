"""GPUs by name: memory, speed and power, from the vendors' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from miaobi.device import PEAK_FLOPS
from miaobi.errors import UserError

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """Figures from the data sheet."""

    name: str
    memory: int
    """Bytes."""
    flops: float
    """Dense bf16 FLOP/s; fp16 or fp32 where there is no bf16."""
    watts: float
    has_bf16: bool = True


def card(name: str, gib: float, watts: float, has_bf16: bool = True) -> Card:
    """A row of the table; the FLOP/s come from `device.PEAK_FLOPS`."""
    flops = next(flops for key, flops in PEAK_FLOPS.items() if key in name)
    return Card(name, int(gib * GIB), flops, watts, has_bf16)


CARDS = [
    card("RTX 5090", 32, 575), card("RTX 5080", 16, 360), card("RTX 4090", 24, 450), card("RTX 4080", 16, 320),
    card("RTX 4070", 12, 200), card("RTX 4060", 8, 115), card("RTX 3090", 24, 350), card("RTX 3080", 10, 320),
    card("RTX 3070", 8, 220), card("RTX 3060", 12, 170), card("B200", 180, 1000), card("H200", 141, 700),
    card("H100", 80, 700), card("H800", 80, 700), card("H20", 96, 400), card("A100-80GB", 80, 400),
    card("A100", 40, 400), card("A800", 80, 400), card("L40S", 48, 350), card("L4", 24, 72), card("A10", 24, 150),
    card("V100", 16, 300, has_bf16=False), card("T4", 16, 70, has_bf16=False),
]  # fmt: skip


def normalized(name: str) -> str:
    """A name without vendor, spaces and punctuation: `NVIDIA GeForce RTX 4080` and `rtx4080` are the same card."""
    return re.sub(r"nvidia|geforce|tesla|rtx|[^a-z0-9]", "", name.lower())


def find_card(name: str) -> Card:
    """The card of that name. Raises UserError, with the known names, for one that is not in the table."""
    asked = normalized(name)
    for known in CARDS:
        if normalized(known.name) == asked:
            return known
    names = ", ".join(known.name for known in CARDS)
    raise UserError(f"gpu {name!r} is not in the table of cards; known are {names}. For another one, "
                    "take the nearest in memory and speed")  # fmt: skip


def local_card(device: torch.device) -> Card | None:
    """The GPU of this machine, with the memory that its driver reports; None for a CPU or an Apple chip."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    asked, memory = normalized(name), torch.cuda.get_device_properties(device).total_memory
    known = max((c for c in CARDS if normalized(c.name) in asked), key=lambda c: len(c.name), default=None)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Card(name, memory, known.flops if known else 0.0, known.watts if known else 0.0, has_bf16)
