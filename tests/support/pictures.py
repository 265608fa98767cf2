"""Pictures of the page: `python -m tests.support.pictures WORKSPACE FOLDER [WORD ...]`.

FOLDER gets every tab in both languages, both themes, and at the width of a desktop and of a phone; with words
only those that have all of them, as `chat zh dark`. WORKSPACE is a folder that `edge ui` has worked in.
docs/pictures has some of them, under these names.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path

from edge.ui.app import TABS
from tests.support.browser import Browser, headless
from tests.support.page import Page

SIZES = {"desktop": (1200, 800), "phone": (390, 800)}
# The parts that are folded or asked for, by tab; in either language.
OPENED = {"Data": ("Preview", "预览")}
# What is scrolled to, the last of its kind.
SHOWN = {"Data": ".edge-chart", "Export": ".q-table__container"}
DRAWN_S = 2.5


def views() -> list[tuple[str, str, str, str]]:
    """(tab, language, theme, size) of every picture."""
    return list(itertools.product(TABS, ("en", "zh"), ("light", "dark"), SIZES))


def take(page: Page, view: tuple[str, str, str, str], folder: Path) -> None:
    tab, language, theme, size = view
    browser: Browser = page.browser
    width, height = SIZES[size]
    browser.colours(theme)
    browser.resize(width, height, mobile=size == "phone")
    page.open(tab, language)
    if tab in OPENED:
        page.press(OPENED[tab][language == "zh"])
        browser.until("document.querySelector('.edge-tokens') !== null", 120)
    if tab in SHOWN:
        last = f"[...document.querySelectorAll('{SHOWN[tab]}')].at(-1)"
        browser.ask(f"{last}?.scrollIntoView({{block: '{'start' if tab == 'Data' else 'end'}'}})")
        browser.ask("window.scrollBy(0, {})".format(-190 if tab == "Data" else 20))
    time.sleep(DRAWN_S)
    browser.picture(folder / f"{tab.lower()}-{language}-{theme}-{size}.png")


def main(argv: list[str]) -> int:
    workspace, folder = (Path(one).absolute() for one in argv[:2])
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {*argv[2:]}
    with tempfile.TemporaryDirectory() as profile, headless(Path(profile)) as browser:
        page = Page(workspace, browser)
        page.start()
        try:
            for view in views():
                if wanted <= {part.lower() for part in view}:
                    take(page, view, folder)
        finally:
            page.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
