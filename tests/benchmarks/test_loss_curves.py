"""Losses of two versions of the code are told apart, and are equal to the last bit where the code is."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.loss_curves import ROOT, SHAPE, losses, main, side
from tests.conftest import sports_text

from benchmarks import loss_curves

TINY = SHAPE | {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 2, "max_iters": 3,
                "eval_interval": 3, "eval_iters": 1}  # fmt: skip
CLIMBS = """
made = make_optimizers
def make_optimizers(*given):
    found = made(*given)
    for one in found:
        parameters = [p for group in one.param_groups for p in group["params"]]
        one.register_step_pre_hook(lambda *_, of=parameters: [p.grad.neg_() for p in of] and None)
    return found
"""


@pytest.mark.slow
def test_another_version_starts_alike_and_differs_from_the_step_on_in_which_its_code_does(tmp_path: Path):
    shutil.copytree(ROOT / "src", tmp_path / "before" / "src", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "before" / "src" / "miaobi" / "train" / "optimizer.py").open("a", encoding="utf-8") as f:
        f.write(CLIMBS)
    (tmp_path / "text.txt").write_text(sports_text(60), encoding="utf-8")
    values = TINY | {"data": tmp_path / "text.txt", "family": "gpt2", "optimizer": "adamw", "bigram_init": False,
                     "warmup_iters": 0}  # fmt: skip
    ours = losses(side(ROOT), values, tmp_path / "ours")
    theirs = losses(side(tmp_path / "before"), values, tmp_path / "theirs")
    assert len(ours) == len(theirs) == 3
    assert ours[0] == theirs[0]
    assert ours[1] < theirs[1], "it climbs where ours descends"


@pytest.mark.parametrize(("drift", "tolerance", "code"), [(0.0, 0.0, None), (1e-3, 0.0, 1), (1e-3, 1e-2, None)])
def test_the_greatest_difference_decides(monkeypatch, capsys, tmp_path: Path, drift, tolerance, code):
    here = side(ROOT)
    sides = iter([replace(here, name="before"), replace(here, name="after")])
    monkeypatch.setattr(loss_curves, "side", lambda path: next(sides))
    monkeypatch.setattr(loss_curves, "losses", lambda one, *_: [3.0, 2.0 + drift * (one.name == "after")])
    words = [f"--data={tmp_path}", f"--before={ROOT}", f"--tolerance={tolerance}", f"--plot={tmp_path / 'plot.png'}"]
    monkeypatch.setattr(sys, "argv", ["loss_curves", *words])
    if code:
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
    else:
        main()
    assert f"{drift:.2e}" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_what_is_no_version_of_it_is_refused(tmp_path: Path):
    """A directory without the code must not be taken for the one that is installed."""
    with pytest.raises(SystemExit, match="neither a checkout"):
        side(tmp_path)
