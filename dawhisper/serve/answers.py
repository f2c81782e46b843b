"""A transcription as OpenAI's answers: JSON, text, subtitles, or server-sent events while it is made."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import math
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from whisper.tokenizer import LANGUAGES

from dawhisper.audio import SAMPLE_RATE
from dawhisper.decoding import model_tokenizer
from dawhisper.model import Whisper
from dawhisper.speakers import Turn, each_speaker, spoken_by
from dawhisper.transcription import Segment, Transcription
from dawhisper.writers import WRITERS

from .errors import told_in_the_answer
from .forms import Asked
from .service import Service
from .worker import TranscriptionTask

KEEP_ALIVE = 15.0  # seconds without an event after which a comment keeps proxies from giving up
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold events back


def formatted(service: Service, asked: Asked, result: Transcription) -> Response:
    """The answer in the format that was asked for."""
    duration = round(len(asked.samples) / SAMPLE_RATE, 2)
    if asked.response_format == "text":
        return PlainTextResponse(result.text.strip() + "\n")
    if asked.response_format in ("srt", "vtt"):
        out = io.StringIO()
        WRITERS[asked.response_format]("").write_result(result.to_dict(), file=out, options={})
        kind = "application/x-subrip" if asked.response_format == "srt" else "text/vtt"
        return Response(out.getvalue(), media_type=f"{kind}; charset=utf-8")
    body: dict[str, Any] = {"text": result.text.strip(), "usage": usage(asked)}
    if asked.logprobs:
        body["logprobs"] = logprobs_of(service, asked, result.segments)
    if asked.turns is not None:
        pieces = [piece for segment in result.segments for piece in pieces_of(segment, asked.turns)]
        body |= {"task": asked.options.decoding.task, "duration": duration, "segments": pieces}
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


def usage(asked: Asked) -> dict[str, Any]:
    """What OpenAI would charge for."""
    return {"type": "duration", "seconds": math.ceil(round(len(asked.samples) / SAMPLE_RATE, 2))}


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


def pieces_of(segment: Segment, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A segment as OpenAI's of diarized_json: what each speaker says of it."""
    return [
        {
            "type": "transcript.text.segment",
            "id": f"seg_{segment.id}_{number}",
            "start": float(piece.start),
            "end": float(piece.end),
            "text": piece.text,
            "speaker": piece.speaker,
        }
        for number, piece in enumerate(each_speaker(spoken_by(segment, turns)))
    ]


def logprobs_of(service: Service, asked: Asked, segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """The text's tokens with their log probabilities, as OpenAI has them."""
    pairs = [pair for segment in segments for pair in zip(segment.tokens, segment.logprobs or [])]
    return token_logprobs(service.engine.models[asked.model], pairs)


def token_logprobs(model: Whisper, pairs: Iterable[tuple[int, float]]) -> list[dict[str, Any]]:
    """Tokens of text with their log probabilities; timestamps are left out.

    A letter may be spread over several tokens, whose bytes alone tell it: they are always given.
    """
    tokenizer = model_tokenizer(model)
    made = []
    for token, logprob in pairs:
        if token < tokenizer.eot:
            data = tokenizer.encoding.decode_single_token_bytes(token)
            made.append({"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)})
    return made


def finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def event(body: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(finite(body), ensure_ascii=False))


async def events(
    service: Service, asked: Asked, admission: contextlib.ExitStack, seconds: float
) -> AsyncIterator[bytes]:
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
            while True:
                left = deadline - time.monotonic()
                try:
                    segment = await asyncio.wait_for(told.get(), min(left, KEEP_ALIVE))
                except asyncio.TimeoutError:
                    if left <= KEEP_ALIVE:
                        raise
                    yield KEEPALIVE_COMMENT
                    continue
                if segment is None:
                    break
                for body in segment_events(service, asked, segment):
                    yield event(body)
            yield event(done_event(service, asked, future.result()))
        except Exception as error:  # the status line is sent already
            yield event(told_in_the_answer(error).body())
        finally:
            clip.stop()


def segment_events(service: Service, asked: Asked, segment: Segment) -> list[dict[str, Any]]:
    if not segment.text:
        return []
    if asked.turns is not None:
        pieces = pieces_of(segment, asked.turns)
        delta = [{"type": "transcript.text.delta", "delta": p["text"], "segment_id": p["id"]} for p in pieces]
        return [made for pair in zip(delta, pieces) for made in pair]
    made: list[dict[str, Any]] = [{"type": "transcript.text.delta", "delta": segment.text}]
    if asked.logprobs:
        made[0]["logprobs"] = logprobs_of(service, asked, [segment])
    if asked.granularities:
        times = {"id": str(segment.id), "start": float(segment.start), "end": float(segment.end)}
        words = {"words": words_of(segment, asked.gates)} if "word" in asked.granularities else {}
        made.append({"type": "transcript.text.segment", **times, "text": segment.text, **words})
    return made


def done_event(service: Service, asked: Asked, result: Transcription) -> dict[str, Any]:
    language = LANGUAGES.get(result.language, result.language).title()
    made = {"type": "transcript.text.done", "text": result.text.strip(), "language": language, "usage": usage(asked)}
    return made | ({"logprobs": logprobs_of(service, asked, result.segments)} if asked.logprobs else {})
