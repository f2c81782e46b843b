"""Recordings of every container, codec, layout, rate, length and gap: no fault, and each sound at its time.

40 of them here; DAWHISPER_FUZZ=500 makes 500, other ones each time.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.models import SURE, pair
from helpers.recordings import Recipe, beeps, heard_beeps, write
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dawhisper.audio import SAMPLE_RATE, SampleReader, load_audio
from dawhisper.model import Whisper

EXAMPLES = int(os.environ.get("DAWHISPER_FUZZ", 40))
ALL_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 37800, 44100, 48000, 88200, 96000, 192_000)
MPEG_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
ALL_LAYOUTS = ("mono", "stereo", "2.1", "3.0", "quad", "5.0", "5.1", "6.1", "7.1")
CODECS = {  # rates, layouts
    **dict.fromkeys(
        (
            "pcm_s16le",
            "pcm_s16be",
            "pcm_s24le",
            "pcm_f32le",
            "pcm_f64le",
            "pcm_s32le",
            "pcm_u8",
            "pcm_alaw",
            "pcm_mulaw",
        ),
        (ALL_RATES, ALL_LAYOUTS),
    ),
    "flac": (ALL_RATES, ("mono", "stereo", "3.0", "quad", "5.0", "5.1", "7.1")),
    "alac": (ALL_RATES[:10], ("mono", "stereo", "3.0")),
    "wavpack": (ALL_RATES[:10], ("mono", "stereo", "5.1")),
    "tta": (ALL_RATES[:10], ("mono", "stereo")),
    "libopus": ((8000, 12000, 16000, 24000, 48000), ("mono", "stereo", "quad", "5.1", "7.1")),
    "libmp3lame": (MPEG_RATES, ("mono", "stereo")),
    "mp2": ((16000, 22050, 24000, 32000, 44100, 48000), ("mono", "stereo")),
    "aac": (MPEG_RATES, ("mono", "stereo", "3.0", "5.1")),
    "ac3": ((32000, 44100, 48000), ("mono", "stereo", "5.1")),
}
LOSSLESS = ("flac", "alac", "wavpack", "tta")
CONTAINERS = {  # codecs; whether a late start and gaps are kept; whether there may be pictures
    "wav": (("pcm_s16le", "pcm_s24le", "pcm_f32le", "pcm_u8", "pcm_alaw", "pcm_mulaw"), False, False),
    "w64": (("pcm_s16le", "pcm_f64le"), False, False),
    "aiff": (("pcm_s16be",), False, False),
    "au": (("pcm_s16be",), False, False),
    "caf": (("pcm_s16le",), False, False),
    "flac": (("flac",), False, False),
    "wv": (("wavpack",), False, False),
    "tta": (("tta",), False, False),
    "mp3": (("libmp3lame",), False, False),
    "mp2": (("mp2",), False, False),
    "aac": (("aac",), False, False),
    "ac3": (("ac3",), False, False),
    "opus": (("libopus",), False, False),
    "oga": (("flac",), False, False),
    "m4a": (("aac", "alac"), True, False),
    "mp4": (("aac", "libmp3lame", "libopus", "ac3"), True, True),
    "mov": (("alac", "aac"), True, True),
    "mkv": (("aac", "libopus", "flac", "libmp3lame", "ac3", "pcm_s16le", "pcm_f32le", "alac"), True, True),
    "webm": (("libopus",), True, False),
    "ts": (("aac", "libmp3lame", "ac3", "mp2"), True, True),
    "avi": (("pcm_s16le", "libmp3lame"), False, True),
}
if int(av.__version__.split(".")[0]) < 18:
    del CONTAINERS["w64"]  # these lose the last packet of one whose bytes are filled up to eights
STREAMS = ("ts", "mp2", "mp3", "aac", "ac3")


@dataclass(frozen=True)
class Case:
    container: str
    recipe: Recipe
    seconds: float
    channel: int

    @property
    def times(self) -> list[float]:
        """Of the beeps, in the sound."""
        return [0.3, self.seconds - 0.5] if self.seconds > 1.6 else []

    @property
    def heard(self) -> list[float]:
        """Of the beeps, on the clock."""
        at, length = self.recipe.gap or (np.inf, 0.0)
        return [self.recipe.start + t + (length if t > at else 0.0) for t in self.times]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    container = draw(st.sampled_from(sorted(CONTAINERS)))
    codecs, keeps_time, pictures = CONTAINERS[container]
    codec = draw(st.sampled_from(codecs))
    rates, layouts = CODECS[codec]
    rate, layout = draw(st.sampled_from(rates)), draw(st.sampled_from(layouts))
    if container in ("aiff", "caf") and layout == "7.1":
        layout = "5.1"  # ffmpeg 8.1 overruns its memory when it opens these
    if container in ("ts", "mp4"):
        rate = max(rate, 16000)  # MPEG-2.5 is for neither
    # a few packets alone don't tell what they are
    long = st.floats(1.7, 6.0)
    seconds = draw(long if container in STREAMS else st.one_of(st.floats(0.02, 0.5), long))
    video = pictures and draw(st.booleans())
    start, gap = 0.0, None
    if keeps_time and seconds > 1.6:
        # without pictures nothing tells where the clock of a transport stream starts
        start = draw(st.sampled_from((0.0, 0.0, 0.7, 4.9))) if video or container != "ts" else 0.0
        gap = draw(st.sampled_from((None, (seconds / 2, 0.4), (seconds / 2, 3.0))))
    channels = av.AudioLayout(layout).nb_channels
    lossless = codec.startswith("pcm") or codec in LOSSLESS
    channel = draw(st.integers(0, channels - 1)) if lossless else 0  # lossy codecs cut a subwoofer's highs off
    return Case(container, Recipe(codec, rate, layout, start, gap, video), seconds, channel)


@pytest.fixture(scope="module")
def model() -> Whisper:
    return pair()[0]


@settings(
    max_examples=EXAMPLES,
    derandomize="DAWHISPER_FUZZ" not in os.environ,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),  # to make a case smaller takes minutes
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(case=cases())
def test_recordings_of_every_kind(model: Whisper, case: Case) -> None:
    channels = np.zeros((av.AudioLayout(case.recipe.layout).nb_channels, round(case.seconds * case.recipe.rate)))
    channels[case.channel] = beeps(case.seconds, case.recipe.rate, case.times)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        path = write(Path(folder) / f"a.{case.container}", case.recipe, channels)
        audio = load_audio(path)
        reader = SampleReader(path)
        assert np.array_equal(np.concatenate([reader.read(30_000) for _ in range(20)]), audio[:600_000])
        result = model.transcribe(path, language="en", temperature=0.0, sample_len=4, **SURE)
    assert not [w for w in said if "cut off" in str(w.message) or "damaged" in str(w.message)]

    codec, rate = case.recipe.codec, case.recipe.rate
    exact = codec.startswith("pcm") or codec in LOSSLESS
    slack = 0.06 if exact else 0.06 + 3000 / rate  # what encoders add, where the container can't tell
    length = len(audio) / SAMPLE_RATE
    gap = case.recipe.gap[1] if case.recipe.gap else 0.0
    assert length == pytest.approx(case.recipe.start + case.seconds + gap, abs=slack + 0.05)
    if case.times:
        assert heard_beeps(audio) == pytest.approx(case.heard, abs=slack)
    for segment in result.segments:
        assert 0 <= segment.start <= segment.end <= length
