"""What one window gives: how much is encoded, when it is decoded again, what is silence or made up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from helpers.models import MULTILINGUAL, heard, pair
from helpers.sound import noise

from dawhisper.audio import HOP_LENGTH, SAMPLE_RATE
from dawhisper.model import Whisper
from dawhisper.timing import Word
from dawhisper.transcription import Segment, TranscribeOptions
from dawhisper.window import (
    Window,
    encode_window,
    is_anomalous,
    is_silence,
    last_windows,
    leading_silence,
    needs_fallback,
)


def test_a_window_is_encoded_as_long_as_the_model_was_trained_for() -> None:
    mel = torch.randn(1, 80, 3000)
    assert encode_window(Whisper(MULTILINGUAL), mel, Window(0, 410)).primary.shape[1] == 1500
    assert encode_window(Whisper(MULTILINGUAL, variable_audio_ctx=True), mel, Window(0, 410)).primary.shape[1] == 300
    assert encode_window(Whisper(MULTILINGUAL, variable_audio_ctx=True), mel, Window(0, 3000)).primary.shape[1] == 1500


def test_fallback_and_silence() -> None:
    model, options = Whisper(MULTILINGUAL), TranscribeOptions()
    assert not needs_fallback(model, heard(), options)
    assert needs_fallback(model, heard(avg_logprob=-1.2), options)
    assert needs_fallback(model, heard(ratio=2.5), options)
    assert not needs_fallback(model, heard(avg_logprob=-1.2, no_speech=0.7), options)
    assert needs_fallback(model, heard(ratio=2.5, no_speech=0.7), options)
    assert is_silence(model, heard(avg_logprob=-1.2, no_speech=0.7), options)
    assert not is_silence(model, heard(no_speech=0.7), options)
    assert is_silence(model, heard(no_speech=0.7), replace(options, logprob_threshold=None))
    assert not is_silence(model, heard(avg_logprob=-1.2, no_speech=0.7), replace(options, no_speech_threshold=None))
    model.knows_silence = True  # then a likely text does not speak against it
    assert is_silence(model, heard(no_speech=0.7), options) and not is_silence(model, heard(no_speech=0.5), options)
    assert not needs_fallback(model, heard(ratio=2.5, no_speech=0.7), options)
    assert needs_fallback(model, heard(ratio=2.5), options)
    assert not is_silence(model, heard(no_speech=0.7), replace(options, no_speech_threshold=None))


def test_anomalous_words() -> None:
    def segment(*words: Word) -> Segment:
        return Segment(0, 0, 0, 1, "", [], 0, 0, 0, 0, list(words))

    good = Word(" fine", 0.0, 0.4, 0.9)
    assert not is_anomalous(segment(good, good))
    assert is_anomalous(segment(replace(good, probability=0.1)))
    assert is_anomalous(segment(good, replace(good, end=6.0)))
    assert not is_anomalous(segment(good, good, good, replace(good, probability=0.1)))
    assert not is_anomalous(segment())


def test_leading_silence_of_each_window() -> None:
    """Of windows that start with 0, 2 and 4 s of zeros, and of one that is nothing else; the shortest counts alone."""
    model, _ = pair()
    sound = noise(3) + 0.01
    clips = [np.concatenate([np.zeros(s * SAMPLE_RATE, np.float32), sound]) for s in (0, 2, 4)]
    clips.append(np.zeros(SAMPLE_RATE, np.float32))
    mel = last_windows(model, clips)
    sizes = [len(clip) // HOP_LENGTH for clip in clips]
    silent = leading_silence(mel, sizes)
    assert silent == [0, 199, 399, 100]  # a frame hears 12.5 ms beyond its place
    assert silent == [leading_silence(mel[i : i + 1, :, :size], [size])[0] for i, size in enumerate(sizes)]
    assert not any(mel[i, :, size:].any() for i, size in enumerate(sizes))
