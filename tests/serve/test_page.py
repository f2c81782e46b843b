"""The server's page in a real Chromium: a file, the microphone, errors, and a phone's width."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.browser import chromium, needs_chromium, phone, set_scheme
from helpers.models import pair
from helpers.server import Running, running, start, wav
from websockets.sync.client import connect

import dawhisper
from dawhisper.audio import load_audio
from dawhisper.model import Whisper

pytestmark = needs_chromium


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
    speech = tmp_path_factory.mktemp("mic") / "speech.wav"
    speech.write_bytes(wav(np.pad(load_audio(assets / "speech.opus"), (8000, 16000))))
    microphone = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")
    with chromium(*microphone, f"--use-file-for-fake-audio-capture={speech}") as driver:
        yield driver


class Page:
    def __init__(self, driver: object, url: str, loaded: bool = True):
        self.driver: object = driver
        driver.set_window_size(1100, 900)  # type: ignore[attr-defined]
        self.errors()  # those of the page before are read now
        driver.get(url)  # type: ignore[attr-defined]
        if loaded:
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

    def colours(self, result: int, name: str) -> int:
        """How many pixels of a result's picture have the colour of a style's variable."""
        return self.run(  # type: ignore[return-value]
            f"""(() => {{
              const canvas = document.querySelectorAll('canvas')[{result}];
              const c = canvas.getContext('2d');
              c.fillStyle = getComputedStyle(document.documentElement).getPropertyValue('{name}');
              const wanted = [1, 3, 5].map((i) => parseInt(c.fillStyle.slice(i, i + 2), 16));
              const data = c.getImageData(0, 0, canvas.width, canvas.height).data;
              let n = 0;
              for (let i = 0; i < data.length; i += 4) n += wanted.every((v, j) => data[i + j] === v);
              return n;
            }})()"""
        )

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()  # type: ignore[arg-type]

    def focused(self) -> object:
        return self.driver.switch_to.active_element  # type: ignore[attr-defined]

    def error(self, start: str) -> None:
        self.until(f"document.getElementById('error').textContent.startsWith({start!r})")
        assert self.run("!document.getElementById('error').hidden")
        self.until("!document.getElementById('record').disabled")

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
    assert [h.split(" English")[0] for h in page.texts(".result h2")] == ["speech.opus, dual", "speech.opus, stock"]
    said = [" ".join(page.texts(f".result:nth-of-type({i}) .word")) for i in (1, 2)]
    assert said == [expected, expected]  # an untrained copy of the branch changes nothing
    assert page.texts(".differs") == []
    assert page.texts(".time")[0] == "0:00"
    title = page.run("document.querySelector('.word').title")
    assert re.fullmatch(r"probability \d+%, gate [01]\.\d\d(: heard in noise, check this one)?", str(title))
    captions = page.texts("figcaption")
    assert "the gate" in captions[0]
    assert "lowest" in captions[0]
    assert "has no gate" in captions[1]
    assert page.run("!document.querySelector('.downloads').hidden")
    page.picture("desktop", tmp_path)
    assert [page.colours(i, "--gate") > 100 for i in (0, 1)] == [True, False]
    assert all(page.colours(i, "--done") > 1000 for i in (0, 1))
    elsewhere = "performance.getEntriesByType('resource').filter((r) => !r.name.startsWith(location.origin)).length"
    assert page.run(elsewhere) == 0
    with phone(browser):
        assert page.run("innerWidth") == 375
        assert page.run("document.documentElement.scrollWidth") == 375
        small = "[...document.querySelectorAll('button:not(.time), select, #prompt, #drop')].map((e) => e.offsetHeight)"
        assert min(height for height in page.run(small) if height) >= 40  # type: ignore[attr-defined]
        page.picture("phone", tmp_path)
    assert page.errors() == []


def test_the_microphone(server: Running, browser: object, tmp_path: Path) -> None:
    page = Page(browser, server.url)
    page.run("document.getElementById('model').value = 'stock'")
    page.element("#record").click()  # type: ignore[attr-defined]
    page.until("document.querySelector('.final') && document.querySelector('.final').textContent.length > 20")
    page.until("document.getElementById('level').value > 0 && !document.getElementById('live').hidden")
    assert page.run("/^\\d:\\d\\d$/.test(document.getElementById('clock').textContent)")
    assert page.colours(0, "--wave") + page.colours(0, "--done") > 1000
    assert page.element("#record").get_attribute("aria-pressed") == "true"  # type: ignore[attr-defined]
    page.picture("live", tmp_path)
    page.element("#record").click()  # type: ignore[attr-defined]
    page.until("document.getElementById('status').textContent === 'Done.'")
    assert page.run("!document.querySelector('.downloads').hidden")
    assert page.texts("#record-label") == ["Record"]
    assert page.errors() == []


def test_a_sample_in_noise_is_played_and_compared(server: Running, browser: object, tmp_path: Path) -> None:
    page = Page(browser, server.url)
    set_scheme(browser, "dark")
    page.element("#sample").click()  # type: ignore[attr-defined]
    page.until("document.getElementById('player').currentTime > 0")
    page.until("document.querySelectorAll('.spoken').length || document.getElementById('player').ended")
    page.until("document.getElementById('status').textContent === 'Done.'")
    assert page.run("document.getElementById('empty').hidden")
    assert len(page.texts(".result")) == 2
    page.run("document.getElementById('player').pause()")
    page.run("document.querySelector('.word:nth-of-type(3)').click()")  # click to hear
    page.until("document.getElementById('player').currentTime > 0.5")
    page.run("document.querySelector('.result').scrollIntoView()")
    page.picture("sample", tmp_path)
    set_scheme(browser)
    differ = "import('/text.js').then((m) => m.differences(['So', 'it', 'is.'], ['so', 'is', 'it', 'not']))"
    places = page.run(f"{differ}.then((sets) => sets.map((s) => [...s]))")
    assert places in ([[1], [2, 3]], [[2], [1, 3]])
    assert page.errors() == []


def test_cancel_and_a_file_that_waits(server: Running, browser: object, assets: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.wav"
    sentence = np.pad(load_audio(assets / "speech.opus"), (0, 24 * 16000))  # a window each, with nothing repeated
    long.write_bytes(wav(np.tile(sentence, 6)))
    page = Page(browser, server.url)
    page.run("document.getElementById('model').value = 'stock'")
    page.send(long)
    page.until("/ of 3:0\\d, about .* left/.test(document.getElementById('status').textContent)")
    page.send(assets / "speech.opus")
    page.until("document.getElementById('waiting').textContent === 'speech.opus waits'")
    page.picture("progress", tmp_path)
    page.element("#cancel").click()  # type: ignore[attr-defined]
    page.until("document.getElementById('status').textContent === 'Done.'")
    titles = [title.split(",")[0] for title in page.texts(".result h2")]
    assert titles == ["speech.opus", "long.wav"]  # what was heard before the cancel is kept
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


def test_the_servers_refusals_are_said(browser: object, assets: Path, tmp_path: Path) -> None:
    small, large = tmp_path / "small.wav", tmp_path / "large.wav"
    small.write_bytes(wav(np.zeros(1600, np.float32)))
    large.write_bytes(wav(np.zeros(16000 * 60, np.float32)))
    models = {"m": pair(eot_bias=6.0)[0]}
    with running(models, max_upload=0.5, max_queue=1, max_live=1, api_key="secret") as server:
        page = Page(browser, server.url, loaded=False)
        page.until("!document.getElementById('key-form').hidden")
        assert page.run("document.getElementById('error').hidden")  # it is asked for, not complained about
        page.picture("key", tmp_path)
        key = page.element("#key")
        key.send_keys("guess\n")  # type: ignore[attr-defined]
        page.error("the server does not take this key")
        key.clear()  # type: ignore[attr-defined]
        key.send_keys("secret\n")  # type: ignore[attr-defined]
        page.until("document.querySelectorAll('#model option').length")
        assert page.run("document.getElementById('error').hidden && document.getElementById('key-form').hidden")
        page = Page(browser, server.url)  # once a session
        assert page.run("document.getElementById('key-form').hidden")
        page.send(large)
        page.error("the upload is larger than 0.5 MB")
        server.service.active += 1
        page.send(small)
        page.error("too many requests are waiting")
        server.service.active -= 1
        with connect(server.ws) as live:
            live.send('{"api_key": "secret"}')
            live.recv()
            page.element("#record").click()  # type: ignore[attr-defined]
            page.error("too many live streams")
            assert page.texts("#record-label") == ["Record"]
        page.picture("refused", tmp_path)
    page.send(small)
    page.error("the server can't be reached")
    page.element("#record").click()  # type: ignore[attr-defined]
    page.error("the connection to the server was lost")


def test_a_server_that_dies_is_said(browser: object, tiny_en_path: Path, assets: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.wav"
    long.write_bytes(wav(np.tile(load_audio(assets / "speech.opus"), 20)))
    with ThreadPoolExecutor(2) as pool:  # their start takes longest
        servers = list(pool.map(start, [tiny_en_path] * 2))
    try:
        for recorded, (process, url) in zip((False, True), servers):
            page = Page(browser, url)
            if recorded:
                page.element("#record").click()  # type: ignore[attr-defined]
            else:
                page.send(long)
            page.until("document.querySelector('.final')?.textContent")
            process.kill()
            process.wait(30)
            page.error("the connection")
            assert page.texts(".final")[0]  # what came is kept
    finally:
        for process, _ in servers:
            process.kill()


def test_the_keyboard_alone(server: Running, browser: object, tmp_path: Path) -> None:
    """Everything that can be used is reached by Tab and has a name; record, stop and download by keys."""
    from selenium.webdriver import Keys

    downloads = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)  # type: ignore[attr-defined]
    page = Page(browser, server.url)
    reached = []
    for _ in range(8):
        page.press(Keys.TAB)
        reached.append(page.focused().get_attribute("id"))  # type: ignore[attr-defined]
        assert page.focused().accessible_name, reached  # type: ignore[attr-defined]
    assert reached == ["model", "compare", "language", "task", "prompt", "file", "record", "sample"]
    assert page.element("#status").aria_role == "status"  # type: ignore[attr-defined]
    assert page.element("#error").get_attribute("role") == "alert"  # type: ignore[attr-defined]

    page.element("#record").send_keys(Keys.SPACE)  # type: ignore[attr-defined]
    page.until("document.querySelector('.final') && document.querySelector('.final').textContent.length > 20")
    page.press(Keys.SPACE)
    page.until("document.getElementById('status').textContent === 'Done.'")
    assert page.focused().get_attribute("id") == "record"  # type: ignore[attr-defined]
    text = " ".join(page.texts(".word"))
    assert re.fullmatch("Play from 0:0[0-9]", page.element(".time").accessible_name)  # type: ignore[attr-defined]
    name = str(page.run("document.querySelector('h2').textContent")).split(",")[0]
    page.run("document.querySelector('.copy').focus()")
    for kind in ("txt", "srt", "vtt"):
        page.press(Keys.TAB)
        assert page.focused().accessible_name == f"Download the text of dual as {kind}"  # type: ignore[attr-defined]
        page.press(Keys.ENTER)
        made = tmp_path / f"{name.replace(':', '_')}.{kind}"
        deadline = time.monotonic() + 10
        while not made.exists() or not made.stat().st_size:  # the browser makes an empty file of the name first
            assert time.monotonic() < deadline
            time.sleep(0.05)
        lines = made.read_text().splitlines()
        times = r"\d\d:\d\d:\d\d[.,]\d{3} --> \d\d:\d\d:\d\d[.,]\d{3}"
        said = [line for line in lines if line and not re.fullmatch(rf"WEBVTT|\d+|{times}", line)]
        assert " ".join(said) == text
        assert lines[0] == {"txt": said[0], "srt": "1", "vtt": "WEBVTT"}[kind]
    assert page.run("document.querySelector('.final').getAttribute('aria-live')") == "polite"
    assert page.run("document.querySelector('canvas').getAttribute('aria-label')").startswith("Waveform, ")  # type: ignore[attr-defined]


CONTRAST = """
    const canvas = document.createElement("canvas"), c = canvas.getContext("2d", {willReadFrequently: true});
    canvas.width = canvas.height = 1;
    const over = (colours) => {  // as they are painted on each other, whatever their notation
      c.globalCompositeOperation = "source-over";
      for (const colour of colours) { c.fillStyle = colour; c.fillRect(0, 0, 1, 1); }
      return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const chain = (element) => (element ? [...chain(element.parentElement), element] : []);
    const behind = (element) => ["Canvas", ...chain(element).map((e) => getComputedStyle(e).backgroundColor)];
    const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ratio = (front, back) => {  // WCAG 2.2
      const [low, high] = [light(over([...back, front])), light(over(back))].sort((a, b) => a - b);
      return (high + 0.05) / (low + 0.05);
    };
    const found = [];
    const note = (what, value, wanted) => found.push([what, Math.round(100 * value) / 100, wanted]);
    const called = (e) => e.tagName.toLowerCase() + (e.id && "#" + e.id) + (e.className && "." + e.className);
    document.querySelectorAll("[hidden]").forEach((e) => { e.hidden = false; });
    document.getElementById("error").textContent = "an error";
    document.getElementById("waiting").innerHTML = "<li>a.wav waits</li>";
    document.querySelectorAll(".pending").forEach((e) => { e.textContent = "words to come"; });
    const shown = [...document.querySelectorAll("body *")].filter((e) => e.offsetParent && !e.closest("[disabled]"));
    for (const e of shown) {
      const style = getComputedStyle(e);
      const says = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
      if (says || e.matches("select, input")) note(called(e), ratio(style.color, behind(e)), 4.5);
      if (e.matches("select, input:not([type=file]), button:not(.time), .drop"))
        note(called(e) + " border", ratio(style.borderTopColor, behind(e.parentElement)), 3);
    }
    const prompt = document.getElementById("prompt");
    note("placeholder", ratio(getComputedStyle(prompt, "::placeholder").color, behind(prompt)), 4.5);
    const root = getComputedStyle(document.documentElement), card = behind(document.querySelector(".result"));
    for (const name of ["--gate", "--wave", "--done", "--accent"])
      note(name + " on a card", ratio(root.getPropertyValue(name), card), 3);
    const word = document.querySelector(".word");
    for (const noise of [0, 0.25, 0.5, 0.75, 1]) {
      word.style.setProperty("--noise", noise);
      note(`word at noise ${noise}`, ratio(getComputedStyle(word).color, behind(word)), 4.5);
    }
    return found;
"""


def test_contrast_is_wcags(server: Running, browser: object, assets: Path, tmp_path: Path) -> None:
    """AA: 4.5 for text, also over the gate's shading, and 3 for borders and the waveform, light and dark."""
    page = Page(browser, server.url)
    page.run("document.getElementById('compare').value = 'stock'")
    page.send(assets / "speech.opus")
    page.until("document.getElementById('status').textContent === 'Done.'")
    with phone(browser):
        page.picture("phone", tmp_path)
    for scheme in ("light", "dark"):
        set_scheme(browser, scheme)
        page.picture(scheme, tmp_path)
        measured = browser.execute_script(CONTRAST)  # type: ignore[attr-defined]
        assert {"placeholder", "word at noise 1", "p.pending", "p#error", "select#model border"} <= {
            m[0] for m in measured
        }
        print(scheme, *sorted(measured, key=lambda m: m[1] / m[2]), sep="\n")
        assert [m for m in measured if m[1] < m[2]] == []
    set_scheme(browser)


def test_the_api_is_described_on_a_page(server: Running, browser: object, tmp_path: Path) -> None:
    page = Page(browser, server.url + "/docs", loaded=False)
    page.until("document.querySelectorAll('.operation').length >= 6")
    headings = page.texts(".operation h2")
    assert "POST /v1/audio/transcriptions" in headings
    assert "timestamp_granularities" in page.texts(".operation th")
    assert any(t.startswith("curl -X POST") and "/v1/audio/translations" in t for t in page.texts("code"))
    elsewhere = "performance.getEntriesByType('resource').filter((r) => !r.name.startsWith(location.origin)).length"
    assert page.run(elsewhere) == 0
    page.picture("docs", tmp_path)
    with phone(browser):
        assert page.run("document.documentElement.scrollWidth") == 375
    assert page.errors() == []
