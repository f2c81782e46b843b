"""Where somebody speaks, and from that: where a recording is cut into windows of up to 30 seconds.

Speech is found by Silero's voice activity detector where the package silero-vad is installed (the extra `vad`), and by
loudness otherwise. A recording is read in blocks, so that one of many hours takes no more memory than a short one.
Cuts lie between steps of 160 ms, which is both a whole number of the detector's frames and of spectrogram frames.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from .audio import HOP_LENGTH, N_SAMPLES, SAMPLE_RATE, SampleReader
from .errors import OptionError
from .options import option

VAD_FRAME = 512  # samples that the detector judges at once, 32 ms
STEP = 5 * VAD_FRAME  # 160 ms
BLOCK = 200 * STEP  # 32 s, read and judged at once
CONTEXT = 8 * STEP  # the detector hears 1.3 s before a block again, to be settled when the block starts
LONGEST_WINDOW = N_SAMPLES // STEP  # steps of a window: 29.92 s
SHORTEST_WINDOW = 125  # steps, 20 s: before this a window is not cut where it could be longer
PAUSE = 0.3  # of 3.0: as little speech as this in 640 ms makes a pause

THRESHOLD = 0.5  # probability from which on a step is speech

SOON = 31  # steps, 5 s: speech that starts by then leaves enough of the window to tell its language

SILENCE = np.zeros(0, np.float32)  # of no length

Detector = Callable[[np.ndarray], np.ndarray]  # samples [n] -> probability of speech of each frame [n / 512]


@dataclass(frozen=True)
class VadOptions:
    """What counts as speech; the names are Silero's, times are rounded to steps of 160 ms.

    threshold: probability from which on sound is speech. min_speech_duration_ms: shorter sounds are none.
    speech_pad_ms: kept before and behind speech. min_silence_duration_ms: silence, without this padding, that is worth
    leaving out. max_speech_duration_s: the longest window, which ends in a pause of its last third if it can.
    """

    threshold: float = option(
        THRESHOLD, "probability from which on sound counts as speech, also where windows are cut", name="vad_threshold"
    )
    min_speech_duration_ms: int = option(
        0, "with --vad_filter: shorter sounds are no speech", name="vad_min_speech_duration_ms"
    )
    min_silence_duration_ms: int = option(
        960, "with --vad_filter: shorter silence is not left out", name="vad_min_silence_duration_ms"
    )
    speech_pad_ms: int = option(480, "with --vad_filter: kept before and behind speech", name="vad_speech_pad_ms")
    max_speech_duration_s: float = option(
        30.0, "with --batch_size: windows are no longer than this", name="vad_max_speech_duration_s"
    )

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise OptionError(f"vad_threshold lies between 0 and 1, not {self.threshold}")
        for name in ("min_speech_duration_ms", "min_silence_duration_ms", "speech_pad_ms"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"vad_{name} is 0 or more, not {getattr(self, name)}")
        if self.max_speech_duration_s < 2:
            raise OptionError(f"vad_max_speech_duration_s is at least 2, not {self.max_speech_duration_s}")

    @property
    def padding(self) -> int:
        """In steps."""
        return in_steps(self.speech_pad_ms)

    @property
    def min_silence(self) -> int:
        """In steps, at least one."""
        return max(in_steps(self.min_silence_duration_ms), 1)

    @property
    def longest_window(self) -> int:
        """In steps."""
        return min(int(self.max_speech_duration_s * SAMPLE_RATE) // STEP, LONGEST_WINDOW)

    @property
    def shortest_window(self) -> int:
        """In steps: before this a window is not cut where it could be longer."""
        return self.longest_window * SHORTEST_WINDOW // LONGEST_WINDOW

    def loud(self, speech: np.ndarray) -> np.ndarray:
        """The steps that are speech, out of the probabilities of all; a short sound at the end may go on behind it."""
        is_speech = speech >= self.threshold
        if in_steps(self.min_speech_duration_ms) > 1:
            edges = np.flatnonzero(np.diff(is_speech, prepend=False, append=False))
            for first, end in zip(edges[::2], edges[1::2]):
                if end - first < in_steps(self.min_speech_duration_ms) and end < len(speech):
                    is_speech[first:end] = False
        return np.flatnonzero(is_speech)


def in_steps(milliseconds: float) -> int:
    return round(milliseconds * SAMPLE_RATE / 1000 / STEP)


DEFAULT_VAD = VadOptions()


@dataclass(frozen=True)
class Skip:
    """A part of a recording that gives no text, in seconds, and why."""

    start: float
    end: float
    why: str


@dataclass(frozen=True)
class Chunk:
    """What is to be decoded as one window: samples from spectrogram frame `seek` on, and the speech of each step."""

    seek: int
    samples: np.ndarray  # [n], n <= 480,000
    speech: np.ndarray  # [n / 2560], probabilities
    vad: VadOptions = DEFAULT_VAD

    @property
    def size(self) -> int:
        """In spectrogram frames, whole ones."""
        return len(self.samples) // HOP_LENGTH

    def has_speech(self, seek: int) -> bool:
        """Whether there is speech from this spectrogram frame on."""
        return bool((self.speech[-(-(seek - self.seek) * HOP_LENGTH // STEP) :] >= self.vad.threshold).any())

    def from_speech(self) -> Chunk | None:
        """This from its first speech on, or all of it where that comes soon; None without speech."""
        loud = self.vad.loud(self.speech)
        if not len(loud):
            return None
        first = max(int(loud[0]) - self.vad.padding, 0)
        return self if first <= SOON else self.rest(self.seek + first * STEP // HOP_LENGTH)

    def rest(self, seek: int) -> Chunk:
        """What is left from this spectrogram frame on."""
        first = (seek - self.seek) * HOP_LENGTH
        return replace(self, seek=seek, samples=self.samples[first:], speech=self.speech[first // STEP :])


@dataclass(frozen=True)
class Block:
    """What is read and judged at once: up to 32 s of samples, and the speech of each step."""

    samples: np.ndarray  # [n], n <= 512,000; fewer at the end alone
    speech: np.ndarray  # [n / 2560], probabilities


def judged(reader: SampleReader, end: int | None, before: np.ndarray = SILENCE) -> Iterator[Block]:
    """What comes from the reader, up to its sample `end`; `before`: the samples before it, where they are to be heard.

    A block's speech depends on its samples and on `CONTEXT` before them alone.
    """
    while True:
        samples = reader.read(BLOCK if end is None else min(BLOCK, end - reader.position))
        if len(samples):
            before = before[-CONTEXT:]
            frames = detector()(np.concatenate([before, samples]))[len(before) // VAD_FRAME :]
            frames = np.pad(frames, (0, -len(frames) % 5))
            yield Block(samples, frames.reshape(-1, 5).max(axis=1))
        if len(samples) < BLOCK:
            return
        before = samples


def cut(
    blocks: Iterator[Block], start: int, drop_silence: bool, vad: VadOptions = DEFAULT_VAD
) -> Iterator[Chunk | Skip]:
    """Cut blocks, of which the first begins at sample `start`, into windows; with `drop_silence`, leave silence out.

    A window that can't hold the rest ends in the latest pause of its last third. Windows don't overlap, and
    together with the skips they cover everything.
    """
    heard = _Buffer(blocks, start, vad)
    while heard.fill():
        if drop_silence:
            if (skip := _skip_silence(heard)) is not None:
                yield skip
            if not heard.fill():
                break
        steps = _window(heard.speech, heard.ended, vad)
        yield heard.take(steps - (_trailing_silence(heard.speech[:steps], vad) if drop_silence else 0))


class _Buffer:
    """What was read and judged, and not yet taken: at least 30 s, where there is as much."""

    def __init__(self, blocks: Iterator[Block], start: int, vad: VadOptions):
        self.blocks, self.start, self.vad = blocks, start, vad  # start: in samples, of what is in here
        self.samples = self.speech = SILENCE
        self.ended = False

    def fill(self) -> bool:
        """Read on where there is too little; False at the end."""
        while not self.ended and len(self.speech) <= LONGEST_WINDOW:
            block = next(self.blocks, None)
            self.ended = block is None or len(block.samples) < BLOCK
            if block is not None:
                self.speech = np.concatenate([self.speech, block.speech])
                self.samples = np.concatenate([self.samples, block.samples])
        return bool(len(self.samples))

    def take(self, steps: int) -> Chunk:
        chunk = Chunk(self.start // HOP_LENGTH, self.samples[: steps * STEP], self.speech[:steps], self.vad)
        self.start += len(chunk.samples)
        self.samples, self.speech = self.samples[steps * STEP :], self.speech[steps:]
        return chunk


def _skip_silence(heard: _Buffer) -> Skip | None:
    """Go on to where speech starts."""
    start, vad = heard.start, heard.vad
    while heard.fill():
        loud = vad.loud(heard.speech)
        if len(loud):
            silent = max(int(loud[0]) - vad.padding, 0)
            if silent >= vad.min_silence or heard.start > start:
                heard.take(silent)
            break
        heard.take(len(heard.speech) - (0 if heard.ended else min(vad.padding, len(heard.speech) - 1)))
    return Skip(start / SAMPLE_RATE, heard.start / SAMPLE_RATE, "no voice") if heard.start > start else None


def _trailing_silence(speech: np.ndarray, vad: VadOptions) -> int:
    """Steps that can be left out at the end."""
    loud = vad.loud(speech)
    silent = len(speech) - 1 - int(loud[-1]) - vad.padding if len(loud) else 0
    return silent if silent >= vad.min_silence else 0


def _window(speech: np.ndarray, ended: bool, vad: VadOptions) -> int:
    """Steps of the next window: all that is left, or up to its latest pause, or else its quietest moment."""
    longest, shortest = vad.longest_window, vad.shortest_window
    if ended and len(speech) <= longest:
        return len(speech)
    # how much speech there is around each border between two steps
    around = np.convolve(speech[: longest + 2], [0.5, 1.0, 1.0, 0.5], mode="valid")[shortest - 2 :]
    pauses = np.flatnonzero(around < PAUSE)
    return shortest + int(pauses[-1] if len(pauses) else around.argmin())


@cache
def detector() -> Detector:
    """Silero's detector, or loudness where it is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("silero_vad", "onnxruntime")):
        return loudness
    threads = torch.get_num_threads()
    from silero_vad import load_silero_vad

    torch.set_num_threads(threads)  # the import sets it to one
    try:
        return load_silero_vad(sequence=True).audio_forward
    except TypeError:
        raise OptionError("this silero-vad is too old: pip install -U 'dawhisper[vad]', or uninstall it") from None


def loudness(samples: np.ndarray) -> np.ndarray:
    """A stand-in for a detector: how certainly each frame is louder than 35 dB below the loudest ones, and -60 dBFS.

    In steady noise everything counts as speech: rather decode noise than lose words.
    """
    frames = np.pad(samples, (0, -len(samples) % VAD_FRAME)).reshape(-1, VAD_FRAME)
    decibels = 10 * np.log10(np.square(frames, dtype=np.float64).mean(axis=1) + 1e-12)
    floor = max(float(np.percentile(decibels, 95)) - 35, -60.0)
    return 1 / (1 + np.exp(-(decibels - floor) / 5))
