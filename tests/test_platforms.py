"""Windows and macOS, as far as Linux can play them: tests/elsewhere.py takes away what they do not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import sports_text

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="there it is so")
def test_the_common_path_needs_nothing_of_posix(tmp_path: Path):
    (tmp_path / "文本.txt").write_bytes(sports_text(80).encode("gb18030"))
    environment = os.environ | {"PYTHONIOENCODING": "gbk", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", ROOT / "tests" / "elsewhere.py", tmp_path],
        cwd=tmp_path, env=environment, capture_output=True, timeout=600,
    )  # fmt: skip
    said, out = done.stderr.decode("gbk", "replace"), done.stdout.decode("gbk")
    assert done.returncode == 0, said
    prepared, first, second, *sampled, scored, console = out.splitlines()
    assert json.loads(prepared)["documents"] == 80
    assert (json.loads(first)["step"], json.loads(second)["step"]) == (4, 6)
    assert any(line.startswith("妙笔?") for line in sampled), "what GBK lacks is a question mark, not a crash"
    assert json.loads(scored)["bits_per_char"] > 0
    assert json.loads(console) == {"encoding": "gbk", "methods": ["spawn"]}
    best = tmp_path / "run" / "checkpoints" / "best"
    assert best.is_dir()
    assert not best.is_symlink(), "where links are refused there are real directories"
    assert (best / "model.safetensors").is_file()
