"""The page of `flowdit.inspect` in headless Chromium: `make test-browser`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import call
from test_report_in_browser import WIDTHS, Browser, contrast, open_browser

from flowdit.inspect import main

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(tiny_data, tmp_path_factory) -> Iterator[Browser]:
    out = Path(tmp_path_factory.mktemp("inspected")) / "page.html"
    finished = call(main, f"data={tiny_data}", f"out={out}", "num_images=4", "num_outliers=2")
    assert finished.status == 0, finished.err
    with open_browser(out) as browser:
        yield browser


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_has_no_errors(browser, width):
    browser.load(width)
    assert WIDTHS[width] - 20 < browser.run("document.documentElement.scrollWidth") <= WIDTHS[width]
    assert [entry for entry in browser.driver.get_log("browser") if entry["level"] != "INFO"] == []
    assert browser.run("[...document.images].every((image) => image.naturalWidth > 0)")
    assert browser.run("document.images.length") == 6


def test_bars_are_drawn_and_told_under_the_cursor(browser):
    from selenium.webdriver import Keys

    browser.load()
    chart = browser.chart("Length of captions")
    assert len(chart.find_elements("css selector", ".plot rect.bar")) > 2
    chart.find_element("css selector", ".plot svg").send_keys(Keys.ARROW_LEFT)
    assert browser.tip(chart).startswith("characters ")


def test_dark_mode_is_legible(browser):
    browser.load(prefers_color_scheme="dark")
    for selector in (".facts dt", ".note", ".picture p", "td"):
        colour = browser.run(f"getComputedStyle(document.querySelector('{selector}')).color")
        behind = browser.run("getComputedStyle(document.querySelector('.card')).backgroundColor")
        assert contrast(colour, behind) >= 4.5, (selector, colour, behind)
