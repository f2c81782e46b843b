"""One worker thread that owns the models; requests of many threads wait for it in one bounded queue.

Clips of up to 30 s with the same model, options and encoded length are decoded together, in one batch; what a batch
can't settle (a window to be decoded again at a higher temperature, a text that ends before its clip) goes the way of
`transcribe`, so the result is the same as that of a clip alone. (A language to be found out is read from the window
that is decoded.)
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from whisper.audio import HOP_LENGTH, N_SAMPLES

from dawhisper.batched import BatchedRecording
from dawhisper.decoding import DecodingResult, decode_windows, model_tokenizer
from dawhisper.model import Whisper
from dawhisper.transcribe import first_speech, iter_segments, open_recording
from dawhisper.transcription import Segment, TranscribeOptions, Transcription, collect
from dawhisper.window import (
    Prompt,
    Window,
    encode_batch,
    last_windows,
    leading_silence,
    needs_fallback,
    padded_frames,
    split_window,
    spoken,
    without_silence,
)


class QueueFull(Exception):
    """As many requests wait as may."""


class Stopped(Exception):
    """The one who asked does not wait any more."""


@dataclass(eq=False)
class TranscriptionTask:
    """A recording to transcribe: samples [n] at 16 kHz. `stop` it when nobody waits for it any more.

    on_segment: called in the worker's thread as soon as a segment is known; such a clip
    is not decoded with others.
    """

    model: str
    samples: np.ndarray
    options: TranscribeOptions
    on_segment: Callable[[Segment], None] | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        self.stopped.set()

    @property
    def is_short(self) -> bool:
        return self.on_segment is None and len(self.samples) <= N_SAMPLES

    def goes_with(self, other: TranscriptionTask, model: Whisper) -> bool:
        """Whether both can be decoded in one batch; a model of variable context would hear a longer one's padding."""
        alike = other.is_short and other.model == self.model and other.options == self.options
        return alike and other.padded(model) == self.padded(model)

    def padded(self, model: Whisper) -> int:
        """Frames that are encoded for it."""
        return padded_frames(model, len(self.samples) // HOP_LENGTH)


@dataclass(eq=False)
class Queued:
    """A place in the queue: a clip, or anything else that the worker is to call."""

    work: TranscriptionTask | Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Engine:
    """The models, the queue and the worker. `close` finishes what waits, then ends the thread.

    on_batch: called in the worker's thread with the model's name and how many seconds each clip has waited, when clips
    begin to be decoded together.
    """

    def __init__(
        self,
        models: dict[str, Whisper],
        batch_size: int = 8,
        max_queue: int = 64,
        on_batch: Callable[[str, list[float]], None] = lambda model, waited: None,
    ):
        self.models, self.batch_size, self.max_queue, self.on_batch = models, batch_size, max_queue, on_batch
        self.jobs: deque[Queued] = deque()
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self._work, name="dawhisper-engine", daemon=True)
        self.thread.start()

    def submit(self, work: TranscriptionTask | Callable[[], Any]) -> Future[Any]:
        """A clip's Transcription, or what the callable returns. QueueFull where too many wait."""
        job = Queued(work)
        with self.changed:
            if self.closing or len(self.jobs) >= self.max_queue:
                raise QueueFull
            self.jobs.append(job)
            self.changed.notify()
        return job.future

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    @property
    def waiting(self) -> int:
        return len(self.jobs)

    @property
    def alive(self) -> bool:
        return self.thread.is_alive()

    def _work(self) -> None:
        while jobs := self._take():
            running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            clips = [job.work for job in running if isinstance(job.work, TranscriptionTask)]
            if clips:
                self.on_batch(clips[0].model, [time.monotonic() - job.since for job in running])
            if len(clips) > 1:
                self._run_together(running, clips)
            else:
                for job in running:
                    self._run(job)
            del jobs, running, clips  # an idle worker holds no audio

    def _take(self) -> list[Queued]:
        """The next job, and the clips in the queue that go with it; [] at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.jobs or self.closing)
            if not self.jobs:
                return []
            taken = [self.jobs.popleft()]
            first = taken[0].work
            if isinstance(first, TranscriptionTask) and first.is_short:
                model = self.models[first.model]
                fitting = (
                    j for j in self.jobs if isinstance(j.work, TranscriptionTask) and first.goes_with(j.work, model)
                )
                taken += itertools.islice(fitting, self.batch_size - 1)
                self.jobs = deque(job for job in self.jobs if job not in taken)
            return taken

    def _run(self, job: Queued) -> None:
        try:
            result = self._alone(job.work) if isinstance(job.work, TranscriptionTask) else job.work()
        except Exception as error:  # it belongs to the one who asked; the worker goes on
            job.future.set_exception(error)
        else:
            job.future.set_result(result)

    def _run_calls(self) -> None:
        """Updates of live audio: they are short, and do not wait for the end of a long recording."""
        with self.changed:
            calls = [job for job in self.jobs if not isinstance(job.work, TranscriptionTask)]
            self.jobs = deque(job for job in self.jobs if job not in calls)
        for job in calls:
            if job.future.set_running_or_notify_cancel():
                self._run(job)

    def _run_together(self, jobs: list[Queued], clips: list[TranscriptionTask]) -> None:
        try:
            results = transcribe_together(self.models[clips[0].model], [c.samples for c in clips], clips[0].options)
        except Exception:  # whose fault it is shows alone
            results = [None] * len(jobs)
        for job, result in zip(jobs, results):
            if result is None:
                self._run(job)
            else:
                job.future.set_result(result)

    def _alone(self, clip: TranscriptionTask) -> Transcription:
        model = self.models[clip.model]
        if clip.stopped.is_set():
            raise Stopped
        recording = open_recording(model, clip.samples, clip.options)

        def told() -> Iterator[Segment]:
            for segment in iter_segments(model, recording, clip.options.speaking(recording.language)):
                if clip.stopped.is_set():
                    raise Stopped
                if clip.on_segment:
                    clip.on_segment(segment)
                yield segment
                self._run_calls()

        return collect(told(), recording)


def transcribe_together(
    model: Whisper, clips: Sequence[np.ndarray], options: TranscribeOptions
) -> list[Transcription | None]:
    """Transcribe clips of up to 30 s in one batch; None for each that needs more than one decoding of one window.

    They are encoded alike: clips of a model of variable context differ by less than a second.
    """
    # where speech starts late, the window is not what tells the language
    given = options.decoding.language is not None or not model.is_multilingual
    are_known = [
        given or first_speech(samples, [(0, len(samples) // HOP_LENGTH)], options.vad)[0] == 0 for samples in clips
    ]
    tokenizer = model_tokenizer(model, options.decoding.language or "en", options.decoding.task)
    prompt = Prompt.of(model, tokenizer, options).tokens(options)
    mel = last_windows(model, clips)
    results = decode_windows(model, encode_batch(model, mel), options.at(options.temperatures()[0], prompt))
    silences = leading_silence(mel, [len(samples) // HOP_LENGTH for samples in clips])
    return [
        from_one_window(model, samples, silent, result, options) if known else None
        for samples, silent, result, known in zip(clips, silences, results, are_known)
    ]


def from_one_window(
    model: Whisper, samples: np.ndarray, silent: int, result: DecodingResult, options: TranscribeOptions
) -> Transcription | None:
    """The transcription of a clip [n], of which the first `silent` frames are so, where this result is all of it."""
    window = Window(0, len(samples) // HOP_LENGTH)
    if silent == window.size:
        return Transcription("", [], result.language)
    if without_silence(window, silent) is not None:
        return None
    if needs_fallback(model, result, options) and len(options.temperatures()) > 1:
        return None
    recording = BatchedRecording(samples, duration=window.duration)
    recording.speaks(model, result.language, options)
    split = split_window(model, recording, window, result, options, 0.0)
    if split.resume < window.end:
        return None
    recording.skipped.extend(split.skipped)
    segments = [replace(segment, id=i) for i, segment in enumerate(spoken(split.segments, window))]
    return collect(iter(segments), recording)
