"""`dawhisper serve`: the models, the application around them, and the process that serves it to its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI

from dawhisper.checkpoint import load_model
from dawhisper.errors import OptionError
from dawhisper.model import Whisper
from dawhisper.speakers import pyannote_diarizer

from .app import create_app
from .limits import Patient
from .options import ServerOptions
from .stream import warm_up
from .worker import Engine, QueueFull

LAST_WORDS = 20.0  # seconds that live streams have at the end
MOST_MESSAGE = 16 * 2**20  # bytes of a WebSocket's message: OpenAI takes 15 MiB of audio in one


def load_models(names: tuple[str, ...], device: str | None, dtype: str = "auto") -> dict[str, Whisper]:
    """Models by the name that clients use: NAME of NAME=PATH, else a path's stem."""
    models: dict[str, Whisper] = {}
    for given in names:
        label, _, path = given.rpartition("=")
        label = label or Path(path).name.removesuffix(".pt").removesuffix(".safetensors")
        if label in models:
            raise OptionError(f"two models are named {label!r}; name them with --model NAME={path}")
        models[label] = load_model(path, device, dtype)
    return models


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
                timeout_keep_alive=math.ceil(options.idle_timeout),
                timeout_graceful_shutdown=math.ceil(options.timeout),
                ws_max_size=MOST_MESSAGE,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        until = time.monotonic() + LAST_WORDS
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
    # each live stream has a place of its own
    engine = Engine({}, options.batch_size, options.max_queue + options.max_live)
    try:
        # in the thread that decodes: had another one computed in parallel before it, OpenMP would let each core sleep
        # between two operations, which makes decoding on two cores 1.4 times as long
        models = engine.submit(partial(load_models, options.models, options.device, options.dtype)).result()
        engine.models.update(models)
        device = next(iter(models.values())).device
        diarizer = pyannote_diarizer(options.hf_token, device) if options.diarize else None
        for model in models.values():
            with contextlib.suppress(QueueFull):  # the first request is slower then
                engine.submit(partial(warm_up, model))
        app = create_app(engine, options, diarizer=diarizer)
    except Exception:
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
