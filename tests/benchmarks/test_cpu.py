"""The table of a CPU: what other benchmarks print becomes its rows, and what fails is named."""

import time

from benchmarks.common import ratio
from benchmarks.cpu import busy_rows, decode_rows, run, training_rows


def given(ours, theirs):
    found = ratio(ours, theirs)
    return {"pairs": found.pairs, "median": found.median, "low": found.low, "high": found.high}


def test_training_is_told_against_each_peer_and_with_its_memory():
    told = {
        "tokens_per_second": {"miaobi": [200.0, 220.0, 210.0], "nanoGPT": [100.0, 110.0, 105.0]},
        "sides": {"miaobi": {"dtype": "float32"}, "nanoGPT": {"dtype": "float32"}},
        "ratios": {"nanoGPT": given([200.0, 220.0, 210.0], [100.0, 110.0, 105.0])},
        "peak_mib": {"miaobi": 500.0, "nanoGPT": 1000.0},
    }
    speed, memory = training_rows("small", told, {"nanoGPT": "≥ 1.2"})
    assert (speed.ours, speed.theirs, speed.ratio, speed.bar) == (210.0, 105.0, "2.00 (2.00-2.00)", "≥ 1.2")
    assert (memory.ours, memory.theirs, memory.ratio) == (500.0, 1000.0, "0.50")


def test_a_busy_core_and_decoding_have_their_rows():
    busy = {"models": {"1.2M": {"quiet": [100.0], "busy": [60.0], "ratio": given([60.0], [100.0])}}}
    assert busy_rows(busy)[0].ratio == "0.60 (0.60-0.60)"
    decoding = {"tokens_per_second": {"1x200": {"llama.cpp bf16": [50.0]}},
                "ratios": {"1x200": {"llama.cpp bf16": given([60.0], [50.0])}}}  # fmt: skip
    row = decode_rows(decoding)[0]
    assert (row.ours, row.theirs, row.bar) == (60.0, 50.0, "≥ 1.0")


def test_a_benchmark_that_fails_or_takes_too_long_is_said():
    later = time.monotonic() + 60
    assert run("train_speed", ["--no_such_flag"], later).startswith("exit code")
    assert run("train_speed", ["--help"], time.monotonic()) == "the time was over"
