"""Pictures of the page for the README, from a server that runs.

miaobi serve demo_run/chat --classifier=demo_run/sentiment --runs=demo_run --port=8000
miaobi serve demo_run --port=8001
python docs/images/pictures.py http://127.0.0.1:8000 http://127.0.0.1:8001
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

HERE = Path(__file__).parent
DESKTOP = {"viewport": {"width": 1200, "height": 880}}
PHONE = {"viewport": {"width": 360, "height": 720}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
JUDGED = "房间很干净，前台也热情，就是早餐一般，晚上有点吵。不过离地铁近，下次还来。"


def chat(page: Page) -> None:
    """A conversation of three turns."""
    page.locator("#chat [data-settings]").click()
    page.fill("#set-temperature", "0")
    page.keyboard.press("Escape")
    for text in ("你好", "你好吗？", "很高兴认识你。"):
        page.fill("#say", text)
        page.press("#say", "Enter")
        page.wait_for_selector("#chat [data-do=send]:visible")


def continuation(page: Page) -> None:
    """Three continuations, and what stood beside one character."""
    page.locator("#continue [data-settings]").click()
    page.fill("#set-seed", "7")
    page.keyboard.press("Escape")
    page.fill("#prompt", "今年春天，")
    page.fill("#continue [name=tokens]", "110")
    page.click("#continue [data-do=write]")
    page.wait_for_selector("#continue [data-do=write]:visible")
    cell = page.locator(".column").nth(0).locator(".cell").nth(12)
    cell.scroll_into_view_if_needed()
    cell.click()


def classification(page: Page) -> None:
    """A review, judged."""
    page.fill("#judged", JUDGED)
    page.click("#classify [type=submit]")
    page.wait_for_selector(".marks")


def runs(page: Page) -> None:
    """Two runs over each other."""
    page.wait_for_selector(".line")
    for name in ("demo_run", "chat"):
        page.locator("#runs li", has=page.get_by_text(name, exact=True)).locator("input").check()
    page.mouse.move(700, 250)


TABS = {"chat": chat, "continue": continuation, "classify": classification, "runs": runs}


def picture(browser: Browser, url: str, tab: str, size: dict, theme: str, name: str) -> None:
    """One PNG of 256 colours."""
    context = browser.new_context(locale="zh-CN", color_scheme=theme, **size)
    page = context.new_page()
    page.goto(f"{url}/#/{tab}")
    page.wait_for_selector("html.ready")
    TABS[tab](page)
    page.wait_for_timeout(300)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(HERE / f"{name}.png", optimize=True)
    context.close()


def main() -> None:
    """Each tab on a desktop, light or dark; chat and continue on a phone."""
    chatting, writing = sys.argv[1:]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for tab, theme in {"chat": "light", "continue": "light", "classify": "dark", "runs": "light"}.items():
            picture(browser, writing if tab == "continue" else chatting, tab, DESKTOP, theme, f"page-{tab}")
        picture(browser, chatting, "chat", PHONE, "dark", "page-phone-chat")
        picture(browser, writing, "continue", PHONE, "light", "page-phone-continue")
        browser.close()


if __name__ == "__main__":
    main()
