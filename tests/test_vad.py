"""Silero's settings: what each of them changes in where silence is left out and windows end."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.sound import bursts

from dawhisper import transcribe_files, vad
from dawhisper.audio import SampleReader
from dawhisper.cli import main
from dawhisper.errors import OptionError
from dawhisper.transcription import TranscribeOptions
from dawhisper.vad import Chunk, Skip, VadOptions, cut, judged

STEP = 0.16


@pytest.fixture(autouse=True)
def by_loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vad, "detector", lambda: vad.loudness)


def spoken(audio: np.ndarray, **options: Any) -> list[tuple[float, float]]:
    """What is heard of it, in seconds, with silence left out."""
    pieces = cut(judged(SampleReader(audio), None), 0, True, VadOptions(**options))
    return [(p.seek / 100, p.seek / 100 + len(p.samples) / 16000) for p in pieces if isinstance(p, Chunk)]


def test_padding_and_silence() -> None:
    audio = bursts(2, 30, 2)
    (_, end), (start, _) = spoken(audio)
    assert (end, start) == pytest.approx((2 + 4 * STEP, 32 - 3 * STEP), abs=STEP)
    (_, end), (start, _) = spoken(audio, speech_pad_ms=0)
    assert (end, start) == pytest.approx((2 + STEP, 32), abs=STEP)
    (_, end), (start, _) = spoken(audio, speech_pad_ms=1600)
    assert (end, start) == pytest.approx((2 + 11 * STEP, 32 - 10 * STEP), abs=STEP)
    short = bursts(25, 4, 25)  # its silence is at a window's end
    assert len(spoken(short)) == 2 and sum(b - a for a, b in spoken(short)) < 52
    assert sum(b - a for a, b in spoken(short, min_silence_duration_ms=5000)) == pytest.approx(54)


def test_threshold_and_short_sounds() -> None:
    audio = np.concatenate([bursts(2, 30), bursts(0.3, 30, 2)])
    assert len(spoken(audio)) == 3
    assert len(spoken(audio, min_speech_duration_ms=800)) == 2  # the click is none
    quiet = audio.copy()
    quiet[31 * 16000 : 33 * 16000] *= 0.02  # 34 dB below the rest
    assert len(spoken(quiet, threshold=0.5)) == 3 and len(spoken(quiet, threshold=0.9)) == 2


def test_the_longest_window() -> None:
    audio = bursts(*[1.5, 0.5] * 40)
    for longest in (5.0, 12.0, 30.0):
        windows = list(cut(judged(SampleReader(audio), None), 0, False, VadOptions(max_speech_duration_s=longest)))
        lengths = [len(p.samples) / 16000 for p in windows if isinstance(p, Chunk)]
        assert max(lengths) <= longest and min(lengths[:-1]) > longest / 2
        assert sum(lengths) == pytest.approx(80) and not any(isinstance(p, Skip) for p in windows)


def test_how_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = TranscribeOptions.of(vad_filter=True, vad_threshold=0.7, vad_speech_pad_ms=100)
    assert flat.vad == VadOptions(0.7, speech_pad_ms=100)
    assert TranscribeOptions.of(vad_parameters={"threshold": 0.7, "speech_pad_ms": 100}).vad == flat.vad
    parsed: dict[str, Any] = {}
    monkeypatch.setattr(transcribe_files, "transcribe_files", lambda *words: parsed.update(words[2]) or 0)
    assert main(["transcribe", "a.wav", "--vad_threshold", "0.7", "--vad-speech-pad-ms", "100"]) == 0
    assert TranscribeOptions.of(**parsed).vad == flat.vad
    with pytest.raises(OptionError, match="unknown option 'vad_treshold'; did you mean vad_threshold"):
        TranscribeOptions.of(vad_parameters={"treshold": 0.7})
    for name, value in (("threshold", 1.5), ("min_silence_duration_ms", -1), ("max_speech_duration_s", 0.5)):
        with pytest.raises(OptionError, match=f"vad_{name}"):
            VadOptions(**{name: value})
