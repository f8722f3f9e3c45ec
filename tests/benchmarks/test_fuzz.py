"""The short form of `python -m benchmarks.fuzz`: whatever a file holds, a result or a clear error."""

import random
import sys
from pathlib import Path

import pytest
from tests import processes

from benchmarks import mutations

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_no_format_ends_in_anything_but_a_result_or_an_error_for_the_user(tmp_path):
    done = processes.run(["-m", "benchmarks.fuzz", "--minutes=0.12", f"--keep={tmp_path}"], cwd=ROOT)
    why = "\n".join(file.read_text()[-3000:] for file in tmp_path.glob("*.why"))
    assert done.returncode == 0, done.stderr[-3000:] + why
    assert " 0 failures" in done.stderr


@pytest.mark.parametrize("name", ["json_changed", "bytes_changed", "text_changed", "recoded"])
def test_mutations_are_the_same_for_the_same_draw_and_do_change_something(name):
    valid = '{"a": [1, 2, {"b": "笔"}], "c": null}\n{"a": 1}\n'.encode()  # recoded, ASCII would often stay what it is
    valid = valid.splitlines()[0] if name == "json_changed" else valid
    mutate = getattr(mutations, name)
    found = [mutate(random.Random(seed), valid) for seed in range(60)]
    assert found == [mutate(random.Random(seed), valid) for seed in range(60)]
    assert len(set(found)) > 40
    assert sum(case == valid for case in found) < 10
