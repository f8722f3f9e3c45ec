"""How a person moves in the page."""

import pytest
from playwright.sync_api import Page, expect

expect.set_options(timeout=30_000)  # of a machine with much else to do


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


def written(page: Page, column: int = 0) -> str:
    """What a column holds behind its prompt, once it is whole."""
    expect(page.locator(".column.writing")).to_have_count(0)
    return page.locator(".column").nth(column).locator(".cell").evaluate_all(
        "cells => cells.map((c) => c.textContent.replace('↵', '')).join('')")  # fmt: skip


def tab_to(page: Page, wanted: str, key: str = "Tab") -> None:
    """Press Tab until something that matches is focused; what is focused on the way can be seen to be."""
    for _ in range(40):
        page.keyboard.press(key)
        assert page.evaluate(
            """() => { let node = document.activeElement;
              for (let i = 0; node && i < 3; i += 1, node = node.parentElement) {
                const style = getComputedStyle(node);
                if (style.outlineStyle !== "none" || style.boxShadow !== "none") return true;
              } return false; }"""
        ), page.evaluate("document.activeElement.outerHTML")
        if page.evaluate("wanted => document.activeElement.matches(wanted)", wanted):
            return
    pytest.fail(f"Tab does not lead to {wanted}")
