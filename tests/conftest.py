"""A small learnable text, and runs trained on it once per session."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models; subprocesses inherit it, so that they end bit-identical
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch

from miaobi import cache, cli, console, native
from miaobi.corpus.config import PrepareConfig
from miaobi.settings import load_config

torch.set_num_threads(1)
# Tests with caches of their own compile into the user's, as the compiled step does: once per machine and graph.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.private_cache() / "inductor"))
hypothesis.settings.register_profile("miaobi", deadline=None, max_examples=50)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=1000)  # --hypothesis-profile=thorough
hypothesis.settings.load_profile("miaobi")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bf16", choices=("auto", "yes", "no"), default="auto",
                     help="behave as on a CPU with bf16 units (yes) or without (no), whatever this one has; "
                          "auto: as this one, and tests marked bf16 run both ways")  # fmt: skip


def in_memory() -> str | None:
    """Where Linux keeps files in memory, if there is much room and programs may run there. Each of some hundred runs
    waits for the disk otherwise, file by file.
    """
    place = "/dev/shm"
    if not os.access(place, os.W_OK) or os.statvfs(place).f_flag & os.ST_NOEXEC:
        return None
    return place if shutil.disk_usage(place).free > 8 << 30 else None


if (place := in_memory()) is not None:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", place)  # pytest's tmp_path


def pytest_configure(config: pytest.Config) -> None:
    os.environ["MIAOBI_CPU_BF16"] = config.getoption("bf16")  # subprocesses inherit it


LONGEST = (
    "train/test_ranks.py", "train/test_hosts.py", "benchmarks/test_common.py", "test_packaging.py",
    "serve/test_page.py", "corpus/test_ray.py", "test_demo.py", "test_cache.py", "serve/test_page_files.py",
    "test_docs_commands.py", "test_warnings.py", "generate/test_slots.py", "generate/test_avx512.py",
    "benchmarks/test_fuzz.py", "train/test_resume.py", "train/test_recovery.py", "generate/test_cpu_step.py",
    "train/test_saving.py", "classify/test_ablation.py", "train/test_run_directory.py", "test_audit.py",
    "train/test_schedule.py", "test_readme.py", "train/test_dialogue_training.py", "train/test_mirror.py",
    "convert/test_gguf.py", "generate/test_terminal.py",
)  # fmt: skip
"""Files that take long, some of them waiting: first, so that at the end no worker sits idle while one of them runs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; everything else as it was. Tests marked gpu are skipped where there is none."""
    here = Path(__file__).parent
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA card"))
    rank = {here / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test marked bf16 runs twice: as on a CPU with bf16 units, and as on one without."""
    if metafunc.definition.get_closest_marker("bf16"):
        asked = metafunc.config.getoption("bf16")
        metafunc.fixturenames.append("cpu_bf16")
        metafunc.parametrize("cpu_bf16", ["no", "yes"] if asked == "auto" else [asked], indirect=True,
                             ids=lambda has: "bf16" if has == "yes" else "no-bf16")  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    """What is said once in a process is said once in a test."""
    console.warn_once.cache_clear()


@pytest.fixture
def cpu_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU is taken to have bf16 units; set by the marker bf16."""
    monkeypatch.setenv("MIAOBI_CPU_BF16", request.param)
    return request.param == "yes"


WHO = "皇马 曼联 国家队 主教练 球迷 裁判 门将 前锋"
DID = "赢得 输掉 期待 谈到 错过 准备"
WHAT = "比赛 联赛 冠军 转会 训练"


def sports_text(documents: int = 300, seed: int = 0) -> str:
    """Documents of two to six sentences, who did what, separated by blank lines."""
    draw = random.Random(seed)

    def sentence() -> str:
        return "".join(draw.choice(words.split()) for words in (WHO, DID, WHAT)) + draw.choice("。，！")

    return "\n\n".join("".join(sentence() for _ in range(draw.randint(2, 6))) for _ in range(documents)) + "\n"


def tiny(**values: object) -> list[str]:
    """Command-line flags of a run that takes seconds; `values` replace or add some."""
    flags = {
        "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 8, "max_iters": 20,
        "eval_interval": 10, "eval_iters": 2, "log_interval": 5, "sample_tokens": 0, "device": "cpu",
        "dtype": "float32", "compile": False,
    } | values  # fmt: skip
    return [f"--{key}={value}" for key, value in flags.items()]


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def miaobi(capsys: pytest.CaptureFixture) -> Callable[..., Answer]:
    """`miaobi("sample", run, "--json")` inside this process."""

    def command(*args: object) -> Answer:
        capsys.readouterr()
        code = 0
        try:
            cli.main([str(a) for a in args])
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        return Answer(code, *capsys.readouterr())

    return command


@pytest.fixture
def train() -> Callable[..., dict]:
    """`train(out_dir=..., data=...)`: a tiny run through `load_config`, as `miaobi train` does it."""
    from miaobi.train.loop import train as train_run

    def run(preview=None, **values: object) -> dict:
        given = [tuple(flag[2:].split("=", 1)) for flag in tiny(**values)]
        return train_run(*load_config(None, given), preview)

    return run


@pytest.fixture(scope="session")
def built() -> Callable[[Path], None]:
    """`built(step.SOURCE)`: wait until it is compiled; some seconds, the first time."""

    def wait(source: Path) -> None:
        if native.compiler() is None:
            pytest.skip("no C++ compiler")
        for _ in range(600):
            if native.library(source) is not None:
                return
            time.sleep(0.1)
        pytest.fail(f"the compiler did not finish {source.name}")

    return wait


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text as a file."""
    path = tmp_path_factory.mktemp("corpus") / "sports.txt"
    path.write_text(sports_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prepared(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`prepared(tokenizer="bpe")`: the text prepared, once per set of settings."""
    from miaobi.corpus.prepare import prepare

    known: dict[tuple, Path] = {}

    def get(**settings: object) -> Path:
        key = tuple(sorted(settings.items()))
        if key not in known:
            known[key] = tmp_path_factory.mktemp("prepared") / "data"
            prepare([str(corpus_file)], PrepareConfig(out=known[key], workers=1, **settings))
        return known[key]

    return get


@pytest.fixture(scope="session")
def trained(prepared: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """`trained("gpt2", "bpe")`: a run directory, trained once per session."""
    from miaobi.train.loop import train as train_run

    known: dict[tuple[str, str], Path] = {}

    def get(family: str = "gpt2", tokenizer: str = "char") -> Path:
        if (family, tokenizer) not in known:
            out = known[family, tokenizer] = tmp_path_factory.mktemp("run") / f"{family}-{tokenizer}"
            vocab_size = {"vocab_size": 400} if tokenizer == "bpe" else {}
            data = prepared(tokenizer=tokenizer, **vocab_size)
            flags = tiny(data=data, out_dir=out, family=family, bias=family == "gpt2", max_iters=40)
            train_run(*load_config(None, [tuple(flag[2:].split("=", 1)) for flag in flags]))
        return known[family, tokenizer]

    return get
