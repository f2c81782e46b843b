"""Live audio over a WebSocket: what every session does, and our own protocol, at /v1/audio/live.

The client sends a JSON object first ({"model", "language", "task", "prompt", "api_key"}, all optional), then binary
messages of s16le 16 kHz mono samples, and {"type": "finish"} at the end. It gets {"type": "ready"}, then
{"type": "update"} messages (see stream.as_dict), and {"type": "done"} or {"type": "error"} last.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from fastapi import WebSocket, WebSocketDisconnect
from starlette.datastructures import Headers

from dawhisper.audio import SAMPLE_RATE

from .answers import finite
from .errors import ApiError, told_in_the_answer
from .forms import MOST_PROMPT
from .service import Service, checked_language
from .sources import pcm_samples
from .stream import Stream, StreamOptions, Update, as_dict

BACKLOG = 60.0  # seconds of live audio that may wait


class Inbox:
    """Samples that wait to be heard, with commands between them, in the order in which they came."""

    def __init__(self) -> None:
        self.waiting: deque[np.ndarray | object] = deque()
        self.changed = asyncio.Event()

    @property
    def seconds(self) -> float:
        return sum(len(piece) for piece in self.waiting if isinstance(piece, np.ndarray)) / SAMPLE_RATE

    def put(self, piece: np.ndarray | object) -> None:
        self.waiting.append(piece)
        self.changed.set()

    async def take(self, wanted: int, most: int | None = None) -> tuple[np.ndarray, object | None]:
        """The samples [n] before the next command, up to `most` of them, and that command where it is reached.

        Waits until there are `wanted` samples or a command.
        """
        while not (self.seconds * SAMPLE_RATE >= wanted or any(not isinstance(p, np.ndarray) for p in self.waiting)):
            self.changed.clear()
            await self.changed.wait()
        pieces, left = [np.zeros(0, np.float32)], most
        while self.waiting:
            piece = self.waiting.popleft()
            if not isinstance(piece, np.ndarray):
                return np.concatenate(pieces), piece
            pieces.append(piece[:left])
            if left is not None and len(piece) >= left:
                if len(piece) > left:
                    self.waiting.appendleft(piece[left:])
                break
            left = None if left is None else left - len(piece)
        return np.concatenate(pieces), None


class Session:
    """A WebSocket: one task takes in what comes, another gives it to a stream, as much as there is each time."""

    END = object()  # the command after which nothing comes

    def __init__(self, service: Service, socket: WebSocket):
        self.service, self.socket, self.inbox = service, socket, Inbox()
        self.reading: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Serve the client until it has finished or gone."""
        raise NotImplementedError

    async def read(self) -> None:
        """Put what comes into the inbox, until the client has finished."""
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """`read` runs in the background."""
        self.reading = asyncio.create_task(self.read())
        self.reading.add_done_callback(lambda _: self.inbox.put(self.END))
        try:
            yield
        finally:
            self.end()

    def end(self) -> None:
        """Take in no more audio; what was heard is still transcribed."""
        if self.reading:
            self.reading.cancel()

    def raise_what_went_wrong(self) -> None:
        """In `read`, once it has ended by itself."""
        if self.reading and not self.reading.cancelled():
            self.reading.result()

    async def receive(self, patience: float) -> bytes | str:
        """The next message; ApiError where none comes for so many seconds."""
        try:
            got = await asyncio.wait_for(self.socket.receive(), patience)
        except asyncio.TimeoutError:
            raise ApiError(408, f"nothing came for {patience:g} s; connect again", code="too_slow") from None
        if got["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(got.get("code", 1005))
        return got["text"] if got.get("bytes") is None else got["bytes"]

    async def heard(self, stream: Stream, samples: np.ndarray, last: bool) -> Update:
        """What the engine's worker makes of these samples."""
        return await asyncio.wrap_future(self.service.engine.submit(partial(fed, stream, samples, last)))

    async def say(self, error: ApiError) -> None:
        await self.socket.send_json({"type": "error", **error.body()})


def fed(stream: Stream, samples: np.ndarray, last: bool) -> Update:
    update = stream.feed(samples)
    return update + stream.finish() if last else update


def parsed(message: str) -> dict[str, Any]:
    """A text message's JSON object."""
    try:
        made = json.loads(message)
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict):
        raise ApiError(400, "a text message is a JSON object")
    return made


async def attend(session: Session) -> None:
    """Run an accepted session in its place among the others, and say what goes wrong."""
    try:
        with session.service.attended(session):
            await session.run()
            await session.socket.close()
    except WebSocketDisconnect:
        pass
    except Exception as error:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client may have gone
            await session.say(told_in_the_answer(error))
            await session.socket.close(1008)


def may_connect(headers: Headers, allowed: Sequence[str]) -> bool:
    """Whether a browser's WebSocket comes from this server's own page or an allowed one; programs send no origin."""
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host") or bool({origin, "*"} & set(allowed))


class Live(Session):
    """Our own protocol."""

    async def run(self) -> None:
        first = await self.receive(self.service.options.idle_timeout)
        if isinstance(first, bytes):
            raise ApiError(400, "the first message is a JSON object")
        service, asked = self.service, parsed(first)
        service.authorize(str(asked.get("api_key", "")))
        given = {k: str(asked[k]) for k in ("model", "language", "task", "prompt") if asked.get(k)}
        name = service.model_named(given.get("model", "whisper-1"))
        model = service.engine.models[name]
        task = given.get("task", "transcribe")
        language = checked_language(name, model, given.get("language"), task)
        prompt = given.get("prompt", "")[:MOST_PROMPT] or None
        stream = Stream(model, StreamOptions(language=language, task=task, initial_prompt=prompt))
        await self.socket.send_json({"type": "ready", "model": name})
        async with self.listening():
            command = None
            while command is None:
                samples, command = await self.inbox.take(stream.wanted)
                if command is not None:
                    self.raise_what_went_wrong()
                service.metrics.audio.labels(name).inc(len(samples) / SAMPLE_RATE)
                update = await self.heard(stream, samples, last=command is not None)
                message = {"type": "update", "now": round(stream.now, 2), **finite(as_dict(update))}
                await self.socket.send_json(message)
        await self.socket.send_json({"type": "done"})

    async def read(self) -> None:
        rest = b""  # half a sample
        while True:
            got = await self.receive(self.service.options.idle_timeout)
            if isinstance(got, bytes):
                data = rest + got
                even = len(data) // 2 * 2
                rest = data[even:]
                self.inbox.put(pcm_samples(data[:even]))
            elif parsed(got).get("type") == "finish":
                return
            else:
                raise ApiError(400, 'send samples as binary messages, then {"type": "finish"}')
            if self.inbox.seconds > BACKLOG:
                raise ApiError(429, "audio comes faster than it can be transcribed", code="too_fast")
