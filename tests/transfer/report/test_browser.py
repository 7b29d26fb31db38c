"""The report in headless Chromium: nothing asked of the network, everything on the page, at two widths."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.report_data import write_suite
from transfer.report import command

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip

pytestmark = [
    pytest.mark.skipif(not CHROMIUM, reason="no chromium here (Debian: apt-get install chromium)"),
    pytest.mark.xdist_group("browser"),
]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_suite(tmp_path_factory.mktemp("suite"))
    command.main([str(root), "--output", str(root / "report")])
    return root / "report" / "index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_page(browser: Any, page_file: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_load_state("networkidle")
    assert said == []
    assert [u for u in asked if not u.startswith("data:")] == [page_file.as_uri()]

    # nothing is wider than the window: wide tables scroll inside their own frame
    assert page.evaluate("document.documentElement.scrollWidth") == width
    tables = page.locator("table")
    assert tables.count() == page_file.read_text().count("<table ") >= 8
    for i in range(tables.count()):
        assert tables.nth(i).is_visible() and tables.nth(i).locator("tbody tr").count() > 0
    images = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(images) == 3
    assert all(complete and natural == 256 and 0 < shown <= width for complete, natural, shown in images)
    boxes = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(s => [s.clientWidth, s.clientHeight])"
    )
    assert len(boxes) == len(list((page_file.parent / "plots").glob("*.svg")))
    assert all(200 < w <= width and h > 100 for w, h in boxes)

    # text of the page and of the plots stands out from the ground in both schemes
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    for ink in (
        page.evaluate("getComputedStyle(document.body).color"),
        page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill"),
    ):
        assert contrast(ink, ground) > 7
    assert (luminance(ground) < 0.05) == (scheme == "dark")
    strokes = page.evaluate(
        "[...document.querySelectorAll('figure svg path')].map(p => getComputedStyle(p).stroke)"
        ".filter(s => s.startsWith('rgb('))"
    )
    assert strokes and min(contrast(s, ground) for s in strokes) >= 3
    page.close()


def test_print(browser: Any, page_file: Path, tmp_path: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(page_file.as_uri())
    page.pdf(path=str(tmp_path / "report.pdf"), format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    # on paper the ink is dark whatever the screen, and no table is cut off at the margin
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 720, "height": 1000})
    assert luminance(page.evaluate("getComputedStyle(document.body).color")) < 0.05
    widths = page.evaluate(
        "[...document.querySelectorAll('table')].map(t => t.getBoundingClientRect().right)"
    )
    assert max(widths) <= 720
    page.close()


def luminance(colour: str) -> float:
    """Relative luminance of an `rgb(r, g, b)` as WCAG 2 defines it."""
    parts = [int(v) / 255 for v in re.findall(r"\d+", colour)[:3]]
    r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
