"""Files in, files out: what `dawhisper transcribe` does."""

from __future__ import annotations

import itertools
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .batched import BatchedRecording, iter_batched
from .checkpoint import MODEL_HELP, OWN_MODEL, load_model
from .decoding import asked_language
from .device import DEVICE_HELP, THREADS_HELP
from .errors import DawhisperError, OptionError, unforeseen
from .files import writable_folder
from .hotwords import read_terms
from .model import Whisper
from .options import option
from .transcribe import transcribe_lazily
from .transcription import Segment, TranscribeOptions, Transcription, collect
from .writers import WRITERS

SMALLEST_INCREMENT = 0.01  # of the temperature


@dataclass(frozen=True)
class WriterOptions:
    """The format of the outputs, and how subtitles break into lines where there are word times."""

    output_format: str = option("all", "what is written", short="-f", choices=[*WRITERS, "all"])
    highlight_words: bool = option(False, "underline words as they are spoken (srt and vtt)")
    max_line_width: int | None = option(None, "characters in a line of subtitles")
    max_line_count: int | None = option(None, "lines in a subtitle")
    max_words_per_line: int | None = option(None, "words in a subtitle")

    def verify(self, word_timestamps: bool) -> None:
        for name, value in self.lines().items():
            if value is not None and value < 1 and name != "highlight_words":
                raise OptionError(f"--{name} is at least 1, not {value}")
            if value and not word_timestamps:
                raise OptionError(f"--{name} requires --word_timestamps True")
        if self.max_line_count and not self.max_line_width:
            warnings.warn("--max_line_count has no effect without --max_line_width", stacklevel=2)
        if self.max_words_per_line and self.max_line_width:
            warnings.warn("--max_words_per_line has no effect with --max_line_width", stacklevel=2)

    def lines(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "output_format"}


@dataclass(frozen=True)
class FilesOptions:
    """Which files are transcribed, by which model, and where the outputs go."""

    audio: Sequence[str] = option(help="audio or video files", positional=True)
    model: str = option(OWN_MODEL, MODEL_HELP)
    model_dir: str | None = option(None, "where downloaded models are kept; ~/.cache/whisper by default")
    device: str | None = option(None, DEVICE_HELP)
    fp16: bool = option(True, "compute in fp16 on a GPU; False in fp32 (a CPU always does)")
    dtype: str | None = option(
        None, "compute in this instead; int8 is fastest on a CPU", choices=["fp32", "fp16", "bf16", "int8"]
    )
    int8_memory: bool = option(False, "on a GPU: keep the audio's keys and values in int8, faster")
    threads: int = option(0, THREADS_HELP)
    output_dir: str = option(".", "folder for the outputs", short="-o")
    temperature: float = option(0.0, "temperature to sample with; 0 takes the likeliest text")
    temperature_increment_on_fallback: float | None = option(0.2, "step of the fallback's retries")


@dataclass(frozen=True)
class Outcome:
    """What became of the file at this place in the list; `interrupted` by Ctrl-C, with what was known until then."""

    place: int
    result: Transcription | None = None
    error: Exception | None = None
    interrupted: bool = False


def transcribe_files(
    files: FilesOptions, writing: WriterOptions, options: dict[str, Any], report: Callable[[str], int]
) -> int:
    """Transcribe each file and write its outputs. A file that fails is reported and the others go on; returns 1 then.

    options: the arguments of `transcribe`, but for its temperatures. On Ctrl-C the outputs of what was transcribed so
    far are written first.
    """
    writing.verify(options.get("word_timestamps", False))
    temperatures = fallback_temperatures(files.temperature, files.temperature_increment_on_fallback)
    options = {**options, "temperature": temperatures, "hotwords": read_terms(options.get("hotwords"))}
    TranscribeOptions.of(**options)  # wrong options end here, before anything is loaded
    options["language"] = asked_language(options.get("language"))
    paths, output_dir = files.audio, Path(files.output_dir)
    writable_folder(output_dir)
    if files.threads:
        torch.set_num_threads(files.threads)
    model = load_model(files.model, files.device, files.dtype or (None if files.fp16 else "fp32"), files.model_dir)
    model.decoder.int8_memory = files.int8_memory  # type: ignore[assignment]
    options["language"] = usable_language(model, files.model, options.get("language"))
    options["multilingual"] = bool(options.get("multilingual")) and model.is_multilingual

    failed, names = 0, output_names(paths)
    outcomes = one_by_one if options.get("batch_size") is None else in_batches
    for outcome in outcomes(model, paths, options):
        path = paths[outcome.place]
        if outcome.error is not None:
            failed = report(described(outcome.error, path))
        if outcome.result is not None:
            try:
                write_outputs(outcome.result, names[outcome.place], output_dir, writing)
            except OSError as error:
                failed = report(f"can't write the output of {path}: {error.strerror or error}")
            except Exception as error:
                failed = report(unforeseen(error, f"the output of {path}"))
        if outcome.interrupted:
            failed = report(f"interrupted in {path}; what was transcribed until then is in {output_dir}")
    return failed


def described(error: Exception, path: str) -> str:
    return str(error) if isinstance(error, DawhisperError) else unforeseen(error, path)


def fallback_temperatures(temperature: float, increment: float | None) -> tuple[float, ...]:
    """temperature, temperature + increment, ... up to 1."""
    if increment is None:
        return (temperature,)
    if increment < SMALLEST_INCREMENT:
        raise OptionError(
            f"temperature_increment_on_fallback is above 0 (from {SMALLEST_INCREMENT} on), or None; not {increment}"
        )
    return tuple(np.arange(temperature, 1.0 + 1e-6, increment).tolist()) or (temperature,)


def usable_language(model: Whisper, name: str, language: str | None) -> str | None:
    """English for English-only models, whatever was asked for."""
    if model.is_multilingual:
        return language
    if asked_language(language) not in (None, "en"):
        warnings.warn(f"{name} knows English only; using English instead of {language}", stacklevel=2)
    return "en"


def output_names(paths: Sequence[str]) -> list[str]:
    """A name for each file's outputs: its stem, or where stems clash, more of its path.

    Names that some disks take for the same, by case or by how an accent is written, are the same here too.
    """
    stems = Counter(alike(Path(path).stem) for path in paths)
    names = Counter(alike(Path(path).name) for path in paths)
    result: list[str] = []
    taken: set[str] = set()
    for given in paths:
        path = Path(given)
        name = path.stem if stems[alike(path.stem)] == 1 else path.name
        if stems[alike(path.stem)] > 1 and names[alike(path.name)] > 1:
            name = f"{path.absolute().parent.name}_{path.name}"
        numbered = (f"{name}_{i}" for i in itertools.count(2))
        free = next(n for n in itertools.chain([name], numbered) if alike(n) not in taken)
        taken.add(alike(free))
        result.append(free)
    return result


def alike(name: str) -> str:
    """What names have in common that a disk may take for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def one_by_one(model: Whisper, paths: Sequence[str], options: dict[str, Any]) -> Iterator[Outcome]:
    """Transcribe a file after the other."""
    for place, path in enumerate(paths):
        kept: list[Segment] = []
        try:
            segments, recording = transcribe_lazily(model, path, **options)
            try:
                for segment in segments:
                    kept.append(segment)
            except KeyboardInterrupt:
                yield Outcome(place, collect(kept, recording), interrupted=True)
                return
            result = collect(kept, recording)
        except BrokenPipeError:  # the reader of our output has gone
            raise
        except Exception as error:
            yield Outcome(place, error=error)
        else:
            yield Outcome(place, result)


def in_batches(model: Whisper, paths: Sequence[str], options: dict[str, Any]) -> Iterator[Outcome]:
    """Transcribe the files in common batches; should one break its batch, those that are left follow one by one."""
    made = TranscribeOptions.of(**options)
    recordings = {place: BatchedRecording(path) for place, path in enumerate(paths)}
    try:
        yield from batch(model, recordings, made)
    except BrokenPipeError:
        raise
    except Exception:
        for place in list(recordings):
            again = {place: BatchedRecording(paths[place])}
            try:
                yield from batch(model, again, made)
            except Exception as error:
                yield Outcome(place, error=error)


def batch(model: Whisper, unfinished: dict[int, BatchedRecording], options: TranscribeOptions) -> Iterator[Outcome]:
    """Transcribe recordings, of which those leave the table that are finished."""
    places = {id(recording): place for place, recording in unfinished.items()}
    try:
        for recording, _ in iter_batched(model, list(unfinished.values()), options):
            if recording.finished:
                result = None if recording.error else recording.result()
                place = places[id(recording)]
                del unfinished[place]
                yield Outcome(place, result, recording.error)
    except KeyboardInterrupt:
        heard = {place: recording for place, recording in unfinished.items() if recording.segments}
        if not heard:
            raise
        for place, recording in heard.items():
            yield Outcome(place, recording.result(), interrupted=True)


def write_outputs(result: Transcription, name: str, output_dir: Path, writing: WriterOptions) -> None:
    formats = WRITERS if writing.output_format == "all" else (writing.output_format,)
    for output_format in formats:
        WRITERS[output_format](str(output_dir))(result.to_dict(), f"{name}.audio", **writing.lines())
