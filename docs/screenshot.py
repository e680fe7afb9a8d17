"""Photograph an HTML file with Debian's chromium; nothing is fetched from a network.

    python docs/screenshot.py runs/demo/report.html docs/report.png --width 1280 --height 900

Without --height the whole page is photographed. `--dark` asks for the dark theme, `--click CSS`
clicks one element first (for instance `--click "input[value=rel_error]"`), `--to CSS` starts the
picture at an element.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


def find_chromium() -> str | None:
    """Path of a chromium on PATH, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless chromium that is closed at the end. Raises SystemExit when there is none."""
    path = find_chromium()
    if path is None:
        raise SystemExit("no chromium on PATH (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, help="only this many pixels from the top")
    parser.add_argument("--scale", type=float, default=1.0, help="device pixels per CSS pixel")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--click", help="CSS selector to click first")
    parser.add_argument("--to", help="CSS selector to scroll to (with --height)")
    options = parser.parse_args(arguments)
    with chromium() as browser:
        page = browser.new_page(
            viewport={"width": options.width, "height": options.height or 900},
            color_scheme="dark" if options.dark else "light",
            device_scale_factor=options.scale,
            reduced_motion="reduce",
        )
        page.goto(options.page.resolve().as_uri())
        if options.click:
            page.locator(options.click).first.click(force=True)
            page.mouse.move(0, 0)
        if options.to:
            page.locator(options.to).first.evaluate("element => element.scrollIntoView()")
        page.screenshot(path=options.picture, full_page=options.height is None)


if __name__ == "__main__":
    main(sys.argv[1:])
