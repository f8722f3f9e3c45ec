"""Links that somebody left in a directory of ours: what is written replaces the link, never what it leads to."""

import csv
from pathlib import Path

import pytest
from tests.conftest import tiny

from miaobi.files import text_written_whole, write_json, write_text
from miaobi.model.checkpoint import save_tensors

NAMES = (
    "config.yaml",
    "metrics.jsonl",
    "report.html",
    "text.json",
    "ablation.csv",
    "ablation.png",
    ".lock",
    "README.md",
)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the user's that a stranger's link leads to."""
    (tmp_path / "secret").write_text("mine", encoding="utf-8")
    return tmp_path / "secret"


def linked(directory: Path, secret: Path) -> None:
    directory.mkdir(parents=True)
    for name in NAMES:
        (directory / name).symlink_to(secret)


def test_the_writers_of_files_replace_links(tmp_path, secret):
    place = tmp_path / "place"
    for write in (lambda p: write_text(p, "x"), lambda p: write_json(p, {})):
        place.symlink_to(secret)
        write(place)
        assert not place.is_symlink()
        place.unlink()
    place.symlink_to(secret)
    with text_written_whole(place) as file:
        file.write("x")
    assert not place.is_symlink()
    assert secret.read_text(encoding="utf-8") == "mine"


def test_a_run_writes_through_none(miaobi, prepared, tmp_path, secret):
    linked(tmp_path / "run", secret)
    flags = [f"--data={prepared()}", f"--out_dir={tmp_path / 'run'}", *tiny(max_iters=2, eval_interval=2)]
    answer = miaobi("train", *flags)
    assert answer.code in (0, 2), answer.err  # a lock that is a link is refused
    (tmp_path / "run" / ".lock").unlink(missing_ok=True)
    answer = miaobi("train", *flags)
    assert answer.code == 0, answer.err
    assert secret.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("name", ["checkpoints", "wandb"])
def test_a_run_is_not_led_into_another_directory(miaobi, prepared, tmp_path, name):
    """Neither written nor deleted, nor moved aside by --init_from=scratch."""
    (tmp_path / "run").mkdir()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step-1").mkdir(parents=True)
    (tmp_path / "run" / name).symlink_to(elsewhere)
    for more in ((), ("--init_from=scratch",)):
        flags = [f"--data={prepared()}", f"--out_dir={tmp_path / 'run'}", *tiny(max_iters=2, eval_interval=2), *more]
        answer = miaobi("train", *flags)
        assert answer.code == 2
        assert f"{name} is a link to {elsewhere}" in answer.err
    assert [path.name for path in elsewhere.iterdir()] == ["step-1"]


def test_an_ablation_is_not_led_into_another_directory(miaobi, trained, tmp_path):
    (tmp_path / "reviews.csv").write_text(
        "label,review\n" + "".join(f"{i % 2},{'输赢'[i % 2]}了{i}\n" for i in range(60)), encoding="utf-8"
    )
    (tmp_path / "grid").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "grid" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    answer = miaobi("classify", "train", f"--base_model={trained()}", f"--data={tmp_path / 'reviews.csv'}",
                    f"--out_dir={tmp_path / 'grid'}", "--max_epoch=1", "--device=cpu")  # fmt: skip
    assert answer.code == 2
    assert "checkpoints is a link to" in answer.err
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_ablation_writes_through_none_whatever_its_table_is_called(miaobi, trained, tmp_path, secret):
    """A name with $ is no formula to the plot, and brackets are no markup to the table."""
    table = tmp_path / "re$\\frac[bold]views.csv"
    rows = [("label", "review"), *((i % 2, f"皇马赢得{i}" if i % 2 else f"曼联输掉{i}") for i in range(60))]
    with table.open("w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows(rows)
    linked(tmp_path / "grid", secret)
    (tmp_path / "grid" / ".lock").unlink()
    answer = miaobi("classify", "ablate", f"--base_model={trained()}", f"--data={table}",
                    f"--out_dir={tmp_path / 'grid'}", "--max_epoch=1", "--trainable=head", "--pooling=mask",
                    "--device=cpu", "--dtype=float32")  # fmt: skip
    assert answer.code == 0, answer.err
    assert secret.read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "grid" / "ablation.png").read_bytes()[:4] == b"\x89PNG"


def test_weights_are_as_readable_as_any_other_file(tmp_path):
    import torch

    save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode
