"""The application: which path does what, around a running engine.

POST /v1/audio/transcriptions, /v1/audio/translations; GET /v1/models, /health, /metrics, /docs and a page on /;
WebSockets /v1/realtime, as OpenAI's, and /v1/audio/live, our own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import prometheus_client as prometheus
from fastapi import Depends, FastAPI, Request, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from whisper.tokenizer import LANGUAGES

import dawhisper
from dawhisper.errors import DawhisperError
from dawhisper.speakers import Diarizer

from .answers import STREAM_HEADERS, events, formatted, wait_for
from .errors import ApiError, as_api_error
from .forms import DESCRIBED, read
from .limits import Guard
from .live import Live, attend, may_connect
from .metrics import Metrics
from .options import ServerOptions
from .realtime import Realtime
from .service import Service
from .worker import Engine, QueueFull, Stopped, TranscriptionTask

PAGE = Path(__file__).parent / "page"
Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]


def create_app(
    engine: Engine, options: ServerOptions, metrics: Metrics | None = None, diarizer: Diarizer | None = None
) -> FastAPI:
    """The application around a running engine, which it closes at its end."""
    metrics = metrics or Metrics()
    service = Service(engine, options, metrics, diarizer)
    engine.on_batch = metrics.begun

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="dawhisper",
        version=dawhisper.__version__,
        description="OpenAI's audio API. Live audio goes to a WebSocket: /v1/realtime as OpenAI's, or /v1/audio/live.",
        lifespan=lifespan,
        docs_url=None,  # Swagger's files come from a CDN; page/docs.html needs nothing from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Guard, options=options, metrics=metrics)
    if options.allow_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.allow_origin, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    add_errors(app)
    add_audio(app, service)
    add_models(app, service)
    add_state(app, service)
    add_live(app, service)
    add_pages(app)
    return app


def with_key(service: Service) -> list[Any]:
    async def authorized(bearer: Bearer) -> None:
        service.authorize(bearer.credentials if bearer else None)

    return [Depends(authorized)]


def add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = "not_found" if error.status_code == 404 else None
        response = ApiError(error.status_code, str(error.detail), code=code).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()


def add_audio(app: FastAPI, service: Service) -> None:
    @app.post("/v1/audio/transcriptions", dependencies=with_key(service), openapi_extra=DESCRIBED)
    async def transcriptions(request: Request) -> Response:
        """The text of a recording."""
        return await answer(request, service, "transcribe")

    @app.post("/v1/audio/translations", dependencies=with_key(service), openapi_extra=DESCRIBED)
    async def translations(request: Request) -> Response:
        """The text of a recording, in English."""
        return await answer(request, service, "translate")


async def answer(request: Request, service: Service, task: str) -> Response:
    """A recording's transcription, or what is wrong with the request."""
    began, options = time.monotonic(), service.options
    with contextlib.ExitStack() as admission:
        try:
            admission.enter_context(service.admitted())
            length = request.headers.get("content-length", "0")
            if length.isdigit() and int(length) > options.max_upload * 1e6:
                raise ApiError(413, f"the upload is larger than {options.max_upload:g} MB", "file", "too_large")
            asked = await asyncio.wait_for(read(request, service, task), options.timeout)
            left = options.timeout - (time.monotonic() - began)
            if asked.stream:
                return EventSourceResponse(events(service, asked, admission.pop_all(), left), headers=STREAM_HEADERS)
            clip = TranscriptionTask(asked.model, asked.samples, asked.options)
            result = await wait_for(service.engine.submit(clip), clip, request, left)
            return formatted(service, asked, result)
        except (ApiError, DawhisperError, QueueFull, Stopped, asyncio.TimeoutError) as error:
            return as_api_error(error).response()
        except HTTPException as error:
            return ApiError(error.status_code, str(error.detail), "file").response()
        except ClientDisconnect:  # nobody reads the answer
            return Response(status_code=499)


def add_models(app: FastAPI, service: Service) -> None:
    engine, started = service.engine, int(time.time())

    def model_card(name: str) -> dict[str, Any]:
        model = engine.models[name]
        card = {"id": name, "object": "model", "created": started, "owned_by": "dawhisper"}
        codes = list(LANGUAGES)[: model.num_languages] if model.is_multilingual else ["en"]
        languages = {code: LANGUAGES[code].title() for code in codes}
        return card | {"dual": model.dual is not None, "multilingual": model.is_multilingual, "languages": languages}

    @app.head("/v1/models", include_in_schema=False, dependencies=with_key(service))
    @app.get("/v1/models", dependencies=with_key(service))
    async def models() -> Response:
        """The models that are served."""
        return JSONResponse({"object": "list", "data": [model_card(name) for name in engine.models]})

    @app.head("/v1/models/{name}", include_in_schema=False, dependencies=with_key(service))
    @app.get("/v1/models/{name}", dependencies=with_key(service))
    async def one_model(name: str) -> Response:
        """A model, by its name or another name of it."""
        return JSONResponse(model_card(service.model_named(name)))


def add_state(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> Response:
        """Whether the worker lives, and how many requests wait for it."""
        status = {
            "status": "ok" if engine.alive else "failed",
            "models": list(engine.models),
            "waiting": engine.waiting,
        }
        return JSONResponse(status, 200 if engine.alive else 503)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics")
    async def metrics_page() -> Response:
        """Counts and times, as Prometheus reads them."""
        return Response(service.metrics.page(), media_type=prometheus.CONTENT_TYPE_LATEST)


def add_live(app: FastAPI, service: Service) -> None:
    @app.websocket("/v1/audio/live")
    async def live(socket: WebSocket) -> None:
        if not may_connect(socket.headers, service.options.allow_origin):
            await socket.close(1008)
            return
        await socket.accept()
        await attend(Live(service, socket))

    @app.websocket("/v1/realtime")
    async def realtime(socket: WebSocket) -> None:
        if not may_connect(socket.headers, service.options.allow_origin):
            await socket.close(1008)
            return
        session = Realtime(service, socket)
        try:
            service.authorize(session.key)
        except ApiError as error:
            await socket.send_denial_response(error.response())
            return
        await socket.accept("realtime" if "realtime" in session.protocols else None)
        await attend(session)


def add_pages(app: FastAPI) -> None:
    """The pages' own paths only: what is not there is a 404, also for a POST."""
    for file in sorted(PAGE.iterdir()):
        paths = [f"/{file.name}", *{"index.html": ["/"], "docs.html": ["/docs"]}.get(file.name, [])]
        for path in paths:
            app.add_api_route(path, partial(page_file, file), methods=["GET", "HEAD"], include_in_schema=False)


async def page_file(file: Path) -> FileResponse:
    return FileResponse(file)
