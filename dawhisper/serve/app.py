"""`dawhisper serve`: OpenAI's audio API over HTTP, live audio over a WebSocket, a page to try both, and metrics.

POST /v1/audio/transcriptions, /v1/audio/translations; GET /v1/models, /health, /metrics; WebSocket /v1/audio/live.

Live audio: the client sends a JSON object first ({"model", "language", "task", "prompt", "api_key"}, all optional),
then binary messages of s16le 16 kHz mono samples, and {"type": "finish"} at the end. It gets {"type": "ready"}, then
{"type": "update"} messages (see streaming.as_dict), and {"type": "done"} or {"type": "error"} last.

Uploads are held in memory, or by the multipart parser in unnamed temporary files, and no name of theirs is ever opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import io
import json
import logging
import math
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
import prometheus_client as prometheus
import torch
import uvicorn
from fastapi import Depends, FastAPI, Request, WebSocket, WebSocketDisconnect
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from whisper.tokenizer import LANGUAGES

import dawhisper
from dawhisper.audio import SAMPLE_RATE, load_audio
from dawhisper.checkpoint import OWN_MODEL, load_model
from dawhisper.decoding import asked_language
from dawhisper.device import DEVICE_HELP, THREADS_HELP
from dawhisper.errors import AudioError, DawhisperError, OptionError
from dawhisper.model import Whisper
from dawhisper.options import option
from dawhisper.transcription import Segment, TranscribeOptions, Transcription
from dawhisper.writers import WRITERS

from .sources import pcm_samples
from .stream import Stream, StreamOptions, Update, as_dict, warm_up
from .worker import Engine, QueueFull, Stopped, TranscriptionTask

FIELDS = {
    "model": "a name that /v1/models lists; the first one by default",
    "language": "code or English name of the language spoken; found out by default",
    "prompt": "text before the first word: names, spelling, style",
    "response_format": "json, text, srt, verbose_json or vtt",
    "temperature": "0 to 1; 0 tries higher ones where the text is doubtful",
    "timestamp_granularities": "segment, word; with verbose_json or stream",
    "stream": "true: server-sent events",
    "include": "gate: words carry their probability and the share of the speech branch",
    "chunking_strategy": "auto: long recordings are always cut here",
}
INDEX = re.compile(r"\[\d*\]$")  # of a list's field: NAME[] or NAME[0]
FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
GRANULARITIES = ("segment", "word")
IDLE = 20.0  # seconds that a client may send nothing of what is awaited
LIVE_BACKLOG = 60.0  # seconds of live audio that may wait
log = logging.getLogger("uvicorn.error")
PAGE = Path(__file__).parent / "page"
# the page needs nothing from elsewhere, and nobody else's page may frame it
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; media-src 'self' blob:; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


# Swagger UI, which FastAPI takes from there
DOCS_HEADERS = HEADERS | {
    "Content-Security-Policy": "default-src 'self'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'unsafe-inline' https://cdn.jsdelivr.net; img-src 'self' data: https://fastapi.tiangolo.com; "
    "frame-ancestors 'none'"
}
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
FORM = {  # of a transcription, for /docs
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "audio or video of any format"},
                        **{name: {"type": "string", "description": text} for name, text in FIELDS.items()},
                    },
                }
            }
        },
    }
}


@dataclass(frozen=True)
class ServerOptions:
    """models: names or paths, or NAME=PATH; the first one is also "whisper-1". Sizes in MB, times in seconds.

    max_queue: requests that are waiting or running; more get 429. max_upload: of a request's body; max_audio: of a
    recording. upload_timeout: until a request's body has come; later ones get 408. timeout: of a request, from its
    first byte to its answer. api_key: what clients must send; None for all.
    """

    models: tuple[str, ...] = option(
        (OWN_MODEL,), f"name, path or NAME=PATH, once a model; {OWN_MODEL} by default", name="model", append=True
    )
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all, which needs --api_key to be safe")
    port: int = option(8000, "0 takes a free one")
    device: str | None = option(None, DEVICE_HELP)
    threads: int = option(0, THREADS_HELP)
    api_key: str | None = option(
        None, "what clients must send; $DAWHISPER_API_KEY by default, which other users can't see"
    )
    batch_size: int = option(8, "short clips of different requests decoded together")
    max_queue: int = option(64, "requests waiting or running; more are refused with 429")
    max_live: int = option(4, "live streams at once")
    max_upload: float = option(100.0, "MB of a request; more is refused with 413")
    max_audio: float = option(7200.0, "seconds of a recording")
    upload_timeout: float = option(300.0, "seconds for an upload to come; slower ones get 408")
    timeout: float = option(600.0, "seconds of a request")
    allow_origin: tuple[str, ...] = option(
        (), "a web page's origin that may use the server, as https://app.example, or * for all", append=True
    )
    alias: tuple[str, ...] = option((), "NAME=MODEL: another name of a model, once a name", append=True)

    def __post_init__(self) -> None:
        sizes = ("batch_size", "max_queue", "max_live", "max_upload", "max_audio", "upload_timeout", "timeout")
        for name in sizes:
            if not getattr(self, name) > 0:
                raise OptionError(f"--{name} is above 0, not {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise OptionError(f"--port lies between 0 and 65535, not {self.port}")
        for origin in self.allow_origin:
            parts = urlsplit(origin)
            if origin != "*" and (not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}"):
                raise OptionError(f"--allow_origin is SCHEME://HOST[:PORT] without a path, or *, not {origin!r}")
        for alias in self.alias:
            if not all(alias.partition("=")):
                raise OptionError(f"--alias is NAME=MODEL, not {alias!r}")

    def names(self, models: Iterable[str]) -> dict[str, str]:
        """Which model each alias means; OptionError where there is no such model."""
        known = list(models)
        names = {"whisper-1": known[0]}
        for alias in self.alias:
            name, _, model = alias.partition("=")
            if model not in known:
                raise OptionError(f"--alias {alias}: there is no model {model!r}, only {', '.join(known)}")
            names[name] = model
        return {name: model for name, model in names.items() if name not in known}


class ApiError(Exception):
    """An answer in OpenAI's shape of errors."""

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


class Metrics:
    """What /metrics tells."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "dawhisper_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.seconds = prometheus.Histogram(
            "dawhisper_request_seconds",
            "From request to answer",
            registry=self.registry,
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
        )
        self.audio = prometheus.Counter("dawhisper_audio_seconds", "Audio taken in", registry=self.registry)
        self.batch = prometheus.Histogram(
            "dawhisper_batch_size", "Clips decoded together", registry=self.registry, buckets=(1, 2, 4, 8, 16, 32)
        )
        self.active = prometheus.Gauge("dawhisper_active_requests", "Waiting or running", registry=self.registry)
        self.live = prometheus.Gauge("dawhisper_live_streams", "Live streams", registry=self.registry)


# -------------------------------------------------------------------------------------------------------- requests


@dataclass(frozen=True)
class Asked:
    """A checked request."""

    model: str
    samples: np.ndarray
    options: TranscribeOptions
    response_format: str
    granularities: frozenset[str]
    stream: bool
    gates: bool


class Service:
    """What the routes share: engine, limits, metrics."""

    def __init__(self, engine: Engine, options: ServerOptions, metrics: Metrics):
        self.engine, self.options, self.metrics = engine, options, metrics
        self.aliases = options.names(engine.models)
        self.active = 0
        self.lives: set[Live] = set()
        self.decoding = asyncio.Semaphore(2)  # recordings decoded at once: each holds its samples

    def model_named(self, name: str) -> str:
        models = self.engine.models
        name = self.aliases.get(name, name)
        if name not in models:
            message = f"the model {name[:80]!r} does not exist; there are {', '.join(models)}"
            raise ApiError(404, message, "model", "model_not_found")
        return name

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        if self.active >= self.options.max_queue:
            raise QueueFull
        self.active += 1
        self.metrics.active.set(self.active)
        try:
            yield
        finally:
            self.active -= 1
            self.metrics.active.set(self.active)

    def authorize(self, key: str | None) -> None:
        wanted = self.options.api_key
        if wanted is not None and not hmac.compare_digest(
            *(k.encode(errors="surrogatepass") for k in (key or "", wanted))
        ):
            raise ApiError(401, "no or wrong API key; send Authorization: Bearer KEY", code="invalid_api_key")

    async def read(self, request: Request, task: str) -> Asked:
        """The form of a request, checked, and its recording, decoded."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise ApiError(400, "send multipart/form-data with a file", "file")
        async with request.form(max_files=1, max_fields=32) as form:
            values: dict[str, list[str]] = {}
            upload = form.get("file")
            if not isinstance(upload, UploadFile):
                raise ApiError(400, "send the recording as the field 'file', with a file name", "file")
            for name, value in form.multi_items():
                if isinstance(value, str):
                    values.setdefault(INDEX.sub("", name), []).append(value)
                elif name != "file":
                    raise ApiError(400, f"{name[:40]!r} is not a file", name[:40])
            asked = self.check(values, task)
            data = io.BytesIO(await upload.read())
            data.name = Path(upload.filename or "file").name[:80]  # for messages only
        if not data.getbuffer().nbytes:
            raise ApiError(400, "the file is empty", "file", "invalid_audio")
        async with self.decoding:
            samples = await asyncio.to_thread(self.decode_audio, data)
        self.metrics.audio.inc(len(samples) / SAMPLE_RATE)
        return replace(asked, samples=samples)

    def decode_audio(self, data: io.BytesIO) -> np.ndarray:
        limit = self.options.max_audio
        samples = load_audio(data, end=limit + 1)
        if len(samples) > limit * SAMPLE_RATE:
            raise ApiError(413, f"the recording is longer than {limit:g} s; send parts of it", "file", "too_long")
        return samples

    def check(self, values: Mapping[str, list[str]], task: str) -> Asked:
        """A request without its recording, from the form's text fields."""

        def one(name: str, default: str = "") -> str:
            return values.get(name, [default])[-1].strip()

        for field in values:
            if field not in FIELDS:
                message = f"the option {field[:40]!r} is not offered; there are file, {', '.join(FIELDS)}"
                raise ApiError(400, message, field[:40], "unsupported_parameter")
        for field, offered in (("include", "gate"), ("chunking_strategy", "auto")):
            for value in values.get(field, []):
                if value != offered:
                    message = f"{field} is {offered}; {value[:40]!r} is not offered"
                    raise ApiError(400, message, field, "unsupported_parameter")
        name = self.model_named(one("model") or next(iter(self.engine.models)))
        model = self.engine.models[name]
        response_format = one("response_format", "json")
        if response_format not in FORMATS:
            raise ApiError(400, f"response_format is one of {', '.join(FORMATS)}", "response_format")
        granularities = frozenset(values.get("timestamp_granularities", []))
        if not granularities <= set(GRANULARITIES):
            raise ApiError(400, "timestamp_granularities are segment and word", "timestamp_granularities")
        stream = one("stream", "false").lower()
        if stream not in ("true", "false", "1", "0"):
            raise ApiError(400, "stream is true or false", "stream")
        if granularities and response_format != "verbose_json" and stream in ("false", "0"):
            raise ApiError(400, "timestamp_granularities needs response_format=verbose_json", "timestamp_granularities")
        try:
            temperature = float(one("temperature") or 0)
        except ValueError:
            temperature = math.nan
        if not 0 <= temperature <= 1:
            raise ApiError(400, "temperature lies between 0 and 1", "temperature")
        prompt = one("prompt")
        if len(prompt) > 4000:
            raise ApiError(400, "prompt has more than 4000 characters", "prompt")
        gates = "gate" in values.get("include", [])
        options = TranscribeOptions.of(
            task=task,
            language=checked_language(name, model, one("language") or None, task),
            initial_prompt=prompt or None,
            word_timestamps=gates or "word" in granularities,
            **({"temperature": temperature} if temperature else {}),  # 0 is what falls back to others
        )
        empty = np.zeros(0, np.float32)
        return Asked(name, empty, options, response_format, granularities, stream in ("true", "1"), gates)


def checked_language(name: str, model: Whisper, language: str | None, task: str) -> str | None:
    """The code of the language asked for; ApiError where the model can't do that."""
    try:
        code = asked_language(language)
    except OptionError as error:
        raise ApiError(400, str(error), "language") from None
    if model.is_multilingual:
        return code
    if task == "translate" or code not in (None, "en"):
        raise ApiError(400, f"{name} knows English only; use a multilingual model", "model")
    return "en"


# --------------------------------------------------------------------------------------------------------- answers


def formatted(asked: Asked, result: Transcription) -> Response:
    duration = round(len(asked.samples) / SAMPLE_RATE, 2)
    if asked.response_format == "text":
        return PlainTextResponse(result.text.strip() + "\n")
    if asked.response_format in ("srt", "vtt"):
        out = io.StringIO()
        WRITERS[asked.response_format]("").write_result(result.to_dict(), file=out, options={})
        kind = "application/x-subrip" if asked.response_format == "srt" else "text/vtt"
        return Response(out.getvalue(), media_type=f"{kind}; charset=utf-8")
    usage = {"type": "duration", "seconds": math.ceil(duration)}
    body: dict[str, Any] = {"text": result.text.strip(), "usage": usage}
    if asked.response_format == "verbose_json":
        body |= {
            "task": asked.options.decoding.task,
            "language": LANGUAGES.get(result.language, result.language),
            "duration": duration,
        }
        if "word" in asked.granularities:
            body["words"] = [word for segment in result.segments for word in words_of(segment, asked.gates)]
        if "segment" in asked.granularities or not asked.granularities:
            body["segments"] = [segment_dict(segment) for segment in result.segments]
    return JSONResponse(finite(body))


def words_of(segment: Segment, gates: bool) -> list[dict[str, Any]]:
    """Words as OpenAI has them; where the gate was asked for, with it and the word's probability."""
    made: list[dict[str, Any]] = []
    for word in segment.words or []:
        made.append({"word": word.word.strip(), "start": float(word.start), "end": float(word.end)})
        if gates:
            made[-1] |= {"probability": round(float(word.probability), 3), "gate": word.gate}
    return made


def segment_dict(segment: Segment) -> dict[str, Any]:
    made = segment.to_dict()
    made.pop("words", None)
    return {name: float(v) if isinstance(v, np.floating) else v for name, v in made.items()}


def finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(finite(body), ensure_ascii=False)}\n\n"


async def wait_for(future: Future[Any], clip: TranscriptionTask, request: Request, seconds: float) -> Transcription:
    """The result; a client that has gone or waited too long stops the work."""
    waiting = asyncio.wrap_future(future)
    deadline = time.monotonic() + seconds
    try:
        while not waiting.done():
            await asyncio.wait([waiting], timeout=min(0.5, max(0.0, deadline - time.monotonic())))
            if not waiting.done() and (time.monotonic() >= deadline or await request.is_disconnected()):
                raise asyncio.TimeoutError
        return waiting.result()
    finally:
        clip.stop()
        waiting.cancel()


async def events(service: Service, asked: Asked, admission: contextlib.ExitStack, seconds: float) -> AsyncIterator[str]:
    """Server-sent events: text as it is known, segments where asked for, the whole at the end."""
    loop = asyncio.get_running_loop()
    told: asyncio.Queue[Segment | None] = asyncio.Queue()

    def tell(segment: Segment | None) -> None:
        loop.call_soon_threadsafe(told.put_nowait, segment)

    clip = TranscriptionTask(asked.model, asked.samples, asked.options, on_segment=tell)
    with admission:
        try:
            future = service.engine.submit(clip)
            future.add_done_callback(lambda _: tell(None))
            deadline = time.monotonic() + seconds
            while (segment := await asyncio.wait_for(told.get(), deadline - time.monotonic())) is not None:
                if segment.text:
                    yield event({"type": "transcript.text.delta", "delta": segment.text})
                if asked.granularities and segment.text:
                    times = {"id": str(segment.id), "start": float(segment.start), "end": float(segment.end)}
                    words = {"words": words_of(segment, asked.gates)} if "word" in asked.granularities else {}
                    yield event({"type": "transcript.text.segment", **times, "text": segment.text, **words})
            result = future.result()
            usage = {"type": "duration", "seconds": math.ceil(len(asked.samples) / SAMPLE_RATE)}
            language = LANGUAGES.get(result.language, result.language).title()
            done = {"type": "transcript.text.done", "text": result.text.strip(), "language": language}
            yield event(done | {"usage": usage})
        except Exception as error:  # the status line is sent already
            yield event(told_in_the_answer(error).body())
        finally:
            clip.stop()


# ------------------------------------------------------------------------------------------------------ live audio


class Live:
    """A WebSocket: one task takes in audio, another gives it to the stream, as much as there is each time."""

    def __init__(self, service: Service, socket: WebSocket):
        self.service, self.socket = service, socket
        self.heard = bytearray()
        self.news = asyncio.Event()
        self.reading: asyncio.Task[None] | None = None

    async def run(self) -> None:
        first = await self.message()
        if not isinstance(first, dict):
            raise ApiError(400, "the first message is a JSON object")
        service = self.service
        service.authorize(str(first.get("api_key", "")))
        given = {k: str(first[k]) for k in ("model", "language", "task", "prompt") if first.get(k)}
        name = service.model_named(given.get("model", "whisper-1"))
        model = service.engine.models[name]
        task = given.get("task", "transcribe")
        language = checked_language(name, model, given.get("language"), task)
        prompt = given.get("prompt", "")[:4000] or None
        options = StreamOptions(language=language, task=task, initial_prompt=prompt)
        stream = Stream(model, options)
        await self.socket.send_json({"type": "ready", "model": name})
        self.reading = asyncio.create_task(self.read())
        self.reading.add_done_callback(lambda _: self.news.set())
        try:
            await self.listen(stream, self.reading)
        finally:
            self.end()

    def end(self) -> None:
        """Take in no more audio; what was heard is still transcribed."""
        if self.reading:
            self.reading.cancel()

    async def message(self) -> Any:
        """A JSON message, or bytes of audio."""
        try:
            got = await asyncio.wait_for(self.socket.receive(), IDLE)
        except asyncio.TimeoutError:
            raise ApiError(408, f"nothing came for {IDLE:g} s; connect again", code="too_slow") from None
        if got["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(got.get("code", 1005))
        if got.get("bytes") is not None:
            return got["bytes"]
        try:
            return json.loads(got["text"])
        except (ValueError, RecursionError):
            raise ApiError(400, "a text message is a JSON object") from None

    async def read(self) -> None:
        """Take in audio until the client says that it has finished."""
        while True:
            got = await self.message()
            if isinstance(got, bytes):
                self.heard += got
                self.news.set()
            elif isinstance(got, dict) and got.get("type") == "finish":
                return
            else:
                raise ApiError(400, 'send samples as binary messages, then {"type": "finish"}')
            if len(self.heard) > LIVE_BACKLOG * SAMPLE_RATE * 2:
                raise ApiError(429, "audio comes faster than it can be transcribed", code="too_fast")

    async def listen(self, stream: Stream, reading: asyncio.Task[None]) -> None:
        last = False
        while not last:
            while len(self.heard) < 2 * stream.wanted and not reading.done():
                self.news.clear()
                await self.news.wait()
            last = reading.done()
            if last and not reading.cancelled():
                reading.result()  # raises what went wrong
            even = len(self.heard) // 2 * 2  # the rest is half a sample
            samples, self.heard = pcm_samples(bytes(self.heard[:even])), self.heard[even:]
            self.service.metrics.audio.inc(len(samples) / SAMPLE_RATE)
            update = await asyncio.wrap_future(self.service.engine.submit(partial(heard, stream, samples, last)))
            await self.socket.send_json({"type": "update", "now": round(stream.now, 2), **finite(as_dict(update))})
        await self.socket.send_json({"type": "done"})


def heard(stream: Stream, samples: np.ndarray, last: bool) -> Update:
    update = stream.feed(samples)
    return update + stream.finish() if last else update


def may_connect(headers: Headers, allowed: Sequence[str]) -> bool:
    """Whether a browser's WebSocket comes from this server's own page or an allowed one; programs send no origin."""
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host") or bool({origin, "*"} & set(allowed))


# ------------------------------------------------------------------------------------------------------------- app


class Guard:
    """Around every HTTP request: the limits of its body's size and pace, headers of the answer, counts."""

    def __init__(self, app: ASGIApp, max_bytes: float, max_seconds: float, metrics: Metrics):
        self.app, self.max_bytes, self.max_seconds, self.metrics = app, max_bytes, max_seconds, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, taken, complete, status = time.monotonic(), 0, False, 500

        async def limited() -> Message:
            nonlocal taken, complete
            try:
                left = min(IDLE, began + self.max_seconds - time.monotonic())
                message = await (receive() if complete else asyncio.wait_for(receive(), left))
            except asyncio.TimeoutError:
                raise ApiError(408, "the upload came too slowly; send a smaller file", "file", "too_slow") from None
            complete = not message.get("more_body", False)
            taken += len(message.get("body", b""))
            if taken > self.max_bytes:
                raise ApiError(413, f"the upload is larger than {self.max_bytes / 1e6:g} MB", "file", "too_large")
            return message

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(DOCS_HEADERS if scope.get("path") == "/docs" else HEADERS)
                if status == 408:  # what else may come of the body is not read
                    headers["Connection"] = "close"
            try:
                await asyncio.wait_for(send(message), IDLE)
            except asyncio.TimeoutError:  # the client reads nothing
                raise ClientDisconnect from None

        try:
            await self.app(scope, limited, counted)
        except ClientDisconnect:
            pass
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")  # not the request's own: there is no end to those
            self.metrics.requests.labels(path or "page", status).inc()
            if path.startswith("/v1/audio"):
                self.metrics.seconds.observe(time.monotonic() - began)


def create_app(engine: Engine, options: ServerOptions, metrics: Metrics | None = None) -> FastAPI:
    """The application around a running engine, which it closes at its end."""
    metrics = metrics or Metrics()
    service = Service(engine, options, metrics)
    engine.on_batch = metrics.batch.observe

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="dawhisper",
        version=dawhisper.__version__,
        description="OpenAI's audio API; live audio goes to the WebSocket /v1/audio/live.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Guard, max_bytes=options.max_upload * 1e6, max_seconds=options.upload_timeout, metrics=metrics)
    if options.allow_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.allow_origin, allow_methods=["GET", "POST"], allow_headers=["*"]
        )

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = "not_found" if error.status_code == 404 else None
        response = ApiError(error.status_code, str(error.detail), code=code).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    async def authorized(bearer: Bearer) -> None:
        service.authorize(bearer.credentials if bearer else None)

    with_key = [Depends(authorized)]

    async def answer(request: Request, task: str) -> Response:
        began = time.monotonic()
        with contextlib.ExitStack() as admission:
            try:
                admission.enter_context(service.admitted())
                length = request.headers.get("content-length", "0")
                if length.isdigit() and int(length) > options.max_upload * 1e6:
                    raise ApiError(413, f"the upload is larger than {options.max_upload:g} MB", "file", "too_large")
                asked = await asyncio.wait_for(service.read(request, task), options.timeout)
                left = options.timeout - (time.monotonic() - began)
                if asked.stream:
                    return StreamingResponse(
                        events(service, asked, admission.pop_all(), left),
                        media_type="text/event-stream",
                        headers={"Cache-Control": "no-store"},
                    )
                clip = TranscriptionTask(asked.model, asked.samples, asked.options)
                result = await wait_for(engine.submit(clip), clip, request, left)
                return formatted(asked, result)
            except (ApiError, DawhisperError, QueueFull, Stopped, asyncio.TimeoutError) as error:
                return as_api_error(error).response()
            except HTTPException as error:
                return ApiError(error.status_code, str(error.detail), "file").response()
            except ClientDisconnect:  # nobody reads the answer
                return Response(status_code=499)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    @app.post("/v1/audio/transcriptions", dependencies=with_key, openapi_extra=FORM)
    async def transcriptions(request: Request) -> Response:
        return await answer(request, "transcribe")

    @app.post("/v1/audio/translations", dependencies=with_key, openapi_extra=FORM)
    async def translations(request: Request) -> Response:
        return await answer(request, "translate")

    started = int(time.time())

    def model_card(name: str) -> dict[str, Any]:
        model = engine.models[name]
        card = {"id": name, "object": "model", "created": started, "owned_by": "dawhisper"}
        codes = list(LANGUAGES)[: model.num_languages] if model.is_multilingual else ["en"]
        languages = {code: LANGUAGES[code].title() for code in codes}
        return card | {"dual": model.dual is not None, "multilingual": model.is_multilingual, "languages": languages}

    @app.head("/v1/models", include_in_schema=False, dependencies=with_key)
    @app.get("/v1/models", dependencies=with_key)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model_card(name) for name in engine.models]})

    @app.head("/v1/models/{name}", include_in_schema=False, dependencies=with_key)
    @app.get("/v1/models/{name}", dependencies=with_key)
    async def one_model(name: str) -> Response:
        return JSONResponse(model_card(service.model_named(name)))

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        status = {
            "status": "ok" if engine.alive else "failed",
            "models": list(engine.models),
            "waiting": engine.waiting,
        }
        return JSONResponse(status, 200 if engine.alive else 503)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics")
    async def metrics_page() -> Response:
        return Response(prometheus.generate_latest(metrics.registry), media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.websocket("/v1/audio/live")
    async def live(connection: WebSocket) -> None:
        if not may_connect(connection.headers, options.allow_origin):
            await connection.close(1008)
            return
        await connection.accept()
        session = Live(service, connection)
        try:
            if len(service.lives) >= options.max_live:
                raise ApiError(429, "too many live streams; try again later", code="queue_full")
            service.lives.add(session)
            metrics.live.set(len(service.lives))
            await session.run()
            await connection.close()
        except WebSocketDisconnect:
            pass
        except Exception as error:
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the client may have gone
                await connection.send_json({"type": "error", **told_in_the_answer(error).body()})
                await connection.close(1008)
        finally:
            service.lives.discard(session)
            metrics.live.set(len(service.lives))

    # the page's own paths only: what is not there is a 404, also for a POST
    for file in sorted(PAGE.iterdir()):
        for path in {f"/{file.name}", "/"} if file.name == "index.html" else {f"/{file.name}"}:
            app.add_api_route(path, partial(page_file, file), methods=["GET", "HEAD"], include_in_schema=False)
    return app


async def page_file(file: Path) -> FileResponse:
    return FileResponse(file)


def load_models(names: tuple[str, ...], device: str | None) -> dict[str, Whisper]:
    """Models by the name that clients use: NAME of NAME=PATH, else a path's stem."""
    models: dict[str, Whisper] = {}
    for given in names:
        label, _, path = given.rpartition("=")
        label = label or Path(path).name.removesuffix(".pt").removesuffix(".safetensors")
        if label in models:
            raise OptionError(f"two models are named {label!r}; name them with --model NAME={path}")
        models[label] = load_model(path, device)
    return models


class Patient(H11Protocol):
    """Closes a connection whose next request's head has not come after IDLE seconds, or whose last body goes on.

    uvicorn waits for ever as long as something drips in.
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
        self.timer = self.loop.call_later(IDLE, self.expired)

    def expired(self) -> None:
        if self in self.connections and (self.cycle is None or self.cycle.response_complete):  # else a WebSocket's
            self.transport.close()


class Server(uvicorn.Server):
    """Ends live streams with their last words before the connections are closed."""

    def __init__(self, app: FastAPI, options: ServerOptions):
        self.lives = app.state.service.lives
        super().__init__(
            uvicorn.Config(
                app,
                host=options.host,
                port=options.port,
                log_level="warning",
                http=Patient,
                timeout_graceful_shutdown=math.ceil(options.timeout),
                ws_max_size=2**20,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        until = time.monotonic() + IDLE
        while self.lives and time.monotonic() < until:
            for session in self.lives:
                session.end()
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)


def serve(options: ServerOptions) -> None:
    """Load the models and serve until SIGTERM or Ctrl-C; requests that run then are finished first."""
    options = replace(options, api_key=options.api_key or os.environ.get("DAWHISPER_API_KEY") or None)
    if options.threads:
        torch.set_num_threads(options.threads)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every malformed request
    models = load_models(options.models, options.device)
    # each live stream has a place of its own
    engine = Engine(models, options.batch_size, options.max_queue + options.max_live)
    for model in models.values():
        with contextlib.suppress(QueueFull):  # the first request is slower then
            engine.submit(partial(warm_up, model))
    try:
        app = create_app(engine, options)
    except OptionError:
        engine.close()
        raise
    server = Server(app, options)
    try:
        sockets = [server.config.bind_socket()]
    except SystemExit:
        engine.close()
        raise OptionError(f"can't listen on {options.host}:{options.port}; is the port in use? Try --port") from None
    sockets[0].listen()  # who reads the next line may connect
    host, port = sockets[0].getsockname()[:2]
    print(f"dawhisper serves {', '.join(models)} at http://{host}:{port}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=sockets)
