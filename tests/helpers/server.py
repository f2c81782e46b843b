"""A server in a thread on a free port of 127.0.0.1, for the tests of the server and of its page."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import threading
import time
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from dawhisper.model import Whisper
from dawhisper.serve.app import create_app
from dawhisper.serve.options import ServerOptions
from dawhisper.serve.server import Server
from dawhisper.serve.service import Service
from dawhisper.serve.worker import Engine, TranscriptionTask
from dawhisper.speakers import Diarizer

PATH = "/v1/audio/transcriptions"
PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'  # of a form
ROOT = Path(__file__).resolve().parent.parent.parent


class Brief(Engine):
    """For random models, which are unsure of everything and would talk on: a few tokens, decoded once."""

    def submit(self, work: TranscriptionTask | Callable[[], Any]) -> Future[Any]:
        if isinstance(work, TranscriptionTask):
            decoding = replace(work.options.decoding, sample_len=6, without_timestamps=True)
            work.options = replace(work.options, temperature=0.0, no_speech_threshold=None, decoding=decoding)
        return super().submit(work)


@dataclass(frozen=True)
class Running:
    url: str
    engine: Engine
    service: Service

    @property
    def ws(self) -> str:
        return self.url.replace("http", "ws") + "/v1/audio/live"


@contextlib.contextmanager
def running(
    models: dict[str, Whisper], brief: bool = True, diarizer: Diarizer | None = None, **options: object
) -> Iterator[Running]:
    made = ServerOptions(**{"port": 0, **options})  # type: ignore[arg-type]
    engine = (Brief if brief else Engine)(models, made.batch_size, made.max_queue + made.max_live)
    app = create_app(engine, made, diarizer=diarizer)
    server = Server(app, made)
    socket = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield Running(f"http://127.0.0.1:{socket.getsockname()[1]}", engine, app.state.service)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        assert not engine.alive


def launch(words: list[str]) -> tuple[subprocess.Popen[str], str]:
    """`dawhisper serve` with these words, in a process of its own, and the line that it says once it serves."""
    command = [sys.executable, "-m", "dawhisper", "serve", *words, "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    return process, process.stdout.readline()


def start(checkpoint: Path) -> tuple[subprocess.Popen[str], str]:
    process, line = launch(["--model", str(checkpoint)])
    assert "dawhisper serves tiny.en at http://127.0.0.1:" in line
    return process, line.split()[-1]


def wav(samples: np.ndarray, rate: int = 16000) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes((samples * 32767).astype("<i2").tobytes())
    return out.getvalue()


def pcm(samples: np.ndarray) -> bytes:
    return (samples * 32767).astype("<i2").tobytes()


def sound(seed: int, seconds: float = 2.0) -> np.ndarray:
    """Different for each seed, so that a mix-up shows."""
    generator = np.random.default_rng(seed)
    t = np.arange(int(16000 * seconds)) / 16000
    return (0.3 * np.sin(2 * np.pi * generator.uniform(100, 3000) * t) + 0.05 * generator.normal(size=len(t))).astype(
        np.float32
    )


def post(server: Running, file: object = None, **fields: object) -> httpx.Response:
    files = {"file": file if file is not None else ("a.wav", wav(sound(0)))}
    return httpx.post(server.url + PATH, files=files, data=fields, timeout=60)  # type: ignore[arg-type]
