"""Recordings made with PyAV: any container, codec, layout and rate, late starts, gaps and several tracks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


@dataclass(frozen=True)
class Recipe:
    """What a file is to be.

    start: seconds of the first sample on the clock. gap: (at, for) seconds by which what comes later is later still,
    `at` counted in sound. video: pictures from 0 on.
    """

    codec: str
    rate: int = 48000
    layout: str = "mono"
    start: float = 0.0
    gap: tuple[float, float] | None = None
    video: bool = False
    bit_rate: int | None = None
    options: tuple[tuple[str, str], ...] = ()
    codec_options: tuple[tuple[str, str], ...] = ()


def write(path: Path, recipe: Recipe, *tracks: np.ndarray) -> Path:
    """Write sound tracks, each float samples [channels, n], and what else the recipe asks for."""
    with av.open(str(path), "w", options=dict(recipe.options)) as container:
        pictures = None
        if recipe.video:
            pictures = container.add_stream("mpeg4", rate=10)
            pictures.width, pictures.height, pictures.pix_fmt = 64, 64, "yuv420p"
        made = {"layout": recipe.layout, "options": dict(recipe.codec_options)}
        streams = [container.add_stream(recipe.codec, rate=recipe.rate, **made) for _ in tracks]
        for stream in streams:
            if recipe.bit_rate:
                stream.bit_rate = recipe.bit_rate
        if pictures is not None:
            longest = max(track.shape[1] for track in tracks) / recipe.rate + recipe.start
            for i in range(max(round(10 * longest), 1)):
                picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 2 * i % 256, np.uint8), format="rgb24")
                container.mux(pictures.encode(picture))
            container.mux(pictures.encode(None))
        for stream, channels in zip(streams, tracks):
            for frame in _frames(stream, recipe, channels):
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return path


def _frames(stream: av.AudioStream, recipe: Recipe, channels: np.ndarray) -> Sequence[av.AudioFrame]:
    rate = recipe.rate
    packed = np.ascontiguousarray(channels.T, np.float32).reshape(1, -1)
    whole = av.AudioFrame.from_ndarray(packed, "flt", recipe.layout)
    whole.sample_rate, whole.pts, whole.time_base = rate, 0, Fraction(1, rate)
    resampler = av.AudioResampler(stream.format, stream.layout, rate, stream.frame_size or 1024)
    frames = [*resampler.resample(whole), *resampler.resample(None)]
    for frame in frames:
        late = recipe.start
        if recipe.gap is not None and frame.pts >= recipe.gap[0] * rate:
            late += recipe.gap[1]
        frame.pts += round(late * rate)
    return frames


def beeps(seconds: float, rate: int, times: Sequence[float], pitch: float = 600.0, length: float = 0.2) -> np.ndarray:
    """Tones at these times in silence, float32 [n]."""
    t = np.arange(round(seconds * rate)) / rate
    on = np.zeros(len(t), bool)
    for time in times:
        on |= (t >= time) & (t < time + length)
    return (0.4 * np.sin(2 * np.pi * pitch * t) * on).astype(np.float32)


def heard_beeps(samples: np.ndarray, rate: int = 16000) -> list[float]:
    """When tones begin, in seconds."""
    size = rate // 200
    loud = np.abs(samples[: len(samples) // size * size]).reshape(-1, size).max(axis=1)
    loud = loud > 0.3 * max(float(loud.max()), 1e-9)
    # an encoder's ripples are no beeps of their own
    starts = [i for i in np.flatnonzero(loud) if not loud[max(i - 10, 0) : i].any()]
    return [i * size / rate for i in starts]
