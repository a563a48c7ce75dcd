"""The page in headless Chromium, and its API: `make test-browser`."""

import base64
import concurrent.futures
import io
import json
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from runs import REPOSITORY, start, wait_for_line

from flowdit.inference.recipe import read_recipe

pytestmark = pytest.mark.browser
SETTINGS = ("max_images=4", "max_steps=30", "max_waiting=24", "max_waiting_each=24", "frames=5")
LAUNCH = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")


class Server(NamedTuple):
    url: str
    pid: int

    def memory(self) -> float:
        """Resident memory in MiB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The page of the pretrained model on a free port. It ends with a line."""
    settings = (f"checkpoint={REPOSITORY / 'pretrained' / 'openmoji'}", "port=0", *SETTINGS)
    process = start("-m", "flowdit.serve", *settings)
    try:
        line = wait_for_line(process, "page: ")[-1]
        yield Server(line.split()[1], process.pid)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (128 + signal.SIGTERM, "stopped by SIGTERM\n")
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def client(server) -> Any:
    from gradio_client import Client

    return Client(server.url, verbose=False)


class Page:
    """The page in a browser."""

    def __init__(self, driver: Any, url: str):
        self.driver = driver
        self.url = url

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> Any:
        """The first true value of `condition`. Elements may be replaced while it looks."""
        from selenium.common.exceptions import StaleElementReferenceException as Stale

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except Stale:
                pass
            time.sleep(0.1)
        raise AssertionError(f"did not come in {seconds} s; the page says {[e.text for e in self.all('.fd-line')]}")

    def load(self) -> None:
        self.driver.get(self.url)
        self.until(lambda: self.all("#fd-draw") and self.all(".fd-thumbs") and self.all(".fd-line"))
        time.sleep(1)  # until the buttons are connected

    def set(self, selector: str, value: str) -> None:
        element = self.find(selector)
        element.clear()
        element.send_keys(value, "\t")

    def wait_for(self, kind: str) -> str:
        """The text of the line once it is of this kind, when a draw has begun."""
        return self.until(lambda: [e.text for e in self.all(f".fd-{kind}") if e.text])[0]

    def draw(self) -> list[bytes]:
        """Click on Draw; the PNGs."""
        self.find("#fd-draw").click()
        return self.drawn()

    def drawn(self) -> list[bytes]:
        """The PNGs once another draw has ended."""
        self.until(lambda: not self.all(".fd-done"))
        self.wait_for("done")
        return self.shown()

    def shown(self) -> list[bytes]:
        pictures = self.until(lambda: [e.get_attribute("src") for e in self.all(".fd-image")])
        return [base64.b64decode(picture.partition(",")[2]) for picture in pictures]


@pytest.fixture(scope="module")
def page(server) -> Iterator[Page]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for argument in (*LAUNCH, "--window-size=1440,1000"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        opened = Page(driver, server.url)
        opened.load()
        opened.set("#fd-steps input[type=number]", "3")
        opened.set("#fd-count input[type=number]", "2")
        yield opened
    finally:
        driver.quit()


def requested_hosts(page: Page) -> set[str]:
    messages = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {url.split("/")[2] for url in urls if url.startswith("http")}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_draw_from_start_to_end(page, server):
    assert page.find("#fd-heading h1").text == "openmoji"
    first = page.draw()
    assert "2 images in " in page.find(".fd-done").text
    recipes = [read_recipe(png) for png in first]
    assert [(recipe.number, recipe.seed, recipe.sampler["steps"]) for recipe in recipes] == [(0, 0, 3), (1, 0, 3)]
    link = page.find(".fd-save a")
    assert link.get_attribute("download").endswith("_seed0_0.png")
    slider, strip = ".fd-path input", "return document.querySelector('.fd-strip').style"
    assert page.driver.execute_script(f"{strip}.visibility") == "hidden"  # the image itself
    page.driver.execute_script(
        f"const s = document.querySelector('{slider}'); s.value = 1; s.dispatchEvent(new Event('input'))"
    )
    assert page.driver.execute_script(f"{strip}.visibility") == "visible"
    assert page.driver.execute_script(f"{strip}.backgroundPositionX") == "25%"
    assert requested_hosts(page) == {server.url.split("/")[2]}
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_another_setting_is_another_image_and_the_same_is_the_same(page):
    page.set("#fd-seed input", "5")
    first = page.draw()
    page.set("#fd-guidance input[type=number]", "6")
    assert not np.array_equal(pixels(page.draw()[0]), pixels(first[0]))
    page.find("#fd-new-seed button, button#fd-new-seed").click()
    page.until(lambda: page.find("#fd-seed input").get_attribute("value") not in ("5", ""))
    page.set("#fd-seed input", "5")
    page.set("#fd-guidance input[type=number]", str(read_recipe(first[0]).sampler["guidance"]))
    assert page.draw() == first


def test_a_bad_input_is_a_line_on_the_page(page):
    page.set("#fd-seed input", "-1")
    page.find("#fd-draw").click()
    assert page.wait_for("error") == "seed: must be in [0, 2**32), got -1"
    page.set("#fd-seed input", "0")
    assert len(page.draw()) == 2


def test_the_history_outlasts_a_reload_and_draws_again(page):
    page.set("#fd-seed input", "11")
    first = page.draw()
    count = len(page.all(".fd-thumbs button"))
    assert count >= 2
    page.load()
    assert len(page.all(".fd-thumbs button")) == count and page.all(".fd-image") == []
    page.all(".fd-thumbs button")[1].click()
    assert page.drawn() == [first[1]]  # with its recipe
    assert "Same model, versions and device" in page.find(".fd-done").text
    assert page.find("#fd-seed input").get_attribute("value") == "11"  # the controls follow
    assert len(page.all(".fd-thumbs button")) == count


def test_a_dropped_png_gives_its_image_again(page, tmp_path):
    kept = page.shown()
    file = tmp_path / "kept.png"
    file.write_bytes(kept[0])
    page.find("#fd-recipe input[type=file]").send_keys(str(file))
    assert page.drawn() == kept
    Image.new("RGB", (8, 8)).save(file)
    page.until(lambda: page.all("#fd-recipe input[type=file]"))
    page.find("#fd-recipe input[type=file]").send_keys(str(file))
    assert page.wait_for("error").startswith("recipe: this PNG has no recipe")


def test_the_api_has_plain_names(server, client):
    described = client.predict(api_name="/model")
    assert described["takes"] == ["label"] and "heart" in described["classes"] and described["image_size"] == 64
    drawn = client.predict(label="heart", steps=2, solver="euler", seed=3, count=2, api_name="/draw")
    (model,) = drawn["models"]
    recipes = [json.loads(picture["recipe"]) for picture in model["pictures"]]
    assert [(recipe["caption"], recipe["number"]) for recipe in recipes] == [("heart", 0), ("heart", 1)]
    again = client.predict(recipe=model["pictures"][1]["recipe"], api_name="/redraw")
    assert again["models"][0]["pictures"][0]["png"] == model["pictures"][1]["png"]
    with pytest.raises(Exception, match=r"steps: must be at most 30, got 31"):
        client.predict(label="heart", steps=31, api_name="/draw")


def post(url: str, body: bytes) -> Any:
    return urllib.request.urlopen(
        urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=60
    ).read()


def test_the_api_without_a_client(server):
    url = f"{server.url}/gradio_api/call/v2/draw"
    event = json.loads(post(url, b'{"label": "heart", "steps": 2, "solver": "euler"}'))["event_id"]
    with urllib.request.urlopen(f"{url}/{event}", timeout=60) as stream:
        text = stream.read().decode()
    assert "event: complete" in text and "data:image/png;base64," in text
    with pytest.raises(OSError):  # 413, or the connection is closed
        post(url, b" " * (17 * 2**20))


def test_twenty_requests_at_once_and_more_than_the_limit(server, client):
    def one(seed: int) -> str:
        settings = {"label": "sound" if seed % 2 else "heart", "steps": 2, "solver": "euler", "seed": seed, "count": 2}
        drawn = client.predict(**settings, guidance=1 + seed / 10, api_name="/draw")
        return drawn["models"][0]["pictures"][0]["png"]

    one(1), one(0)
    before = server.memory()
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        images = list(pool.map(one, range(20)))
    assert len(set(images)) == 20
    slow = client.submit(label="heart", steps=30, count=4, api_name="/draw")  # holds the machine while the others come
    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        problems = [call.exception() for call in [pool.submit(one, seed) for seed in range(30)]]
    refused = [str(problem) for problem in problems if problem is not None]
    line = "queue: 24 of your draws are waiting or running, which is the most: try again later"
    assert len(refused) == 30 - 23 and all(line in text for text in refused)
    assert len(slow.result()["models"][0]["pictures"]) == 4
    assert server.memory() < before + 150
