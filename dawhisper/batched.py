"""Windows of one recording or of thousands, decoded many at a time.

Recordings are read in blocks and cut into windows at pauses (vad.py); a batch takes the next windows there are, of
whichever recording. What a window's text leaves unheard is a window again, in the next batch. Segments come in order.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Generic, TypeVar

import torch
from tqdm import tqdm
from whisper.audio import FRAMES_PER_SECOND
from whisper.tokenizer import Tokenizer

from .audio import Source
from .decoding import DecodingResult, language_code, model_tokenizer
from .front_end import hearings
from .model import AudioFeatures, Whisper
from .reading import Readers, Reading
from .transcription import (
    NBest,
    Segment,
    Settings,
    TranscribeOptions,
    Transcription,
    clip_frames,
    collect,
    say,
    warn_of_translated_words,
)
from .vad import Chunk, Skip, detector
from .window import (
    Prompt,
    Split,
    Window,
    decode_with_fallback,
    encode_batch,
    last_windows,
    leading_silence,
    mel_batch,
    pick,
    rows_of,
    split_window,
    spoken,
    spoken_languages,
    without_silence,
)

T = TypeVar("T")
READERS = 12  # processes that read beside a GPU, at 250 to 500 times real time each
HELD = 20  # windows without speech that are held back until the language is known


@dataclass
class Slot:
    """The place of a window's segments in its recording's order; `open` while a part of the window is to be heard."""

    segments: list[Segment] = field(default_factory=list)
    open: bool = True


@dataclass(eq=False)
class BatchedRecording:
    """What is known of a recording so far.

    settings: what is asked of it otherwise than of the others. segments: those known, in order. error: why it can't be
    read, or not to its end. finished: nothing will change.
    """

    source: Source
    settings: Settings = field(default_factory=Settings)
    language: str = ""
    duration: float = 0.0
    segments: list[Segment] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)
    n_best: list[NBest] = field(default_factory=list)
    error: Exception | None = None
    ended: bool = False  # all of it was read
    opening: Chunk | None = None  # its first speech, which tells its language
    slots: deque[Slot] = field(default_factory=deque)
    _tokenizer: Tokenizer | None = None

    @property
    def finished(self) -> bool:
        return self.ended and not self.slots

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None, "the language is not known yet"
        return self._tokenizer

    def speaks(self, model: Whisper, language: str, options: TranscribeOptions) -> None:
        """Its language is known now; `options` are those of all recordings."""
        task = self.settings.over(options).decoding.task
        self.language, self._tokenizer = language_code(language), model_tokenizer(model, language, task)

    def release(self) -> list[Segment]:
        """The segments that are known now and follow those before without a gap."""
        known: list[Segment] = []
        while self.slots and not self.slots[0].open:
            for segment in self.slots.popleft().segments:
                known.append(replace(segment, id=len(self.segments) + len(known)))
        self.segments += known
        return known

    def result(self) -> Transcription:
        return collect(self.segments, self)


@dataclass(frozen=True)
class PendingWindow:
    """A window to be decoded."""

    recording: BatchedRecording
    slot: Slot
    chunk: Chunk

    @property
    def window(self) -> Window:
        return Window(self.chunk.seek, self.chunk.size)


Read = tuple[BatchedRecording, Chunk | Skip | Exception | None]  # a piece of a recording, or its end


def readers_beside(devices: int) -> int:
    """Processes that read for each of so many GPUs in one machine, so that it need not wait."""
    return max(1, min(READERS, (os.cpu_count() or 1) // devices))


def transcribe_all(model: Whisper, sources: Sequence[Source], options: TranscribeOptions) -> list[Transcription]:
    """Transcribe recordings in common batches; the first that can't be read ends it with its AudioError."""
    recordings = [BatchedRecording(source) for source in sources]
    for recording, _ in iter_batched(model, recordings, options):
        if recording.error is not None:
            raise recording.error
    return [recording.result() for recording in recordings]


def segments_of_one(model: Whisper, recording: BatchedRecording, options: TranscribeOptions) -> Iterator[Segment]:
    for _, segments in iter_batched(model, [recording], options):
        yield from segments
    if recording.error is not None:
        raise recording.error


def iter_batched(
    model: Whisper, recordings: Iterable[BatchedRecording], options: TranscribeOptions, readers: Readers | None = None
) -> Iterator[tuple[BatchedRecording, list[Segment]]]:
    """Yields a recording and its next segments as they become known; of each one, once, when it is finished.

    Recordings are read ahead of the model, as many at once as `readers` are for (one beside a CPU, which is busy), and
    are asked for when they are to be read, so that they may come from a queue.
    """
    warn_of_translated_words(options)
    detector()  # loaded here, since its import changes torch's threads for a moment
    size = options.batch_size or 1
    again: deque[PendingWindow] = deque()  # what windows left unheard
    beside_gpu = model.device.type != "cpu"
    own = Readers(readers_beside(1)) if beside_gpu and readers is None else None
    with (
        nullcontext() if own is None else closing(own),
        closing(read_together(recordings, options, size, (readers or own) if beside_gpu else None)) as pieces,
        tqdm(unit="s", disable=options.verbose is not False) as bar,
    ):
        while True:
            batch, touched = next_batch(pieces, again, size, options)
            if not touched:
                return
            for job, split in zip(batch, hear_batch(model, batch, options)):
                rest = settle(job, split, options)
                again += [] if rest is None else [rest]
                bar.update(round((job.chunk.size - (rest.chunk.size if rest else 0)) / FRAMES_PER_SECOND, 2))
            for recording in touched:
                if recording.ended and not recording.language:  # nothing could be heard in it
                    recording.speaks(model, recording.settings.over(options).decoding.language or "en", options)
                known = recording.release()
                for segment in known:
                    say(segment, options)
                if known or recording.finished:
                    yield recording, known


def read(
    recordings: Iterable[BatchedRecording], options: TranscribeOptions, readers: Readers | None = None
) -> Generator[Read, None, None]:
    """What the recordings hold, one after the other; at the end of each, None or why it could not be read."""
    for recording in recordings:
        own = recording.settings.over(options)
        try:
            clips = clip_frames(own.clip_timestamps)
            reading = Reading(recording.source, options.audio_track, clips, own.vad_filter, own.vad)
            pieces = reading.pieces() if readers is None else readers.pieces(reading)
            for piece in opening_first(recording, pieces):
                yield recording, piece
            yield recording, None
        except Exception as error:  # the other recordings go on
            yield recording, error


def opening_first(recording: BatchedRecording, pieces: Iterator[Chunk | Skip]) -> Iterator[Chunk | Skip]:
    """The pieces; none before it is known where the recording's first speech is, or that there is none for long."""
    held: list[Chunk | Skip] = []
    for piece in pieces:
        if recording.opening is None:
            held.append(piece)
            recording.opening = piece.from_speech() if isinstance(piece, Chunk) else None
            if recording.opening is None and len(held) < HELD:
                continue
            yield from held
            held = []
        else:
            yield piece
    yield from held


def read_together(
    recordings: Iterable[BatchedRecording], options: TranscribeOptions, ahead: int, readers: Readers | None = None
) -> Generator[Read, None, None]:
    """What the recordings hold; each of some threads reads the next one there is, `ahead` pieces too early.

    readers: processes that read files for as many threads as they are to; closed where reading ends early.
    """
    shared, threads = OneAtATime(recordings), 1 if readers is None else readers.at_once
    lanes = deque(ReadAhead(read(shared, options, readers), ahead) for _ in range(threads))
    try:
        while lanes:
            piece = lanes[0].next()
            if piece is None:
                lanes.popleft().close()
            else:
                yield piece
                lanes.rotate(-1)
    finally:
        if lanes and readers is not None:
            readers.close()
        for lane in lanes:
            lane.close()


class OneAtATime(Iterator[T]):
    """Items that several threads may ask for."""

    def __init__(self, items: Iterable[T]):
        self.items, self.lock = iter(items), Lock()

    def __next__(self) -> T:
        with self.lock:
            return next(self.items)


class ReadAhead(Generic[T]):
    """Items of which up to `count` are made in a thread before they are asked for."""

    def __init__(self, items: Generator[T, None, None], count: int):
        self.items, self.pool = items, ThreadPoolExecutor(1)
        self.coming = deque(self.pool.submit(next, items, None) for _ in range(count))

    def next(self) -> T | None:
        """The next item; None at the end."""
        item = self.coming.popleft().result()
        if item is not None:
            self.coming.append(self.pool.submit(next, self.items, None))
        return item

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.items.close()


def next_batch(
    pieces: Iterator[Read],
    again: deque[PendingWindow],
    size: int,
    options: TranscribeOptions,
) -> tuple[list[PendingWindow], list[BatchedRecording]]:
    """Up to `size` windows, and the recordings about which something new is known or will be."""
    batch = [again.popleft() for _ in range(min(size, len(again)))]
    touched = {job.recording: None for job in batch}  # a set that keeps its order
    while len(batch) < size and (item := next(pieces, None)) is not None:
        recording, piece = item
        touched[recording] = None
        if isinstance(piece, Chunk):
            recording.duration = piece.seek / FRAMES_PER_SECOND + piece.size / FRAMES_PER_SECOND
            if piece.size:
                recording.slots.append(Slot())
                batch.append(PendingWindow(recording, recording.slots[-1], piece))
        elif isinstance(piece, Skip):
            recording.duration = piece.end
            recording.skipped.append(piece)
            say(piece, options)
        else:
            recording.ended, recording.error = True, piece
    return batch, list(touched)


def hear_batch(model: Whisper, batch: list[PendingWindow], options: TranscribeOptions) -> list[Split]:
    """What each window gave."""
    if not batch:
        return []
    heard, hearing_of = hearings([job.chunk.samples for job in batch], options.hearing(), model.device)
    mel = last_windows(model, heard)
    silent = leading_silence(mel[: len(batch)], [job.chunk.size for job in batch])
    later = [without_silence(job.window, frames) for job, frames in zip(batch, silent)]
    audible = [i for i, split in enumerate(later) if split is None]
    rows = rows_of(audible, hearing_of)
    of = [audible.index(hearing_of[row]) for row in rows]
    results = decode_jobs(model, mel if len(rows) == len(mel) else mel[rows], [batch[i] for i in audible], of, options)
    decoded = dict(zip(audible, results))
    return [
        split_window(
            model, job.recording, job.window, decoded[i], job.recording.settings.over(options), job.window.start
        )
        if split is None
        else split
        for i, (job, split) in enumerate(zip(batch, later))
    ]


def decode_jobs(
    model: Whisper, mel: torch.Tensor, jobs: list[PendingWindow], hearing_of: list[int], options: TranscribeOptions
) -> Iterator[DecodingResult]:
    """Decode windows [B, n_mels, frames], those asked for alike at once; find new recordings' languages first.

    hearing_of: which job each window is a hearing of; the first ones are the jobs', one each.
    """
    if not jobs:
        return iter(())
    features = encode_batch(model, mel)
    asked = [job.recording.settings.over(options) for job in jobs]
    new: dict[BatchedRecording, PendingWindow] = {}  # with its first window
    for job, own in zip(jobs, asked):
        if not job.recording.language and own.decoding.language:
            job.recording.speaks(model, own.decoding.language, options)
        elif not job.recording.language:
            new.setdefault(job.recording, job)
    for recording, language in zip(new, first_languages(model, list(new.values()), jobs, features, options)):
        recording.speaks(model, language, options)
    spoken_in = [job.recording.language for job in jobs]
    switching = [i for i, own in enumerate(asked) if own.multilingual]
    if switching:
        heard = spoken_languages(model, pick(features, switching), replace(options, verbose=None))
        for i, language in zip(switching, heard):
            spoken_in[i] = language

    alike: dict[tuple[str, Settings], list[int]] = {}
    for i, (job, language) in enumerate(zip(jobs, spoken_in)):
        alike.setdefault((language, job.recording.settings.of_text), []).append(i)
    results: dict[int, DecodingResult] = {}
    for (language, _), same in alike.items():
        own = asked[same[0]].speaking(language)
        prompt = Prompt.of(model, jobs[same[0]].recording.tokenizer, own).initial
        rows = rows_of(same, hearing_of)
        of = [hearing_of[row] for row in rows]
        results.update(zip(same, decode_with_fallback(model, pick(features, rows), own, prompt, of)))
    return (results[i] for i in range(len(jobs)))


def first_languages(
    model: Whisper,
    new: list[PendingWindow],
    jobs: list[PendingWindow],
    features: AudioFeatures,
    options: TranscribeOptions,
) -> list[str]:
    """The languages of new recordings, of each in its first speech; its window's features serve where that is in it."""
    if not new:
        return []
    openings = [job.recording.opening or job.chunk for job in new]
    chunks = [job.chunk for job in jobs]
    places = [next((i for i, chunk in enumerate(chunks) if chunk is opening), None) for opening in openings]
    here = [place for place in places if place is not None]
    if len(here) == len(openings):
        return spoken_languages(model, pick(features, here), options)
    mel = mel_batch(model, [opening.samples for opening in openings])
    return spoken_languages(model, mel.to(model.dtype), options)


def settle(job: PendingWindow, split: Split, options: TranscribeOptions) -> PendingWindow | None:
    """Put a window's segments in their place; returns what is left of it to be heard."""
    for skip in split.skipped:
        say(skip, options)
    job.recording.skipped += split.skipped
    job.recording.n_best += split.n_best
    job.slot.segments += spoken(split.segments, job.window)
    resume = split.resume if split.resume > job.chunk.seek else job.window.end
    if resume < job.window.end and (not split.heard or job.chunk.has_speech(resume)):
        return PendingWindow(job.recording, job.slot, job.chunk.rest(resume))
    job.slot.open = False
    return None
