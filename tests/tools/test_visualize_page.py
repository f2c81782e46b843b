"""The page that `dawhisper visualize` writes, in a real Chromium."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.browser import chromium, needs_chromium, phone, set_scheme
from helpers.models import DUALS, talkative, trained
from helpers.sound import noise

from dawhisper.tools.visualize import VisualizeOptions, look, write_views

pytestmark = needs_chromium

WHEEL = """
    const canvas = document.querySelector("canvas"), before = [from, to];
    const turn = {deltaY: -300, clientX: 600, ctrlKey: arguments[0], cancelable: true, bubbles: true};
    const scrolls = canvas.dispatchEvent(new WheelEvent("wheel", turn));
    return [scrolls, before, [from, to]];
"""


@pytest.fixture(scope="module")
def driver() -> Iterator[object]:
    with chromium() as made:
        yield made


def test_the_page_plays_scrolls_and_zooms(driver: object, tmp_path: Path) -> None:
    model = talkative(trained(DUALS["full"]))
    options = VisualizeOptions("x.wav", text="one two, three four", language="en")
    views = [look(model, noise(2.5, seed), title, options) for seed, title in enumerate(("clean", "noisy"))]
    [page] = write_views(views, "m", tmp_path / "x", "html")
    run = driver.execute_script  # type: ignore[attr-defined]
    driver.set_window_size(1500, 900)  # type: ignore[attr-defined]
    driver.get(page.as_uri())  # type: ignore[attr-defined]
    headings = run("return [...document.querySelectorAll('b')].map((b) => b.textContent)")
    panels = ["Gate", "Words", "Spectrogram", "Primary branch", "Second branch", "Difference"]
    assert [re.split("[,;:]", heading)[0] for heading in headings] == panels * 2
    left, right = run("return [...document.querySelectorAll('section')].map((s) => s.getBoundingClientRect().toJSON())")
    assert left["top"] == right["top"]  # beside each other
    assert left["right"] < right["left"]
    scrolls, before, after = run(WHEEL, False)
    assert scrolls and before == after  # the wheel is the page's
    scrolls, before, after = run(WHEEL, True)
    assert not scrolls and after[1] - after[0] < before[1] - before[0]
    run("document.getElementById('all').click()")
    assert run("return [from, to]") == [0, 2.5]
    wait(driver, "Math.abs(document.querySelector('audio').duration - 2.5) < 0.01")  # it can be played
    set_scheme(driver, "dark")
    wait(driver, "getComputedStyle(document.body).backgroundColor === 'rgb(20, 23, 28)'")
    with phone(driver):
        assert run("return document.documentElement.scrollWidth") == 375
        assert run("return getComputedStyle(document.querySelector('canvas')).touchAction") == "pan-y"
    set_scheme(driver)
    assert [e for e in driver.get_log("browser") if e["level"] == "SEVERE"] == []  # type: ignore[attr-defined]


def wait(driver: object, condition: str) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(driver, 20, 0.1).until(lambda d: d.execute_script(f"return {condition}"), condition)  # type: ignore[arg-type]
