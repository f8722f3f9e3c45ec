"""How soon the page can be used: from its first byte, in a real Chromium, every time as a new visitor.

miaobi serve demo_run/chat --classifier=demo_run/sentiment --runs=demo_run
python -m benchmarks.page_load http://127.0.0.1:8000
"""

from __future__ import annotations

import shutil
import statistics
from dataclasses import dataclass

from playwright.sync_api import sync_playwright

from benchmarks.common import machine, parse, report
from miaobi.kinds import Positional

USABLE = """() => {
  const [first] = performance.getEntriesByType("navigation");
  const files = performance.getEntriesByType("resource");
  return { usable: performance.getEntriesByName("usable")[0].startTime - first.responseStart,
           painted: performance.getEntriesByName("first-contentful-paint")[0].startTime - first.responseStart,
           bytes: [first, ...files].reduce((sum, file) => sum + file.transferSize, 0) };
}"""


@dataclass(frozen=True)
class Args:
    """Command line."""

    url: Positional[str] = "http://127.0.0.1:8000"
    """Address of a `miaobi serve`."""
    visits: int = 20
    """Each with an empty cache; the first one is not counted: Chromium itself starts."""
    json: bool = False
    """Print one line of JSON as well."""


def main() -> None:
    """Visit, and report milliseconds from the first byte until the page has what the server told it of its model."""
    args = parse("page_load", Args, __doc__)
    found = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(args.visits + 1):
            context = browser.new_context(locale="zh-CN")
            page = context.new_page()
            page.goto(args.url)
            page.wait_for_selector("html.ready")
            page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
            found.append(page.evaluate(USABLE))
            context.close()
        browser.close()
    rows = {name: [visit[name] for visit in found[1:]] for name in ("painted", "usable")}
    table = [[name, statistics.median(times), max(times)] for name, times in rows.items()]
    report("page_load", ["ms from the first byte", "median", "slowest"], table,
           {"machine": machine(), **rows, "bytes": found[1]["bytes"]}, args.json)  # fmt: skip


if __name__ == "__main__":
    main()
