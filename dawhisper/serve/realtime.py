"""OpenAI's realtime API for transcription sessions, a WebSocket at /v1/realtime: events in JSON, both ways.

The client appends audio in base64, and a turn ends where nobody speaks any more (server_vad), or where the client
commits it (turn_detection null). A turn is an item: its words come as deltas as soon as they are final, while it is
spoken, and at its end the completed transcript. Both shapes of the session are taken, `session.update`'s and the beta's
flat `transcription_session.update`; what is not offered is an error event, after which the session goes on.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from fastapi import WebSocket
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dawhisper.audio import SAMPLE_RATE

from .answers import finite, token_logprobs
from .errors import ApiError, told_in_the_answer
from .forms import MOST_PROMPT
from .live import BACKLOG, Session, parsed
from .service import Service, checked_language
from .stream import PIECE, LiveWord, Stream, StreamOptions, Update, text_of

KEY_PROTOCOL = "openai-insecure-api-key."  # how a browser, which can send no header, gives its key
SHORTEST_TURN = 0.1  # seconds that can be committed, as OpenAI's
COMMIT_EMPTY = "input_audio_buffer_commit_empty"
TRANSCRIPTION = "conversation.item.input_audio_transcription"
EVENTS = (
    "session.update, transcription_session.update, input_audio_buffer.append, input_audio_buffer.commit and "
    "input_audio_buffer.clear"
)
BETA = {  # the flat session's field -> where it stands now
    "input_audio_format": "format",
    "input_audio_transcription": "transcription",
    "input_audio_noise_reduction": "noise_reduction",
    "turn_detection": "turn_detection",
}
BETA_FORMATS: dict[str, dict[str, Any]] = {
    "pcm16": {"type": "audio/pcm", "rate": 24000},
    "g711_ulaw": {"type": "audio/pcmu"},
    "g711_alaw": {"type": "audio/pcma"},
}


# -------------------------------------------------------------------------------------------------------- settings


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Format(Part):
    """Samples as they come: 16 bit little-endian at a rate, OpenAI's 24 kHz by default, or G.711 at 8 kHz."""

    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"]
    rate: int | None = Field(default=None, ge=8000, le=48000)

    @property
    def hertz(self) -> int:
        return (self.rate or 24000) if self.type == "audio/pcm" else 8000


class Transcription(Part):
    """What is to be recognised; model None is the first one."""

    model: str | None = None
    language: str | None = None
    prompt: str | None = Field(default=None, max_length=MOST_PROMPT)


class TurnDetection(Part):
    """A pause ends a turn. No response is ever made, so whether to make one or to interrupt it means nothing."""

    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(default=0.5, gt=0, lt=1)
    prefix_padding_ms: int = Field(default=300, ge=0, le=5000)
    silence_duration_ms: int = Field(default=500, ge=200, le=5000)
    create_response: bool | None = None
    interrupt_response: bool | None = None


class AudioInput(Part):
    format: Format = Format(type="audio/pcm", rate=24000)
    noise_reduction: None = None
    transcription: Transcription = Transcription()
    turn_detection: TurnDetection | None = TurnDetection()


class Audio(Part):
    input: AudioInput = AudioInput()


class SessionSettings(Part):
    """OpenAI's session object, as far as it is offered."""

    type: Literal["transcription"] = "transcription"
    audio: Audio = Audio()
    include: list[Literal["item.input_audio_transcription.logprobs"]] | None = None

    def updated(self, given: dict[str, Any]) -> SessionSettings:
        """With the fields that are given; ApiError where one is wrong or not offered."""
        try:
            return SessionSettings.model_validate(deep_merged(self.model_dump(), given))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(("session", *map(str, first["loc"])))
            code = "unsupported_parameter" if first["type"] in ("extra_forbidden", "literal_error") else None
            raise ApiError(400, f"{name} is not offered so: {first['msg']}", name, code) from None


def deep_merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old settings with the new ones in their place; a format is given as a whole."""
    both = old | new
    for name in old.keys() & new.keys() - {"format"}:
        if isinstance(old[name], dict) and isinstance(new[name], dict):
            both[name] = deep_merged(old[name], new[name])
    return both


def from_beta(given: dict[str, Any]) -> dict[str, Any]:
    """The flat session of the beta, in today's shape."""
    given = {**given}
    name = given.get("input_audio_format")
    if name is not None:
        if name not in BETA_FORMATS:
            raise ApiError(400, f"input_audio_format is one of {', '.join(BETA_FORMATS)}", "session.input_audio_format")
        given["input_audio_format"] = BETA_FORMATS[name]
    inputs = {new: given.pop(old) for old, new in BETA.items() if old in given}
    return given | {"audio": {"input": inputs}}


def as_beta(settings: SessionSettings) -> dict[str, Any]:
    inputs = settings.model_dump()["audio"]["input"]
    names = {kind["type"]: name for name, kind in BETA_FORMATS.items()}
    return {old: inputs[new] for old, new in BETA.items()} | {"input_audio_format": names[inputs["format"]["type"]]}


# ----------------------------------------------------------------------------------------------------------- audio


class Decoder:
    """Appended bytes in the session's format -> float samples [n] at 16 kHz; a cut may fall into a sample."""

    def __init__(self, given: Format):
        names = {"audio/pcm": "pcm_s16le", "audio/pcmu": "pcm_mulaw", "audio/pcma": "pcm_alaw"}
        self.codec = cast(AudioCodecContext, av.CodecContext.create(names[given.type], "r"))
        self.codec.sample_rate = given.hertz
        self.codec.layout = "mono"
        self.size = 2 if given.type == "audio/pcm" else 1
        self.resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
        self.rest = b""  # half a sample

    def add(self, data: bytes) -> np.ndarray:
        data = self.rest + data
        whole = len(data) // self.size * self.size
        self.rest = data[whole:]
        frames = self.codec.decode(av.Packet(data[:whole])) if whole else []
        return self._joined([out for frame in frames for out in self.resampler.resample(frame)])

    def flush(self) -> np.ndarray:
        """The few samples that the resampler still holds."""
        self.resampler, last = av.AudioResampler("flt", "mono", SAMPLE_RATE), self.resampler
        try:
            return self._joined(last.resample(None))
        except ValueError:  # nothing was put in
            return self._joined([])

    @staticmethod
    def _joined(frames: list[av.AudioFrame]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.float32), *(frame.to_ndarray()[0] for frame in frames)])


# --------------------------------------------------------------------------------------------------------- session


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"


@dataclass
class Item:
    """A turn: where in the session it starts (seconds), and what was said so far."""

    start: float
    id: str = field(default_factory=lambda: new_id("item"))
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    announced: bool = False  # that somebody speaks

    def add(self, said: str) -> str:
        """What the client is to append for these words."""
        said = said if self.text else said.lstrip()
        self.text += said
        return said


class Realtime(Session):
    """A transcription session. The reader changes the settings at once; what is heard with them follows in order."""

    COMMIT, CLEAR = object(), object()

    def __init__(self, service: Service, socket: WebSocket):
        super().__init__(service, socket)
        self.protocols = [name.strip() for name in socket.headers.get("sec-websocket-protocol", "").split(",")]
        beta = "openai-beta.realtime-v1" in self.protocols
        self.is_beta = beta or "realtime=v1" in socket.headers.get("openai-beta", "")
        self.id = new_id("sess")
        self.settings = SessionSettings()
        self.decoder = Decoder(self.settings.audio.input.format)
        self.appended = self.committed = 0.0  # seconds of the session's audio that have come, and up to the last commit
        self.origin = 0.0  # seconds of the session before the stream
        self.stream: Stream | None = None
        self.item = Item(0.0)
        self.previous: str | None = None  # the last item

    @property
    def key(self) -> str | None:
        """The client's, from its header or, for a browser, its protocols."""
        scheme, _, key = self.socket.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return key
        return next((p.removeprefix(KEY_PROTOCOL) for p in self.protocols if p.startswith(KEY_PROTOCOL)), None)

    async def send(self, kind: str, **fields: Any) -> None:
        await self.socket.send_json(finite({"event_id": new_id("event"), "type": kind, **fields}))

    async def say(self, error: ApiError, cause: str | None = None) -> None:
        await self.send("error", error={**error.body()["error"], "event_id": cause})

    async def tell_settings(self, what: str) -> None:
        kind = "transcription_session" if self.is_beta else "session"
        session = as_beta(self.settings) if self.is_beta else self.settings.model_dump()
        about = {"id": self.id, "object": "realtime.transcription_session"}
        await self.send(f"{kind}.{what}", session=about | session)

    async def run(self) -> None:
        name = self.socket.query_params.get("model")
        if self.socket.query_params.get("intent", "transcription") != "transcription":
            raise ApiError(400, "there are transcription sessions only; connect with ?intent=transcription", "intent")
        self.change({"audio": {"input": {"transcription": {"model": name}}}})
        await self.tell_settings("created")
        async with self.listening():
            await self.listen()

    # what the client sends

    async def read(self) -> None:
        while True:
            message = await self.receive(self.service.options.timeout)
            cause = None
            try:
                event = parsed(message if isinstance(message, str) else "")
                cause = str(event["event_id"])[:200] if event.get("event_id") else None
                await self.obey(event)
            except ApiError as error:
                await self.say(error, cause)
            while self.inbox.seconds > BACKLOG:  # the client's sending waits for us
                await asyncio.sleep(0.05)

    async def obey(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        if kind in ("session.update", "transcription_session.update"):
            given = event.get("session")
            if not isinstance(given, dict):
                raise ApiError(400, "session is an object", "session")
            self.is_beta = kind == "transcription_session.update"
            self.change(from_beta(given) if self.is_beta else given)
            await self.tell_settings("updated")
        elif kind == "input_audio_buffer.append":
            try:
                samples = self.decoder.add(base64.b64decode(event.get("audio", ""), validate=True))
            except (binascii.Error, TypeError, ValueError):
                raise ApiError(400, "audio is a base64 string", "audio") from None
            self.take_in(samples)
        elif kind == "input_audio_buffer.commit":
            self.take_in(self.decoder.flush())
            if self.appended - self.committed < SHORTEST_TURN:
                came = 1000 * max(0.0, self.appended - self.committed)
                held = f"at least {1000 * SHORTEST_TURN:.0f} ms are needed, {came:.0f} ms have come"
                raise ApiError(400, f"there is too little audio to commit: {held}", code=COMMIT_EMPTY)
            self.committed = self.appended
            self.inbox.put(self.COMMIT)
        elif kind == "input_audio_buffer.clear":
            self.take_in(self.decoder.flush())
            self.committed = self.appended
            self.inbox.put(self.CLEAR)
        else:
            raise ApiError(400, f"type is one of {EVENTS}, not {str(kind)[:80]!r}", "type", "invalid_event")

    def take_in(self, samples: np.ndarray) -> None:
        self.appended += len(samples) / SAMPLE_RATE
        self.inbox.put(samples)

    def change(self, given: dict[str, Any]) -> None:
        """The settings from now on."""
        settings = self.settings.updated(given)
        self.stream_options(settings)
        if settings.audio.input.format != self.settings.audio.input.format:
            self.take_in(self.decoder.flush())
            self.decoder = Decoder(settings.audio.input.format)
        self.settings = settings
        self.inbox.put(settings)

    def stream_options(self, settings: SessionSettings) -> tuple[str, StreamOptions]:
        """The model's name, and how it is to listen; ApiError where there is no such model or language."""
        asked, turns = settings.audio.input.transcription, settings.audio.input.turn_detection
        name = self.service.model_named(asked.model or "whisper-1")
        language = checked_language(name, self.service.engine.models[name], asked.language, "transcribe")
        if turns is None:
            return name, StreamOptions(language=language, initial_prompt=asked.prompt)
        silence = turns.silence_duration_ms / 1000
        return name, StreamOptions(
            language=language, initial_prompt=asked.prompt, silence=silence, threshold=turns.threshold
        )

    # what it gets

    @property
    def now(self) -> float:
        """Seconds of the session's audio that were heard."""
        return self.origin + (self.stream.now if self.stream else 0.0)

    def begin_anew(self) -> None:
        """Forget what was heard and said, but not the time."""
        self.origin, self.stream = self.now, None
        self.item = Item(self.origin)

    async def listen(self) -> None:
        command: object = None
        settings = heard_with = self.settings
        while command is not self.END:
            turns = settings.audio.input.turn_detection
            idle = self.stream is None or (self.stream.turn is None and not self.item.text)
            name, options = self.stream_options(settings)
            if self.stream is None or (idle and settings != heard_with):
                self.begin_anew()
                self.stream, heard_with = Stream(self.service.engine.models[name], options), settings
            # a pause is looked for at the end of what is heard, so that little of it is heard at once
            most = round((options.step if turns else PIECE) * SAMPLE_RATE)
            samples, command = await self.inbox.take(min(self.stream.wanted, most), most)
            if command is self.END:
                self.raise_what_went_wrong()
            self.service.metrics.audio.labels(name).inc(len(samples) / SAMPLE_RATE)
            try:
                update = await self.heard(self.stream, samples, last=command in (self.COMMIT, self.END))
            except Exception as error:  # of this turn alone
                said = told_in_the_answer(error).body()["error"]
                await self.send(f"{TRANSCRIPTION}.failed", item_id=self.item.id, content_index=0, error=said)
                self.begin_anew()
            else:
                await self.tell(update, turns, committed=command is self.COMMIT)
            if command is self.CLEAR:
                self.begin_anew()
                await self.send("input_audio_buffer.cleared")
            elif isinstance(command, SessionSettings):
                settings = command
        if self.item.text:  # the server ends
            await self.complete(self.item)

    async def tell(self, update: Update, turns: TurnDetection | None, committed: bool) -> None:
        """The events of an update."""
        item, start = self.item, update.speech_start
        if turns and start is not None and not item.announced:
            item.announced = True
            milliseconds = max(0, round(1000 * (self.origin + start)) - turns.prefix_padding_ms)
            await self.send("input_audio_buffer.speech_started", audio_start_ms=milliseconds, item_id=item.id)
        if delta := item.add(text_of(update.words)):
            places = {"item_id": item.id, "content_index": 0}
            await self.send(f"{TRANSCRIPTION}.delta", **places, delta=delta, **self.logprobs(update.words))
        if item.announced and update.end_of_turn and not committed:
            await self.send("input_audio_buffer.speech_stopped", audio_end_ms=round(1000 * self.now), item_id=item.id)
            committed = True
        if committed:
            await self.complete(item)

    def logprobs(self, words: list[LiveWord]) -> dict[str, Any]:
        """Of these words, where they were asked for; the item keeps them."""
        if not self.settings.include or not self.stream:
            return {}
        pairs = [pair for word in words for pair in zip(word.tokens, word.logprobs or [])]
        made = token_logprobs(self.stream.model, pairs)
        self.item.logprobs += made
        return {"logprobs": made}

    async def complete(self, item: Item) -> None:
        """The turn is an item of the conversation now, with its transcript."""
        places = {"item_id": item.id, "content_index": 0}
        logprobs = {"logprobs": item.logprobs} if self.settings.include else {}
        message = {"id": item.id, "object": "realtime.item", "type": "message", "status": "completed", "role": "user"}
        content = [{"type": "input_audio", "transcript": None}]
        added = "conversation.item.created" if self.is_beta else "conversation.item.added"
        usage = {"type": "duration", "seconds": round(self.now - item.start, 2)}
        await self.send("input_audio_buffer.committed", item_id=item.id, previous_item_id=self.previous)
        await self.send(added, previous_item_id=self.previous, item={**message, "content": content})
        await self.send(f"{TRANSCRIPTION}.completed", **places, transcript=item.text.strip(), usage=usage, **logprobs)
        self.previous, self.item = item.id, Item(self.now)
        self.committed = max(self.committed, self.now)
