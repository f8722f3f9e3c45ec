"""The command: exit codes, what goes to stdout and what to stderr, and the seeds' own lines."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from tests.conftest import tiny

from miaobi import cli, seeds, show
from miaobi.errors import UserError
from miaobi.settings import keys

VERBS = list(dict.fromkeys(name.split()[0] for name in cli.VERBS))


def only_json(out: str) -> dict:
    """The one JSON object on stdout."""
    assert out.count("\n") == 1, out
    return json.loads(out)


# --- the command itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["nonsense"]])
def test_starting_does_not_import_torch(arguments):
    code = ("import sys; from miaobi import cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'numpy', 'tokenizers', 'rich', 'ruamel.yaml', 'transformers'} & set(sys.modules)\n"
            "assert not heavy, heavy")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("argument", "code"), [("--version", 0), ("nonsense", 2)])
def test_under_torchrun_a_process_ends_before_its_interpreter_is_taken_down(argument, code):
    """Groups that torch's caches still hold have threads that abort the process then, now and again."""
    script = ("import atexit, os, runpy, sys\n"
              "class Group:\n    def __del__(self, abort=os.abort): abort()\nheld = Group()\n"
              "atexit.register(print, 'what was registered is run')\nsys.argv = ['miaobi', sys.argv[1]]\n"
              "runpy.run_module('miaobi', run_name='__main__')")  # fmt: skip
    for several in ({}, {"TORCHELASTIC_RUN_ID": "1"}):
        done = subprocess.run([sys.executable, "-c", script, argument], env=os.environ | several, capture_output=True,
                              text=True)  # fmt: skip
        assert done.stdout.endswith("what was registered is run\n")
        assert done.returncode == (code if several else -signal.SIGABRT), done.stderr


def test_importing_the_package_does_not_import_torch():
    code = "import sys, miaobi; assert 'torch' not in sys.modules and callable(miaobi.load)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_lists_every_verb(miaobi):
    for arguments in (["--help"], ["-h"], ["help"], []):
        answer = miaobi(*arguments)
        assert answer.code == 0
        for verb in VERBS:
            assert f"\n  {verb} " in answer.out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_its_options(miaobi, verb):
    answer = miaobi(verb, "--help")
    assert answer.code == 0
    words = " ".join(answer.out.split())
    expected = {
        "train": ["--n_layer", "--learning_rate", "Context in tokens", "--save_interval", "--patience"],
        "plan": ["--gpu", "--price_per_hour", "--measure", "--n_layer", "Run 20 steps here"],
        "sample": ["--start", "--top_k", "Keep only this many likeliest tokens", "--repetition_penalty", "--stop"],
        "eval": ["--stride", "Windows scored at once"],
        "chat": ["--temperature", "--repetition_penalty", "CONFIG.yaml"],
        "prepare": ["--vocab_size", "--simplify", "Convert Traditional to Simplified"],
        "demo": ["--quick"],
        "serve": ["--classifier", "--runs", "--api_key", "Origins whose pages", "--max_queue", "--temperature"],
        "report": ["RUNS ...", "--out", "several are compared"],
        "doctor": ["--json"],
        "push": ["--dry_run", "--gguf", "OWNER/NAME"],
        "data": ["list", "get"],
        "convert": ["small-gpt", "nanogpt"],
        "classify": ["train", "ablate", "predict"],
    }[verb]
    for text in expected:
        assert text in words, text
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_every_verb_has_every_setting_with_its_docstring(miaobi, verb):
    kind = cli.imported(cli.VERBS[verb].settings)
    answer = miaobi(*verb.split(), "--help")
    assert answer.code == 0, answer.err
    for key in keys(kind).values():
        shown = key.name.upper() if key.is_positional else f"--{key.name}"
        assert re.search(rf"^  {shown}  +\S", answer.out, re.MULTILINE), shown
    assert answer.out.startswith(f"usage: miaobi {verb} ")


@pytest.mark.parametrize("verb", cli.VERBS.values(), ids=cli.VERBS)
def test_every_row_of_the_table_names_what_there_is(verb):
    assert callable(cli.imported(verb.run))
    assert not verb.load or callable(cli.imported(verb.load))
    assert not verb.show or callable(getattr(show, verb.show))
    assert isinstance(getattr(seeds, verb.names), seeds.Names)


def test_an_unknown_verb_suggests_one(miaobi):
    answer = miaobi("trian", "configs/demo.yaml")
    assert answer.code == 2
    assert "Did you mean train?" in answer.err
    assert not answer.out


def test_a_mistake_is_told_without_a_traceback_unless_debug(miaobi, tmp_path):
    answer = miaobi("sample", tmp_path / "nothing")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("miaobi: no model at ")
    assert "Traceback" not in answer.err
    with pytest.raises(UserError, match="no model at"):
        miaobi("sample", tmp_path / "nothing", "--debug")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--n_layers=3"], "Did you mean n_layer?"),
        (["train", "--n_layer=few"], "a whole number"),
        (["train", "--n_embd=100", "--n_head=7"], "not divisible"),
        (["train", "--n_layer"], "--n_layer needs a value"),
        (["train", "no-such.yaml"], "no-such.yaml"),
        (["train", "config/train_XY.py"], "train_XY.yaml"),
        (["train", "--data=no/such/text"], "no/such/text"),
        (["eval"], "which model?"),
        (["sample", "a", "--out_dir=b"], "two models"),
        (["sample", "a", "--temprature=1"], "temperature"),
        (["sample", "a", "--temperature=-1"], "or more"),
        (["sample", "a", "--temperature=nan"], "temperature is nan"),
        (["sample", "a", "--seed=99999999999999999999"], "seed is 99999999999999999999"),
        (["chat", "a", "--repetition_penalty=inf"], "repetition_penalty is inf"),
        (["sample", "a", "--top_k=many"], "many"),
        (["eval", "a"], "text"),
        (["eval", "no-model", "x.txt"], "no-model"),
        (["prepare"], "prepare"),
        (["prepare", "no-such.txt", "--out", "OUT"], "no-such.txt"),
    ],
)
def test_mistakes_exit_with_2_and_say_what_is_wrong(miaobi, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    answer = miaobi(*arguments)
    assert answer.code == 2
    assert words in answer.err
    assert "Traceback" not in answer.err
    assert not answer.out


def test_a_bug_is_not_dressed_up_as_a_mistake(miaobi, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("miaobi.generate.sample.sample", broken)
    with pytest.raises(ZeroDivisionError):
        miaobi("sample", "x")


def test_ctrl_c_outside_a_run_exits_with_130(miaobi, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("miaobi.yardstick.judge.score", interrupted)
    answer = miaobi("eval", "x", "y")
    assert answer.code == 130
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["classify", "train", "--help"]])
def test_a_reader_that_went_away_is_no_traceback(arguments):
    """miaobi ... | head"""
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "miaobi", *arguments]
    done = subprocess.run(command, check=False, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (done.returncode, done.stderr.decode()) == (0, "")


@pytest.mark.parametrize(("closed", "arguments", "code"), [
    (">&-", "--version", 0), ("<&- >&- 2>&-", "--help", 0), ("2>&-", "nonsense", 2), (">&- 2>&-", "nonsense", 2),
])  # fmt: skip
def test_closed_streams_are_no_traceback(closed, arguments, code):
    command = f"{sys.executable} -m miaobi {arguments} {closed}"
    done = subprocess.run(["sh", "-c", command], check=False, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


@pytest.mark.parametrize("encoding", ["gbk", "ascii"])
def test_a_poor_output_loses_no_result(trained, monkeypatch, encoding):
    def written(*args: str) -> str:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        cli.main(["sample", str(trained()), "--start=皇马😀", "--num_samples=1", "--max_new_tokens=3", *args])
        return sys.stdout.buffer.getvalue().decode(encoding)

    start = "皇马?" if encoding == "gbk" else "???"
    assert written("--device=cpu").startswith(start)
    assert written("--device=cpu", "--stream").startswith(start)
    assert json.loads(written("--device=cpu", "--json"))["samples"][0]["text"].startswith("皇马😀")


# --- configurations -----------------------------------------------------------------------------------------------


def test_a_python_configuration_of_nanogpts_is_refused_with_the_way_out(miaobi, tmp_path):
    (tmp_path / "train_mine.py").write_text("out_dir = 'out'\nbatch_size = 12\n", encoding="utf-8")
    answer = miaobi("train", tmp_path / "train_mine.py")
    assert answer.code == 2
    assert "train_mine.yaml" in answer.err


# --- train, sample and eval on a real run ------------------------------------------------------------------------


def test_train_prints_one_json_object(miaobi, corpus_file, tmp_path):
    answer = miaobi("train", f"--data={corpus_file}", f"--out_dir={tmp_path / 'run'}", "--n_layer=1", "--n_head=2",
                    "--n_embd=16", "--block_size=16", "--batch_size=4", "--max_iters=4", "--eval_interval=2",
                    "--device=cpu", "--eval_iters=1", "--sample_tokens=4", "--json")  # fmt: skip
    assert answer.code == 0, answer.err
    result = only_json(answer.out)
    assert set(result) >= {"run", "step", "train_loss", "val_loss", "val_bits_per_char", "best_step",
                           "tokens_per_second", "parameters", "trained_parameters", "stopped"}  # fmt: skip
    assert (result["step"], result["stopped"]) == (4, "max_iters")
    assert "number of parameters: " in answer.err
    assert "step 2:" in answer.err
    config = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "n_layer: 1" in config
    assert "# command line" in config


@pytest.mark.parametrize("verb", ["prepare", "train", "eval", "classify train", "classify ablate"])
def test_a_bad_record_at_the_end_leaves_nothing_on_stdout(miaobi, trained, tmp_path, verb):
    """Of no verb with --json half an object: whoever reads it gets all or nothing, and the code says which."""
    texts, table = tmp_path / "a.jsonl", tmp_path / "a.csv"
    texts.write_text('{"text": "好的皇马"}\n' * 3000 + "{\n", encoding="utf-8")
    table.write_text("label,review\n" + "1,好\n0,坏\n" * 3000 + '1,"好\n', encoding="utf-8")
    words = {
        "prepare": [texts, f"--out={tmp_path / 'out'}"],
        "train": [*tiny(data=texts, out_dir=tmp_path / "run")],
        "eval": [trained(), texts, "--device=cpu"],
    }.get(verb, [f"--base_model={trained()}", f"--data={table}", f"--out_dir={tmp_path / 'run'}", "--device=cpu"])
    answer = miaobi(*verb.split(), *words, "--json")
    assert (answer.code, answer.out) == (2, "")
    assert "line " in answer.err.splitlines()[-1]


def test_the_seeds_sample_line(miaobi, trained):
    """python sample.py --out_dir=TH_out --start=皇马 --device=cpu"""
    answer = miaobi("sample", f"--out_dir={trained()}", "--start=皇马", "--device=cpu", "--max_new_tokens=12")
    assert answer.code == 0, answer.err
    samples = answer.out.split("\n---------------\n")
    assert len(samples) == 11
    assert samples.pop() == ""
    assert all(s.startswith("皇马") for s in samples)
    assert sum(len(s) > 2 for s in samples) > 5, "forty steps teach little: some end at once"


def test_every_key_of_nanogpts_sample_py_is_understood(miaobi, trained):
    answer = miaobi("sample", "--init_from=resume", f"--out_dir={trained()}", "--start=\n", "--num_samples=2",
                    "--max_new_tokens=5", "--temperature=0.8", "--top_k=200", "--seed=1337", "--device=cpu",
                    "--dtype=float32", "--compile=False")  # fmt: skip
    assert answer.code == 0, answer.err
    assert answer.out.count("---------------") == 2
    assert answer.err.count("not needed: ") == 1
    assert re.search(r"init_from \(.*compile \(", answer.err)


def test_sample_json(miaobi, trained):
    arguments = ["sample", trained("qwen3"), "--start=国家队", "--num_samples=3", "--max_new_tokens=8", "--device=cpu"]
    result = only_json(miaobi(*arguments, "--json").out)
    assert set(result) == {"samples", "tokens_per_second"}
    assert len(result["samples"]) == 3
    for s in result["samples"]:
        assert set(s) == {"text", "tokens", "finish_reason"}
        assert s["text"].startswith("国家队")
        assert s["finish_reason"] == "length" if s["tokens"] == 8 else "stop"
    again = only_json(miaobi(*arguments, "--json").out)
    assert again["samples"] == result["samples"]
    assert only_json(miaobi(*arguments, "--json", "--seed=2").out)["samples"] != result["samples"]


def test_streamed_text_is_the_text(miaobi, trained):
    flags = ["--start=皇马", "--num_samples=1", "--max_new_tokens=20", "--device=cpu", "--stop=。"]
    plain, streamed = miaobi("sample", trained(), *flags), miaobi("sample", trained(), *flags, "--stream")
    assert streamed.code == 0, streamed.err
    assert streamed.out == plain.out


@pytest.mark.parametrize("stop", [["--stop", "。", "！"], ["--stop=。", "--stop=！"], ["--stop", "。", "--stop=！"]])
def test_stop_strings(miaobi, trained, stop):
    flags = ["--start=皇马", "--max_new_tokens=60", *stop, "--device=cpu", "--json"]
    samples = only_json(miaobi("sample", trained(), *flags).out)["samples"]
    assert not any(mark in s["text"] for s in samples for mark in "。！")
    assert any(s["finish_reason"] == "stop" for s in samples)


@pytest.mark.parametrize("start", ["😀", "龘𠮷没见过", "<|im_end|><0x41>", "-皇马", "--皇马", "a=b", ""])
def test_any_prompt_works_on_the_command_line(miaobi, trained, start):
    answer = miaobi("sample", trained("qwen3", "bpe"), f"--start={start}", "--num_samples=1", "--max_new_tokens=3",
                    "--device=cpu", "--json")  # fmt: skip
    assert answer.code == 0, answer.err
    assert only_json(answer.out)["samples"][0]["text"].startswith(start)


def test_a_prompt_from_a_file(miaobi, trained, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("曼联输掉比赛，".encode("gb18030") * 5)
    answer = miaobi("sample", trained(), f"--start=FILE:{tmp_path / 'prompt.txt'}", "--num_samples=1",
                    "--max_new_tokens=3", "--device=cpu")  # fmt: skip
    assert answer.out.startswith("曼联输掉比赛，" * 5)
    answer = miaobi("sample", trained(), f"--start=FILE:{tmp_path / 'nowhere.txt'}", "--device=cpu")
    assert answer.code == 2
    assert "nowhere.txt" in answer.err
    (tmp_path / "mixed.txt").write_bytes("曼联输掉比赛，".encode() * 50 + b"\xff\xff")
    answer = miaobi("sample", trained(), f"--start=FILE:{tmp_path / 'mixed.txt'}", "--device=cpu")
    assert (answer.code, "with --skip_bad" in answer.err) == (2, True)
    assert "prepare, eval and classify" in answer.err, "a flag that sample does not have is not advised to it"


def test_checkpoints_of_a_run_can_be_chosen(miaobi, trained):
    for name in ("best", "last", "step-40"):
        flags = [f"--checkpoint={name}", "--num_samples=1", "--max_new_tokens=2", "--device=cpu"]
        assert miaobi("sample", trained(), *flags).code == 0
    answer = miaobi("sample", trained(), "--checkpoint=step-7", "--device=cpu")
    assert answer.code == 2
    assert "step-40" in answer.err


def test_an_interrupted_run_without_an_evaluation_can_be_sampled(miaobi, train, prepared, tmp_path, monkeypatch):
    """Ctrl-C before the first evaluation leaves `last` and no `best`; the next command the run prints must work."""
    from miaobi.train.loop import Run

    step = Run.step
    monkeypatch.setattr(Run, "step", lambda self, n: (n == 2 and self.interrupt("interrupted"), step(self, n))[1])
    train(data=prepared(), out_dir=tmp_path / "run")
    answer = miaobi("sample", tmp_path / "run", "--start=中国", "--num_samples=1", "--max_new_tokens=2", "--device=cpu")
    assert answer.code == 0, answer.err


def test_eval_json(miaobi, trained, prepared, tmp_path):
    (tmp_path / "text.txt").write_text("皇马赢得比赛。😀\n\n曼联输掉冠军！\n", encoding="utf-8")
    for data in (prepared(), tmp_path / "text.txt"):
        answer = miaobi("eval", trained(), data, "--device=cpu", "--json")
        assert answer.code == 0, answer.err
        result = only_json(answer.out)
        assert set(result) >= {"loss", "perplexity", "bits_per_char", "bits_per_byte", "tokens", "characters"}
        assert result["bits_per_byte"] < result["bits_per_char"]
    assert "bits/char" in miaobi("eval", trained(), prepared(), "--device=cpu", "--stride=block").out


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "COLUMNS", "LINES"])
@pytest.mark.parametrize("value", ["abc", "", "-1", "9" * 30])
def test_whatever_the_environment_says_a_mistake_is_one_line(miaobi, monkeypatch, tmp_path, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: None)
    answer = miaobi("prepare", tmp_path / "nowhere.txt", f"--out={tmp_path / 'out'}")
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert "no such file" in answer.err
