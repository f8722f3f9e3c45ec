"""Whatever lies where a file is expected, every verb ends soon, in little memory, with a result or one clear error.

In the suite each file meets one of ODD, in turn, and one of the commands that read it; `--hypothesis-profile=thorough`
tries every one with all of them.
"""

import os
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from tests.conftest import tiny

from miaobi.classify.config import ClassifyConfig

SECONDS = 20
"""Of processor time: the bar is 10, on a machine that is not busy."""
GROWTH = 1 << 30
STEER = "\x1b]0;owned\x07\x9b31m\u202e\u2066"


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's name has 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(before)


def put_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


ODD: dict[str, Callable[[Path], object]] = {
    "pipe": put_fifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "directory": lambda path: path.mkdir(),
    "loop of links": lambda path: path.symlink_to(path.name),
    "socket": put_socket,
    "sparse": put_sparse,
    "deep": lambda path: path.write_bytes(b'{"a":' * 100_000),
    "brackets": lambda path: path.write_bytes(b"[" * 200_000),
    "not finite": lambda path: path.write_text('{"step": NaN, "val_loss": Infinity, "vocab_size": -1e999}'),
    "huge numbers": lambda path: path.write_text(f'{{"step": {"9" * 5000}, "vocab_size": {2**70}, "r": -1e308}}'),
    "long key": lambda path: path.write_text(f'{{"{"k" * 3_000_000}": 1, "step": 1}}'),
    "many": lambda path: path.write_text("[" + "[]," * 3_000_000 + "[]]"),
    "steering": lambda path: path.write_text(f'{{"{STEER}": "{STEER}", "model_type": "{STEER}", "format": "{STEER}"}}'),
    "not UTF-8": lambda path: path.write_bytes(b'{"step": "\xff\xfe\x80"}\n\xed\xa0\x80'),
    "nothing": lambda path: path.touch(),
    "null": lambda path: path.write_text("null"),
    "doubling": lambda path: path.write_text(
        "a: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    ),
    "merging": lambda path: path.write_text("a: &a\n  <<: *a\n<<: *a\nseed: !!python/tuple [1]\nseed: 0x" + "f" * 999),
}  # fmt: skip

TRAIN = ["train", *tiny(data="data", out_dir="run", max_iters=4, eval_interval=2, n_layer=1)]
SAMPLE = ["sample", "run", "--start=皇马", "--max_new_tokens=2", "--device=cpu"]
FETCH = ["train", *tiny(data="data", out_dir="fetched", max_iters=4, eval_interval=2, n_layer=1), "--mirror=far"]
REPORT, PLAN = ["report", "run"], ["plan", *tiny(data="data", out_dir="planned")]
GGUF = ["convert", "gguf", "run", "--out=model.gguf"]
PUSH = ["push", "run", "me/mine", "--dry_run"]
JUDGE = ["classify", "predict", "judge", "皇马赢了", "--device=cpu"]
STEP = "run/checkpoints/step-2"
READ: dict[str, list[list[str]]] = {  # file -> commands that read it
    "run/config.yaml": [TRAIN, REPORT, ["serve runs"]],
    "run/metrics.jsonl": [TRAIN, REPORT, ["serve runs"]],
    "run/samples.jsonl": [TRAIN, REPORT, ["serve runs"]],
    "run/summary.json": [TRAIN, REPORT],
    "run/plan.json": [REPORT],
    "run/writer.json": [TRAIN],
    "run/text.json": [TRAIN, REPORT],
    "run/checkpoints/last": [TRAIN, REPORT, ["sample", "run", "--checkpoint=last", *SAMPLE[2:]]],
    "run/checkpoints/best": [TRAIN, SAMPLE, GGUF],
    f"{STEP}/checksums.json": [TRAIN, SAMPLE, GGUF],
    f"{STEP}/config.json": [SAMPLE, GGUF, PUSH, TRAIN],
    f"{STEP}/generation_config.json": [SAMPLE, GGUF, PUSH],
    f"{STEP}/tokenizer.json": [SAMPLE, GGUF, TRAIN],
    f"{STEP}/tokenizer_config.json": [SAMPLE, GGUF],
    f"{STEP}/chat_template.jinja": [SAMPLE, ["chat", "run", "--device=cpu"], GGUF],
    f"{STEP}/model.safetensors": [SAMPLE, GGUF, PUSH, TRAIN],
    f"{STEP}/README.md": [PUSH, ["serve page"]],
    f"{STEP}/train_state/progress.json": [TRAIN, REPORT],
    f"{STEP}/train_state/optimizer.json": [TRAIN],
    f"{STEP}/train_state/optimizer-0-of-1.safetensors": [TRAIN],
    "data/manifest.json": [TRAIN, PLAN, ["prepare", "text.txt", "--out=data", "--workers=1"]],
    "data/tokenizer.json": [TRAIN, PLAN],
    "data/train.bin": [TRAIN, PLAN],
    "data/train.idx": [TRAIN, PLAN],
    "far/last": [FETCH],
    "far/best": [FETCH],
    "far/run": [FETCH],
    "far/config.yaml": [FETCH],
    "far/writer.json": [FETCH],
    "far/step-2/checksums.json": [FETCH],
    "judge/classifier.json": [JUDGE],
    "judge/tokenizer.json": [JUDGE],
    "mine.yaml": [["train", "mine.yaml", *TRAIN[1:]], ["plan", "mine.yaml", *PLAN[1:]]],
    "mine.txt": [["prepare", "mine.txt", "--out=new", "--workers=1"], ["eval", "run", "mine.txt", "--device=cpu"],
                 ["sample", "run", "--start=FILE:mine.txt", *SAMPLE[3:]], [*JUDGE[:3], "mine.txt", "--device=cpu"]],
}  # fmt: skip
THOROUGH = hypothesis_settings.default.max_examples > 100
NAMES = [STEER, os.fsdecode(b"\xff\xfe\x80"), "two\nlines\r", "$(touch x);`touch x`|x", "名" * 84, "{0}%s[red]\\n"]


@pytest.fixture(scope="module")
def good(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything as it is meant: text.txt, data, run, judge."""
    from miaobi.classify.ablation import train as classify
    from miaobi.corpus.config import PrepareConfig
    from miaobi.corpus.prepare import prepare
    from miaobi.settings import load_config
    from miaobi.train.loop import train

    place = tmp_path_factory.mktemp("good")
    shutil.copy(corpus_file, place / "text.txt")
    prepare([str(corpus_file)], PrepareConfig(out=place / "data", workers=1))
    flags = tiny(data=place / "data", out_dir=place / "run", max_iters=2, eval_interval=2, n_layer=1)
    flags += [f"--mirror={place / 'far'}"]
    train(*load_config(None, [tuple(flag[2:].split("=", 1)) for flag in flags]))
    rows = ["label,review", *(f"{i % 2},{'皇马赢得比赛' if i % 2 else '曼联输掉比赛'}{i}" for i in range(40))]
    (place / "reviews.csv").write_text("\n".join(rows), encoding="utf-8")
    where = {"base_model": str(place / "run"), "data": str(place / "reviews.csv"), "out_dir": str(place / "tuned")}
    classify(ClassifyConfig(**where, max_epoch=1, device="cpu", dtype="float32", trainable="head"), {})
    shutil.copytree(next((place / "tuned" / "checkpoints").glob("mask-*")), place / "judge")
    return place


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as current directory. A run goes on with the mirror that it had, which must be the copy too."""
    shutil.copytree(good, tmp_path / "here", symlinks=True)
    config = tmp_path / "here" / "run" / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace(str(good), str(tmp_path / "here")), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def in_bounds() -> Iterator[None]:
    """Too much time, and waiting for ever, are errors; so is a gigabyte more."""

    def late(*_: object) -> None:
        raise TimeoutError("it does not end")

    before = signal.signal(signal.SIGALRM, late), signal.signal(signal.SIGVTALRM, late)
    Path("/proc/self/clear_refs").write_text("5")
    began = peak()
    yield
    grown = peak() - began
    signal.signal(signal.SIGALRM, before[0])
    signal.signal(signal.SIGVTALRM, before[1])
    assert grown < GROWTH, f"{grown >> 20:,} MiB"


def peak() -> int:
    """Bytes that this process had in memory at most."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def run(miaobi, words: list[str]):
    """A command within its time; what the server's page does is done without the server."""
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    signal.alarm(60 * SECONDS)  # a machine may be very busy; a pipe is waited for longer
    try:
        if words == ["serve runs"]:
            return looked_at()
        if words == ["serve page"]:
            return shown_card()
        return miaobi(*words)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.alarm(0)


def looked_at():
    """As the page asks for runs. What comes out is JSON of RFC 8259."""
    import json

    from miaobi.serve import runs
    from miaobi.serve.errors import json_bytes

    for name, path in runs.listing(Path()).items():
        told = json_bytes([runs.summary(name, path), runs.contents(name, path, -1)])
        json.loads(told, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def shown_card():
    """As the page asks for the card of a model."""
    from miaobi.serve.runs import beginning

    if Path(STEP, "README.md").is_file():
        beginning(Path(STEP, "README.md"))


def of_each() -> Iterator[object]:
    """(file, kind, commands) of every case."""
    for number, (file, commands) in enumerate(READ.items()):
        for i, kind in enumerate(ODD):
            if (file, kind) == ("mine.txt", "sparse"):
                continue  # a text of a terabyte takes its time
            if THOROUGH:
                yield pytest.param(file, kind, commands, id=f"{file}-{kind}")
            elif number % len(ODD) == i:
                yield pytest.param(file, kind, [commands[number % len(commands)]], id=f"{file}-{kind}")


@pytest.mark.parametrize(("file", "kind", "commands"), list(of_each()))
def test_what_is_no_such_file_ends_in_a_result_or_one_clear_error(miaobi, place, in_bounds, file, kind, commands):
    path = place / file
    path.unlink(missing_ok=True)
    for words in commands:
        if os.path.lexists(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        ODD[kind](path)
        ends_well(words, run(miaobi, words))


def ends_well(words: list[str], said) -> None:
    """A result, or an error that is short and steers no terminal."""
    if said is not None:
        assert said.code in (0, 2), (words, said.err[-3000:])
        assert "Traceback" not in said.err
        assert len(said.err) < 6000, (words, said.err[:500])
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", said.err), (words, said.err)


@pytest.mark.parametrize("name", NAMES if THOROUGH else NAMES[:3])
def test_names_of_places_neither_steer_nor_break_a_verb(miaobi, place, in_bounds, name):
    (place / name).mkdir()
    for part in ("run", "data", "judge", "text.txt"):
        shutil.move(place / part, place / name / part)
    at = f"./{name}"
    for words in (
        ["prepare", f"{at}/text.txt", f"--out={at}/new", "--workers=1"], ["plan", *tiny(data=f"{at}/data")],
        ["train", *tiny(data=f"{at}/data", out_dir=f"{at}/trained", max_iters=2, eval_interval=2, n_layer=1)],
        ["sample", f"{at}/trained", f"--start=FILE:{at}/text.txt", "--max_new_tokens=1", "--device=cpu"],
        ["eval", f"{at}/trained", f"{at}/data", "--device=cpu"], ["report", f"{at}/trained"],
        ["convert", "gguf", f"{at}/trained", f"--out={at}/model.gguf"], ["serve", f"{at}/nothing"],
        ["classify", "predict", f"{at}/judge", "皇马赢了", "--device=cpu"], ["serve runs"],
        ["push", f"{at}/trained", "me/mine", "--dry_run"],
        ["chat", f"{at}/nothing"], ["data", "get", name], ["doctor", name], ["convert", "nanogpt", f"{at}/ckpt.pt"],
    ):  # fmt: skip
        ends_well(words, run(miaobi, words))
