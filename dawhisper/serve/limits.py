"""Around every request: the size and pace of its body, the headers of its answer, counts; and idle connections."""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError
from .metrics import Metrics
from .options import ServerOptions

# no page needs anything from elsewhere, and nobody else's page may frame one
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Around every HTTP request: the limits of its body's size and pace, headers of the answer, counts."""

    def __init__(self, app: ASGIApp, options: ServerOptions, metrics: Metrics):
        self.app, self.options, self.metrics = app, options, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, taken, complete, status = time.monotonic(), 0, False, 500
        idle, most = self.options.idle_timeout, self.options.max_upload * 1e6

        async def limited() -> Message:
            nonlocal taken, complete
            try:
                left = min(idle, began + self.options.upload_timeout - time.monotonic())
                message = await (receive() if complete else asyncio.wait_for(receive(), left))
            except asyncio.TimeoutError:
                raise ApiError(408, "the upload came too slowly; send a smaller file", "file", "too_slow") from None
            complete = not message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > most:
                raise ApiError(413, f"the upload is larger than {most / 1e6:g} MB", "file", "too_large")
            return message

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                if status == 408:  # what else may come of the body is not read
                    headers["Connection"] = "close"
            try:
                await asyncio.wait_for(send(message), idle)
            except asyncio.TimeoutError:  # the client reads nothing
                raise ClientDisconnect from None

        try:
            await self.app(scope, limited, counted)
        except ClientDisconnect:
            pass
        finally:
            path = getattr(scope.get("route"), "path", "other")  # not the request's own: there is no end to those
            labels = (scope.get("method", ""), path)
            self.metrics.requests.labels(*labels, status).inc()
            if path.startswith("/v1/audio"):
                self.metrics.seconds.labels(*labels).observe(time.monotonic() - began)


class Patient(H11Protocol):
    """Closes a connection whose next request's head has not come in time, or whose last body goes on.

    uvicorn's timeout_keep_alive begins after an answer only and ends with any byte: a head that drips in, or none at
    all, would hold a connection for ever, so this starts the same timer anew for every head.
    """

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.expect()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.expect()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.timer:
            self.timer.cancel()

    def expect(self) -> None:
        if self.timer:
            self.timer.cancel()
        self.timer = self.loop.call_later(self.timeout_keep_alive, self.expired)

    def expired(self) -> None:
        if self in self.connections and (self.cycle is None or self.cycle.response_complete):  # else a WebSocket's
            self.transport.close()
