"""What the routes share: the engine, and who may use it."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING

import numpy as np

from dawhisper.decoding import asked_language
from dawhisper.errors import OptionError, one_line
from dawhisper.model import Whisper
from dawhisper.speakers import Diarizer, Turn

from .errors import ApiError
from .metrics import Metrics
from .options import ServerOptions
from .worker import Engine, QueueFull

if TYPE_CHECKING:
    from .live import Session


class Service:
    """The engine with its limits and its metrics, and what tells who speaks, if anything does."""

    def __init__(self, engine: Engine, options: ServerOptions, metrics: Metrics, diarizer: Diarizer | None = None):
        self.engine, self.options, self.metrics, self.diarizer = engine, options, metrics, diarizer
        self.aliases = options.names(engine.models)
        self.active = 0
        self.lives: set[Session] = set()
        self.decoding = asyncio.Semaphore(2)  # recordings decoded at once: each holds its samples
        self.diarizing = asyncio.Lock()

    def model_named(self, name: str) -> str:
        models = self.engine.models
        name = self.aliases.get(name, name)
        if name not in models:
            message = f"the model {name[:80]!r} does not exist; there are {', '.join(models)}"
            raise ApiError(404, message, "model", "model_not_found")
        return name

    async def turns_of(self, samples: np.ndarray) -> list[Turn]:
        """Who speaks when, one recording after the other; the speakers are A, B, ... in the order in which they begin.

        ApiError where that fails.
        """
        assert self.diarizer is not None  # forms.py refuses such a request
        async with self.diarizing:
            try:
                turns = await asyncio.to_thread(lambda diarize: [*diarize(samples)], self.diarizer)
            except Exception as error:  # another package's
                raise ApiError(500, f"who speaks can't be told: {one_line(error)}") from error
        turns.sort(key=attrgetter("start"))
        letters = {speaker: letters_of(n) for n, speaker in enumerate(dict.fromkeys(turn.speaker for turn in turns))}
        return [replace(turn, speaker=letters[turn.speaker]) for turn in turns]

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """A request's place; QueueFull where there is none."""
        if self.active >= self.options.max_queue:
            raise QueueFull
        self.active += 1
        self.metrics.active.set(self.active)
        try:
            yield
        finally:
            self.active -= 1
            self.metrics.active.set(self.active)

    @contextlib.contextmanager
    def attended(self, session: Session) -> Iterator[None]:
        """A live stream's place; ApiError where there is none."""
        if len(self.lives) >= self.options.max_live:
            raise ApiError(429, "too many live streams; try again later", code="queue_full")
        self.lives.add(session)
        self.metrics.live.set(len(self.lives))
        try:
            yield
        finally:
            self.lives.discard(session)
            self.metrics.live.set(len(self.lives))

    def authorize(self, key: str | None) -> None:
        wanted = self.options.api_key
        if wanted is not None and not hmac.compare_digest(
            *(k.encode(errors="surrogatepass") for k in (key or "", wanted))
        ):
            raise ApiError(401, "no or wrong API key; send Authorization: Bearer KEY", code="invalid_api_key")


def letters_of(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    return (letters_of(number // 26 - 1) if number >= 26 else "") + chr(ord("A") + number % 26)


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
