"""A request's form -> what it asks for, checked, and its recording, decoded.

Uploads are held in memory, or by the multipart parser in unnamed temporary files, and no name of theirs is ever opened.
"""

from __future__ import annotations

import asyncio
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from fastapi import Request
from starlette.datastructures import MutableHeaders, UploadFile

from dawhisper.audio import SAMPLE_RATE, load_audio
from dawhisper.speakers import Turn
from dawhisper.transcription import TranscribeOptions

from .errors import ApiError
from .service import Service, checked_language

MULTIPART = "multipart/form-data"
FIELDS = {
    "model": "a name that /v1/models lists; the first one by default",
    "language": "code or English name of the language spoken; found out by default",
    "prompt": "text before the first word: names, spelling, style",
    "hotwords": "names and terms to listen for, with commas (not one of OpenAI's fields)",
    "response_format": "json, text, srt, verbose_json, vtt, or diarized_json, which tells who speaks",
    "temperature": "0 to 1; 0 tries higher ones where the text is doubtful",
    "timestamp_granularities": "segment, word; with verbose_json or stream",
    "stream": "true: server-sent events",
    "include": "logprobs, of each token, with json or stream; gate: words carry their probability and the share of the "
    "speech branch",
    "chunking_strategy": "auto: long recordings are always cut here",
}
OFFERED = {"include": ("logprobs", "gate"), "chunking_strategy": ("auto",)}  # of what OpenAI has there
INDEX = re.compile(r"\[\d*\]$")  # of a list's field: NAME[] or NAME[0]
FORMATS = ("json", "text", "srt", "verbose_json", "vtt", "diarized_json")
GRANULARITIES = ("segment", "word")
MOST_PROMPT = 4000  # characters, of hotwords too
DESCRIBED = {  # for /docs
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {
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
class Asked:
    """A checked request; samples [n] at 16 kHz. turns: who speaks when, None where that was not asked for."""

    model: str
    samples: np.ndarray
    options: TranscribeOptions
    response_format: str
    granularities: frozenset[str]
    stream: bool
    gates: bool
    logprobs: bool
    turns: Sequence[Turn] | None = None


async def read(request: Request, service: Service, task: str) -> Asked:
    """The form of a request, checked, and its recording; ApiError or AudioError where one is wrong."""
    kind, semicolon, boundary = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != MULTIPART:
        raise ApiError(400, f"send {MULTIPART} with a file", "file")
    headers = MutableHeaders(raw=list(request.scope["headers"]))
    headers["content-type"] = f"{MULTIPART}{semicolon}{boundary}"  # Python 3.10's newest parser knows no other case
    request = Request({**request.scope, "headers": headers.raw}, request.receive)
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
        asked = checked_form(values, service, task)
        data = io.BytesIO(await upload.read())
        data.name = Path(upload.filename or "file").name[:80]  # for messages only
    if not data.getbuffer().nbytes:
        raise ApiError(400, "the file is empty", "file", "invalid_audio")
    async with service.decoding:
        samples = await asyncio.to_thread(decode_upload, data, service.options.max_audio)
    turns = await service.turns_of(samples) if asked.response_format == "diarized_json" else None
    service.metrics.audio.labels(asked.model).inc(len(samples) / SAMPLE_RATE)
    return replace(asked, samples=samples, turns=turns)


def decode_upload(data: io.BytesIO, longest: float) -> np.ndarray:
    """Samples of up to `longest` seconds."""
    samples = load_audio(data, end=longest + 1)
    if len(samples) > longest * SAMPLE_RATE:
        raise ApiError(413, f"the recording is longer than {longest:g} s; send parts of it", "file", "too_long")
    return samples


def checked_form(values: Mapping[str, list[str]], service: Service, task: str) -> Asked:
    """A request without its recording, from the form's text fields."""

    def one(name: str, default: str = "") -> str:
        return values.get(name, [default])[-1].strip()

    for field in values:
        if field not in FIELDS:
            message = f"the option {field[:40]!r} is not offered; there are file, {', '.join(FIELDS)}"
            raise ApiError(400, message, field[:40], "unsupported_parameter")
    for field, offered in OFFERED.items():
        for value in values.get(field, []):
            if value not in offered:
                message = f"{field} is {' or '.join(offered)}; {value[:40]!r} is not offered"
                raise ApiError(400, message, field, "unsupported_parameter")
    name = service.model_named(one("model") or next(iter(service.engine.models)))
    response_format = one("response_format", "json")
    if response_format not in FORMATS:
        raise ApiError(400, f"response_format is one of {', '.join(FORMATS)}", "response_format")
    granularities = frozenset(values.get("timestamp_granularities", []))
    if not granularities <= set(GRANULARITIES):
        raise ApiError(400, "timestamp_granularities are segment and word", "timestamp_granularities")
    stream = one("stream", "false").lower()
    if stream not in ("true", "false", "1", "0"):
        raise ApiError(400, "stream is true or false", "stream")
    diarized = response_format == "diarized_json"
    if diarized and service.diarizer is None:
        message = "response_format=diarized_json needs a server that was started with --diarize"
        raise ApiError(400, message, "response_format", "unsupported_parameter")
    if granularities and response_format != "verbose_json" and (diarized or stream in ("false", "0")):
        raise ApiError(400, "timestamp_granularities needs response_format=verbose_json", "timestamp_granularities")
    try:
        temperature = float(one("temperature") or 0)
    except ValueError:
        temperature = math.nan
    if not 0 <= temperature <= 1:
        raise ApiError(400, "temperature lies between 0 and 1", "temperature")
    for field in ("prompt", "hotwords"):
        if len(one(field)) > MOST_PROMPT:
            raise ApiError(400, f"{field} has more than {MOST_PROMPT} characters", field)
    included = values.get("include", [])
    gates, logprobs = "gate" in included, "logprobs" in included
    if logprobs and response_format != "json":
        raise ApiError(400, "include[]=logprobs needs response_format=json", "include")
    options = TranscribeOptions.of(
        task=task,
        language=checked_language(name, service.engine.models[name], one("language") or None, task),
        initial_prompt=one("prompt") or None,
        hotwords=one("hotwords") or None,
        word_timestamps=gates or diarized or "word" in granularities,
        logprobs=logprobs,
        **({"temperature": temperature} if temperature else {}),  # 0 is what falls back to others
    )
    empty = np.zeros(0, np.float32)
    return Asked(name, empty, options, response_format, granularities, stream in ("true", "1"), gates, logprobs)
