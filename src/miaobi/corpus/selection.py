"""Which documents are kept, and which of those are for validation: duplicates, shares of sources, the split."""

from __future__ import annotations

import numpy as np

from miaobi import console
from miaobi.corpus import clean, near
from miaobi.corpus.config import PrepareConfig
from miaobi.errors import UserError, number_of

DROP, TRAIN, VAL = 0, 1, 2
"""What a document is used for; a number above VAL: TRAIN, one time less than it says."""


def choose(
    digests: np.ndarray, sketches: np.ndarray | None, owners: np.ndarray, weights: np.ndarray, is_val: np.ndarray,
    cfg: PrepareConfig,
) -> tuple[np.ndarray, dict[str, int]]:  # fmt: skip
    """(documents,) uint8: DROP, TRAIN or VAL of each; and how many were dropped as exact and near duplicates, because
    they are in the validation file (`validation`), and for their source's weight (`weights`).

    Args:
        digests: (documents, 16) uint8, of their content.
        sketches: (documents, N_PERMUTATIONS) uint32 where near duplicates are looked for.
        owners: (documents,) which source each is from.
        weights, is_val: (sources,) its weight, and whether it is the file for validation (--val).
    """
    dropped = {"exact": 0, "near": 0, "validation": 0, "weights": 0}
    for_val = is_val[owners]
    keep = np.ones(len(digests), bool)
    if (weights < 1).any():  # first: a document that one source loses may come from another
        keep = shares(digests) < weights[owners]
        dropped["weights"] = int((~keep).sum())
    if for_val.any():
        known = keep & ~for_val & clean.are_among(digests, digests[for_val])
        dropped["validation"] = int(known.sum())
        keep &= ~known
    if cfg.dedup != "none" and cfg.split == "hash":
        taken = keep & ~for_val  # the file for validation stays what it is
        first = taken.copy()
        first[taken] = clean.first_occurrences(digests[taken])
        dropped["exact"] = int(taken.sum() - first.sum())
        if sketches is not None:
            order = np.argsort(~for_val, kind="stable")  # what is in validation comes first
            is_first = np.empty(len(order), bool)
            is_first[order] = near.first_of_their_kind(sketches[order], cfg.near_threshold)
            dropped["near"] = int((first & ~is_first).sum())
            first &= is_first
        keep = first | (keep & for_val)
    if is_val.any():
        goes_to_val = for_val
    elif cfg.split == "hash":
        goes_to_val = clean.is_validation(digests, cfg.val_fraction)
    else:  # the last dialogues, wherever weights thin them out
        goes_to_val = np.arange(len(digests)) >= int(len(digests) * (1 - cfg.val_fraction))
    return np.where(keep, np.where(goes_to_val, VAL, TRAIN), DROP).astype(np.uint8), dropped


def shares(digests: np.ndarray) -> np.ndarray:
    """(documents,) float64 in [0, 1), by content and unrelated to the split."""
    return digests[:, :8].copy().view("<u8").ravel() / 2.0**64


def repeat(choice: np.ndarray, digests: np.ndarray, weights: np.ndarray) -> None:
    """Marks training documents whose source has a weight above 1, (documents,), to come several times."""
    copies = np.floor(weights) + (shares(digests) < weights - np.floor(weights))
    often = (choice == TRAIN) & (copies > 1)
    choice[often] = copies[often] + 1


def copies_in_training(choice: np.ndarray) -> np.ndarray:
    """(documents,) int64: how often each document is in the training part."""
    return np.where(choice > VAL, choice.astype(np.int64) - 1, choice == TRAIN)


def fill_empty_side(choice: np.ndarray, digests: np.ndarray, characters: int) -> None:
    """With a handful of documents, chance may leave one side of the split empty; it then gets the nearest document.

    Raises UserError where there are not two of them.
    """
    used = np.flatnonzero(choice != DROP)
    if len(used) < 2:
        raise UserError(
            f"the text is {number_of(len(used), 'document')} of {number_of(characters, 'character')}: too little "
            "to keep some for validation. Give more text; or --format=lines if every line is a document; "
            "or --split=tail to cut the characters instead"
        )
    for side in (VAL, TRAIN):
        if not (choice == side).any():
            ranks = digests[used][:, 8:].copy().view("<u8").ravel()
            choice[used[ranks.argmin() if side == VAL else ranks.argmax()]] = side
            console.warn(
                f"only {number_of(len(used), 'document')}: one of them was put into "
                f"{'validation' if side == VAL else 'training'}, "
                "which had none"
            )
