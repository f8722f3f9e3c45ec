"""The page in a real Chromium, against a real server whose tiny model learned its replies by heart."""

import csv
import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from browsing import answered, ask, greedy, tab_to, written
from playwright.sync_api import expect

from miaobi.serve.config import Serve
from miaobi.settings import load_config

SCRIPT = "<script>document.title='oops'</script>"
REPLIES = {
    "你好": "你好呀",
    "你是谁": "我叫妙笔",
    "写代码": SCRIPT,
    "生僻字": "生僻的龘龘真难写",
    "数数": "一二三四五六七八九十" * 20,
}
RUN = "<b>run\x1b[31m"  # of files: what may stand in their names
LABELS = ["差<i>评\x07", "好评"]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows REPLIES; of 难, which comes once, its vocabulary has the bytes."""
    from miaobi.corpus.config import PrepareConfig
    from miaobi.corpus.prepare import prepare
    from miaobi.generate.chat import preview
    from miaobi.train.loop import train

    place = tmp_path_factory.mktemp("runs")
    (place / "said.txt").write_text("\n\n".join(map("\n".join, [*REPLIES.items()] * 16)) + "\n", encoding="utf-8")
    config = PrepareConfig(out=place / "data", format="dialogue", dedup="none", workers=1)
    known = prepare([str(place / "said.txt")], config)["vocab_size"]
    shutil.rmtree(place / "data")
    prepare([str(place / "said.txt")], PrepareConfig(**vars(config) | {"vocab_size": known - 3}))
    values = {
        "data": place / "data", "out_dir": place / RUN, "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64,
        "batch_size": 8, "max_iters": 80, "eval_interval": 40, "eval_iters": 2, "log_interval": 1, "sample_tokens": 12,
        "device": "cpu", "dtype": "float32", "compile": False,
    }  # fmt: skip
    train(*load_config(None, [(key, str(value)) for key, value in values.items()]), preview)
    return place / RUN


@pytest.fixture(scope="module")
def url(talker: Path, serving: Callable, judge: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with all that the page shows."""
    classifier = judge(tmp_path_factory.mktemp("judge") / "judge", LABELS)
    with serving(Serve(model=str(talker), classifier=str(classifier), runs=str(talker.parent), device="cpu")) as found:
        yield found.url


def test_chat_replies_is_edited_and_tried_again(visit, url):
    page = visit(url, permissions=["clipboard-read", "clipboard-write"])
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


def test_chat_stops_and_what_was_said_is_exported_for_prepare(visit, url, tmp_path, miaobi, slow_steps):
    page = visit(url)
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
    line = (tmp_path / "said.jsonl").read_text(encoding="utf-8")
    assert [turn["content"] for turn in json.loads(line)["messages"]] == said
    (tmp_path / "said.jsonl").write_text(line * 30, encoding="utf-8")
    made = miaobi("prepare", tmp_path / "said.jsonl", "--format=dialogue", "--dedup=none", f"--out={tmp_path / 'data'}")
    assert made.code == 0, made.err


def test_what_a_model_a_run_and_a_label_say_is_text(visit, url):
    page = visit(url)
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


def completion(url: str, prompt: str, **how: object) -> dict:
    """What the API writes behind a prompt, greedily."""
    name = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    body = {"model": name, "prompt": prompt, "temperature": 0, "top_p": 0.9, "repetition_penalty": 1} | how
    return httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]


def test_continuations_side_by_side_and_another_character_goes_on_from_there(visit, url):
    page = visit(url, "continue")
    greedy(page)
    page.fill("#prompt", "一二三")
    page.fill("#continue [name=n]", "2")
    page.fill("#continue [name=tokens]", "12")
    page.press("#prompt", "Control+Enter")
    expect(page.locator(".column")).to_have_count(2)
    told = completion(url, "一二三", max_tokens=12, logprobs=1)
    assert written(page, 0) == written(page, 1) == told["text"]
    first = page.locator(".column").first.locator(".cell")
    first.nth(1).click()
    box = page.locator(".alternatives")
    expect(box.locator(".soft").first).to_contain_text("概率")
    other = box.locator("button:not(:disabled)").first
    letter = other.locator(".token").inner_text().replace("↵", "\n")
    other.click()
    kept = told["text"][:1] + letter
    assert written(page, 0) == kept + completion(url, "一二三" + kept, max_tokens=12)["text"]
    assert written(page, 1) == told["text"], "the other column stays"
    expect(first.nth(1)).to_have_class(re.compile("chosen"))
    page.locator(".column").first.get_by_text("撤销").click()
    assert written(page, 0) == told["text"]
    page.locator(".column").first.get_by_text("继续写").click()
    assert written(page, 0).startswith(told["text"])


def test_bytes_are_joined_into_their_character_and_shaded_by_its_probability(visit, url):
    page = visit(url, "continue")
    greedy(page)
    page.fill("#prompt", "生僻的")
    page.fill("#continue [name=n]", "1")
    page.fill("#continue [name=tokens]", "8")
    page.click("#continue [data-do=write]")
    told = completion(url, "生僻的", max_tokens=8, logprobs=1)
    text = written(page)
    assert "难" in text
    assert text == told["text"].rstrip("\ufffd"), "half a character at the end waits to be written"
    cells = page.locator(".cell")
    at = text.index("难")
    expect(cells.nth(at)).to_have_text("难")
    tokens = told["logprobs"]
    begin = next(i for i, token in enumerate(tokens["token_bytes"]) if token == list("难".encode())[:1])
    p = sum(tokens["token_logprobs"][begin : begin + 3])
    expect(cells.nth(at)).to_have_attribute("aria-label", re.compile(rf"^难 {100 * 2.718281828**p:.0f}"))
    cells.nth(at).hover()
    expect(page.locator(".alternatives")).to_contain_text("3 个字节片")


def test_a_text_is_judged_and_what_mattered_is_marked(visit, url):
    page = visit(url, "classify")
    text = "皇马赢得比赛，球迷期待。"
    page.fill("#judged", text)
    page.press("#judged", "Enter")
    told = httpx.post(f"{url}/classify", json={"input": text, "explain": True}).json()["data"][0]
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


def test_a_dropped_csv_comes_back_labelled(visit, url, tmp_path):
    page = visit(url, "classify")
    rows = [[str(i), f'第{i}条："皇马，赢"\n比赛{"国" * (i % 5)}'] for i in range(70)] + [["70", "  "]]
    rows[3].append("多一格")
    sheet = io.StringIO()
    csv.writer(sheet).writerows([["编号", "评论"], *rows])
    data = sheet.getvalue().encode("gb18030")
    page.evaluate(
        """data => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([new Uint8Array(data)], "表.csv"));
          const drop = new DragEvent("drop", { bubbles: true, dataTransfer: transfer });
          document.querySelector(".drop").dispatchEvent(drop);
        }""",
        list(data),
    )
    expect(page.locator("#classify .file")).to_contain_text("71 行，GB18030")
    expect(page.locator("#column")).to_have_value("1")
    expect(page.locator("#classify blockquote")).to_contain_text('第0条："皇马，赢"')
    page.get_by_role("button", name="开始").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="下载").click()
    assert download.value.suggested_filename == "表-labelled.csv"
    download.value.save_as(tmp_path / "out.csv")
    back = list(csv.reader((tmp_path / "out.csv").open(encoding="utf-8-sig", newline="")))
    assert back[0] == ["编号", "评论", "", "predicted_label", "probability"]
    assert [row[:3] for row in back[1:]] == [[*row, ""][:3] for row in rows]
    told = httpx.post(f"{url}/classify", json={"input": [row[1] for row in rows[:70]]}).json()["data"]
    assert [row[3] for row in back[1:71]] == [one["label"] for one in told]
    assert [float(row[4]) for row in back[1:71]] == pytest.approx([one["score"] for one in told], abs=1e-3)
    assert back[71][3:] == ["", ""]
    expect(page.locator("#classify .file")).to_contain_text("1 行是空的")


def test_runs_are_laid_over_each_other_live_with_their_samples(visit, url, talker):
    from miaobi.train.loop import train

    page = visit(url, "runs")
    place, figure = talker.parent, page.locator(".chart:not([hidden])")
    expect(figure.locator("h2")).to_have_text(["验证集，每字比特", "学习率", "每秒词元"])
    shown = page.locator("[data-runs] .name")
    expect(shown).to_have_text([RUN.replace("\x1b", "␛")])
    expect(page.locator(".samples li h3")).to_have_text(["第 80 步", "第 40 步"])
    samples = [json.loads(line)["text"] for line in (talker / "samples.jsonl").read_text("utf-8").splitlines()]
    assert page.locator(".samples .text").all_inner_texts() == samples[::-1]
    values = {
        "data": place / "data", "out_dir": place / "live", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 64,
        "batch_size": 2, "max_iters": 60, "eval_interval": 30, "eval_iters": 1, "log_interval": 1, "sample_tokens": 0,
        "device": "cpu", "dtype": "float32", "compile": False,
    }  # fmt: skip
    given = load_config(None, [(key, str(value)) for key, value in values.items()])
    training = threading.Thread(target=train, args=given)
    training.start()
    page.get_by_label("live").check(timeout=30_000)
    expect(page.locator("[data-runs] li").filter(has_text="live")).to_contain_text("60 / 60 步", timeout=60_000)
    training.join()
    rows = [json.loads(line) for line in (place / "live" / "metrics.jsonl").read_text().splitlines()]
    last = [row["val_bits_per_char"] for row in rows if "val_bits_per_char" in row][-1]
    mine = figure.first.locator(".values > span").filter(has_text="live")
    expect(mine).to_contain_text(f"{last:.4g}"[:4], timeout=30_000)
    expect(mine).to_contain_text("第 60 步")
    assert figure.first.locator("polyline.line:not(.pale)").count() == 2
    figure.first.locator("svg").focus()
    page.keyboard.press("Home")
    expect(figure.first.locator(".values")).to_contain_text("第 40 步")


def test_everything_is_done_with_the_keyboard_alone(visit, url):
    page = visit(url)
    press, focus = page.keyboard.press, "document.activeElement.id"
    tab_to(page, ".skip")
    tab_to(page, "#tab-chat")
    tab_to(page, "[data-settings]")
    press("Enter")
    tab_to(page, "#set-temperature")
    page.keyboard.type("0")
    press("Escape")
    assert page.evaluate("document.activeElement.matches('[data-settings]')"), "focus returns to where it was"
    tab_to(page, "#say")
    page.keyboard.type("你好")
    press("Enter")
    assert answered(page, 2)[1] == "你好呀"
    tab_to(page, "[data-t='chat.edit']", "Shift+Tab")
    press("Enter")
    press("Control+A")
    page.keyboard.type("你是谁")
    press("Enter")
    assert answered(page, 2) == ["你是谁", "我叫妙笔"]
    tab_to(page, "#tab-chat", "Shift+Tab")
    press("ArrowRight")
    assert page.evaluate(focus) == "tab-continue"
    tab_to(page, "#prompt")
    page.keyboard.type("一二三")
    press("Control+Enter")
    before = written(page)
    tab_to(page, ".cell")
    for key in ("ArrowRight", "ArrowRight", "Enter", "Enter"):
        press(key)
    expect(page.locator(".cell.chosen")).to_have_count(1)
    assert written(page)[:2] == before[:2]
    assert written(page)[2] != before[2]
    tab_to(page, "#tab-continue", "Shift+Tab")
    press("ArrowRight")
    tab_to(page, "#judged")
    page.keyboard.type("皇马赢得比赛")
    press("Enter")
    expect(page.locator(".verdict .label")).to_be_visible()
    tab_to(page, "#table")
    tab_to(page, "#tab-classify", "Shift+Tab")
    press("End")
    page.locator("#runs .line").first.wait_for()
    tab_to(page, "[data-runs] input")
    press("Space")
    expect(page.locator(".chart:not([hidden])")).to_have_count(0)


def test_on_a_phone_nothing_is_wider_than_it(visit, url):
    page = visit(url, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    ask(page, "写代码")
    answered(page, 2)
    page.tap("#tab-continue")
    page.fill("#prompt", "一二三" * 30)
    page.tap("#continue [data-do=write]")
    written(page)
    page.tap("#tab-classify")
    page.fill("#judged", "皇马" * 100)
    page.tap("#classify [type=submit]")
    expect(page.locator(".verdict .label")).to_be_visible()
    for tab in ("chat", "continue", "classify", "runs"):
        page.tap(f"#tab-{tab}")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, tab
        small = "nodes => nodes.filter((n) => n.offsetParent && n.getBoundingClientRect().height < 24).length"
        assert page.locator("button").evaluate_all(small) == 0
    page.tap("#tab-continue")
    page.locator(".cell").last.tap()
    box = page.locator(".alternatives").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360


def test_a_lost_server_and_a_request_that_is_refused_are_told_in_words(visit, url):
    page = visit(url, fails=True)
    page.context.set_offline(True)
    ask(page, "你好")
    expect(page.get_by_role("alert")).to_contain_text("连不上服务器")
    page.context.set_offline(False)
    greedy(page)
    page.get_by_text("再试一次").click()
    assert answered(page, 2)[1] == "你好呀"
    page.click("#tab-continue")
    page.fill("#prompt", "一")
    page.locator("[name=tokens]").evaluate("input => { input.max = ''; }")
    page.fill("[name=tokens]", "99999")
    page.click("#continue [data-do=write]")
    expect(page.get_by_role("alert").first).to_contain_text("max_tokens is too large")
