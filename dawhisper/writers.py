"""A transcription as text, subtitles or data. A new format is a ResultWriter with a name in WRITERS."""

from __future__ import annotations

import html
from typing import Any, TextIO

from whisper.utils import ResultWriter, WriteJSON, WriteSRT, WriteTSV, WriteTXT, WriteVTT


class Named(ResultWriter):
    """A writer of text, whose lines begin with "[SPEAKER_00]: " where it is known who speaks."""

    def write_result(self, result: dict[str, Any], file: TextIO, *rest: Any, **options: Any) -> None:
        segments = [named(segment) for segment in result["segments"]]
        super().write_result(result | {"segments": segments}, file, *rest, **options)


def named(segment: dict[str, Any]) -> dict[str, Any]:
    """A segment whose text begins with its speaker; among its words the name is put before each change of speaker."""
    if not segment.get("speaker"):
        return segment
    made = segment | {"text": f" [{segment['speaker']}]: {segment['text'].lstrip()}"}
    if "words" in segment:
        made["words"], now = [], None
        for word in segment["words"]:
            speaker = word.get("speaker", now)
            says = f" [{speaker}]: {word['word'].lstrip()}" if speaker != now else word["word"]
            made["words"].append(word | {"word": says})
            now = speaker
    return made


class WriteNamedTXT(Named, WriteTXT):
    pass


class WriteNamedSRT(Named, WriteSRT):
    pass


class Escaped(ResultWriter):
    """A writer whose text holds none of WebVTT's marks."""

    def write_result(self, result: dict[str, Any], file: TextIO, *rest: Any, **options: Any) -> None:
        segments = [escaped(segment) for segment in result["segments"]]
        super().write_result(result | {"segments": segments}, file, *rest, **options)


class WriteEscapedVTT(Named, Escaped, WriteVTT):
    pass


def escaped(segment: dict[str, Any]) -> dict[str, Any]:
    """A segment whose text and words are none of WebVTT's marks."""
    made = segment | {"text": html.escape(segment["text"], quote=False)}
    if "words" in segment:
        made["words"] = [word | {"word": html.escape(word["word"], quote=False)} for word in segment["words"]]
    return made


class WriteTextGrid(ResultWriter):
    """Praat's TextGrid, as its manual describes it: a tier of segments, and one of words where they have times."""

    extension = "TextGrid"

    def write_result(self, result: dict[str, Any], file: TextIO, *_: Any, **__: Any) -> None:
        segments = result["segments"]
        tiers = {"segments": [(s["start"], s["end"], s["text"]) for s in segments]}
        if all("words" in segment for segment in segments):
            tiers["words"] = [(w["start"], w["end"], w["word"]) for s in segments for w in s["words"]]
        last = max((end for spans in tiers.values() for _, end, _ in spans), default=0.0)
        whole = f"xmin = 0\nxmax = {last}\n"
        print('File type = "ooTextFile"\nObject class = "TextGrid"\n', file=file)
        print(f"{whole}tiers? <exists>\nsize = {len(tiers)}\nitem []:", file=file)
        for number, (name, spans) in enumerate(tiers.items(), 1):
            intervals = without_gaps(spans, last)
            print(f'item [{number}]:\nclass = "IntervalTier"\nname = "{name}"\n{whole}', end="", file=file)
            print(f"intervals: size = {len(intervals)}", file=file)
            for place, (start, end, text) in enumerate(intervals, 1):
                quoted = text.strip().replace('"', '""')
                print(f'intervals [{place}]:\nxmin = {start}\nxmax = {end}\ntext = "{quoted}"', file=file)


def without_gaps(spans: list[tuple[float, float, str]], last: float) -> list[tuple[float, float, str]]:
    """Intervals that cover everything up to `last` seconds, without an overlap; between spans they are empty."""
    made: list[tuple[float, float, str]] = []
    now = 0.0
    for start, end, text in spans:
        start = max(start, now)
        if end <= start:  # takes no time of its own
            continue
        made += [(now, start, "")] if start > now else []
        made.append((start, end, text))
        now = end
    return made + ([(now, last, "")] if now < last else [])


WRITERS: dict[str, type[ResultWriter]] = {
    "txt": WriteNamedTXT,
    "vtt": WriteEscapedVTT,
    "srt": WriteNamedSRT,
    "tsv": WriteTSV,
    "json": WriteJSON,
    "TextGrid": WriteTextGrid,
}
ONLY_BY_NAME = ("TextGrid",)  # not written where all formats are asked for: openai-whisper has not got it
