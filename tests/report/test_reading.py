"""A report reads runs that were cut, altered or moved, and says what it lacks."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from miaobi.corpus.prepared import PreparedData
from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.report.page import render
from miaobi.report.reading import read_run
from miaobi.report.statistics import COMMON, text_statistics


def test_settings_come_with_where_they_came_from(sampled: Path):
    settings = {s.key: s for s in read_run(str(sampled)).settings}
    assert settings["n_layer"].value == 2
    assert settings["n_layer"].origin == "command line"
    assert settings["dropout"].origin == "default"
    assert settings["family"].origin == "auto"
    assert read_run(str(sampled)).value("learning_rate") == 0.003  # what the recipe decided


def test_a_run_is_read_with_its_samples_evaluations_and_end(sampled: Path):
    run = read_run(str(sampled))
    assert [sample.step for sample in run.samples] == [10, 20]
    assert [evaluation.step for evaluation in run.evaluations] == [10, 20]
    assert run.summary.stopped == "max_iters"
    assert run.summary.total_steps == 20
    assert run.summary.peak_memory_bytes > 1 << 20
    assert run.summary.versions["torch"]
    assert run.missing == []


def test_the_commonest_characters_are_those_of_the_text(sampled: Path):
    data = PreparedData.open(sampled / "data")
    ids = [id_ for id_ in data.train.read(0, len(data.train)).tolist() if id_ != data.eot_id]
    texts = data.tokenizer.decode(ids)
    counts, found = Counter(texts), text_statistics(sampled / "data")
    assert len(found.common) == min(COMMON, len(counts))
    assert dict(found.common) == {c: pytest.approx(counts[c] / len(texts)) for c, _ in found.common}
    shares = [share for _, share in found.common]
    assert shares == pytest.approx([n / len(texts) for _, n in counts.most_common(COMMON)])
    assert sum(n for _, _, n in found.lengths) == found.documents["train"]
    assert found.lengths[0][0] <= found.median_length < found.lengths[-1][1]


def test_a_vocabulary_of_pieces_gives_the_same_characters(prepared):
    char, bpe = (text_statistics(prepared(tokenizer=kind, **more)).common[:5]
                 for kind, more in (("char", {}), ("bpe", {"vocab_size": 400})))  # fmt: skip
    assert [c for c, _ in char] == [c for c, _ in bpe]
    assert [share for _, share in char] == pytest.approx([share for _, share in bpe], rel=1e-6)


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"step": "x"}', '{"step": -1}', '{"train_loss": 3}', "[" * 20_000, "\udcff"]
)
def test_a_line_that_cannot_be_read_is_counted(altered, line: str):
    run = altered()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(line.encode("utf-8", "surrogatepass") + b"\n")
    found = read_run(str(run))
    assert len(found.evaluations) == 2
    assert any("1 of" in said and "metrics.jsonl" in said for said in found.missing)


@pytest.mark.parametrize("value", ['"3"', "true", "null", "[]", "1e999", "NaN", "1" + "0" * 400])
def test_a_figure_that_is_none_is_not_drawn(altered, value: str):
    run = altered()
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(f'{{"step": 30, "train_loss": {value}, "val_loss": {value}, "val_bits_per_char": {value}}}\n')
    found = read_run(str(run))
    assert found.curves["train_loss"][-1][0] == 20
    assert found.evaluations[-1].step == 20


@pytest.mark.parametrize("content", ["", "[]", '{"peak_memory_bytes": "much"}', '{"gpus": {}}', '{"started": NaN'])
def test_a_damaged_summary_is_refused_by_name(altered, content: str):
    run = altered()
    (run / "summary.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"summary\.json"):
        read_run(str(run))


def test_a_run_of_another_version_is_read_without_its_unknown_keys(altered):
    """Keys and fields that this version lacks; counters that it cannot read."""
    run = altered()
    config, summary = run / "config.yaml", json.loads((run / "summary.json").read_text(encoding="utf-8"))
    text = config.read_text(encoding="utf-8").replace("\ntrain:\n", "\ntrain:\n  warp_speed: 9\n")
    config.write_text(text + "later:\n  depth: 3\n", encoding="utf-8")
    (run / "summary.json").write_text(json.dumps(summary | {"joules": 3}), encoding="utf-8")
    progress = pointed(run / "checkpoints" / "last") / "train_state" / "progress.json"
    progress.write_text(json.dumps(json.loads(progress.read_text(encoding="utf-8")) | {"aura": 1}), encoding="utf-8")
    found = read_run(str(run))
    said = " ".join(found.missing)
    assert "2 unknown key(s) (warp_speed, later) of config.yaml" in said
    assert "joules" in said
    assert "aura" in said
    assert found.value("n_layer") == 2
    assert found.summary.stopped == "max_iters"
    assert found.progress is None
    assert "warp_speed" in render([found]), "said on the page"


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="no such directory"):
        read_run(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="that is a file"):
        read_run(__file__)
    with pytest.raises(UserError, match=r"no config\.yaml"):
        read_run(str(tmp_path))
    (tmp_path / "config.yaml").write_text("pooling: mask\n", encoding="utf-8")
    with pytest.raises(UserError, match="not the configuration of a run"):
        read_run(str(tmp_path))


def test_a_run_whose_text_is_gone_is_read_without_it(altered):
    run = altered()
    (run / "data").rename(run.parent / "elsewhere")
    found = read_run(str(run))
    assert found.text is None
    assert any("not there any more" in said for said in found.missing)


def test_a_resumed_run_continues_its_samples(train, corpus_file: Path, tmp_path: Path):
    """Those of steps that are run again after a kill are written again, not twice."""
    from miaobi.generate.chat import preview

    out = tmp_path / "run"
    train(preview, out_dir=out, data=corpus_file, sample_tokens=4)
    with (out / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 30, "text": "of a step that a kill undid"}) + "\n")
    train(preview, out_dir=out, data=corpus_file, sample_tokens=4, max_iters=40)
    run = read_run(str(out))
    assert [sample.step for sample in run.samples] == [10, 20, 30, 40]
    assert "kill" not in run.samples[2].text
    assert run.summary.wall_seconds > run.summary.ended - run.summary.started


def test_a_saved_plan_is_shown_beside_the_outcome(altered):
    run = altered()
    assert read_run(str(run)).planned == (None, None)
    (run / "plan.json").write_text('{"time": {"seconds": 90}, "memory": {"run": 1048576}}', encoding="utf-8")
    assert read_run(str(run)).planned == (90.0, 1 << 20)
    assert "planned 1 min 30 s" in re.sub(r"<[^>]+>", "", render([read_run(str(run))]))
    (run / "plan.json").write_text('{"time": 3, "memory": {"run": "much"}}', encoding="utf-8")
    assert read_run(str(run)).planned == (None, None)
    (run / "plan.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"plan\.json"):
        read_run(str(run))
