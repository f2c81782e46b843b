"""Recordings -> what became of each: its transcription, or why there is none. A fault in one never takes the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from dawhisper.batched import BatchedRecording, iter_batched
from dawhisper.errors import DawhisperError, unforeseen
from dawhisper.model import Whisper
from dawhisper.reading import Readers
from dawhisper.transcribe import segments_of
from dawhisper.transcription import Segment, TranscribeOptions, Transcription, collect

from .inputs import Input


@dataclass(frozen=True)
class Outcome:
    """What became of a recording of `duration` seconds; `interrupted` by Ctrl-C, with what was known until then."""

    item: Input
    result: Transcription | None = None
    duration: float = 0.0
    error: str = ""  # one line
    interrupted: bool = False


def transcribe_inputs(
    model: Whisper, inputs: Iterable[Input], options: TranscribeOptions, readers: Readers | None = None
) -> Iterator[Outcome]:
    """Transcribe recordings as they come; by `readers` they are read where they fill batches together."""
    if not model.is_multilingual:
        inputs = (replace(item, settings=replace(item.settings, language=None)) for item in inputs)
    if options.batch_size is None:
        return one_by_one(model, inputs, options)
    return in_batches(model, inputs, options, readers)


def one_by_one(model: Whisper, inputs: Iterable[Input], options: TranscribeOptions) -> Iterator[Outcome]:
    """Transcribe a recording after the other."""
    for item in inputs:
        kept: list[Segment] = []
        try:
            segments, recording = segments_of(model, item.source, item.settings.over(options))
            try:
                for segment in segments:
                    kept.append(segment)
            except KeyboardInterrupt:
                yield Outcome(item, collect(kept, recording), recording.duration, interrupted=True)
                return
            result = collect(kept, recording)
        except BrokenPipeError:  # the reader of our output has gone
            raise
        except Exception as error:
            yield Outcome(item, error=described(error, item.label))
        else:
            yield Outcome(item, result, recording.duration)


def in_batches(
    model: Whisper, inputs: Iterable[Input], options: TranscribeOptions, readers: Readers | None
) -> Iterator[Outcome]:
    """Transcribe recordings in common batches; should one break its batch, those that are begun follow one by one."""
    begun: dict[BatchedRecording, Input] = {}

    def recordings(items: Iterable[Input]) -> Iterator[BatchedRecording]:
        for item in items:
            recording = BatchedRecording(item.source, item.settings)
            begun[recording] = item
            yield recording

    coming, left = recordings(inputs), True
    while left:
        try:
            yield from batch(model, coming, begun, options, readers)
            left = False
        except BrokenPipeError:
            raise
        except Exception:
            alone = list(begun.values())
            begun.clear()
            readers = None  # they are closed
            for item in alone:
                try:
                    yield from batch(model, recordings([item]), begun, options, None)
                except Exception as error:
                    begun.clear()
                    yield Outcome(item, error=described(error, item.label))


def batch(
    model: Whisper,
    recordings: Iterator[BatchedRecording],
    begun: dict[BatchedRecording, Input],
    options: TranscribeOptions,
    readers: Readers | None,
) -> Iterator[Outcome]:
    """Transcribe recordings, of which those leave the table that are finished."""
    try:
        for recording, _ in iter_batched(model, recordings, options, readers):
            if recording.finished:
                item = begun.pop(recording)
                if recording.error is not None:
                    yield Outcome(item, None, recording.duration, described(recording.error, item.label))
                else:
                    yield Outcome(item, recording.result(), recording.duration)
    except KeyboardInterrupt:
        heard = {recording: item for recording, item in begun.items() if recording.segments}
        if not heard:
            raise
        for recording, item in heard.items():
            yield Outcome(item, recording.result(), recording.duration, interrupted=True)


def described(error: Exception, what: str) -> str:
    return str(error) if isinstance(error, DawhisperError) else unforeseen(error, what)
