"""Errors as OpenAI's API has them: a status, and a JSON object that says what is wrong."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi.responses import JSONResponse

from dawhisper.errors import AudioError, DawhisperError

from .worker import QueueFull, Stopped

log = logging.getLogger("uvicorn.error")


class ApiError(Exception):
    """An answer in OpenAI's shape of errors. param: the field that is wrong; wait: seconds until another try."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, wait: int | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.wait = status, param, code, wait

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, {} if self.wait is None else {"Retry-After": str(self.wait)})


def as_api_error(error: BaseException) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AudioError):
        return ApiError(400, str(error), "file", "invalid_audio")
    if isinstance(error, DawhisperError):
        return ApiError(400, str(error))
    if isinstance(error, QueueFull):
        return ApiError(429, "too many requests are waiting; try again later", code="queue_full", wait=5)
    if isinstance(error, (asyncio.TimeoutError, Stopped)):
        return ApiError(504, "the request took too long; send a shorter recording or raise --timeout", code="timeout")
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def told_in_the_answer(error: Exception) -> ApiError:
    """For an answer that has begun: nobody else logs what is a bug."""
    answer = as_api_error(error)
    if answer.status == 500:
        log.error("failed on a request", exc_info=error)
    return answer
