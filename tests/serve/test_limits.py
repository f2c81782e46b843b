"""Malformed requests, clients that go away, and slow ones: all are answered or let go, and leave nothing."""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import time
from pathlib import Path

import httpx
import pytest
from helpers.models import pair
from helpers.server import PART, PATH, Running, post, running, sound, wav
from starlette.types import Message, Receive, Scope, Send

from dawhisper.serve.limits import Guard
from dawhisper.serve.metrics import Metrics
from dawhisper.serve.options import ServerOptions


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def malformed(rng: random.Random) -> tuple[bytes, dict[str, str]]:
    """A request's body and headers, wrong in one of many ways."""
    names = [
        "a.wav",
        "../../etc/passwd",
        "/etc/passwd",
        "a\\..\\b",
        "file:///etc/passwd",
        "",
        "x" * 3000,
        "\u202eü.wav",
    ]
    name = rng.choice(names)
    whole = wav(sound(rng.randrange(4), 0.2))
    content = rng.choice(
        [b"", rng.randbytes(200), whole[: rng.randrange(44)], b"#EXTM3U\nfile:///etc/passwd\n", b"concat"]
    )
    field = rng.choice(["file", "files", "model", "prompt"])
    part = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode() + content
    body = rng.choice([part + b"\r\n--x--\r\n", part, part[: rng.randrange(len(part))], b"{}", b"", rng.randbytes(500)])
    kind = rng.choice(["multipart/form-data; boundary=x"] * 4 + ["multipart/form-data", "application/json", "\x7f", ""])
    return body, {"content-type": kind}


def test_malformed_requests_are_answered_and_leave_nothing(random_server: Running) -> None:
    rng = random.Random(0)
    with httpx.Client(base_url=random_server.url, timeout=30) as client:

        def some(n: int) -> None:
            for _ in range(n):
                body, headers = malformed(rng)
                answer = client.post(rng.choice([PATH, "/v1/audio/translations"]), content=body, headers=headers)
                assert 400 <= answer.status_code < 500, (body, headers, answer.text)
                assert answer.json()["error"]["message"]

        some(20)
        gc.collect()
        before = open_files()
        some(150)
        gc.collect()
        assert open_files() <= before + 3
        for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%5c..%5cetc", "/v1/nothing", "/app.js/x"):
            assert client.get(path).status_code in (404, 405)
        assert client.get(PATH).json()["error"]["message"]
    assert post(random_server).status_code == 200


def test_a_client_that_goes_away_leaves_nothing(random_server: Running) -> None:
    host, port = random_server.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n")
            raw.sendall(b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n")
    deadline = time.monotonic() + 10
    while "dawhisper_active_requests 0.0" not in httpx.get(random_server.url + "/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def head(length: int, kind: str = "multipart/form-data; boundary=x") -> bytes:
    return f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\nContent-Type: {kind}\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("first", "drip", "status"),
    [
        (head(2_000_000) + PART + bytes(1_500_000), b"", 408),  # stops, with a temporary file
        (head(2_000_000) + PART + bytes(1_500_000), b"x", 408),  # a byte now and then
        (b"", b"", None),
        (b"POST /v1/audio/transcriptions HTTP/1.1\r\nX: ", b"x", None),  # headers without end
        (head(2_000_000, "text/plain"), b"x", 400),  # goes on after its answer
    ],
)
def test_slow_clients_are_let_go(first: bytes, drip: bytes, status: int | None) -> None:
    with running({"m": pair(eot_bias=6.0)[0]}, upload_timeout=1.2, idle_timeout=0.6) as server:
        host, port = server.url.removeprefix("http://").split(":")
        before = open_files()
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(first)
            raw.settimeout(0.1)
            began, got, closed = time.monotonic(), b"", False
            while not closed and time.monotonic() - began < 10:
                try:
                    if drip:
                        raw.send(drip)
                    got += (data := raw.recv(65536))
                    closed = not data
                except TimeoutError:
                    pass
                except ConnectionError:
                    closed = True
            assert closed
            assert (int(got.split()[1]) if got else None) == status
            if status == 408:
                assert b'"code":"too_slow"' in got
            assert open_files() <= before + 1  # our own end of the connection
        assert "dawhisper_active_requests 0.0" in httpx.get(server.url + "/metrics").text
        assert post(server).status_code == 200


def test_who_does_not_read_the_answer_is_let_go() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def stuck(message: Message) -> None:
        await asyncio.sleep(60)

    guard = Guard(app, ServerOptions(idle_timeout=0.2), Metrics())
    asyncio.run(asyncio.wait_for(guard({"type": "http"}, stuck, stuck), 5))  # type: ignore[arg-type]
