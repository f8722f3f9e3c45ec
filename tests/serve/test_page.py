"""The page in a real Chromium, against a real server whose tiny model learned its replies by heart."""

import csv
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from miaobi import serve
from miaobi.serve.config import Serve
from miaobi.settings import load_config

PAGE = Path(serve.__file__).parent / "page"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None and not os.environ.get("MIAOBI_REQUIRE_CHROMIUM"):
    pytest.skip("no Chromium here: apt install chromium", allow_module_level=True)

SCRIPT = "<script>document.title='oops'</script>"
REPLIES = {"你好": "你好呀", "你是谁": "我叫妙笔", "写代码": SCRIPT, "生僻字": "龘龘", "数数": "一二三四五六七八九十" * 20}
RUN = "<b>run\x1b[31m"  # of files: what may stand in their names
LABELS = ["差<i>评\x07", "好评"]
MAX_BYTES = 150_000


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows REPLIES; 龘 is beyond its vocabulary, and three bytes."""
    from miaobi.corpus.config import PrepareConfig
    from miaobi.corpus.prepare import prepare
    from miaobi.train.loop import train

    place = tmp_path_factory.mktemp("runs")
    asked = [words for turn in REPLIES.items() for words in ("\n".join(turn), "\n".join(turn))]
    (place / "said.txt").write_text("\n\n".join(asked * 8) + "\n", encoding="utf-8")
    letters = set("".join([*REPLIES, *REPLIES.values()]))
    config = PrepareConfig(out=place / "data", format="dialogue", dedup="none", workers=1)
    known = prepare([str(place / "said.txt")], config)["vocab_size"]
    assert "龘" in letters
    shutil.rmtree(place / "data")
    prepare([str(place / "said.txt")], PrepareConfig(**vars(config) | {"vocab_size": known - 3}))
    values = {
        "data": place / "data", "out_dir": place / RUN, "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64,
        "batch_size": 8, "max_iters": 150, "eval_interval": 50, "eval_iters": 2, "log_interval": 1, "sample_tokens": 0,
        "device": "cpu", "dtype": "float32", "compile": False,
    }  # fmt: skip
    train(*load_config(None, [(key, str(value)) for key, value in values.items()]))
    return place / RUN


@pytest.fixture(scope="module")
def site(talker: Path, serving: Callable, judge: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with all that the page shows."""
    classifier = judge(tmp_path_factory.mktemp("judge") / "judge", LABELS)
    with serving(Serve(model=str(talker), classifier=str(classifier), runs=str(talker.parent), device="cpu")) as found:
        yield found.url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """One browser for all."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Browser, site: str) -> Iterator[Callable[..., Page]]:
    """`visit("chat", color_scheme="dark")`: the page as a new visitor sees it; nothing may go wrong in it, or leave."""
    contexts, wrong = [], []

    def go(tab: str = "chat", address: str = site, fails: bool = False, **how: object) -> Page:
        context = chromium.new_context(**{"locale": "zh-CN", "viewport": {"width": 1200, "height": 800}} | how)
        context.set_default_timeout(15_000)
        page = context.new_page()
        contexts.append(context)
        page.on("request", lambda r: None if r.url.startswith((address, "blob:", "data:")) else wrong.append(r.url))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") and not fails else None)
        page.goto(f"{address}/#{tab}")
        page.wait_for_selector("html.ready")
        return page

    yield go
    for context in contexts:
        context.close()
    assert not wrong


def greedy(page: Page, tokens: int | None = None) -> None:
    """Set the temperature to 0 in the drawer, as a person does."""
    page.locator("[data-settings]:visible").click()
    page.fill("#set-temperature", "0")
    page.fill("#set-repetition_penalty", "1")
    if tokens:
        page.fill("#set-max_tokens", str(tokens))
    page.keyboard.press("Escape")


def ask(page: Page, text: str) -> None:
    page.fill("#say", text)
    page.press("#say", "Enter")


def answered(page: Page, turns: int) -> list[str]:
    """The turns, once the last is whole."""
    expect(page.locator(".turn")).to_have_count(turns)
    expect(page.locator("#chat [data-do=send]")).to_be_visible()
    return page.locator(".turn .words").all_inner_texts()


def test_chat_replies_is_edited_and_tried_again(visit, site):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    greedy(page)
    ask(page, "你好")
    assert answered(page, 2) == ["你好", "你好呀"]
    ask(page, "你是谁")
    said = answered(page, 4)
    page.locator(".turn.assistant").last.get_by_text("重答").click()
    assert answered(page, 4) == said
    page.locator(".turn.user").first.get_by_text("改").click()
    page.keyboard.press("Control+A")
    page.keyboard.type("你是谁")
    page.get_by_text("从这里继续").click()
    assert answered(page, 2) == ["你是谁", "我叫妙笔"]
    page.locator(".turn.assistant").get_by_text("复制").click()
    expect(page.locator(".toast")).to_have_text("已复制")
    assert page.evaluate("navigator.clipboard.readText()") == "我叫妙笔"
    page.reload()
    assert answered(page, 2) == ["你是谁", "我叫妙笔"], "a reload keeps the conversation"
    page.get_by_text("新对话").click()
    expect(page.locator(".turn")).to_have_count(0)


def test_chat_stops_and_what_was_said_is_exported_for_prepare(visit, tmp_path, miaobi):
    page = visit()
    greedy(page, tokens=4000)
    ask(page, "数数")
    expect(page.locator(".turn.assistant .words")).to_contain_text("一二三")
    page.locator("#chat [data-do=stop]").click()
    expect(page.locator(".turn.assistant [data-note]")).to_have_text("已停止")
    said = answered(page, 2)
    assert 3 <= len(said[1]) < 4000
    with page.expect_download() as download:
        page.get_by_text("导出").click()
    download.value.save_as(tmp_path / "said.jsonl")
    told = json.loads((tmp_path / "said.jsonl").read_text(encoding="utf-8"))
    assert [turn["content"] for turn in told["messages"]] == said
    made = miaobi("prepare", tmp_path / "said.jsonl", f"--out={tmp_path / 'data'}", "--json")
    assert made.code == 0, made.err


def test_what_a_model_a_run_and_a_label_say_is_text(visit):
    page = visit()
    greedy(page)
    ask(page, "写代码")
    assert answered(page, 2)[1] == SCRIPT
    expect(page.locator(".card .name")).to_have_text("<b>run␛[31m")
    page.click("#tab-classify")
    expect(page.locator(".chip").first).to_have_text("差<i>评␇")
    page.click("#tab-runs")
    expect(page.locator("[data-runs] .name").first).to_have_text("<b>run␛[31m")
    assert page.title() == "妙笔 miaobi"
    assert page.locator("main script, main b:not(.values b), main i").count() == 0


def completion(site: str, prompt: str, **how: object) -> dict:
    """What the API writes behind a prompt, greedily."""
    name = httpx.get(f"{site}/v1/models").json()["data"][0]["id"]
    body = {"model": name, "prompt": prompt, "temperature": 0, "top_p": 0.9, "repetition_penalty": 1} | how
    return httpx.post(f"{site}/v1/completions", json=body).json()["choices"][0]


def written(page: Page, column: int = 0) -> str:
    """What a column holds behind its prompt, once it is whole."""
    expect(page.locator(".column.writing")).to_have_count(0)
    return page.locator(".column").nth(column).locator(".cell").evaluate_all(
        "cells => cells.map((c) => c.textContent.replace('↵', '')).join('')")  # fmt: skip


def test_continuations_side_by_side_and_another_character_goes_on_from_there(visit, site):
    page = visit("continue")
    greedy(page)
    page.fill("#prompt", "你好")
    page.fill("#continue [name=n]", "2")
    page.fill("#continue [name=tokens]", "12")
    page.press("#prompt", "Control+Enter")
    expect(page.locator(".column")).to_have_count(2)
    told = completion(site, "你好", max_tokens=12, logprobs=1)
    assert written(page, 0) == written(page, 1) == told["text"]
    first = page.locator(".column").first.locator(".cell")
    first.nth(1).click()
    box = page.locator(".alternatives")
    expect(box.locator(".soft").first).to_contain_text("概率")
    other = box.locator("button:not(:disabled)").first
    letter = other.locator(".token").inner_text().replace("↵", "\n")
    other.click()
    kept = told["text"][:1] + letter
    assert written(page, 0) == kept + completion(site, "你好" + kept, max_tokens=12)["text"]
    assert written(page, 1) == told["text"], "the other column stays"
    expect(first.nth(1)).to_have_class(re.compile("chosen"))
    page.locator(".column").first.get_by_text("撤销").click()
    assert written(page, 0) == told["text"]
    page.locator(".column").first.get_by_text("继续写").click()
    assert written(page, 0).startswith(told["text"])


def test_bytes_are_joined_into_their_character_and_shaded_by_its_probability(visit, site):
    page = visit("continue")
    greedy(page)
    page.fill("#prompt", "生僻字")
    page.fill("#continue [name=n]", "1")
    page.fill("#continue [name=tokens]", "8")
    page.click("#continue [data-do=write]")
    told = completion(site, "生僻字", max_tokens=8, logprobs=1)
    text = written(page)
    assert "龘" in text
    assert text == told["text"].rstrip("\ufffd"), "half a character at the end waits to be written"
    cells = page.locator(".cell")
    at = text.index("龘")
    expect(cells.nth(at)).to_have_text("龘")
    tokens = told["logprobs"]
    begin = next(i for i, token in enumerate(tokens["token_bytes"]) if token == [0xE9])
    p = sum(tokens["token_logprobs"][begin : begin + 3])
    expect(cells.nth(at)).to_have_attribute("aria-label", re.compile(rf"^龘 {100 * 2.718281828**p:.0f}"))
    cells.nth(at).hover()
    expect(page.locator(".alternatives")).to_contain_text("3 个字节片")


def test_a_text_is_judged_and_what_mattered_is_marked(visit, site):
    page = visit("classify")
    text = "皇马赢得比赛，球迷期待。"
    page.fill("#judged", text)
    page.press("#judged", "Enter")
    told = httpx.post(f"{site}/classify", json={"input": text, "explain": True}).json()["data"][0]
    seen = told["label"].replace("\x07", "␇")
    expect(page.locator(".verdict .label strong")).to_have_text(seen)
    for label, p in told["probs"].items():
        row = page.locator(".chances li").filter(has_text=label.replace("\x07", "␇"))
        expect(row.locator(".figure")).to_have_text(f"{100 * p:.1f}%")
    assert page.locator(".marks").inner_text() == text
    most = max(told["contributions"], key=lambda one: abs(one["score"]))
    kind = "for" if most["score"] > 0 else "against"
    darkest = page.locator(".marks mark").evaluate_all(
        "marks => marks.find((m) => m.style.getPropertyValue('--s') === '1.000').className"
    )
    assert darkest == kind
    expect(page.locator(".verdict")).to_contain_text("留一法")


def test_a_dropped_csv_comes_back_labelled(visit, site, tmp_path):
    page = visit("classify")
    rows = [[str(i), f'第{i}条："皇马，赢"\n比赛{"国" * (i % 5)}'] for i in range(70)] + [["70", "  "]]
    sheet = io.StringIO()
    csv.writer(sheet).writerows([["编号", "评论"], *rows])
    data = sheet.getvalue().encode("gb18030")
    page.evaluate(
        """data => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(data)], "表.csv"));
          document.querySelector(".drop").dispatchEvent(new DragEvent("drop", { bubbles: true, dataTransfer: transfer }));
        }""",
        list(data),
    )
    expect(page.locator("#classify .file")).to_contain_text("71 行，GB18030")
    expect(page.locator("#column")).to_have_value("1")
    page.get_by_role("button", name="开始").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="下载").click()
    assert download.value.suggested_filename == "表-labelled.csv"
    download.value.save_as(tmp_path / "out.csv")
    back = list(csv.reader((tmp_path / "out.csv").open(encoding="utf-8-sig", newline="")))
    assert back[0] == ["编号", "评论", "predicted_label", "probability"]
    assert [row[:2] for row in back[1:]] == rows
    told = httpx.post(f"{site}/classify", json={"input": [text for _, text in rows[:70]]}).json()["data"]
    assert [row[2] for row in back[1:71]] == [one["label"] for one in told]
    assert [float(row[3]) for row in back[1:71]] == pytest.approx([one["score"] for one in told], abs=1e-3)
    assert back[71][2:] == ["", ""]
    expect(page.locator("#classify .file")).to_contain_text("1 行是空的")
