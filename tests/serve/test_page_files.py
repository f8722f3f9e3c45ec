"""The page's files and looks: small, nothing from elsewhere, dark, in English; what it says without model or key."""

import csv
import io
import random
import re
from pathlib import Path

import httpx
from playwright.sync_api import Page, expect

from miaobi import serve
from miaobi.serve.config import Serve

PAGE = Path(serve.__file__).parent / "page"
MAX_BYTES = 150_000


def test_without_a_model_it_says_how_to_serve_one_and_a_key_is_asked_for(visit, serving, place):
    with serving(Serve(runs=str(place / "runs"), api_key="s3cret")) as keyed:
        page = visit(keyed.url, "runs", fails=True, until="#key[open]")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_text("这个密钥不对。")).to_be_visible()
        page.keyboard.type("s3cret")
        page.keyboard.press("Enter")
        expect(page.locator("[data-runs] .name").first).to_be_visible()
        for tab, line in {"chat": "miaobi serve MODEL", "classify": "miaobi serve MODEL --classifier=DIR"}.items():
            page.click(f"#tab-{tab}")
            expect(page.locator(f"#{tab} code").last).to_have_text(line)


def test_it_waits_while_the_model_is_loaded(visit, serving, place):
    with serving(Serve(runs=str(place / "runs")), is_loading=True) as loading:
        page = visit(loading.url, "runs", fails=True, until="#server:not([hidden])")
        expect(page.locator("#server")).to_contain_text("正在载入")
        loading.app.state.served = loading.served
        expect(page.locator("[data-runs] .name").first).to_be_visible()
        expect(page.locator("#server")).to_be_hidden()


def test_the_policy_lets_nothing_in_and_is_obeyed(visit, site):
    policy = httpx.get(site.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert not re.search(r"unsafe|\*|http:|https:", policy)
    page = visit(site.url, fails=True)
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "document.title = 'oops'";
          document.body.append(script);
          document.body.setAttribute("style", "display: none");
        }"""
    )
    assert page.title() == "妙笔 miaobi"
    assert page.locator("#say").is_visible()


def test_files_are_few_and_small_and_never_parse_a_text_as_html():
    files = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
    assert sum(len(text.encode()) for text in files.values()) <= MAX_BYTES
    for name, text in files.items():
        assert text.count("\n") <= 350, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|DOMParser", text), name
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}[^\s\"')]*", text)) - {
            "http://www.w3.org/2000/svg"
        }
        assert not addresses, name
    assert not re.search(r"<script(?! [^>]*src=)|<style|\sstyle=|\son\w+=", files["index.html"])
    code = "".join(text for name, text in files.items() if name != "words.js")
    for key in re.findall(r'^  "([\w.]+)": \[', files["words.js"], re.MULTILINE):
        used = f'"{key}"' in code or f"{key.rpartition('.')[0]}.$" in code or key.endswith((".how", ".why"))
        assert used, f"{key} is said nowhere"


def test_tables_are_read_as_python_reads_them(visit, site):
    draw, tables = random.Random(0), []
    for _ in range(200):
        rows = [["".join(draw.choices('a字,"\n\r; \t', k=draw.randint(0, 6))) for _ in range(3)] for _ in range(4)]
        rows.insert(draw.randint(0, 3), [""])  # which Python writes with quotes, and people as a blank line
        sheet = io.StringIO()
        csv.writer(sheet, lineterminator="\r\n").writerows(rows)
        tables.append((sheet.getvalue().replace('\r\n""\r\n', draw.choice(['\r\n""\r\n', "\r\n\r\n"])), rows))
    page = visit(site.url)
    read = page.evaluate("async texts => { const { parse } = await import('/page/table.js');"
                         " return texts.map((text) => parse(text, ',')); }", [text for text, _ in tables])  # fmt: skip
    assert read == [rows for _, rows in tables]
    back = page.evaluate("async tables => { const { csv } = await import('/page/table.js');"
                         " return tables.map((rows) => csv(rows)); }", [rows for _, rows in tables])  # fmt: skip
    for text, (_, rows) in zip(back, tables, strict=True):
        assert list(csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""))) == rows


SHEETS = {
    "big5": "編號,評論\n1,這家酒店的房間很乾淨，下次還會再來\n2,服務態度很差，早餐也不好吃\n3,老闆人很親切\n",
    "gb18030": "编号,评论\n1,这家酒店的房间很干净，下次还会再来\n2,服务态度很差，早餐也不好吃\n3,老板很热情\n",
    "utf-8": "編號,評論\n1,這家酒店的房間很乾淨\n2,这家酒店的房间很干净\n",
    "utf-8-sig": "text\n很好\n",
    "utf-16": "編號,評論\n1,這家酒店的房間很乾淨\n",
    "gbk": "text\n很好\n不错\n",
    "big5hkscs": "text\n很好\n不錯\n嘅\n",
}


def test_tables_are_read_in_the_encoding_that_python_wrote_them_in(visit, site):
    """Big5's bytes are mostly valid GB18030 as well; bytes that are neither are told."""
    sheets = {name: list(text.encode(name)) for name, text in SHEETS.items()} | {"latin": [0x74, 0x0A, 0xFC, 0x0A]}
    page = visit(site.url)
    read = page.evaluate(
        """async sheets => {
          const { read } = await import("/page/table.js"), found = {};
          for (const [name, bytes] of Object.entries(sheets)) {
            try { found[name] = (await read(new File([new Uint8Array(bytes)], "a.csv"))).rows; }
            catch (failure) { found[name] = failure.message || String(failure); }
          }
          return found;
        }""",
        sheets,
    )
    latin = read.pop("latin")
    assert read == {name: list(csv.reader(io.StringIO(text))) for name, text in SHEETS.items()}
    assert isinstance(latin, str)


def luminance(page: Page, of: str) -> float:
    """0 = black, 255 = white: the background or the letters of the page."""
    found = page.evaluate(f"getComputedStyle(document.body).{of}")
    return sum(map(float, re.findall(r"[\d.]+", found)[:3])) / 3


def test_dark_and_light_and_both_languages(visit, site):
    page = visit(site.url, color_scheme="dark", locale="en-US")
    assert luminance(page, "backgroundColor") < 40 < 200 < luminance(page, "color")
    for tab in ("chat", "continue", "classify", "runs"):
        page.click(f"#tab-{tab}")
        own = page.locator(f"#{tab} [data-t]:visible, .top [data-t]:not(#language)").all_inner_texts()
        assert own
        assert not [words for words in own if re.search("[\u4e00-\u9fff]", words)]
    page.click("#theme")
    page.click("#language")
    page.reload()
    assert luminance(page, "color") < 60 < 200 < luminance(page, "backgroundColor")
    expect(page.locator("#tab-runs")).to_have_text("训练")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
