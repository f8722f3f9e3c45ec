"""The notebook for a T4: its cells run in order where there is no GPU, but for those that need Colab."""

import json
from pathlib import Path

import pytest
from tests import processes

NOTEBOOK = Path(__file__).parents[1] / "examples" / "t4.ipynb"


def cells() -> list[dict]:
    """Code cells, in order."""
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def test_what_does_not_run_here_says_why_and_nothing_was_left_in():
    for cell in cells():
        source = "".join(cell["source"])
        needs_colab = "needs-colab" in cell["metadata"].get("tags", [])
        assert needs_colab == (source.startswith(("%", "!")) or "google.colab" in source)
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.slow
def test_the_cells_run_in_order(tmp_path: Path):
    here = ["".join(cell["source"]) for cell in cells() if not cell["metadata"].get("tags")]
    assert len(here) >= 5
    done = processes.run(["-c", "\n".join(here)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "max_iters at step 20" in done.stdout
    assert done.stdout.count("中国") >= 2
    assert "bits per character" in done.stdout
    assert (tmp_path / "news_run" / "checkpoints" / "best" / "model.safetensors").is_file()
    assert (tmp_path / "news_run" / "report.html").is_file()
