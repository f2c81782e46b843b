"""What a transcription is: a dict too, with times within the recording and the language of its first speech."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whisper.utils
from helpers.models import FAST, SURE, pair
from helpers.sound import noise

import dawhisper
from dawhisper.decoding import DecodingOptions, asked_language
from dawhisper.errors import AudioError, OptionError
from dawhisper.model import Whisper
from dawhisper.serve.worker import Engine, TranscriptionTask
from dawhisper.transcribe_files import WriterOptions, write_outputs
from dawhisper.transcription import Segment, TranscribeOptions, Transcription

QUICK = {"language": "en", **FAST, **SURE}
ROOT = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def model() -> Whisper:
    return pair()[0]


def segment(text: str, words: list[Any] | None = None, start: float = 0.0, end: float = 1.0) -> Segment:
    return Segment(0, 0, start, end, text, [1] if text else [], 0.0, -0.1, 1.0, 0.0, words)


# ---- a dict


def test_a_transcription_is_a_mapping_and_a_dataclass(model: Whisper, tmp_path: Path) -> None:
    result = model.transcribe(noise(3), word_timestamps=True, **QUICK)
    assert isinstance(result, Mapping) and isinstance(result, dict)
    assert "text" in result and "words" not in result
    assert result.get("text") == result["text"] == result.text and result.get("nothing", 5) == 5
    assert list(result) == ["text", "segments", "language", "skipped"] and len(result) == 4
    assert dict(result) == {**result} == result.to_dict() == dict(result.items())
    assert json.loads(json.dumps(result)) == result.to_dict()
    for output_format in ("txt", "srt", "vtt", "tsv", "json"):
        whisper.utils.get_writer(output_format, str(tmp_path))(result, "s.wav")
        assert (tmp_path / f"s.{output_format}").stat().st_size
    with pytest.raises(AttributeError):
        result.text = "other"  # type: ignore[misc]


# ---- segments that say nothing


def test_what_says_nothing_is_in_no_output(tmp_path: Path) -> None:
    """A recording that begins with noise: its first segments are empty, with words or without."""
    for empty in (segment("", []), segment(" ", None), segment("")):
        result = Transcription(" Hello", [empty, segment(" Hello", start=1, end=2), empty], "en")
        write_outputs(result, "a", tmp_path, WriterOptions())
        assert (tmp_path / "a.srt").read_text() == "1\n00:00:01,000 --> 00:00:02,000\nHello\n\n"
        assert (tmp_path / "a.vtt").read_text() == "WEBVTT\n\n00:01.000 --> 00:02.000\nHello\n\n"
        assert (tmp_path / "a.tsv").read_text() == "start\tend\ttext\n1000\t2000\tHello\n"
        assert (tmp_path / "a.txt").read_text() == "Hello\n"
        assert len(json.loads((tmp_path / "a.json").read_text())["segments"]) == 1
    nothing = Transcription("", [segment("", [])], "en")
    write_outputs(nothing, "b", tmp_path, WriterOptions())
    assert (tmp_path / "b.srt").read_text() == ""


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("words", [False, True])
def test_words_are_none_or_lists_alike(words: bool, batch_size: int | None, model: Whisper) -> None:
    audio = np.concatenate([np.zeros(35 * 16000, np.float32), noise(40)])
    result = model.transcribe(audio, word_timestamps=words, batch_size=batch_size, **QUICK)
    assert len(result.segments) > 1
    for each in result.segments:
        assert each.text.strip() and (each.words is not None) == words


# ---- times


def spans(result: Transcription) -> list[tuple[float, float]]:
    timed = [*result.segments, *(word for each in result.segments for word in each.words or [])]
    return [(each.start, each.end) for each in timed]


@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("seconds", [0.3, 4.37, 33.3])
def test_no_time_beyond_the_recording(seconds: float, words: bool, batch_size: int | None, model: Whisper) -> None:
    """A random model writes any time stamps up to 30 s."""
    for seed in range(2):
        audio = noise(seconds, seed)
        result = model.transcribe(audio, word_timestamps=words, batch_size=batch_size, **QUICK)
        assert spans(result)
        for start, end in spans(result):
            assert 0 <= start <= end <= seconds + 1e-6


def test_no_time_beyond_a_clip_of_the_server(model: Whisper) -> None:
    engine = Engine({"m": model}, batch_size=2)
    options = TranscribeOptions.of(word_timestamps=True, **QUICK)
    futures = [engine.submit(TranscriptionTask("m", noise(3.21, seed=i), options)) for i in range(4)]
    for future in futures:
        for start, end in spans(future.result()):
            assert 0 <= start <= end <= 3.21
    engine.close()


@pytest.mark.parametrize("batch_size", [None, 2])
def test_text_behind_silence_starts_with_the_sound(batch_size: int | None, model: Whisper) -> None:
    audio = np.concatenate([np.zeros(int(5.5 * 16000), np.float32), noise(10) + 0.1 * np.random.rand(160_000)])
    result = model.transcribe(audio.astype(np.float32), batch_size=batch_size, **QUICK)
    assert min(start for start, _ in spans(result)) >= 5.3
    assert result.skipped[0].start == 0.0 and result.skipped[0].why == "digital silence"


def test_a_late_sound_track_has_its_text_at_the_videos_time(tiny_en_path: Path, assets: Path, tmp_path: Path) -> None:
    from helpers.recordings import Recipe
    from helpers.recordings import write as write_recording

    speech = dawhisper.load_audio(assets / "speech.opus")[None]
    path = write_recording(tmp_path / "late.mp4", Recipe("aac", 16000, start=5.0, video=True), speech)
    model = dawhisper.load_model(tiny_en_path, device="cpu")
    plain = model.transcribe(speech[0])
    for batch_size in (None, 2):
        late = model.transcribe(path, batch_size=batch_size)
        assert late.segments[0].start == pytest.approx(plain.segments[0].start + 5, abs=0.3)
        assert late.segments[-1].end == pytest.approx(plain.segments[-1].end + 5, abs=0.6)


# ---- language


def first_heard(model: Whisper, audio: np.ndarray, monkeypatch: pytest.MonkeyPatch, **options: Any) -> torch.Tensor:
    """What the language was read from: log-mel [n_mels, frames] or features [T, d]."""
    heard: list[torch.Tensor] = []

    def listening(model: Whisper, audio: Any, options: TranscribeOptions) -> list[str]:
        each = audio if isinstance(audio, torch.Tensor) else audio.primary
        heard.append(each[0])
        return ["es"] * len(each)

    for name in ("transcribe", "batched"):  # dawhisper.transcribe is the function
        monkeypatch.setattr(sys.modules[f"dawhisper.{name}"], "spoken_languages", listening)
    assert model.transcribe(audio, **FAST, **SURE, **options).language == "es"
    return heard[0]


@pytest.mark.parametrize("options", [{}, {"vad_filter": True}, {"batch_size": 2}])
def test_the_language_is_that_of_the_first_speech(
    options: dict[str, Any], model: Whisper, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the silence before it, 40 s or the first half of a window of it, nor of what is not transcribed."""
    if "batch_size" in options:
        pytest.importorskip("silero_vad", reason="loudness alone takes noise for speech: pip install 'dawhisper[vad]'")
    speech = dawhisper.load_audio(assets / "speech.opus")
    quiet = np.random.default_rng(0).standard_normal(40 * 16000).astype(np.float32) * 1e-3
    for silence in (40, 15):
        heard = first_heard(model, np.concatenate([quiet[: silence * 16000], speech]), monkeypatch, **options)
        assert heard.shape[0] == 80 and heard[:, :150].max() > heard.max() - 0.3  # log-mel that is loud at once


def test_the_language_is_read_within_the_clips(model: Whisper, assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speech = dawhisper.load_audio(assets / "speech.opus")
    audio = np.concatenate([speech, np.zeros(16000, np.float32), speech[: 3 * 16000]])
    start = (len(speech) + 16000) / 16000
    heard = first_heard(model, audio, monkeypatch, clip_timestamps=[start, start + 2])
    floor = heard.min()
    assert (heard[:, :190] > floor + 0.3).any() and (heard[:, 215:] == 0).all()  # padding


@pytest.mark.parametrize("options", [{}, {"vad_filter": True}, {"batch_size": 2}])
def test_spanish_after_silence(options: dict[str, Any], base_path: Path) -> None:
    spanish = dawhisper.load_audio(ROOT / "clips" / "spanish.opus")
    audio = np.concatenate([np.zeros(35 * 16000, np.float32), spanish])
    result = dawhisper.load_model(base_path, device="cpu").transcribe(audio, **options)
    assert result.language == "es" and "Buenos d" in result.text and "niños" in result.text
    assert min(start for start, _ in spans(result)) > 34


@pytest.mark.parametrize("batch_size", [None, 2])
def test_people_who_switch(batch_size: int | None, base_path: Path, assets: Path) -> None:
    english, spanish = (dawhisper.load_audio(p) for p in (assets / "speech.opus", ROOT / "clips" / "spanish.opus"))
    gap = np.zeros(max(30 * 16000 - len(english), 0), np.float32)
    model = dawhisper.load_model(base_path, device="cpu")
    result = model.transcribe(np.concatenate([english, gap, spanish]), multilingual=True, batch_size=batch_size)
    assert result.language == "en" and "Buenos d" in result.text
    with pytest.raises(OptionError, match="multilingual"):
        model.transcribe(english, multilingual=True, language="en")


@pytest.mark.parametrize(
    ("tag", "code"),
    [
        ("en-US", "en"),
        ("pt-BR", "pt"),
        ("zh-CN", "zh"),
        ("zh-TW", "zh"),
        ("zh_Hant_TW", "zh"),
        ("EN", "en"),
        ("nb-NO", "no"),
        ("iw", "he"),
        ("Spanish", "es"),
        (" french ", "fr"),
        ("auto", None),
        ("Auto", None),
        ("", None),
        (None, None),
    ],
)
def test_tags_are_understood(tag: str | None, code: str | None, model: Whisper) -> None:
    assert asked_language(tag) == code
    assert DecodingOptions(language=tag).language == code
    assert TranscribeOptions.of(language=tag).decoding.language == code


@pytest.mark.parametrize(("tag", "hint"), [("eng", "mean en?"), ("spa", "mean es?"), ("xx-YY", "a code such as")])
def test_other_tags_get_a_hint(tag: str, hint: str) -> None:
    with pytest.raises(OptionError) as error:
        asked_language(tag)
    assert hint in str(error.value) and tag in str(error.value)


# ---- what Python code passes


def test_recordings_of_every_kind_give_their_text(model: Whisper, assets: Path) -> None:
    path = assets / "speech.opus"
    audio = dawhisper.load_audio(path)
    for batch_size in (None, 2):
        options = {**QUICK, "batch_size": batch_size}
        want = model.transcribe(path, **options).text
        assert want
        with path.open("rb") as file:
            for source in (str(path), file, path.read_bytes(), audio, audio.tolist(), np.stack([audio, audio])):
                assert model.transcribe(source, **options).text == want
        frozen = audio[::-1]
        frozen.flags.writeable = False
        assert model.transcribe(frozen, **options).text == model.transcribe(audio[::-1].copy(), **options).text
        for wrong in (None, 5, {}, b"no audio"):
            with pytest.raises(AudioError):
                model.transcribe(wrong, **options)
    texts = [each.text for each in model.transcribe([path, audio, path.read_bytes()], **QUICK)]
    assert texts == [model.transcribe(path, **QUICK).text] * 3


def test_numbers_of_numpy_and_torch_as_options(model: Whisper) -> None:
    want = model.transcribe(noise(3), temperature=0.0, beam_size=2, batch_size=2, language="en", **SURE).text
    numbers = {"temperature": np.float32(0), "beam_size": np.int64(2), "batch_size": torch.tensor(2)}
    assert model.transcribe(noise(3), language="en", **SURE, **numbers).text == want
    for wrong in ({"temperature": np.nan}, {"temperature": (0.0, np.inf)}, {"clip_timestamps": [np.nan]},
                  {"no_speech_threshold": np.float32("inf")}, {"clip_timestamps": 5}, {"language": 5}):  # fmt: skip
        with pytest.raises(OptionError):
            model.transcribe(noise(1), **wrong)
