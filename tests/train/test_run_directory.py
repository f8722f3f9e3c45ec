"""A run on disk: what it keeps, what it refuses, and how it goes on."""

import json
import os
import shutil
from pathlib import Path

import pytest

from miaobi.errors import UserError
from miaobi.files import pointed
from miaobi.model.checkpoint import load_model
from miaobi.train.loop import Run
from miaobi.train.run_directory import Progress, find_state, load_progress


def checkpoints(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def weights(run: Path, name: str = "last") -> bytes:
    return (pointed(run / "checkpoints" / name) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory) -> Path:
    """A run of 30 steps, evaluated every 10; copy it before changing it."""
    from miaobi.settings import load_config
    from miaobi.train.loop import train as train_run

    out = tmp_path_factory.mktemp("state") / "run"
    train_run(*load_config(None, list(settings(prepared(), out).items())))
    return out


def settings(data: Path, out: Path) -> dict[str, str]:
    return {"data": str(data), "out_dir": str(out), "n_layer": "1", "n_head": "2", "n_embd": "16", "block_size": "16",
            "batch_size": "4", "max_iters": "30", "eval_interval": "10", "eval_iters": "2", "sample_tokens": "0",
            "device": "cpu", "dtype": "float32", "compile": "False", "schedule": "constant",
            "warmup_iters": "0", "log_interval": "5", "dropout": "0.1"}  # fmt: skip


@pytest.fixture
def again(prepared, finished, tmp_path, monkeypatch):
    """A copy of the finished run, and `again(key=value)`: the same command on it, with changes."""
    from miaobi.settings import load_config
    from miaobi.train.loop import train as train_run

    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    config = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(config.replace(str(finished), str(run)), encoding="utf-8")

    def command(**changes: object) -> dict:
        given = settings(prepared(), run) | {key: str(value) for key, value in changes.items()}
        return train_run(*load_config(None, list(given.items())))

    command.run = run
    return command


# --- what is kept ------------------------------------------------------------------------------------------------


def test_best_and_last_are_kept_and_nothing_else(finished):
    steps = {p.resolve().name for p in (pointed(finished / "checkpoints" / n) for n in ("best", "last"))}
    assert checkpoints(finished) == sorted({"best", "last"} | steps)
    assert "step-30" in steps
    assert os.readlink(finished / "checkpoints" / "last") == "step-30", "relative"
    assert {"config.yaml", "metrics.jsonl", "checkpoints"} <= set(os.listdir(finished))
    assert {"optimizer.json", "optimizer-0-of-1.safetensors", "progress.json"} == set(
        os.listdir(finished / "checkpoints" / "last" / "train_state")
    )


def test_best_is_the_step_with_the_lowest_validation_loss(train, prepared, tmp_path):
    result = train(data=prepared(), out_dir=tmp_path / "run", max_iters=40, eval_interval=5, learning_rate=0.03)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    best = min(losses, key=losses.get)
    assert (result["best_step"], result["best_val_loss"]) == (best, losses[best])
    assert pointed(tmp_path / "run" / "checkpoints" / "best").name == f"step-{best}"


def test_every_nth_checkpoint_is_kept_where_asked_also_between_evaluations(train, prepared, tmp_path):
    train(data=prepared(), out_dir=tmp_path / "run", max_iters=20, eval_interval=10, save_interval=4)
    assert {"step-4", "step-8", "step-12", "step-16", "step-20"} <= set(checkpoints(tmp_path / "run"))


# --- the same command again --------------------------------------------------------------------------------------


def test_the_same_command_on_a_finished_run_says_so_and_changes_nothing(again, capsys):
    before = weights(again.run)
    result = again()
    assert (result["step"], result["stopped"]) == (30, "max_iters")
    assert "finished" in capsys.readouterr().err
    assert weights(again.run) == before
    assert result["val_loss"] == load_progress(again.run / "checkpoints" / "last").val_loss


def test_a_larger_max_iters_extends_to_what_a_longer_run_would_have_been(again, prepared, tmp_path):
    from miaobi.settings import load_config
    from miaobi.train.loop import train as train_run

    assert again(max_iters=50)["step"] == 50
    longer = settings(prepared(), tmp_path / "longer") | {"max_iters": "50"}
    train_run(*load_config(None, list(longer.items())))
    assert weights(again.run) == weights(tmp_path / "longer")
    assert again(max_iters=50)["stopped"] == "max_iters"
    with pytest.raises(UserError, match=r"max_iters=50, now max_iters=30: max_iters can only grow"):
        again()


@pytest.mark.parametrize("ways", [[{"lr_decay_iters": 50}], [{"lr_decay_iters": 30}], [{}], [{}, {}]],
                         ids=["named", "as in its file", "left open", "twice"])  # fmt: skip
def test_a_schedule_that_ended_with_the_run_grows_with_it(train, prepared, tmp_path, ways):
    """nanoGPT's users write both, --max_iters=30 --lr_decay_iters=30, and then extend."""
    given = {"data": prepared(), "schedule": "cosine", "warmup_iters": 0, "min_lr": 1e-5, "log_interval": 1}
    first = {} if ways == [{}] else {"lr_decay_iters": 30}
    train(**given, **first, out_dir=tmp_path / "run", max_iters=30)
    for i, way in enumerate(ways):
        again = first if way == {} else way
        train(**given, **again, out_dir=tmp_path / "run", max_iters=50 + 10 * i)
        train(**given, **again, out_dir=tmp_path / "run", max_iters=50 + 10 * i)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    assert rates[31] > 2e-5, "it rises from min_lr"
    assert rates[max(rates)] < 3e-5


def test_a_schedule_of_its_own_length_stays_as_it_is(train, prepared, tmp_path):
    given = {"data": prepared(), "schedule": "cosine", "lr_decay_iters": 20, "out_dir": tmp_path / "run"}
    train(**given, max_iters=10)
    with pytest.raises(UserError, match="lr_decay_iters=20, now lr_decay_iters=40"):
        train(**given | {"lr_decay_iters": 40}, max_iters=40)


@pytest.mark.parametrize("known", [True, False], ids=["", "older checkpoints"])
def test_an_extended_run_is_measured_on_the_windows_it_began_with(train, prepared, tmp_path, monkeypatch, known):
    """On others the losses, and so the best model, could not be compared."""
    counted, measure = [], Run.validation_loss
    monkeypatch.setattr(
        Run, "validation_loss", lambda run: counted.append(len(run.plan.val_windows.inputs)) or measure(run)
    )
    settings = {"data": prepared(), "out_dir": tmp_path / "run", "batch_size": 2, "eval_iters": 8, "eval_interval": 50}
    train(**settings, max_iters=5)
    if not known:
        file = tmp_path / "run" / "checkpoints" / "last" / "train_state" / "progress.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "windows"}))
        (file.parents[1] / "checksums.json").unlink()  # which older checkpoints have not either
    train(**settings, max_iters=10)
    train(**settings, max_iters=12)
    assert counted == [10, 10, 10]


@pytest.mark.parametrize(
    "change",
    [{"n_layer": 2}, {"learning_rate": 5e-4}, {"batch_size": 8}, {"seed": 1}, {"dropout": 0.2}, {"beta2": 0.99},
     {"data": "elsewhere"}, {"dtype": "bfloat16"}, {"optimizer": "adamw"}],
)  # fmt: skip
def test_a_changed_setting_is_refused_by_name_with_both_ways_out(again, change):
    before = (again.run / "config.yaml").read_bytes(), weights(again.run)
    (key,) = change
    with pytest.raises(UserError, match=rf"{key}=.*now {key}=.*--out_dir.*--init_from=scratch"):
        again(**change)
    assert before == ((again.run / "config.yaml").read_bytes(), weights(again.run))


def test_evaluating_a_finished_run_is_no_change(again):
    before = weights(again.run)
    result = again(eval_only=True)
    assert (result["stopped"], result["step"]) == ("eval_only", 30)
    assert result["val_loss"] == pytest.approx(load_progress(again.run / "checkpoints" / "last").val_loss, abs=1e-6)
    assert weights(again.run) == before
    assert again()["stopped"] == "max_iters"


def test_init_from_scratch_moves_the_old_run_aside(again, capsys):
    before = weights(again.run)
    assert again(init_from="scratch", seed=5)["step"] == 30
    assert weights(again.run) != before
    assert weights(again.run.with_name("run.old-1")) == before
    assert "run.old-1" in capsys.readouterr().err
    again(init_from="scratch")
    assert again.run.with_name("run.old-2").is_dir()


def test_a_run_that_the_command_is_inside_of_is_moved_aside_too(again, monkeypatch):
    monkeypatch.chdir(again.run)
    before = weights(again.run)
    assert again(out_dir=".", init_from="scratch", seed=5)["step"] == 30
    assert weights(again.run.with_name("run.old-1")) == before != weights(again.run)


def test_what_the_run_did_not_write_is_not_moved_aside(again):
    """small-gpt's checkpoint_root, ./checkpoints, holds the models that its README has one download."""
    others = ["pretrained/cpt4000.pth", "notes.txt", "data/mine.txt", "checkpoints/pretrained/cpt.pth", "events.csv",
              "checkpoints/step-5.bak/model.safetensors", "config.yaml.orig"]  # fmt: skip
    for name in others:
        (again.run / name).parent.mkdir(parents=True, exist_ok=True)
        (again.run / name).write_text(name)
    again(init_from="scratch", max_iters=10)
    for name in others:
        assert (again.run / name).read_text() == name
    aside = again.run.with_name("run.old-1")
    assert {"config.yaml", "metrics.jsonl", "checkpoints"} <= set(os.listdir(aside))
    assert not {"pretrained", "notes.txt", "data"} & set(os.listdir(aside))


def test_init_from_resume_wants_something_to_resume(again, tmp_path):
    assert again(init_from="resume", max_iters=31)["step"] == 31
    with pytest.raises(UserError, match="no checkpoint"):
        again(init_from="resume", out_dir=tmp_path / "new")


# --- resume_from and init_from -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".", "checkpoints/last", "checkpoints/step-30"])
def test_resume_from_continues_another_run_elsewhere(again, tmp_path, name):
    expected = again(out_dir=tmp_path / "new", resume_from=again.run / name, max_iters=40)
    assert expected["step"] == 40
    again(max_iters=40)
    assert weights(tmp_path / "new") == weights(again.run)
    assert again(out_dir=tmp_path / "new", resume_from=again.run / name, max_iters=40)["stopped"] == "max_iters"


@pytest.mark.parametrize(
    ("name", "max_iters", "kept"), [(".", 30, {"step-30"}), ("checkpoints/first", 20, {"step-20"})]
)
def test_resume_from_reports_only_its_own_best_model(again, tmp_path, monkeypatch, name, max_iters, kept):
    """The best of the run before is not in the new directory; where all steps are done already, its last one is."""
    monkeypatch.setattr(Run, "validation_loss", lambda run: 1.0 + run.progress.step)  # the first is the best
    shutil.rmtree(again.run / "checkpoints")
    again(max_iters=10)
    shutil.copytree(pointed(again.run / "checkpoints" / "last"), again.run / "checkpoints" / "first")
    again(max_iters=30)
    result = again(out_dir=tmp_path / "new", resume_from=again.run / name, max_iters=max_iters, patience=0)
    best = pointed(tmp_path / "new" / "checkpoints" / "best")
    assert best.name == f"step-{result['best_step']}"
    assert result["best_val_loss"] == 1.0 + result["best_step"]
    assert f"step-{max_iters}" in checkpoints(tmp_path / "new")
    assert result["train_loss"] > 1.0, "that of the run before, where nothing was trained since"


def test_resume_from_a_checkpoint_beyond_the_end_is_refused(again, tmp_path):
    with pytest.raises(UserError, match=r"at step 30, beyond the 20 steps.*--max_iters"):
        again(out_dir=tmp_path / "new", resume_from=again.run, max_iters=20)


def test_resume_from_something_else_is_explained(tmp_path):
    with pytest.raises(UserError, match="no train_state"):
        find_state(str(tmp_path))
    with pytest.raises(UserError, match="miaobi convert"):
        find_state("out/ckpt.pt")


def test_resume_from_a_model_of_another_size_is_refused_by_name(again, tmp_path):
    with pytest.raises(UserError, match="n_layer"):
        again(out_dir=tmp_path / "new", resume_from=again.run, n_layer=2, max_iters=40)


def test_other_data_is_refused(again, prepared, tmp_path):
    with pytest.raises(UserError, match="data"):
        again(out_dir=tmp_path / "new", resume_from=again.run, data=prepared(split="tail"), max_iters=40)


def test_init_from_starts_a_new_run_from_a_models_weights(train, trained, prepared, tmp_path):
    """Fine-tuning: the weights of a model, none of its steps."""
    model = trained("gpt2", "char")
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "family": "gpt2", "bias": True}
    result = train(data=prepared(), out_dir=tmp_path / "new", init_from=model, max_iters=1, learning_rate=1e-9, **sizes)
    assert result["step"] == 1
    from miaobi.model.checkpoint import load_model

    before, after = (dict(load_model(path, "best")[0].named_parameters()) for path in (model, tmp_path / "new"))
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)


def test_init_from_prepares_raw_text_with_the_models_tokenizer(train, trained, tmp_path):
    text = "前锋罚进点球，鱻鱻没见过的字。\n\n" + "皇马期待冠军！\n\n门将错过比赛。\n\n" * 40
    (tmp_path / "more.txt").write_text(text, encoding="utf-8")
    train(data=tmp_path / "more.txt", out_dir=tmp_path / "new", init_from=trained("qwen3", "char"), max_iters=2,
          family="qwen3", dedup="none")  # fmt: skip
    ours, theirs = (
        (path / "tokenizer.json").read_bytes()
        for path in (tmp_path / "new" / "checkpoints" / "last", trained("qwen3", "char") / "checkpoints" / "last")
    )
    assert ours == theirs


@pytest.mark.parametrize("how", ["resume", "the model is gone"])
def test_a_tuned_run_over_raw_text_resumes_with_its_own_data(train, trained, corpus_file, tmp_path, how):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(pointed(trained("gpt2", "bpe") / "checkpoints" / "last"), base)
    command = {"data": corpus_file, "out_dir": run, "max_iters": 2, "family": "gpt2", "bias": True}
    train(**command, init_from=base)
    before = (run / "data" / "train.bin").read_bytes()
    if how == "the model is gone":
        shutil.rmtree(base)
    assert train(**command | {"max_iters": 4}, init_from="resume" if how == "resume" else base)["step"] == 4
    assert (run / "data" / "train.bin").read_bytes() == before


def test_init_from_a_model_with_another_tokenizer_is_refused(train, trained, prepared, tmp_path):
    with pytest.raises(UserError, match="another tokenizer"):
        train(data=prepared(tokenizer="bpe", vocab_size=400), out_dir=tmp_path / "new", init_from=trained("gpt2"))


@pytest.mark.parametrize(
    "change",
    [{"n_layer": 3}, {"n_kv_head": 1}, {"rope_theta": 5e5}, {"vocab_size": 4000}, {"tie_word_embeddings": False},
     {"norm_eps": 1e-5}, {"intermediate_size": 96}, {"head_dim": 8}, {"activation": "gelu_new"}],
)  # fmt: skip
def test_shapes_that_contradict_the_model_started_from_are_refused(train, trained, prepared, tmp_path, change):
    """They were trained into its weights. What says the same is let through."""
    (key,) = change
    same = {"family": "qwen3", "n_layer": 2, "n_kv_head": 2, "head_dim": 16, "intermediate_size": 64, "norm_eps": 1e-6}
    with pytest.raises(UserError, match=rf"has {key}=.*but {key}=.* was given"):
        train(data=prepared(), out_dir=tmp_path / "new", init_from=trained("qwen3"), **same | change)
    train(data=prepared(), out_dir=tmp_path / "new", init_from=trained("qwen3"), max_iters=1, dropout=0.1, **same)


# --- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "train_state/optimizer-0-of-1.safetensors",
        "train_state/optimizer.json",
        "train_state/progress.json",
    ],
)
def test_a_checkpoint_cut_short_is_an_error_that_names_the_file(again, name, kept):
    file = pointed(again.run / "checkpoints" / "last") / name
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=Path(name).parts[0]):
        again(max_iters=40)


def test_a_pointer_to_nothing_does_not_start_over_in_silence(again):
    """Somebody deleted step-30 by hand: what is left must not be overwritten by a run from step 0."""
    shutil.rmtree(pointed(again.run / "checkpoints" / "last"))
    with pytest.raises(UserError, match="last"):
        again()


def test_a_kill_while_the_only_checkpoint_is_replaced_does_not_lose_it(again):
    """`last` names a step that has another name for a moment."""
    step = pointed(again.run / "checkpoints" / "last")
    step.rename(step.with_name(f".{step.name}.old"))
    again(max_iters=40)
    assert not list((again.run / "checkpoints").glob(".*.old"))


def copied(run: Path, way: str) -> None:
    """What a copy makes of the links `best` and `last`."""
    for name in ("best", "last"):
        link = run / "checkpoints" / name
        target = pointed(link)
        link.unlink()
        if way == "directories":  # cp -rL, zip
            shutil.copytree(target, link)


@pytest.mark.parametrize("way", ["left out", "directories"])
def test_a_run_that_was_copied_without_its_links_resumes(again, tmp_path, way, capsys):
    before = {name: pointed(again.run / "checkpoints" / name).name for name in ("best", "last")}
    copied(again.run, way)
    assert again()["stopped"] == "max_iters"
    assert "finished" in capsys.readouterr().err, "from step 0 it would have come here too"
    assert {name: os.readlink(again.run / "checkpoints" / name) for name in ("best", "last")} == before
    if way == "directories":  # and the steps that they were copies of are not there
        copied(again.run, way)
        for step in set(before.values()):
            shutil.rmtree(again.run / "checkpoints" / step)
        load_model(again.run, "best")
    assert again(max_iters=40)["step"] == 40
    again(max_iters=40, out_dir=tmp_path / "whole")
    assert weights(again.run) == weights(tmp_path / "whole")


def test_init_from_scratch_moves_a_run_without_links_aside_too(again):
    before = weights(again.run)
    copied(again.run, "left out")
    again(init_from="scratch", max_iters=10)
    assert (again.run.with_name("run.old-1") / "checkpoints" / "step-30" / "model.safetensors").read_bytes() == before


def test_other_files_among_the_checkpoints_are_not_touched(again):
    for name in ("step-10.bak", "step-best"):
        shutil.copytree(pointed(again.run / "checkpoints" / "last"), again.run / "checkpoints" / name)
    assert again(max_iters=40)["step"] == 40
    assert {"step-10.bak", "step-best"} <= set(checkpoints(again.run))


def test_progress_survives_its_file(tmp_path):
    progress = Progress(step=7, tokens=9, history=[[5.0, 1.0, 2.0]], best_step=5, best_val_loss=2.0, data="x")
    (tmp_path / "train_state").mkdir()
    from dataclasses import asdict

    (tmp_path / "train_state" / "progress.json").write_text(json.dumps(asdict(progress)))
    assert load_progress(tmp_path) == progress


@pytest.mark.parametrize(
    "values",
    [{"step": "../../outside"}, {"step": -1}, {"step": 1.5}, {"step": True}, {"step": 10**400}, {"history": [[1]]},
     {"history": 5}, {"best_step": "x"}, {"data": 7}, {"no_such": 1}, {"stopped": ["x"]}, {"evaluated": None}],
)  # fmt: skip
def test_progress_of_other_types_is_refused_by_the_field(again, values):
    """A step that is text was once used as a path."""
    step = pointed(again.run / "checkpoints" / "last")
    file = step / "train_state" / "progress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    (step / "checksums.json").unlink()
    copied(again.run, "directories")
    (again.run.parent / "outside").mkdir()
    with pytest.raises(UserError, match=r"progress\.json"):
        again(max_iters=40)
    assert (again.run.parent / "outside").is_dir()
    assert list((again.run.parent / "outside").iterdir()) == []


@pytest.mark.parametrize("target", [".", "..", "../outside", "/", ""])
def test_a_link_to_somewhere_else_is_no_checkpoint(again, target):
    link = again.run / "checkpoints" / "last"
    for kind in ("file", *(["link"] if target else [])):
        link.unlink()
        link.symlink_to(target) if kind == "link" else link.write_text(target)
        with pytest.raises(UserError, match="points to a checkpoint that does not exist"):
            again(max_iters=40)


def test_metrics_that_are_a_link_do_not_overwrite_what_it_names(again):
    precious = again.run.parent / "precious.txt"
    precious.write_text("kept")
    (again.run / "metrics.jsonl").unlink()
    (again.run / "metrics.jsonl").symlink_to(precious)
    again(max_iters=40)
    assert precious.read_text() == "kept"
    assert not (again.run / "metrics.jsonl").is_symlink()


def test_a_run_directory_that_is_a_file_is_refused(again, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        again(out_dir=tmp_path / "file")
