"""The server's page in a real Chromium: a file, the microphone, errors, and a phone's width."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from serving import Running, running, wav

import dawhisper
from dawhisper.audio import load_audio
from dawhisper.model import Whisper

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here: apt-get install chromium chromium-driver"
)


@pytest.fixture(scope="module")
def server(tiny_en_path: Path) -> Iterator[Running]:
    """tiny.en as it is, and with a second branch whose gate is not the same everywhere."""
    stock = dawhisper.load_model(str(tiny_en_path), device="cpu")
    dual = dawhisper.load_model(str(tiny_en_path), device="cpu", dual=dawhisper.DualOptions())
    torch.manual_seed(0)
    for block in dual.decoder.blocks:
        torch.nn.init.normal_(block.gate[-1].weight, std=2.0)
    models: dict[str, Whisper] = {"dual": dual, "stock": stock}
    with running(models, brief=False) as made:
        yield made


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> Iterator[object]:
    """A Chromium whose microphone plays the speech clip, over and over."""
    from selenium import webdriver

    speech = tmp_path_factory.mktemp("mic") / "speech.wav"
    speech.write_bytes(wav(np.pad(load_audio(assets / "speech.opus"), (8000, 16000))))
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={speech}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(30)
    yield driver
    driver.quit()


class Page:
    def __init__(self, driver: object, url: str, width: int = 1100):
        self.driver: object = driver
        driver.set_window_size(width, 900)  # type: ignore[attr-defined]
        driver.get(url)  # type: ignore[attr-defined]
        self.until("document.querySelectorAll('#model option').length")

    def run(self, script: str) -> object:
        return self.driver.execute_script("return " + script)  # type: ignore[attr-defined]

    def until(self, script: str, seconds: float = 60) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, seconds, 0.1).until(lambda _: self.run(script), script)  # type: ignore[arg-type]

    def element(self, selector: str) -> object:
        return self.driver.find_element("css selector", selector)  # type: ignore[attr-defined]

    def texts(self, selector: str) -> list[str]:
        return self.run(f"[...document.querySelectorAll('{selector}')].map((e) => e.textContent)")  # type: ignore[return-value]

    def send(self, path: Path) -> None:
        self.element("#file").send_keys(str(path))  # type: ignore[attr-defined]

    def picture(self, name: str, folder: Path) -> None:
        self.driver.save_screenshot(str(folder / f"{name}.png"))  # type: ignore[attr-defined]

    def errors(self) -> list[str]:
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]  # type: ignore[attr-defined]


def test_a_file_with_two_models(server: Running, browser: object, assets: Path, tmp_path: Path) -> None:
    page = Page(browser, server.url)
    assert page.texts("#model option") == ["dual (with gate)", "stock"]
    page.run("document.getElementById('compare').value = 'stock'")
    page.send(assets / "speech.opus")
    page.until("document.getElementById('status').textContent === 'Done.'")
    expected = server.engine.models["stock"].transcribe(assets / "speech.opus").text.strip()  # type: ignore[operator]
    assert page.texts(".result h2") == ["dual", "stock"]
    said = [text.strip() for text in page.texts(".result .final")]
    assert said == [expected, expected]  # an untrained copy of the branch changes nothing
    captions = page.texts("figcaption")
    assert "the gate" in captions[0]
    assert "lowest" in captions[0]
    assert "has no gate" in captions[1]
    assert page.run("!document.querySelector('.downloads').hidden")
    page.picture("desktop", tmp_path)
    page.driver.set_window_size(390, 844)  # type: ignore[attr-defined]
    assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.picture("phone", tmp_path)
    assert page.errors() == []


def test_the_microphone(server: Running, browser: object, tmp_path: Path) -> None:
    page = Page(browser, server.url)
    page.run("document.getElementById('model').value = 'stock'")
    page.element("#record").click()  # type: ignore[attr-defined]
    page.until("document.querySelector('.final') && document.querySelector('.final').textContent.length > 20")
    assert page.element("#record").get_attribute("aria-pressed") == "true"  # type: ignore[attr-defined]
    page.picture("live", tmp_path)
    page.element("#record").click()  # type: ignore[attr-defined]
    page.until("document.getElementById('status').textContent === 'Done.'")
    assert page.run("!document.querySelector('.downloads').hidden")
    assert page.texts("#record-label") == ["Record"]
    assert page.errors() == []


def test_errors_are_said(server: Running, browser: object, tmp_path: Path) -> None:
    bad = tmp_path / "notes.wav"
    bad.write_text("no sound\n" * 50)
    page = Page(browser, server.url)
    page.send(bad)
    page.until("!document.getElementById('error').hidden")
    assert page.texts("#error")[0].startswith("notes.wav: cannot be decoded")
    assert page.texts(".result") == []
    page.picture("error", tmp_path)
    page.run("document.getElementById('language').value = 'klingon'")
    page.send(bad)
    page.until("document.getElementById('error').textContent.includes('klingon')")
    assert page.run("!document.getElementById('file').disabled")


def test_keyboard_and_names(server: Running, browser: object) -> None:
    """Everything that can be used is reached by Tab and has a name."""
    from selenium.webdriver import ActionChains, Keys

    page = Page(browser, server.url)
    reached = []
    for _ in range(5):
        ActionChains(browser).send_keys(Keys.TAB).perform()  # type: ignore[arg-type]
        active = page.driver.switch_to.active_element  # type: ignore[attr-defined]
        reached.append(active.get_attribute("id"))
        assert active.accessible_name, reached
    assert {"model", "compare", "language", "file", "record"} <= set(reached)
