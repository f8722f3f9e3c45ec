"""The clock of time_to_quality, and a race without nanoGPT's scripts."""

import pytest
from benchmarks.time_to_quality import Args, from_first_step, nanogpt_whole, run_miaobi, seconds_of

from benchmarks import time_to_quality


def test_the_clock_begins_before_the_first_step():
    curve = [[12.0, 1, 6.0], [14.0, 2, 5.0], [16.0, 3, 4.0]]
    assert seconds_of(curve) == 6.0
    assert from_first_step(curve, before=1.0, scale=0.5) == [[3.0, 1, 3.0], [5.0, 2, 2.5], [7.0, 3, 2.0]]
    with pytest.raises(ValueError, match="two steps"):
        seconds_of(curve[:1])


def test_nanogpts_clock_leaves_its_evaluations_out(monkeypatch, tmp_path):
    """Its last line comes after its last evaluation, its first after its first: what lies between is steps."""
    curve = [[30.0, 0, 8.0], [31.0, 1, 7.0], [32.0, 2, 6.0], [90.0, 3, 5.0]]
    monkeypatch.setattr(time_to_quality, "run_nanogpt", lambda *_: {"curve": curve, "seconds": 95.0})
    side = nanogpt_whole(Args(data=tmp_path, steps=3), tmp_path, prepared=5.0)
    assert (side["seconds"], side["cold"]) == (3.0, 100.0)
    assert [step for _, step, _ in side["curve"]] == [0, 1, 2]


@pytest.mark.slow
def test_a_run_of_miaobi_is_scored_on_every_character(tmp_path):
    from tests.conftest import sports_text

    text = tmp_path / "text.txt"
    text.write_text(sports_text(), encoding="utf-8")
    args = Args(data=text, n_layer=1, n_head=2, n_embd=32, block_size=32, vocab_size=400, our_batch=2, our_steps=4)
    side = run_miaobi(args, tmp_path, seed=7)
    assert side["characters"] == pytest.approx(len(sports_text()) / 10, abs=2)
    assert side["counting"] > 0  # so short a run starts from bigrams
    assert side["seconds"] > side["counting"]
    assert side["cold"] > side["seconds"]
    assert [step for _, step, _ in side["curve"]] == [1, 2, 3, 4]
    assert side["curve"][0][0] > side["counting"]
