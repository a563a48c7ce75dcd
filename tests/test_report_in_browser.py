"""The page of `flowdit.report` in headless Chromium: `make test-browser`."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import call

from flowdit.image_grid import save_grid
from flowdit.report import main

pytestmark = pytest.mark.browser
LAUNCH = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
WIDTHS = {"phone": 390, "desktop": 1440}


@pytest.fixture(scope="module")
def page(whole_run, tmp_path_factory) -> Path:
    """A report of two runs of 40 steps with validation, samples, a resume and a sweep of scores."""
    folder = tmp_path_factory.mktemp("reported")
    for name, factor in (("one", 1.0), ("two", 2.0)):
        run = folder / name
        shutil.copytree(whole_run, run)
        lines = []
        for step in range(1, 41):
            entry = {"step": step, "time": 1.7e9 + step, "train/loss": factor / step, "train/grad_norm": factor}
            lines.append(entry | ({"train/first_step_seconds": 1.0} if step in (1, 20) else {}))
            if step % 10 == 0:
                times = {f"validation/loss_t{t}": factor * t for t in (0.25, 0.5, 0.75)}
                lines.append({"step": step, "validation/loss": factor, **times})
                save_grid(
                    run / "samples" / f"{step:08d}.png", np.zeros((2, 64, 64, 3), np.uint8), ["a", "b"], columns=2
                )
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = [
        {"settings": {"guidance": g}, "evaluations": 40, "scores": {"efficientnet": {"fd": {"value": abs(g - 2) + 1}}}}
        for g in (1.0, 2.0, 3.0)
    ]
    (folder / "one" / "scores.json").write_text(json.dumps({"points": points, "best": {"point": 1, "metric": "fd"}}))
    out = folder / "report.html"
    finished = call(main, f"run={folder / 'one'}", f"compare={folder / 'two'}", f"out={out}")
    assert finished.status == 0, finished.err
    return out


class Browser:
    """The page in a browser."""

    def __init__(self, driver: Any, page: Path):
        self.driver = driver
        self.page = page

    def load(self, width: str = "desktop", **features: str) -> None:
        size = {"width": WIDTHS[width], "height": 900, "deviceScaleFactor": 1, "mobile": width == "phone"}
        emulated = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": emulated})
        self.driver.get(self.page.as_uri())

    def run(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def chart(self, title: str) -> Any:
        """The figure with this heading."""
        return self.driver.find_element("xpath", f"//figure[.//h3[text()='{title}']]")

    def lines(self, chart: Any) -> list[str]:
        return [path.get_attribute("d") for path in chart.find_elements("css selector", "path.line")]

    def button(self, element: Any, words: str) -> Any:
        return element.find_element("xpath", f".//button[normalize-space()='{words}']")

    def tip(self, chart: Any) -> str:
        return chart.find_element("css selector", ".tip").text


@contextlib.contextmanager
def open_browser(page: Path) -> Iterator[Browser]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for argument in LAUNCH:
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield Browser(driver, page)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def browser(page) -> Iterator[Browser]:
    with open_browser(page) as browser:
        yield browser


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_asks_for_nothing_and_has_no_errors(browser, width):
    browser.driver.get_log("performance")
    browser.load(width)
    assert WIDTHS[width] - 20 < browser.run("document.documentElement.scrollWidth") <= WIDTHS[width]
    assert [entry for entry in browser.driver.get_log("browser") if entry["level"] != "INFO"] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:image/webp;")] == [browser.page.as_uri()]
    assert browser.run("[...document.images].every((image) => image.naturalWidth > 0)")


def test_the_policy_refuses_other_scripts_and_requests(browser):
    browser.load()
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=http://127.0.0.1:9/x onerror=window.bad=1>')")
    browser.driver.execute_async_script("setTimeout(arguments[0], 300)")
    assert browser.run("window.bad === undefined")
    assert any("Content Security Policy" in entry["message"] for entry in browser.driver.get_log("browser"))


def test_values_are_shown_under_the_cursor_and_by_arrow_keys(browser):
    from selenium.webdriver import ActionChains, Keys

    browser.load()
    chart = browser.chart("Loss")
    svg = chart.find_element("css selector", ".plot svg")
    assert browser.tip(chart) == ""
    ActionChains(browser.driver).move_to_element(svg).perform()
    shown = browser.tip(chart).splitlines()
    step = int(shown[0].removeprefix("step "))
    assert 15 < step < 27
    assert float(shown[shown.index("one, training") + 1]) == pytest.approx(1 / step, rel=1e-4)
    assert float(shown[shown.index("two, training") + 1]) == pytest.approx(2 / step, rel=1e-4)
    ActionChains(browser.driver).move_to_element(browser.driver.find_element("css selector", "h1")).perform()
    assert browser.tip(chart) == ""
    svg.send_keys(Keys.ARROW_LEFT)
    assert browser.tip(chart).startswith("step 40")
    svg.send_keys(Keys.ARROW_LEFT)
    assert browser.tip(chart).startswith("step 39")


def test_lines_runs_axes_and_smoothing_are_switched(browser):
    from selenium.webdriver import Keys

    browser.load()
    chart = browser.chart("Loss")
    tools = browser.driver.find_element("css selector", ".tools")
    before = browser.lines(chart)
    assert len(before) == 4
    browser.button(chart, "one, validation").click()
    assert len(browser.lines(chart)) == 3
    browser.button(chart, "one, validation").click()
    assert browser.lines(chart) == before
    browser.button(chart, "log").click()
    assert len(browser.lines(chart)) == 4 and browser.lines(chart) != before
    browser.button(chart, "log").click()
    browser.button(tools, "two").click()
    assert len(browser.lines(chart)) == 2 and len(browser.lines(browser.chart("Gradient norm"))) == 1
    browser.button(tools, "two").click()
    for axis, last in (("Images", "320"), ("Hours", "0.011")):
        browser.button(tools, axis).click()
        chart.find_element("css selector", ".plot svg").send_keys(Keys.ARROW_LEFT)
        assert browser.tip(chart).startswith(f"{axis.lower()} {last}")
    browser.button(tools, "Steps").click()
    assert browser.lines(chart) == before
    smoothing = tools.find_element("css selector", "input")
    smoothing.send_keys(*[Keys.ARROW_RIGHT] * 20)
    assert len(browser.lines(chart)) == 6, "the smoothed training losses, and the raw ones behind them"


def test_a_part_of_a_chart_is_shown_by_dragging(browser):
    from selenium.webdriver import ActionChains

    browser.load()
    chart = browser.chart("Loss")
    svg = chart.find_element("css selector", ".plot svg")
    ActionChains(browser.driver).move_to_element_with_offset(svg, -50, 0).click_and_hold().move_by_offset(
        150, 0
    ).release().perform()
    zoomed = browser.lines(chart)
    browser.button(chart, "Whole range").click()
    assert len(browser.lines(chart)[0]) > 2 * len(zoomed[0])


def test_samples_are_chosen_by_the_slider(browser):
    from selenium.webdriver import Keys

    browser.load()
    shown = lambda: [
        image.get_attribute("alt")
        for image in browser.driver.find_elements("css selector", ".shot img")
        if image.is_displayed()
    ]
    assert shown() == ["samples of one at step 40", "samples of two at step 40"]
    browser.driver.find_element("css selector", ".slide input").send_keys(Keys.HOME)
    assert shown() == ["samples of one at step 10", "samples of two at step 10"]
    slide = browser.driver.find_element("css selector", ".slide")
    browser.button(slide, "All steps").click()
    assert len(shown()) == 8


def test_the_best_point_of_a_sweep_is_marked(browser):
    browser.load()
    chart = browser.chart("Frechet distance in efficientnet by guidance")
    assert len(chart.find_elements("css selector", ".ring")) == 1
    best = browser.driver.find_element("css selector", "tr.best")
    assert best.text.split() == ["best", "2", "40", "1"]


def test_dark_mode_and_print_are_legible(browser):
    """Contrast of text with its background, at least 4.5 (WCAG AA)."""
    for features, on_paper in (
        ({"prefers_color_scheme": "dark"}, False),
        ({"prefers_color_scheme": "light"}, False),
        ({}, True),
    ):
        browser.load(**features)
        if on_paper:
            browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        for selector in ("h1", ".facts dt", ".note", ".path", "td"):
            colour = browser.run(f"getComputedStyle(document.querySelector('{selector}')).color")
            card = "body" if selector == "h1" else ".card"
            behind = browser.run(f"getComputedStyle(document.querySelector('{card}')).backgroundColor")
            assert contrast(colour, behind) >= 4.5, (selector, features, colour, behind)


def contrast(*colours: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [part / 12.92 if part <= 0.04045 else math.pow((part + 0.055) / 1.055, 2.4) for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, colours))
    return (high + 0.05) / (low + 0.05)


def test_without_javascript_the_charts_and_samples_are_there(browser):
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.load()
        images = browser.driver.find_elements("css selector", ".shot img")
        assert len(images) == 8 and all(image.is_displayed() for image in images)
        assert len(browser.lines(browser.chart("Loss"))) == 4
        assert not browser.driver.find_element("css selector", ".tools").is_displayed()
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
