"""What a run notices: loss spikes, a disk that fills up, a slowdown, each with its cause."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from miaobi.config import DataConfig
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.dataset import IGNORE
from miaobi.corpus.prepare import prepare
from miaobi.corpus.prepared import PreparedData
from miaobi.train import alarms
from miaobi.train.alarms import Alarms, Usage, cause
from miaobi.train.data import open_blocks
from miaobi.train.loop import Run


@pytest.fixture
def watching(prepared):
    """Alarms over a run that does not go on by itself."""
    data = PreparedData.open(prepared())
    blocks, _ = open_blocks(DataConfig(), data, 32)
    train = SimpleNamespace(global_batch=8, seed=1337)
    plan = SimpleNamespace(cfg=SimpleNamespace(train=train), data=data, blocks=blocks, tokenizer=data.tokenizer)
    return Alarms(plan)


def record(watching: Alarms, *losses: float, first: int = 0) -> None:
    values = torch.tensor(losses, dtype=torch.float64)
    watching.finite_losses(first, values, torch.zeros_like(values))


def test_a_loss_spike_is_a_warning_with_the_documents_of_its_batch(watching, capsys):
    draw = np.random.default_rng(0)
    record(watching, *(4.0 + 0.05 * draw.standard_normal(40)))
    assert not capsys.readouterr().err
    record(watching, 4.0, 7.5, first=40)
    said = capsys.readouterr().err
    assert re.search(r"step 42: the loss spikes to 7\.50 from 4\.0\d\. Its batch holds documents ", said)
    named = [int(n) - 1 for n in re.search(r"documents ([\d, ]+\d)", said)[1].split(",")]
    assert named == watching.plan.blocks.documents(8, 1337, 41)[: len(named)].tolist()


def test_falling_and_noisy_losses_are_no_spikes(watching, capsys):
    draw = np.random.default_rng(1)
    record(watching, *(8.0 * np.exp(-np.arange(200) / 60) + 2 + 0.2 * draw.standard_normal(200)))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("step", [0, 3, 17, 60])
def test_the_documents_of_a_step_are_those_whose_tokens_it_learns(prepared, step):
    """Against a search for the rows of the batch in the whole text."""
    data = PreparedData.open(prepared())
    blocks, _ = open_blocks(DataConfig(), data, 32)
    text, expected = data.train.read(0, len(data.train)), set()
    batch = blocks.batch(4, 7, step)
    for row, targets in zip(batch.inputs, batch.targets, strict=True):
        (at,) = [i for i in range(len(text) - 32) if (text[i : i + 32] == row).all()]
        scored = at + 1 + np.flatnonzero(targets != IGNORE)
        seen = range(scored[0] - 1, scored[-1] + 1)
        expected |= {int((data.train.starts <= position).sum()) - 1 for position in seen}
    assert blocks.documents(4, 7, step).tolist() == sorted(expected)


def test_the_dialogues_of_a_step_are_those_in_its_blocks(tmp_path):
    text = "\n\n".join(f"第{i}问{chr(0x4E00 + i)}\n第{i}答{chr(0x5E00 + i)}" for i in range(60)) + "\n"
    (tmp_path / "chat.txt").write_text(text, encoding="utf-8")
    prepare([str(tmp_path / "chat.txt")], PrepareConfig(out=tmp_path / "data", format="dialogue", workers=1))
    data = PreparedData.open(tmp_path / "data")
    blocks, _ = open_blocks(DataConfig(), data, 32)
    text, bounds = data.train.read(0, len(data.train)), [*data.train.starts, len(data.train)]
    for step in (0, 3):
        there = " ".join(",".join(map(str, row)) for row in blocks.batch(4, 7, step).inputs.tolist())
        expected = [n for n in range(len(bounds) - 1)
                    if ",".join(map(str, text[bounds[n] : bounds[n + 1] - 1].tolist())) in there]  # fmt: skip
        assert blocks.documents(4, 7, step).tolist() == expected


def test_a_disk_that_will_not_take_two_checkpoints_is_named_once(train, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 30, used=0, free=300_000))
    train(data=prepared(), out_dir=tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("free some space") == 1
    assert "has 0 MiB left, and a checkpoint takes about" in said


NOTHING = {"at": 0.0, "all_": 0.0, "own": 0.0, "throttled": 0, "faults": 0}


@pytest.mark.parametrize(
    ("after", "fetching", "words"),
    [
        ({"at": 10, "all_": 19, "own": 10}, 0.0, "other programs take 0.9 cores"),
        ({"at": 10, "all_": 10, "own": 10}, 0.7, "70% of the time is spent reading batches"),
        ({"at": 10, "all_": 10, "own": 10, "throttled": 3}, 0.0, "is too hot and throttles"),
        ({"at": 10, "all_": 10, "own": 10, "faults": 5000}, 0.0, "swaps"),
        ({"at": 10, "all_": 10, "own": 10}, 0.0, "the cause is not known"),
        ({"at": 10, "all_": None, "own": 10}, 0.0, "the cause is not known"),
    ],
)
def test_a_slowdown_is_a_warning_with_its_cause(after, fetching, words):
    assert words in cause(Usage(**NOTHING), Usage(**NOTHING | after), fetching)


def test_a_slowdown_and_its_end_are_each_reported_once(watching, capsys):
    for speed in [1000.0] * 8 + [300.0]:
        watching.check_speed(speed, 0.0)
    assert not capsys.readouterr().err, "one slow spell is a checkpoint being written"
    for speed in [300.0] * 4:
        watching.check_speed(speed, 0.9)
    said = capsys.readouterr().err
    assert said.count("300 tokens/s, 1,000 before: 90% of the time is spent reading batches") == 1
    watching.check_speed(950.0, 0.0)
    assert "as fast as before" in capsys.readouterr().err


def test_a_run_whose_data_disk_becomes_slow_says_so(train, prepared, tmp_path, monkeypatch, capsys):
    step, now = Run.step, [0.0]
    monkeypatch.setattr("miaobi.train.loop.clock", lambda: now[0])

    def timed(self, n):
        out = step(self, n)
        now[0] += 0.01
        if n >= 14:
            now[0] += 0.05
            self.fetching += 0.05
        return out

    monkeypatch.setattr(Run, "step", timed)
    train(data=prepared(), out_dir=tmp_path / "run", log_interval=2)
    assert "of the time is spent reading batches" in capsys.readouterr().err
    assert alarms.SLOW < 1
