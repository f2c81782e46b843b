"""A transcription as text, subtitles or data. A new format is a ResultWriter with a name in WRITERS."""

from __future__ import annotations

import html
from typing import Any, TextIO

from whisper.utils import ResultWriter, WriteJSON, WriteSRT, WriteTSV, WriteTXT, WriteVTT


class WriteEscapedVTT(WriteVTT):
    """WebVTT whose text holds none of WebVTT's own marks."""

    def write_result(self, result: dict[str, Any], file: TextIO, *rest: Any, **options: Any) -> None:
        segments = [escaped(segment) for segment in result["segments"]]
        super().write_result(result | {"segments": segments}, file, *rest, **options)


def escaped(segment: dict[str, Any]) -> dict[str, Any]:
    """A segment whose text and words are none of WebVTT's marks."""
    made = segment | {"text": html.escape(segment["text"], quote=False)}
    if "words" in segment:
        made["words"] = [word | {"word": html.escape(word["word"], quote=False)} for word in segment["words"]]
    return made


WRITERS: dict[str, type[ResultWriter]] = {
    "txt": WriteTXT,
    "vtt": WriteEscapedVTT,
    "srt": WriteSRT,
    "tsv": WriteTSV,
    "json": WriteJSON,
}
