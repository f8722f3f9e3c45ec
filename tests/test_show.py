"""What people see of results."""

import shlex
from pathlib import Path

import pytest

from miaobi import show
from miaobi.corpus.config import PrepareConfig

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (60, "1.0 min"), (1598, "26.6 min"), (3600, "1.0 h")]
)
def test_times_are_in_units_that_suit_them(seconds: float, shown: str):
    assert show.duration(seconds) == shown


def prepared(out: str, **settings: object) -> dict:
    """What `prepare` gives for a text, printed."""
    result = {"out": out, "documents": 1, "characters": 1, "distinct_characters": 1, "vocab_size": 5, "train_tokens": 1,
              "val_tokens": 2, "duplicates_removed": 1, "skipped_in": [], "seconds": 0.1}  # fmt: skip
    show.prepared(result, PrepareConfig(out=Path(out), **settings))


@pytest.mark.parametrize(
    ("out", "settings", "config"),
    [("data/novel", {}, "demo"), ("data/TH", {}, "train_TH"), ("/x/data/TH", {"split": "tail"}, "train_TH"),
     ("data/TH", {"format": "dialogue"}, "chat-13m"), ("TH", {}, "demo"),
     ("my data/小说's", {"format": "lines"}, "demo")],
)  # fmt: skip
def test_prepare_ends_in_a_command_that_a_shell_reads_as_meant(out, settings, config, capsys):
    prepared(out, **settings)
    told = capsys.readouterr().out
    assert told.startswith(f"{out}: 1 document, 1 character (")
    assert "train 1 token, validation 2 tokens, 1 duplicate removed" in told
    words = shlex.split(told.strip().splitlines()[-1])
    assert words == ["next:", "miaobi", "train", f"configs/{config}.yaml", f"--data={out}", "--out_dir=my_run"]
    assert (ROOT / words[3]).is_file()


@pytest.mark.parametrize("name", ["run", "my run", "运行$1"])
@pytest.mark.parametrize("talks", [False, True])
def test_a_run_or_a_model_ends_in_the_verb_that_suits_it(tmp_path, capsys, name, talks):
    best = tmp_path / name / "checkpoints" / "best"
    best.mkdir(parents=True)
    if talks:
        (best / "chat_template.jinja").write_text("", encoding="utf-8")
    run = str(tmp_path / name)
    show.trained({"run": run, "stopped": "finished", "step": 3, "best_step": 0}, None)
    show.converted({"out": str(best), "parameters": 1, "vocab_size": 5, "spare_rows": 1}, None)
    trained, converted = (shlex.split(line) for line in capsys.readouterr().out.splitlines() if "next:" in line)
    for words, path in ((trained, run), (converted, str(best))):
        assert words[2:] == (["chat", path] if talks else ["sample", path, "--start=中国"])
