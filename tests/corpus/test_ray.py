"""`prepare --backend=ray` on a real Ray cluster of this machine: the same files, errors that name the culprit."""

import csv
import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from miaobi.corpus import workers
from miaobi.corpus.config import PrepareConfig
from miaobi.corpus.prepare import prepare
from miaobi.errors import UserError

ray = pytest.importorskip("ray")
RAY_SETTINGS = {"RAY_ADDRESS": "", "RAY_USAGE_STATS_ENABLED": "0"}
SMALL_BLOCKS = "from miaobi.corpus import blocks\nblocks.BLOCK_BYTES = 20_000"
LOST = """
import os
from miaobi.corpus.workers import Workers, connect_ray
def die(_, blocks):
    os._exit(1)
connect_ray()
with Workers(2, "ray").started() as run:
    list(run(die, [((),)] * 4))
"""
NOT_THERE = """
from pathlib import Path
from miaobi.corpus.blocks import Block
from miaobi.corpus.documents import DocumentOptions
from miaobi.corpus.survey import survey_task
from miaobi.corpus.sources import Source
from miaobi.corpus.workers import Workers, connect_ray
options = DocumentOptions()
tasks = [((Block(Source(Path("elsewhere.txt"), "text", size=9), 0, 0, 9),), options, None)] * 3
connect_ray()
with Workers(2, "ray").started() as run:
    list(run(survey_task, tasks))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def on_ray() -> Iterator[Callable]:
    """`on_ray(prepare, sources, cfg)` in a process that may join the cluster; Ray's threads stay out of this one."""
    scratch = tempfile.mkdtemp(prefix="ray")  # a socket's path is at most 107 bytes, pytest's are longer
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={address[10:]}",
               "--node-ip-address=127.0.0.1", "--num-cpus=2", "--object-store-memory=100000000",
               "--include-dashboard=false", f"--temp-dir={scratch}", "--min-worker-port=0",
               "--max-worker-port=0"]  # fmt: skip
    for _ in range(3):  # it gives itself 30 seconds, which a busy machine may exceed
        cluster = subprocess.Popen(
            command, env=os.environ | RAY_SETTINGS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=scratch,
        )  # fmt: skip
        if any("Ray runtime started" in line for line in cluster.stdout):
            break
        cluster.wait()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", address)
            driver = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            yield lambda function, *args: driver.submit(function, *args).result(timeout=400)
            driver.shutdown()
    finally:
        cluster.send_signal(signal.SIGTERM)
        cluster.wait(30)
        shutil.rmtree(scratch, ignore_errors=True)


def articles(n: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = "皇马 曼联 国家队 主教练 球迷 赢得 输掉 期待 比赛 联赛 冠军 转会 训练 ， 。 ！ 1 2 Goal 中國 😀".split()  # noqa: SIM905
    return [f"{seed}-{i} " + "".join(draw.choices(words, k=60)) for i in range(n)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every way in which text may come, with repeated documents."""
    place = tmp_path_factory.mktemp("sources")
    texts = [articles(80, seed) for seed in range(4)]
    (place / "a.txt").write_text("\n\n".join(texts[0] + texts[0][:20]), encoding="utf-8")
    (place / "b.txt").write_bytes("\n\n".join(texts[1]).replace("😀", "").encode("gbk"))
    records = [json.dumps({"text": text}, ensure_ascii=False) for text in texts[2] + texts[0][:5]]
    (place / "c.jsonl").write_text("\n".join(records), encoding="utf-8")
    with gzip.open(place / "d.csv.gz", "wt", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerows([["text"], *([text] for text in texts[3])])
    return [str(path) for path in sorted(place.iterdir())]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"tokenizer": "bpe", "vocab_size": 400, "dedup": "near"}])
def test_the_output_is_the_local_one_byte_for_byte(on_ray, sources, tmp_path, monkeypatch, settings):
    monkeypatch.chdir(Path(sources[0]).parent)
    on_ray(os.chdir, os.getcwd())
    on_ray(exec, SMALL_BLOCKS)
    names = [Path(source).name for source in sources]  # relative, while the workers' directory is another
    result = on_ray(prepare, names, PrepareConfig(out=tmp_path / "ray", backend="ray", **settings))
    prepare(names, PrepareConfig(out=tmp_path / "here", workers=1, **settings))
    assert result["train_tokens"] > 10_000
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


@pytest.mark.slow
def test_a_bad_file_is_named(on_ray, sources, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "好的"}\n' * 500 + '{"text"\n' + '{"text": "好的"}\n' * 500, encoding="utf-8")
    with pytest.raises(UserError, match=r"bad\.jsonl.*line 501"):
        on_ray(prepare, [*sources, str(bad)], PrepareConfig(out=tmp_path / "out", backend="ray"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_worker_that_dies_or_lacks_the_file_is_explained(on_ray):
    with pytest.raises(UserError, match="a Ray worker was lost"):
        on_ray(exec, LOST, {"__name__": "__main__"})
    with pytest.raises(UserError, match=rf"elsewhere\.txt is not on the Ray worker {socket.gethostname()}"):
        on_ray(exec, NOT_THERE, {"__name__": "__main__"})


@pytest.mark.parametrize("address", ["127.0.0.1:PORT", "nonsense"])
def test_without_a_cluster_it_says_so_at_once(tmp_path, monkeypatch, address):
    address = address.replace("PORT", str(free_port()))
    monkeypatch.setenv("RAY_ADDRESS", address)
    (tmp_path / "a.txt").write_text("好\n\n坏\n", encoding="utf-8")
    began = time.monotonic()
    with pytest.raises(UserError, match=f"no Ray cluster can be joined at RAY_ADDRESS={address}"):
        prepare([str(tmp_path / "a.txt")], PrepareConfig(out=tmp_path / "out", backend="ray"))
    assert time.monotonic() - began < 30


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'miaobi\[ray\]'"):
        workers.connect_ray()
