"""A server in a thread on a free port of 127.0.0.1, for the tests of the server and of its page."""

from __future__ import annotations

import contextlib
import io
import threading
import time
import wave
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dawhisper.engine import Clip, Engine
from dawhisper.model import Whisper
from dawhisper.server import Server, ServerOptions, create_app


class Brief(Engine):
    """For random models, which are unsure of everything and would talk on: a few tokens, decoded once."""

    def submit(self, work: Clip | Callable[[], Any]) -> Future[Any]:
        if isinstance(work, Clip):
            decoding = replace(work.options.decoding, sample_len=6, without_timestamps=True)
            work.options = replace(work.options, temperature=0.0, no_speech_threshold=None, decoding=decoding)
        return super().submit(work)


@dataclass(frozen=True)
class Running:
    url: str
    engine: Engine

    @property
    def ws(self) -> str:
        return self.url.replace("http", "ws") + "/v1/audio/live"


@contextlib.contextmanager
def running(models: dict[str, Whisper], brief: bool = True, **options: object) -> Iterator[Running]:
    made = ServerOptions(**{"port": 0, **options})  # type: ignore[arg-type]
    engine = (Brief if brief else Engine)(models, made.batch_size, made.max_queue)
    server = Server(create_app(engine, made), made)
    socket = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield Running(f"http://127.0.0.1:{socket.getsockname()[1]}", engine)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        assert not engine.alive


def wav(samples: np.ndarray, rate: int = 16000) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as f:
        f.setnchannels(1)
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes((samples * 32767).astype("<i2").tobytes())
    return out.getvalue()
