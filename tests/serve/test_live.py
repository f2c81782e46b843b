"""Live audio over our own WebSocket."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
from helpers.models import pair
from helpers.server import Running, pcm, post, running, sound
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import ClientConnection, connect

from dawhisper.audio import load_audio


def messages(live: ClientConnection) -> Iterator[dict]:
    with contextlib.suppress(ConnectionClosedError):  # after an error
        for message in live:
            yield json.loads(message)


def test_live_audio(real_server: Running, assets: Path) -> None:
    samples = load_audio(assets / "speech.opus")
    with connect(real_server.ws) as live:
        live.send(json.dumps({"language": "en"}))
        assert json.loads(live.recv())["type"] == "ready"
        data = pcm(samples)
        for first in range(0, len(data), 3201):  # odd pieces: samples may be cut in half
            live.send(data[first : first + 3201])
        live.send('{"type": "finish"}')
        got = list(messages(live))
    assert got[-1]["type"] == "done"
    words = "".join(w["word"] for m in got[:-1] for w in m["words"])
    segments = "".join(s["text"] for m in got[:-1] for s in m["segments"])
    assert words == segments
    offline = real_server.engine.models["tiny.en"].transcribe(samples, language="en").text  # type: ignore[operator]
    plain = [re.sub(r"[^a-z ]", "", text.lower()).split() for text in (words, offline)]
    assert plain[0] == plain[1]


@pytest.mark.parametrize("first", ["[]", "no json", '{"model": "other"}', '{"task": "dance"}', b"\x00\x00"])
def test_a_bad_beginning_of_live_audio(random_server: Running, first: str | bytes) -> None:
    with connect(random_server.ws) as live:
        live.send(first)
        assert json.loads(live.recv())["type"] == "error"


@pytest.mark.parametrize("message", ["no json", "[]", '{"type": "dance"}'])
def test_a_bad_message_in_live_audio(random_server: Running, message: str) -> None:
    with connect(random_server.ws) as live:
        live.send("{}")
        assert json.loads(live.recv())["type"] == "ready"
        live.send(message)
        last = list(messages(live))[-1]
        assert last["type"] == "error"
        assert last["error"]["type"] == "invalid_request_error"


def test_half_a_sample_at_the_end_of_live_audio(random_server: Running) -> None:
    with connect(random_server.ws) as live:
        live.send("{}")
        live.send(pcm(sound(0)) + b"x")
        live.send('{"type": "finish"}')
        got = list(messages(live))
    assert [m["type"] for m in (got[0], *got[-2:])] == ["ready", "update", "done"]
    assert got[-2]["now"] == 2.0


def live_streams(server: Running, n: int) -> None:
    deadline = time.monotonic() + 10
    while f"dawhisper_live_streams {n}.0" not in httpx.get(server.url + "/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_too_many_live_streams_and_one_that_is_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    with running({"m": pair(eot_bias=6.0)[0]}, max_live=1) as server:
        with connect(server.ws) as live:
            live.send("{}")
            assert json.loads(live.recv())["type"] == "ready"
            with connect(server.ws) as other:
                assert json.loads(other.recv())["error"]["code"] == "queue_full"
            live.send(pcm(sound(0)))
            live_streams(server, 1)
            live.socket.close()  # in the middle of the work
        live_streams(server, 0)
        with connect(server.ws) as live:
            live.send("{}")
            assert json.loads(live.recv())["type"] == "ready"
    assert not capsys.readouterr().err  # nothing to log


def test_a_silent_or_too_fast_client_of_live_audio() -> None:
    with running({"m": pair(eot_bias=6.0)[0]}, idle_timeout=0.5) as server:
        for begin in ([], ["{}"]):
            with connect(server.ws) as live:
                for message in begin:
                    live.send(message)
                assert list(messages(live))[-1]["error"]["code"] == "too_slow"
        busy = threading.Event()
        server.engine.submit(partial(busy.wait, 20))
        with connect(server.ws, max_size=None) as live:
            live.send("{}")
            for _ in range(5):
                live.send(bytes(16000 * 2 * 20))
            deadline = time.monotonic() + 10
            while not any(session.reading and session.reading.done() for session in [*server.service.lives]):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            busy.set()
            assert list(messages(live))[-1]["error"]["code"] == "too_fast"


def test_a_bug_is_said_and_logged(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with running({"m": pair(eot_bias=6.0)[0]}) as server:
        monkeypatch.setattr(server.engine, "submit", lambda work: 1 / 0)
        with connect(server.ws) as live:
            live.send("{}")
            live.send('{"type": "finish"}')
            assert list(messages(live))[-1]["error"]["code"] == "internal_error"
        assert '"internal_error"' in post(server, stream="true").text
        assert post(server).status_code == 500
    assert capsys.readouterr().err.count("ZeroDivisionError") == 3


def test_the_end_of_the_server_finishes_live_audio() -> None:
    with contextlib.ExitStack() as ends:
        with running({"m": pair(eot_bias=6.0)[0]}) as server:
            live = ends.enter_context(connect(server.ws))
            live.send("{}")
            assert json.loads(live.recv())["type"] == "ready"
            live.send(pcm(sound(0, 0.4)))  # less than a step
            live.ping().wait(10)
        assert [m["type"] for m in messages(live)] == ["update", "done"]


def test_another_sites_page_may_not_listen(random_server: Running) -> None:
    with pytest.raises(Exception, match="403"), connect(random_server.ws, origin="http://evil.example"):  # type: ignore[arg-type]
        pass
    with connect(random_server.ws, origin=random_server.url):  # type: ignore[arg-type]
        pass
