"""Looks at the page of a server that has an API key, in Chromium: run by page.py, with the browser environment's python.

python in_browser.py URL KEY FOLDER    prints what it checked; pictures go to FOLDER; ends with status 1 at a fault
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import expect, sync_playwright

SIZES = {"wide": (1280, 900), "narrow": (400, 900)}


def opened(browser: Any, url: str, size: tuple[int, int], scheme: str) -> Any:
    """A fresh tab with the page in it."""
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, device_scale_factor=1
    )
    page = context.new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(url + "/slo")
    return page


def key_is_asked_for_once(browser: Any, url: str, key: str) -> None:
    """A wrong key is told, the right one shows figures, a reload asks no more, another tab does."""
    page = opened(browser, url, SIZES["wide"], "light")
    asked = page.get_by_label("This server asks for its API key:")
    expect(asked).to_be_visible()
    expect(asked).to_be_focused()
    asked.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The server does not take this key.")
    asked.fill(key)
    page.keyboard.press("Enter")
    expect(page.get_by_text("chat").first).to_be_visible()
    expect(asked).to_be_hidden()
    page.reload()
    expect(page.get_by_text("chat").first).to_be_visible()
    expect(asked).to_be_hidden()
    assert page.evaluate("localStorage.length") == 0 and key not in page.url
    other = opened(browser, url, SIZES["wide"], "light")
    expect(other.get_by_label("This server asks for its API key:")).to_be_visible()
    assert not page.faults + other.faults, page.faults + other.faults
    print("asks for the key once, tells a wrong one, keeps it for the tab only")


def looks(browser: Any, url: str, key: str, folder: Path) -> None:
    """At both widths, light and dark: nothing runs out of the page, windows are chosen by keyboard."""
    for name, size in SIZES.items():
        for scheme in ("light", "dark"):
            page = opened(browser, url, size, scheme)
            page.get_by_label("This server asks for its API key:").fill(key)
            page.keyboard.press("Enter")
            expect(page.get_by_role("status")).to_be_visible()
            over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert over <= 0, f"{name}: {over} px wider than the window"
            page.get_by_role("button", name="1 hour").focus()
            page.keyboard.press("Enter")
            expect(page.get_by_role("button", name="1 hour")).to_have_attribute("aria-pressed", "true")
            cut = page.evaluate(
                "[...document.querySelectorAll('.card:not(:has(.scroll))')].filter(c => c.scrollWidth > c.clientWidth + 1)"
                ".map(c => c.querySelector('h2').textContent)"
            )
            assert not cut, f"{name}: runs out of its card: {cut}"
            scrolled = page.evaluate(
                "[...document.querySelectorAll('.scroll')].some(s => s.scrollWidth > s.clientWidth + 1)"
            )
            assert name != "wide" or not scrolled, "the table of classes does not fit into a wide window"
            assert not page.faults, page.faults
            page.screenshot(path=folder / f"slo-{name}-{scheme}.png", full_page=True)
            print(f"{name} ({size[0]} px), {scheme}: fits, keyboard works")


def main(url: str, key: str, folder: str) -> int:
    """Entry point; returns the exit status."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        key_is_asked_for_once(browser, url, key)
        looks(browser, url, key, Path(folder))
        print(f"Chromium {browser.version}")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
