"""The page in a real browser: nothing is fetched, no text becomes markup, it fits a phone, both languages are whole."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from tests.report.conftest import falling, flat, history

from miaobi.report.config import ReportConfig
from miaobi.report.page import render, report
from miaobi.report.reading import read_run

EVIL = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">{{ 7*7 }}\u202e\x1b[31m\x00"
)


@pytest.fixture(scope="module")
def chromium():
    """Chromium, as playwright drives it."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with playwright.sync_playwright() as driver:
        try:
            opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except playwright.Error as e:
            if os.environ.get("MIAOBI_REQUIRE_CHROMIUM"):
                raise
            pytest.skip(f"NO CHROMIUM: what a browser makes of the page is not known ({str(e).splitlines()[0]})")
        yield opened
        opened.close()


def opened(browser, file: Path, **how):
    """The page, and what it complained of or asked the network for."""
    context = browser.new_context(**how)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: None if request.url == file.as_uri() else said.append(request.url))
    page.goto(file.as_uri())
    return page, said


def test_every_run_that_the_command_trains_gets_a_report(miaobi, corpus_file: Path, tmp_path: Path):
    from tests.conftest import tiny

    out = tmp_path / "run"
    answer = miaobi("train", *tiny(data=corpus_file, out_dir=out, max_iters=10))
    assert answer.code == 0, answer.err
    assert f"report: {out / 'report.html'}" in answer.err
    assert "<h1>run</h1>" in (out / "report.html").read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_costs_a_line(miaobi, corpus_file: Path, tmp_path: Path):
    from tests.conftest import tiny

    out = tmp_path / "run"
    (out / "report.html").mkdir(parents=True)
    answer = miaobi("train", *tiny(data=corpus_file, out_dir=out, max_iters=10), "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["step"] == 10
    assert "the report was not written" in answer.err


def test_a_run_of_another_configuration_keeps_its_report(miaobi, altered):
    from tests.conftest import tiny

    run = altered()
    (run / "report.html").write_text("old", encoding="utf-8")
    assert miaobi("train", *tiny(data=run / "data", out_dir=run, n_embd=64)).code == 2
    assert (run / "report.html").read_text(encoding="utf-8") == "old"


def test_the_command_prints_the_verdict(miaobi, sampled: Path, altered):
    before = {file: file.stat().st_mtime_ns for file in sampled.rglob("*") if file.is_file()}
    out = sampled.parent / "page.html"
    told = json.loads(miaobi("report", sampled, altered("other"), f"--out={out}", "--json").out)
    assert told["out"] == str(out)
    assert [run["stopped"] for run in told["runs"]] == ["max_iters", "max_iters"]
    assert {file: file.stat().st_mtime_ns for file in sampled.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["{run}", "--out={run}"], ["{run}", "--out=no/where/x.html"]])
def test_what_cannot_be_is_said(miaobi, sampled: Path, arguments: list[str]):
    answer = miaobi("report", *(argument.format(run=sampled) for argument in arguments))
    assert answer.code == 2
    assert answer.err.count("\n") == 1


def test_the_page_is_whole_in_both_languages_and_on_every_screen(chromium, altered, tmp_path: Path):
    runs = [altered("one", metrics=history(flat, flat)), altered("two", metrics=history(falling, falling))]
    for names in (runs[:1], runs):
        file = tmp_path / f"{len(names)}.html"
        report(ReportConfig(tuple(map(str, names)), file))
        page, said = opened(chromium, file, viewport={"width": 360, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        chinese = page.inner_text("body")
        page.click("label[for=en]")
        english = page.inner_text("body")
        assert "曲线" in chinese
        assert "Curves" not in chinese
        assert "Curves" in english
        assert "曲线" not in english
        assert page.evaluate("document.querySelectorAll('svg[role=img]').length") >= 4
        too_small = """[...document.querySelectorAll('svg[role=img] text')].filter(
            e => e.getClientRects().length && e.getBoundingClientRect().height < 9).length"""
        assert page.evaluate(too_small) == 0
        assert said == []
        page.context.close()


def test_light_dark_and_print_have_colours_of_their_own_and_enough_contrast(chromium, sampled: Path):
    file = sampled.parent / "colours.html"
    report(ReportConfig((str(sampled),), file))
    seen = {}
    for name, scheme, media in (("light", "light", "screen"), ("dark", "dark", "screen"), ("print", "dark", "print")):
        page, said = opened(chromium, file, color_scheme=scheme)
        page.emulate_media(media=media)
        seen[name] = page.evaluate("""[...document.querySelectorAll('body, .what, .headline, .tick')].map(e => {
            const s = getComputedStyle(e); return s.display === 'none' ? null : e.matches('.tick') ? s.fill : s.color;
        }).concat([getComputedStyle(document.body).backgroundColor])""")
        assert said == []
        page.context.close()
    for name, colours in seen.items():
        *texts, paper = (luminance(colour) for colour in colours if colour)
        for text in texts:
            assert (max(text, paper) + 0.05) / (min(text, paper) + 0.05) >= 4.5, (name, colours)
    assert seen["print"][-1] == "rgb(255, 255, 255)"
    assert seen["dark"][-1] != seen["light"][-1]


def luminance(colour: str) -> float:
    """WCAG's relative luminance of `rgb(r, g, b)`."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_no_text_of_a_run_becomes_markup(chromium, altered, tmp_path: Path):
    """Samples, errors, settings, sources and the run's own name are written by others."""
    run = altered("a&b <i>", samples=[{"step": 20, "text": EVIL + "\ud800"}],
                  summary={"stopped": "failed", "error": EVIL, "device": EVIL,
                           "versions": {EVIL: EVIL}, "cpu": EVIL, "git_commit": EVIL, "gpus": [EVIL]})  # fmt: skip
    manifest = json.loads((run / "data" / "manifest.json").read_text(encoding="utf-8"))
    manifest["sources"] = [{"path": EVIL, "encoding": EVIL, "characters": 1}, {"path": EVIL, "reason": EVIL}]
    (run / "data" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    config = (run / "config.yaml").read_text(encoding="utf-8")
    config = re.sub(r"wandb_project: .*", lambda _: f"wandb_project: {json.dumps(EVIL)} # {EVIL[:-1]}", config)
    (run / "config.yaml").write_text(config.replace("\x1b", "").replace("\x00", ""), encoding="utf-8")
    file = tmp_path / "page.html"
    file.write_text(render([read_run(str(run)), read_run(str(altered("other")))]), encoding="utf-8")
    page, said = opened(chromium, file)
    page.wait_for_timeout(100)
    assert page.title().startswith("妙笔 · a&b <i>")
    assert said == []
    assert page.evaluate("document.querySelectorAll('script, img, iframe, object, link, i').length") == 0
    text = page.inner_text("body")
    assert "onerror" in text
    assert "{{ 7*7 }}" in text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", file.read_text(encoding="utf-8"))


def test_nothing_is_written_that_the_fonts_of_a_chinese_system_lack(chromium, sampled: Path):
    """Every character is drawn by a font that has it; Chromium's own list of used fonts knows no "last resort"."""
    file = sampled.parent / "glyphs.html"
    report(ReportConfig((str(sampled),), file))
    page, _ = opened(chromium, file)
    client = page.context.new_cdp_session(page)
    client.send("DOM.enable")
    client.send("CSS.enable")
    root = client.send("DOM.getDocument")["root"]["nodeId"]
    body = client.send("DOM.querySelector", {"nodeId": root, "selector": "body"})["nodeId"]
    fonts = client.send("CSS.getPlatformFontsForNode", {"nodeId": body})["fonts"]
    page.context.close()
    if not any("CJK" in font["familyName"] or "Hei" in font["familyName"] for font in fonts):
        pytest.skip(f"NO CHINESE FONT HERE: {fonts}")
    assert not any("LastResort" in font["familyName"] for font in fonts)


def test_a_page_of_a_long_run_stays_small(altered):
    rows = [{"step": step, "train_loss": 3.0, "grad_norm": 1.0, "tokens_per_second": 1.0, "learning_rate": 1e-3}
            for step in range(1, 20_000)]  # fmt: skip
    rows += [{"step": step, "val_loss": 3.0, "val_bits_per_char": 6.0} for step in range(10, 20_000, 10)]
    samples = [{"step": step, "text": "长" * 5000} for step in range(10, 20_000, 10)]
    page = render([read_run(str(altered(metrics=rows, samples=samples)))])
    assert len(page.encode()) < 300_000
