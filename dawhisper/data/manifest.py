"""Manifests and tar shards: what they list, and the sound of one utterance.

A manifest is a JSONL file, one utterance a line: "audio" (a path relative to the manifest), "duration" in seconds, and
where known "text", "language", "speaker", "source", "start"/"end" (a part of the file), "teacher_text" and
"teacher_language" (what a Whisper hears in the clean clip), and "segments" (when which part of it is spoken). A shard
is a tar of audio files, each beside a .json of the same keys; a manifest may point into shards by "offset" and "size",
or list them by "shard".
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from dawhisper.audio import SAMPLE_RATE, load_audio, to_int16
from dawhisper.errors import DataError, DawhisperError
from dawhisper.files import AUDIO_SUFFIXES, write_lines
from dawhisper.media import open_media

MIN_SECONDS, MAX_SECONDS = 0.3, 30.0
# what people call the columns of a table, and the keys of a shard's .json
COLUMNS = {
    "audio": ("audio", "path", "file", "file_name", "filename", "audio_path", "audio_file", "wav", "clip"),
    "text": ("text", "sentence", "transcript", "transcription", "raw_transcription"),
    "language": ("language", "lang", "locale"),
    "speaker": ("speaker", "speaker_id", "client_id", "user", "user_id"),
    "source": ("source", "dataset", "category"),
    "start": ("start", "begin", "offset_seconds"),
    "end": ("end", "stop"),
    "split": ("split", "subset", "set"),
}
SLACK_SECONDS = 0.05  # a codec's padding may lengthen a clip; this much beyond the limit is cut off


@dataclass(frozen=True)
class SpokenSegment:
    """A part of an utterance, with its times in seconds from the utterance's beginning."""

    start: float
    end: float
    text: str | None = None
    teacher_text: str | None = None


@dataclass(frozen=True)
class Utterance:
    """One line of a manifest."""

    audio: str  # path of the audio file, or of the shard it lies in
    text: str | None = None
    duration: float = 0.0  # seconds
    language: str | None = None
    speaker: str | None = None
    start: float | None = None  # seconds into the file
    end: float | None = None
    source: str | None = None
    teacher_text: str | None = None
    teacher_language: str | None = None
    offset: int | None = None  # bytes into the shard
    size: int | None = None  # bytes
    segments: tuple[SpokenSegment, ...] | None = None  # of a window of several sentences, for its time stamps

    @property
    def name(self) -> str:
        """What to call it in a report."""
        if self.offset is not None:
            return f"{self.audio}@{self.offset}"
        return self.audio if self.start is None else f"{self.audio}[{self.start:g}-{self.end or 0:g}]"


class Report:
    """What was skipped, and why: each thing once, however often it was met. Iterates as (what, why)."""

    def __init__(self) -> None:
        self._items: dict[tuple[str, str], None] = {}

    def add(self, what: str, why: str) -> None:
        self._items[what, why] = None

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._items)

    @property
    def counts(self) -> dict[str, int]:
        """How many things for each kind of reason (the words before the first colon), most frequent first."""
        return dict(Counter(why.split(":")[0] for _, why in self).most_common())

    def __str__(self) -> str:
        if not self._items:
            return "nothing skipped"
        return f"{len(self)} skipped: " + ", ".join(f"{count} {why}" for why, count in self.counts.items())

    def write(self, path: str | os.PathLike[str]) -> None:
        """One JSON object a line: {"what": ..., "why": ...}; the file is replaced whole."""
        write_lines(path, (json.dumps({"what": what, "why": why}, ensure_ascii=False) for what, why in self))


def read_manifest(path: str | os.PathLike[str], report: Report | None = None) -> list[Utterance]:
    """The utterances of a manifest, of a list of shards, of one tar shard, or of a folder: its manifest.jsonl, or tars.

    Lines that can't be used go to the report. Raises DataError when there is no such file or nothing is left.
    """
    path, report = Path(path), Report() if report is None else report
    parts = [path]
    if path.is_dir():
        parts = [path / "manifest.jsonl"] if (path / "manifest.jsonl").is_file() else sorted(path.glob("*.tar"))
        named = sorted(f.name for f in path.glob("*.jsonl") if not f.name.startswith("."))
        if not parts or (named and parts[0].suffix == ".tar"):
            hint = f"name one of its manifests: {', '.join(named)}" if named else "make one with dawhisper prepare"
            raise DataError(f"{path} has no manifest.jsonl; {hint}")
    elif not path.is_file():
        raise DataError(f"no such manifest: {path}; make one with dawhisper prepare")
    utterances = [u for part in parts for u in _read_file(part, report)]
    if not utterances:
        raise DataError(f"{path} is empty" + (f" ({report})" if len(report) else "") + ": nothing to train on")
    return utterances


def _read_file(path: Path, report: Report) -> list[Utterance]:
    if path.suffix == ".tar":
        return read_shard(path, report)
    utterances = []
    with path.open("rb") as file:  # a line that is not UTF-8 is one to report
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    values = json.loads(line)
                    if isinstance(values, dict) and isinstance(values.get("shard"), str):
                        utterances += read_shard(path.parent / values["shard"], report)
                    else:
                        utterances.append(_utterance(values, path.parent))
                except (ValueError, TypeError) as error:
                    report.add(f"{path}:{number}", f"not a manifest line: {error}")
    return utterances


def _segment(start: Any, end: Any, text: Any = None, teacher_text: Any = None) -> SpokenSegment:
    return SpokenSegment(float(start), float(end), *(None if t is None else str(t) for t in (text, teacher_text)))


def _segments(lines: Any) -> tuple[SpokenSegment, ...]:
    segments = tuple(_segment(**line) for line in lines)
    times = [time for segment in segments for time in (segment.start, segment.end)]
    if times != sorted(times) or not all(0 <= time <= MAX_SECONDS for time in times):
        raise ValueError(f"segments must follow each other within {MAX_SECONDS:g} s")
    return segments


_FIELD_TYPES: dict[str, Callable[[Any], Any]] = {
    **{f.name: str for f in fields(Utterance)},
    **dict.fromkeys(("duration", "start", "end"), float),
    **dict.fromkeys(("offset", "size"), int),
    "segments": _segments,
}


def _utterance(line: Any, folder: Path) -> Utterance:
    if not isinstance(line, dict) or not isinstance(line.get("audio"), str):
        raise ValueError('no "audio"')
    known = {key: kind(line[key]) for key, kind in _FIELD_TYPES.items() if line.get(key) is not None}
    known["audio"] = os.path.normpath(folder / known["audio"])
    return Utterance(**known)


def write_manifest(path: Path, utterances: Iterable[Utterance]) -> None:
    write_lines(path, (manifest_line(u, path.parent) for u in utterances))


def manifest_line(u: Utterance, folder: Path) -> str:
    """The utterance's line in a manifest of this folder; its path is relative unless they have no folder in common."""
    values = {key: value for key, value in asdict(u).items() if value is not None}
    audio, folder = os.path.abspath(u.audio), Path(os.path.abspath(folder))  # noqa: PTH100
    shared = os.path.commonpath([audio, folder])
    values["audio"] = os.path.relpath(audio, folder) if len(Path(shared).parts) > 1 else audio
    values["duration"] = round(u.duration, 4)
    return json.dumps(values, ensure_ascii=False)


def read_shard(path: Path, report: Report) -> list[Utterance]:
    """The utterances of a tar shard, as `webdataset` has them: what a member's name has before its first dot is a key.

    Beside its audio an item has a .json of its values or a .txt. What stands before a damaged place is kept.
    """
    places: dict[str, tuple[int, int]] = {}  # key -> offset and size of the audio
    lines: dict[str, dict[str, Any]] = defaultdict(dict)
    try:
        with tarfile.open(path, "r:") as tar:
            end = path.stat().st_size
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, suffix = name.partition(".")
                key, suffix = os.path.join(folder, stem), suffix.rpartition(".")[2].lower()  # noqa: PTH118
                if not member.isfile() or not stem or not suffix:
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError("cut off")
                file = tar.extractfile(member) if suffix in ("json", "txt") else None
                if file is not None and suffix == "json":
                    lines[key] |= _known_names(json.loads(file.read()))
                elif file is not None:
                    lines[key].setdefault("text", file.read().decode("utf-8", "strict").strip())
                elif f".{suffix}" in AUDIO_SUFFIXES:
                    places[key] = (member.offset_data, member.size)
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        report.add(str(path), f"damaged shard: {error}")
    utterances = []
    for key, (offset, size) in places.items():
        try:
            place = {"audio": path.name, "offset": offset, "size": size}
            if key not in lines:
                raise KeyError(key)
            utterances.append(_utterance({**lines[key], **place}, path.parent))
        except (KeyError, ValueError, TypeError):
            report.add(f"{path}/{key}", "no .json with its values or .txt beside it in the shard")
    return utterances


def _known_names(values: Any) -> dict[str, Any]:
    """A .json's values by our names, where it has them by others'."""
    if not isinstance(values, dict):
        raise ValueError("a .json is no object")
    values = {name: value for name, value in values.items() if name not in ("start", "end")}  # of what it was cut from
    return values | {
        key: next(values[name] for name in COLUMNS[key] if values.get(name) is not None)
        for key in ("text", "language", "speaker")
        if any(values.get(name) is not None for name in COLUMNS[key])
    }


# ---- sound --------------------------------------------------------------------------------------------------------


def read_audio(utterance: Utterance) -> np.ndarray:
    """Decode an utterance to train on -> int16 [n] at 16 kHz. Raises DataError (it says why) when it can't be used."""
    audio = decode_audio(utterance)
    seconds = len(audio) / SAMPLE_RATE
    if seconds > MAX_SECONDS + SLACK_SECONDS:
        raise DataError(f"longer than {MAX_SECONDS:g} s: {seconds:.1f} s")
    if seconds < MIN_SECONDS:
        raise DataError(f"shorter than {MIN_SECONDS:g} s: {seconds:.2f} s")
    if seconds < 0.9 * utterance.duration - 0.5:
        raise DataError(f"cut off: {seconds:.1f} s of the {utterance.duration:.1f} s in the manifest")
    return audio[: int(MAX_SECONDS * SAMPLE_RATE)]


def decode_audio(utterance: Utterance) -> np.ndarray:
    """Decode an utterance of any length -> int16 [n] at 16 kHz. Raises DataError when it is no sound."""
    u = utterance
    if not Path(u.audio).is_file():
        raise DataError("missing file: check the path in the manifest")
    try:
        audio = load_audio(_source(u), start=u.start or 0.0, end=u.end)
        broken = not audio.all() and _has_nan(u)
    except DawhisperError as error:
        raise DataError(f"does not decode: {error}") from None
    except Exception as error:  # a decoder may raise anything on a damaged file, and a run must go on
        raise DataError(f"does not decode: {type(error).__name__}: {error}") from None
    if broken:
        raise DataError("NaN audio: not a number in the samples")
    if not audio.any():
        raise DataError("silent: every sample is zero")
    return to_int16(audio)


def _has_nan(u: Utterance) -> bool:
    """Is there NaN or infinity in a file of floats? Decoding turns these into zeros."""
    with open_media(_source(u)) as container:
        stream = container.streams.audio[0]
        if not stream.codec_context.name.startswith("pcm_f"):
            return False
        return not all(np.isfinite(frame.to_ndarray()).all() for frame in container.decode(stream))


def _source(u: Utterance) -> str | io.BytesIO:
    return u.audio if u.offset is None else _read_member(u)


def _read_member(u: Utterance) -> io.BytesIO:
    try:
        with Path(u.audio).open("rb") as file:
            file.seek(u.offset or 0)
            data = file.read(u.size or 0)
    except OSError as error:
        raise DataError(str(error.strerror or error)) from None
    if len(data) != u.size or not data:
        raise DataError("the shard is cut off")
    return io.BytesIO(data)


def encode_audio(audio: np.ndarray, codec: str = "opus", bitrate: int = 32000) -> bytes:
    """int16 [n] at 16 kHz, mono -> the bytes of an Ogg Opus or FLAC file."""
    import av

    buffer = io.BytesIO()
    container_format, encoder = {"opus": ("ogg", "libopus"), "flac": ("flac", "flac")}[codec]
    with av.open(buffer, "w", format=container_format, options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(encoder, rate=SAMPLE_RATE, layout="mono")
        if codec == "opus":
            stream.bit_rate = bitrate
        frame = av.AudioFrame.from_ndarray(audio[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
