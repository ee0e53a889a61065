"""The report in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from besiege.cli import run


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    assert path, "chromium is not installed; `make test-browser` installs it"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a short audit of the embedded network."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    chosen = ["--attacks", "fgsm,pgd,deepfool,fmn", "-n", "30", "--out", str(folder)]
    assert run(["audit", "embedded:digits-cnn", *chosen]) == 0
    return folder / "report.html"


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The page opened; nothing was said in the console and nothing asked of a network."""
    opened = browser.new_page()
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(report.as_uri())
    yield opened
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    opened.close()


def column(page: Page, number: int) -> list[str]:
    cells = page.locator("table").first.locator(f"tbody tr td:nth-child({number})").all()
    assert len(cells) >= 4
    return [cell.get_attribute("data-key") or "" for cell in cells]


def test_pictures_have_loaded(page: Page) -> None:
    widths = page.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
    assert len(widths) >= 3 and min(widths) > 0


def test_the_table_sorts_by_mouse_and_keyboard(page: Page) -> None:
    head = page.locator("table").first.get_by_role("columnheader", name="Robust accuracy")
    before = column(page, 5)
    head.get_by_role("button").click()
    assert [float(key) for key in column(page, 5)] == sorted(map(float, before))
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert [float(key) for key in column(page, 5)] == sorted(map(float, before), reverse=True)
    page.locator("table").first.get_by_role("button", name="Attack").click()
    assert column(page, 1) == sorted(column(page, 1)) and head.get_attribute("aria-sort") is None


def test_the_curves_are_drawn_and_told_in_figures(page: Page) -> None:
    assert page.locator("svg.curve polyline").count() >= 2
    page.locator("details summary").first.click()
    assert page.locator("details table").first.is_visible()


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_no_page_is_wider_than_its_window(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g).slice(0, 3).map(Number)")
        for name in ("color", "backgroundColor")
    )
    light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 7
    assert (luminance(paper) < luminance(ink)) == (scheme == "dark")


def luminance(colour: list[int]) -> float:
    """Relative luminance as WCAG 2 defines it."""
    linear = [(c / 255 / 12.92) if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_print_shows_the_whole_table(page: Page) -> None:
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowX") == "visible"
    assert page.pdf()[:5] == b"%PDF-"
