"""One worker thread that owns the models; requests of many threads wait for it in one bounded queue.

Clips of up to 30 s with the same model and options are decoded together, in one batch; what a batch can't settle (a
window to be decoded again at a higher temperature, a text that ends before its clip) goes the way of `transcribe`, so
the result is the same as that of a clip alone. (A language to be found out is read from the window that is decoded.)
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from whisper.audio import N_FRAMES, N_SAMPLES

from dawhisper.audio import log_mel_spectrogram, pad_or_trim
from dawhisper.decoding import DecodingResult, decode_windows, model_tokenizer
from dawhisper.model import Whisper
from dawhisper.timing import Word, token_gates
from dawhisper.transcribe import OpenRecording, first_speech, iter_segments, open_recording
from dawhisper.transcription import Segment, TranscribeOptions, Transcription, collect
from dawhisper.window import (
    Prompt,
    Window,
    encode_window,
    leading_silence,
    needs_fallback,
    split_window,
    spoken,
    without_silence,
)


class QueueFull(Exception):
    """As many requests wait as may."""


class Stopped(Exception):
    """The one who asked does not wait any more."""


@dataclass(frozen=True)
class GatedWord(Word):
    """A word with the decoder's mean gate over its tokens."""

    gate: float = float("nan")


@dataclass(eq=False)
class Clip:
    """A recording to transcribe: samples [n] at 16 kHz. `stop` it when nobody waits for it any more.

    gates: words carry the gate. on_segment: called in the worker's thread as soon as a segment is known; such a clip
    is not decoded with others.
    """

    model: str
    samples: np.ndarray
    options: TranscribeOptions
    gates: bool = False
    on_segment: Callable[[Segment], None] | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        self.stopped.set()

    @property
    def is_short(self) -> bool:
        return self.on_segment is None and len(self.samples) <= N_SAMPLES

    def goes_with(self, other: Clip) -> bool:
        return other.is_short and other.model == self.model and other.options == self.options


@dataclass(eq=False)
class Job:
    """A place in the queue: a clip, or anything else that the worker is to call."""

    work: Clip | Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


class Engine:
    """The models, the queue and the worker. `close` finishes what waits, then ends the thread."""

    def __init__(
        self,
        models: dict[str, Whisper],
        batch_size: int = 8,
        max_queue: int = 64,
        on_batch: Callable[[int], None] = lambda size: None,
    ):
        self.models, self.batch_size, self.max_queue, self.on_batch = models, batch_size, max_queue, on_batch
        self.jobs: deque[Job] = deque()
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self._work, name="dawhisper-engine", daemon=True)
        self.thread.start()

    def submit(self, work: Clip | Callable[[], Any]) -> Future[Any]:
        """A clip's Transcription, or what the callable returns. QueueFull where too many wait."""
        job = Job(work)
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
            clips = [job.work for job in running if isinstance(job.work, Clip)]
            if len(clips) > 1:
                self._run_together(running, clips)
            else:
                for job in running:
                    self._run(job)
            del jobs, running, clips  # an idle worker holds no audio

    def _take(self) -> list[Job]:
        """The next job, and the clips in the queue that go with it; [] at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self.jobs or self.closing)
            if not self.jobs:
                return []
            taken = [self.jobs.popleft()]
            first = taken[0].work
            # models that hear as much as there is would hear the padding of a longer neighbour
            if isinstance(first, Clip) and first.is_short and not self.models[first.model].variable_audio_ctx:
                fitting = (j for j in self.jobs if isinstance(j.work, Clip) and first.goes_with(j.work))
                taken += itertools.islice(fitting, self.batch_size - 1)
                self.jobs = deque(job for job in self.jobs if job not in taken)
            return taken

    def _run(self, job: Job) -> None:
        try:
            result = self._alone(job.work) if isinstance(job.work, Clip) else job.work()
        except Exception as error:  # it belongs to the one who asked; the worker goes on
            job.future.set_exception(error)
        else:
            job.future.set_result(result)

    def _run_together(self, jobs: list[Job], clips: list[Clip]) -> None:
        try:
            results = transcribe_together(self.models[clips[0].model], [c.samples for c in clips], clips[0].options)
        except Exception:  # whose fault it is shows alone
            results = [None] * len(jobs)
        self.on_batch(len(jobs))
        for job, clip, result in zip(jobs, clips, results):
            if result is None:
                self._run(job)
            else:
                job.future.set_result(self._with_gates(clip, result))

    def _alone(self, clip: Clip) -> Transcription:
        self.on_batch(1)
        model = self.models[clip.model]
        if clip.stopped.is_set():
            raise Stopped
        recording = open_recording(model, clip.samples, clip.options)

        def told() -> Iterator[Segment]:
            for segment in iter_segments(model, recording, clip.options.speaking(recording.language)):
                if clip.stopped.is_set():
                    raise Stopped
                if clip.gates:
                    segment = gated(model, recording, segment)
                if clip.on_segment:
                    clip.on_segment(segment)
                yield segment

        return collect(told(), recording)

    def _with_gates(self, clip: Clip, result: Transcription) -> Transcription:
        if not clip.gates:
            return result
        model = self.models[clip.model]
        recording = recorded(model, clip.samples, result.language, clip.options)
        return replace(result, segments=[gated(model, recording, segment) for segment in result.segments])


def recorded(model: Whisper, samples: np.ndarray, language: str, options: TranscribeOptions) -> OpenRecording:
    """A recording whose language is known."""
    mel = log_mel_spectrogram(samples, model.dims.n_mels, padding=N_SAMPLES, device=model.device)
    tokenizer = model_tokenizer(model, language, options.decoding.task)
    return OpenRecording(mel, language, tokenizer, [(0, mel.shape[-1] - N_FRAMES)])


def transcribe_together(
    model: Whisper, clips: Sequence[np.ndarray], options: TranscribeOptions
) -> list[Transcription | None]:
    """Transcribe clips of up to 30 s in one batch; None for each that needs more than one decoding of one window."""
    language = options.decoding.language or "en"
    recordings = [recorded(model, samples, language, options) for samples in clips]
    # where speech starts late, the window is not what tells the language
    given = options.decoding.language is not None or not model.is_multilingual
    are_known = [given or first_speech(c, r.clips)[0] == 0 for c, r in zip(clips, recordings)]
    prompt = Prompt.of(model, recordings[0].tokenizer, options).tokens(options)
    mels = torch.stack([pad_or_trim(r.mel[:, : r.frames], N_FRAMES) for r in recordings])
    with torch.no_grad():
        features = model.encode(mels.to(model.device, model.dtype))
    results = decode_windows(model, features, options.at(options.temperatures()[0], prompt))
    return [
        from_one_window(model, replace(r, language=result.language), result, options) if known else None
        for r, result, known in zip(recordings, results, are_known)
    ]


def from_one_window(
    model: Whisper, recording: OpenRecording, result: DecodingResult, options: TranscribeOptions
) -> Transcription | None:
    """The clip's transcription where this result is all there is to it."""
    tokenizer = model_tokenizer(model, result.language, options.decoding.task)
    recording = replace(recording, tokenizer=tokenizer)
    window = Window(0, recording.frames)
    silent = leading_silence(recording.mel[:, : window.end])
    if silent == window.size:
        return Transcription("", [], result.language)
    if without_silence(window, silent) is not None:
        return None
    if needs_fallback(model, result, options) and len(options.temperatures()) > 1:
        return None
    split = split_window(model, recording, window, result, options, 0.0)
    if split.resume < recording.frames:
        return None
    recording.skipped.extend(split.skipped)
    segments = [replace(segment, id=i) for i, segment in enumerate(spoken(split.segments, window))]
    return collect(iter(segments), recording)


@torch.no_grad()
def gated(model: Whisper, recording: OpenRecording, segment: Segment) -> Segment:
    """The segment whose words carry the gate; as it is for models without a second branch."""
    tokenizer = recording.tokenizer
    tokens = [token for token in segment.tokens if token < tokenizer.eot]
    if model.dual is None or not segment.words or not tokens:
        return segment
    size = min(N_FRAMES, recording.frames - segment.seek)
    features = encode_window(model, recording.mel, Window(segment.seek, size))
    gates = token_gates(model, tokenizer, tokens, features)
    # the words are the tokens' text: a word's tokens are those that end within it
    ends = np.array([len(tokenizer.decode(tokens[: i + 1])) for i in range(len(tokens))])
    bounds = np.cumsum([0, *(len(word.word) for word in segment.words)])
    words: list[Word] = []
    for word, begin, end in zip(segment.words, bounds, bounds[1:]):
        own = [gate for gate, at in zip(gates, ends) if begin < at <= end]
        mean = float(np.mean(own)) if own else float("nan")
        words.append(GatedWord(word.word, word.start, word.end, word.probability, mean))
    return replace(segment, words=words)
