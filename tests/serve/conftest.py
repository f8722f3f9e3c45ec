"""One server for the tests: a tiny model with random weights, a classifier, a run, answering over real HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from miaobi.classify import head
from miaobi.classify.data import Reading
from miaobi.corpus.template import CHATML_TEMPLATE, SEP_TEMPLATE
from miaobi.corpus.tokenizer import IM_END, Tokenizer
from miaobi.generate.slots import Slots
from miaobi.model.checkpoint import save_model
from miaobi.model.config import ModelConfig
from miaobi.model.transformer import Transformer
from miaobi.serve import server as server_module
from miaobi.serve.app import make_app
from miaobi.serve.config import Serve
from miaobi.serve.served import Served, load

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

LETTERS = (
    "皇马曼联国家队主教练球迷裁判门将前锋赢得输掉期待谈到错过准备比赛联赛冠军转会训练。，！\n 你好吗我是abcdefghijklmno"
)
BLOCK = 64


def random_model(vocab_size: int, block_size: int = BLOCK, seed: int = 0) -> Transformer:
    """Random weights that write varied text."""
    torch.manual_seed(seed)
    cfg = ModelConfig(family="qwen3", n_layer=2, n_head=4, n_kv_head=2, n_embd=32, block_size=block_size,
                      vocab_size=vocab_size)  # fmt: skip
    made = Transformer(cfg).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.25)
    return made


def write_model(place: Path, template: str = CHATML_TEMPLATE, block_size: int = BLOCK) -> Path:
    """A model directory."""
    tokenizer = Tokenizer.train_char(dict.fromkeys(LETTERS, 9))
    tokenizer.config["chat_template"] = template
    ends = (tokenizer.token_to_id(IM_END), tokenizer.eot_id)
    place.mkdir(parents=True)
    save_model(place, random_model(tokenizer.vocab_size, block_size), tokenizer, ends)
    return place


def write_classifier(place: Path, labels: Sequence[str] = ("差评", "好评")) -> Path:
    """A classifier's directory."""
    torch.manual_seed(1)
    tokenizer = Tokenizer.train_char(dict.fromkeys(LETTERS, 9))
    classifier = head.Classifier(random_model(tokenizer.vocab_size, seed=1), 2, "mean")
    reading = Reading(BLOCK, "chunks", (), (), tokenizer.pad_id)
    place.mkdir(parents=True)
    head.save(place, head.Judge(classifier, tokenizer, reading, list(labels)))
    return place


def write_run(place: Path) -> Path:
    """What the page reads of a run."""
    place.mkdir(parents=True)
    rows = [{"step": 10, "train_loss": 3.0, "learning_rate": 1e-3, "tokens_per_second": 100.0},
            {"step": 20, "val_loss": 2.5, "val_bits_per_char": 3.6}]  # fmt: skip
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (place / "samples.jsonl").write_text(json.dumps({"step": 20, "text": "皇马<script>"}) + "\n", encoding="utf-8")
    (place / "config.yaml").write_text("train:\n  max_iters: 20\n  seed: 7\n", encoding="utf-8")
    return place


@dataclass
class Address:
    """A server that runs in a thread of this process."""

    url: str
    served: Served | None
    cfg: Serve
    app: FastAPI

    @property
    def v1(self) -> str:
        """OpenAI's base URL."""
        return f"{self.url}/v1"


@contextlib.contextmanager
def running(cfg: Serve, served: Served | None) -> Iterator[Address]:
    """A server on a free port."""
    stopping = threading.Event()
    app = make_app(cfg, served, stopping.is_set)
    config = uvicorn.Config(app, http=server_module.protocol(), ws="none", lifespan="off", log_level="warning",
                            access_log=False, timeout_graceful_shutdown=2)  # fmt: skip
    listening, made = server_module.bind("127.0.0.1", 0), uvicorn.Server(config)
    thread = threading.Thread(target=made.run, args=([listening],), daemon=True)
    thread.start()
    while not made.started:
        time.sleep(0.01)
    try:
        yield Address(f"http://127.0.0.1:{listening.getsockname()[1]}", served, cfg, app)
    finally:
        stopping.set()
        made.should_exit = True
        thread.join(timeout=10)


@pytest.fixture(scope="session")
def judge() -> Callable[[Path, Sequence[str]], Path]:
    """`judge(place, labels)`: a classifier's directory."""
    return write_classifier


@pytest.fixture(scope="session")
def serving() -> Callable:
    """`with serving(cfg) as address`: models loaded, a server that answers; is_loading: that says it has none yet."""

    @contextlib.contextmanager
    def serve(cfg: Serve, is_loading: bool = False) -> Iterator[Address]:
        served = load(cfg)
        with running(cfg, None if is_loading else served) as address:
            address.served = served
            yield address
        served.close()

    return serve


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classifier and runs."""
    here = tmp_path_factory.mktemp("beside")
    write_classifier(here / "judge")
    write_run(here / "runs" / "first")
    return here


@pytest.fixture(scope="session")
def site(model_path: Path, place: Path) -> Iterator[Address]:
    """The server: model, classifier, runs."""
    cfg = Serve(model=str(model_path), classifier=str(place / "judge"), runs=str(place / "runs"), device="cpu",
                dtype="float32", slots=4, max_queue=24, max_tokens=100_000, max_new_tokens=16,
                cors=("http://localhost:3000",))  # fmt: skip
    served = load(cfg)
    with running(cfg, served) as address:
        yield address
    served.close()


@pytest.fixture(scope="session")
def talk_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chit-chat model, whose template has no system messages."""
    return write_model(tmp_path_factory.mktemp("sep") / "sep", SEP_TEMPLATE)


THINKS = (
    CHATML_TEMPLATE + "{% if add_generation_prompt %}{% if enable_thinking %}期待{% else %}错过{% endif %}{% endif %}"
)


@pytest.fixture(scope="session")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template asks for `enable_thinking`."""
    return write_model(tmp_path_factory.mktemp("thinks") / "thinks", THINKS)


@pytest.fixture
def http(site: Address) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site.url, timeout=30) as client:
        yield client


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes 20 ms: a fast machine has written a whole reply before anybody presses stop."""
    advance = Slots.advance
    monkeypatch.setattr(Slots, "advance", lambda self: time.sleep(0.02) or advance(self))


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for all."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None and not os.environ.get("MIAOBI_REQUIRE_CHROMIUM"):
        pytest.skip("no Chromium here: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """`visit(url, "chat", color_scheme="dark")`: the page as a new visitor has it; nothing goes wrong in it, or out."""
    contexts, wrong = [], []

    def go(url: str, tab: str = "chat", fails: bool = False, until: str = "html.ready", **how) -> Page:
        context = chromium.new_context(**{"locale": "zh-CN", "viewport": {"width": 1200, "height": 800}} | how)
        context.set_default_timeout(30_000)
        page = context.new_page()
        contexts.append(context)
        page.on("request", lambda r: None if r.url.startswith((url, "blob:", "data:")) else wrong.append(r.url))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") and not fails else None)
        page.goto(f"{url}/#/{tab}")
        page.wait_for_selector(until)
        return page

    yield go
    for context in contexts:
        context.close()
    assert not wrong
