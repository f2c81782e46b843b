"""Long form against openai-whisper's own transcribe(), on random models and on real ones."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whisper
from helpers.models import FAST, MULTILINGUAL, SURE, VARIANTS, pair, talkative, trained
from helpers.sound import noise

import dawhisper
from dawhisper import timing
from dawhisper.errors import AudioError, OptionError
from dawhisper.model import AudioFeatures, DualOptions, Whisper
from dawhisper.timing import dtw


def assert_same(ours: Whisper, theirs: whisper.Whisper, audio: np.ndarray, **options: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    expected = whisper.transcribe(theirs, audio, fp16=False, **options)
    torch.manual_seed(1)
    got = dawhisper.transcribe(ours, audio, **options).to_dict()
    assert got["text"] == expected["text"]
    assert got["language"] == expected["language"]
    said = [segment for segment in expected["segments"] if segment["text"]]  # those that say nothing are left out
    assert len(got["segments"]) == len(said)
    for i, (a, b) in enumerate(zip(got["segments"], said)):
        assert set(a) == set(b)
        b["id"] = i
        within(b, last_frame(b["seek"], len(audio) // 160, options) / 100)
        for key in ("id", "seek", "text", "tokens", "temperature"):
            assert a[key] == b[key], key
        for key in ("start", "end", "avg_logprob", "compression_ratio", "no_speech_prob"):
            assert a[key] == pytest.approx(b[key], abs=1e-3), key
        for word, other in zip(a.get("words", ()), b.get("words", ()), strict=True):
            assert word["word"] == other["word"]
            assert word["probability"] == pytest.approx(other["probability"], abs=1e-3)
            assert word["start"] == pytest.approx(other["start"], abs=0.02)
            assert word["end"] == pytest.approx(other["end"], abs=0.02)
    return got


def last_frame(seek: int, frames: int, options: dict[str, Any]) -> int:
    """Of the window that starts at `seek`."""
    points = options.get("clip_timestamps", [])
    points = [round(100 * float(t)) for t in (points.split(",") if isinstance(points, str) else points)] or [0]
    ends = [end for start, end in zip(points[::2], [*points[1::2], frames]) if start <= seek < end]
    return min(seek + 3000, frames, *ends)


def within(segment: dict[str, Any], end: float) -> None:
    """openai-whisper's times go on in the silence behind the window's audio; ours end with it."""
    if segment["start"] >= end:
        segment["start"] = min(segment["start"], max(segment["seek"] / 100, end - 0.1))
    for timed in (segment, *segment.get("words", ())):
        timed["start"], timed["end"] = min(timed["start"], end), min(timed["end"], end)


CASES = {
    "defaults": {},
    "language": {"language": "az"},
    "sure": SURE,
    "beam": {**SURE, "beam_size": 2},
    "best of": {"temperature": 0.3, "best_of": 2, "language": "en"},
    "prompt": {**SURE, "initial_prompt": "Scottish history."},
    "carried prompt": {**SURE, "initial_prompt": "Scottish history.", "carry_initial_prompt": True},
    "unconditioned": {**SURE, "initial_prompt": "One", "condition_on_previous_text": False},
    "clips": {**SURE, "clip_timestamps": "2,9.5,20,21,33"},
    "clip list": {**SURE, "clip_timestamps": [5.0, 30.0]},
    "words": {**SURE, "word_timestamps": True},
    "hallucinations": {**SURE, "word_timestamps": True, "hallucination_silence_threshold": 0.5},
    "long hallucinations": {**SURE, "word_timestamps": True, "hallucination_silence_threshold": 5.0},
    "translate": {**SURE, "task": "translate"},
    "no timestamps": {**SURE, "without_timestamps": True},
    "silence": {"no_speech_threshold": 0.0, "logprob_threshold": 0.0},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_equals_openai_whisper(case: str) -> None:
    ours, theirs = pair()
    assert_same(ours, theirs, noise(42), **{**FAST, **CASES[case]})


def test_english_only_model() -> None:
    ours, theirs = pair(VARIANTS["english"])
    assert_same(ours, theirs, noise(8), **FAST, **SURE)


def test_real_speech(base_path: Path, assets: Path) -> None:
    """base on more than a window, with word times, and on a clip with beams.

    A clip again and again would do for both packages, but its text looks like a loop, and is decoded at every
    temperature.
    """
    ours, theirs = (
        dawhisper.load_model(base_path, device="cpu", dtype="fp32"),
        whisper.load_model(str(base_path), device="cpu"),
    )
    clip, *others = (dawhisper.load_audio(assets / f"speech{name}.opus") for name in ("", "_quiet", "_noisy"))
    pause = 1e-3 * np.random.default_rng(0).standard_normal(9 * 16000).astype(np.float32)  # silence is skipped here
    audio = np.concatenate([clip, pause, others[0], pause, others[1], clip])
    result = assert_same(ours, theirs, audio, word_timestamps=True, language="en")
    assert sum(len(s["words"]) for s in result["segments"]) > 40
    assert_same(ours, theirs, clip, beam_size=5, best_of=5)


@pytest.mark.parametrize("sound", ["silence", "white noise"])
def test_no_words_without_speech(sound: str, base_path: Path) -> None:
    """Ninety seconds here; ten minutes were run by hand."""
    audio = np.zeros(90 * 16000, np.float32)
    if sound == "white noise":
        audio = np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32) * 0.05
    assert dawhisper.load_model(base_path, device="cpu").transcribe(audio).text.strip() == ""


def test_segments_come_as_soon_as_they_are_known() -> None:
    model, _ = pair()
    windows = 0

    def counting(mel: torch.Tensor) -> AudioFeatures:
        nonlocal windows
        windows += 1
        return encode(mel)

    encode, model.encode = model.encode, counting  # type: ignore[method-assign]
    segments, info = dawhisper.transcribe_lazily(model, noise(100), language="en", **FAST, **SURE)
    assert info.duration == 100
    assert windows == 0
    next(segments)
    assert windows == 1
    list(islice(segments, 1000))
    assert windows >= 4


def test_many_recordings_in_one_call() -> None:
    model, _ = pair()
    several = [noise(3, seed=1), torch.from_numpy(noise(5, seed=2))]
    options = {"language": "en", **FAST, **SURE}
    assert model.transcribe(several, **options) == [model.transcribe(one, **options) for one in several]


def test_the_result_is_read_like_openai_whispers() -> None:
    model, _ = pair()
    result = model.transcribe(noise(3), language="en", word_timestamps=True, **FAST, **SURE)
    assert result["text"] == result.text
    assert result["segments"][0]["words"][0]["word"] == result.segments[0].words[0].word


def test_a_dual_model_transcribes_with_words() -> None:
    model = talkative(trained(DualOptions()))
    result = model.transcribe(noise(35), language="en", word_timestamps=True, **FAST, **SURE)
    assert result.segments
    assert all(s.start <= s.end for s in result.segments)


def test_word_times_leave_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()

    def as_numba(cost: torch.Tensor) -> np.ndarray:
        torch.set_num_threads(threads + 1)  # its first parallel function in a process
        return dtw(cost)

    monkeypatch.setattr(timing, "dtw", as_numba)
    model, _ = pair()
    result = model.transcribe(noise(3), language="en", word_timestamps=True, **FAST, **SURE)
    assert result.segments[0].words
    assert torch.get_num_threads() == threads


def test_the_sound_and_a_second_are_encoded_where_the_model_was_trained_so(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, frames, encode = talkative(Whisper(MULTILINGUAL, variable_audio_ctx=True).eval()), [], Whisper.encode
    monkeypatch.setattr(Whisper, "encode", lambda self, mel: frames.append(mel.shape[-1]) or encode(self, mel))
    result = model.transcribe(noise(3.4), word_timestamps=True, **FAST, **SURE)  # detects the language too
    assert result.segments
    assert frames[0] == 500
    assert max(frames) == 500
    assert all(frame % 100 == 0 for frame in frames)


def test_digital_silence_is_not_decoded() -> None:
    model, _ = pair()
    options = {"language": "en", **FAST, **SURE}
    audio = np.concatenate([noise(30), np.zeros(90 * 16000, np.float32), noise(5)])
    seeks = {s.seek for s in model.transcribe(audio, **options).segments}
    assert [s for s in seeks if s < 3000]
    assert not [s for s in seeks if 3100 <= s <= 9000]  # windows that lie in the silence as a whole
    assert [s for s in seeks if s > 9000]
    assert model.transcribe(np.zeros(16000, np.float32), **options).segments == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"langauge": "en"}, "did you mean language"),
        ({"language": "azerbajani"}, "azerbaijani"),
        ({"clip_timestamps": "1,b"}, "in seconds"),
        ({"clip_timestamps": "5,2"}, "go back"),
        ({"temperature": (0.0, -1.0)}, "temperature"),
        ({"prompt": "x"}, "unknown option 'prompt'"),
    ],
)
def test_wrong_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        dawhisper.transcribe(pair()[0], noise(1), **options)


def test_audio_that_cannot_be_used() -> None:
    model, _ = pair()
    with pytest.raises(AudioError):
        model.transcribe(np.full(16000, np.nan, np.float32))
    with pytest.raises(AudioError):
        model.transcribe(np.zeros(0, np.float32))


@pytest.mark.parametrize("batch_size", [None, 2])
def test_log_probabilities_and_n_best(batch_size: int | None) -> None:
    model = talkative(trained(DualOptions()))
    options = {**SURE, "language": "en", "sample_len": 16, "beam_size": 3, "batch_size": batch_size, "temperature": 0.0}
    audio = noise(40.0)
    plain = dawhisper.transcribe(model, audio, **options, word_timestamps=True).to_dict()
    asked = dawhisper.transcribe(model, audio, **options, word_timestamps=True, logprobs=True, n_best=2).to_dict()
    assert asked.pop("n_best")[0]["alternatives"][0]["text"] in asked["text"].strip()
    for segment in asked["segments"]:
        logprobs = segment.pop("logprobs")
        assert len(logprobs) == len(segment["tokens"]) and max(logprobs) <= 0
        of_words = [each for word in segment["words"] for each in word.pop("logprobs")]
        assert of_words == [p for p, token in zip(logprobs, segment["tokens"]) if token < 50257]
    assert asked == plain


def test_n_best_needs_beams() -> None:
    with pytest.raises(OptionError, match="n_best 4 needs a beam_size as large"):
        dawhisper.transcribe(talkative(trained(DualOptions())), noise(1.0), n_best=4)
