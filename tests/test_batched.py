"""Windows cut at pauses, and decoded in batches: nothing lost, real times, order kept, against the sequential loop."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command_line import run
from helpers.models import FAST, SURE, heard, pair
from helpers.sound import bursts, hiss, noise, write_wav

import dawhisper
from dawhisper import batched, vad, window
from dawhisper.audio import SampleReader, load_audio
from dawhisper.batched import BatchedRecording, PendingWindow, Slot, iter_batched, read_together, settle
from dawhisper.decoding import DecodingOptions, DecodingResult
from dawhisper.errors import AudioError, OptionError
from dawhisper.model import AudioFeatures, Whisper
from dawhisper.reading import Readers
from dawhisper.transcription import Settings, TranscribeOptions
from dawhisper.vad import Chunk, Skip, cut, judged
from dawhisper.window import Split, decode_with_fallback

ENGLISH = {"language": "en", **FAST, **SURE}


@pytest.fixture(autouse=True)
def by_loudness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' sounds are no speech, which Silero knows; and it may not be installed."""
    for module in (vad, batched):
        monkeypatch.setattr(module, "detector", lambda: vad.loudness)


def pieces(audio: np.ndarray, drop_silence: bool = False) -> list[Chunk | Skip]:
    return list(cut(judged(SampleReader(audio), None), 0, drop_silence))


# ------------------------------------------------------------------------------------------------- reading, cutting


def test_reading_in_parts_gives_the_file(assets: Path) -> None:
    whole, reader, parts = load_audio(assets / "speech.opus"), SampleReader(assets / "speech.opus"), []
    while len(part := reader.read(12345)):
        parts.append(part)
    assert np.array_equal(np.concatenate(parts), whole)
    reader = SampleReader(assets / "speech.opus")
    reader.skip_to(30000)
    assert np.array_equal(reader.read(100), whole[30000:30100])


def test_reading_what_is_no_audio(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not audio\n" * 100)
    for bad in (tmp_path / "text.wav", tmp_path / "missing.wav", write_wav(tmp_path / "none.wav", np.zeros(0))):
        with pytest.raises(AudioError):
            SampleReader(bad).read(10)


@pytest.mark.parametrize("drop_silence", [False, True])
@pytest.mark.parametrize("seconds", [(0.5,), (100,), (20, 40, 30.3), (3, 90), (1, 8, 1, 8, 1, 100, 2)])
def test_windows_and_skips_cover_everything(seconds: tuple[float, ...], drop_silence: bool) -> None:
    audio = bursts(*seconds)
    at = 0
    for piece in pieces(audio, drop_silence):
        if isinstance(piece, Skip):
            assert drop_silence
            assert piece.start * 16000 == at
            at = round(piece.end * 16000)
            assert np.abs(audio[round(piece.start * 16000) : at]).max() == 0
        else:
            assert piece.seek * 160 == at
            assert 0 < len(piece.samples) <= 480000
            assert np.array_equal(piece.samples, audio[at : at + len(piece.samples)])
            assert len(piece.speech) == -(-len(piece.samples) // vad.STEP)
            at += len(piece.samples)
    assert at == len(audio)


def test_cuts_lie_in_pauses() -> None:
    audio = np.concatenate([hiss(11), np.zeros(16000, np.float32)] * 12)
    starts = [piece.seek / 100 for piece in pieces(audio) if isinstance(piece, Chunk)][1:]
    assert len(starts) == 5
    assert all(t % 12 > 11 for t in starts), starts


def test_what_is_left_of_a_window() -> None:
    audio = bursts(10, 10)
    (chunk,) = pieces(audio)
    assert isinstance(chunk, Chunk)
    assert chunk.has_speech(500)
    assert not chunk.has_speech(1050)
    rest = chunk.rest(500)
    assert (rest.seek, rest.size) == (500, 1500)
    assert np.array_equal(rest.samples, audio[80000:])
    options, slot = TranscribeOptions(), Slot()
    job = PendingWindow(BatchedRecording(audio), slot, chunk)
    again = settle(job, Split([], 500), options)
    assert again is not None
    assert again.chunk.seek == 500
    assert slot.open
    assert settle(again, Split([], 1050), options) is None  # only silence is left
    assert not slot.open


def test_silero_hears_speech(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnxruntime", "silero_vad"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    monkeypatch.undo()
    threads = torch.get_num_threads()
    silero = vad.detector()
    assert torch.get_num_threads() == threads
    assert silero is not vad.loudness
    clip = load_audio(assets / "speech.opus")
    assert np.mean(silero(clip) > 0.5) > 0.5
    assert np.mean(silero(noise(5)) > 0.5) < 0.1


# --------------------------------------------------------------------------------------------------------- batches


def test_short_recordings_give_what_they_give_alone() -> None:
    model, _ = pair()
    several = [noise(2 + i, seed=i) for i in range(7)]
    options = {**ENGLISH, "without_timestamps": True}  # one window each
    together = dawhisper.transcribe(model, several, batch_size=3, **options)
    alone = dawhisper.transcribe(model, several, **options)
    for a, b in zip(together, alone, strict=True):
        assert a.text == b.text
        assert [(s.id, s.start, s.end, s.tokens) for s in a.segments] == [
            (s.id, s.start, s.end, s.tokens) for s in b.segments
        ]
    # the random model says much the same each time, but is not equally sure of it
    sure = [[r.segments[0].avg_logprob for r in results] for results in (together, alone)]
    assert sure[0] == pytest.approx(sure[1], abs=1e-5)
    assert min(np.diff(sorted(sure[1]))) > 1e-4


def test_batches_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    sizes, encode = [], model.encode

    def counting(mel: torch.Tensor) -> AudioFeatures:
        sizes.append(len(mel))
        return encode(mel)

    monkeypatch.setattr(model, "encode", counting)
    dawhisper.transcribe(model, [bursts(2)] * 20, batch_size=8, **ENGLISH, without_timestamps=True)
    assert sizes == [8, 8, 4]


def test_a_long_recording_in_order_with_words() -> None:
    model, _ = pair()
    options = {**ENGLISH, "word_timestamps": True, "batch_size": 4}
    segments, info = dawhisper.transcribe_lazily(model, noise(100), **options)
    kept = list(segments)
    assert info.duration == 100
    assert [s.id for s in kept] == list(range(len(kept)))
    assert [s.seek for s in kept] == sorted(s.seek for s in kept)
    assert len({s.seek for s in kept}) >= 4
    assert sum(len(s.words or []) for s in kept) > 20
    assert all(0 <= s.start <= s.end <= 101 for s in kept)


def test_times_are_those_of_the_recording() -> None:
    model, _ = pair()
    alone = model.transcribe(hiss(10), batch_size=2, **ENGLISH)
    later = model.transcribe(bursts(0, 100, 10), batch_size=2, vad_filter=True, **ENGLISH)
    (skip,) = later.skipped
    assert (skip.start, skip.why) == (0.0, "no voice")
    assert 99 < skip.end <= 100
    assert later.to_dict()["skipped"] == [{"start": 0.0, "end": skip.end, "why": "no voice"}]
    assert later.segments[0].seek == round(skip.end * 100)
    assert later.segments[0].start >= skip.end
    assert alone.skipped == []


def test_parts_to_transcribe() -> None:
    model, _ = pair()
    clips = [2.0, 9.5, 20.0, 21.0, 33.0]
    seeks = {s.seek for s in model.transcribe(noise(42), batch_size=2, clip_timestamps=clips, **ENGLISH).segments}
    assert {200, 2000, 3300} <= seeks
    assert all(200 <= s < 950 or 2000 <= s < 2100 or s >= 3300 for s in seeks)


def test_a_sequential_filter_skips_too() -> None:
    model, _ = pair()
    audio = bursts(5, 60, 5)
    result = model.transcribe(audio, vad_filter=True, **ENGLISH)
    (skip,) = result.skipped
    assert 5 <= skip.start < 6
    assert 64 < skip.end <= 65
    assert not [s for s in result.segments if skip.start * 100 <= s.seek < skip.end * 100 - 1]


def test_silence_is_reported() -> None:
    model, _ = pair()
    for options in ({}, {"batch_size": 2}):
        result = model.transcribe(np.zeros(16000, np.float32), **options)
        assert (result.text, result.segments) == ("", [])
        assert [(s.start, s.end, s.why) for s in result.skipped] == [(0.0, 1.0, "digital silence")]


def test_only_failing_windows_are_decoded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, list[float]]] = []

    def decoded(model: Whisper, features: AudioFeatures, options: DecodingOptions) -> list[DecodingResult]:
        windows = features.primary[:, 0, 0].tolist()
        asked.append((options.temperature, windows))
        return [heard(avg_logprob=-0.5 if options.temperature >= needed else -2.0) for needed in windows]

    monkeypatch.setattr(window, "decode_windows", decoded)
    needed = torch.tensor([0.0, 0.5, 0.0, 1.0, 9.0])[:, None, None]
    options = TranscribeOptions(temperature=(0.0, 0.5, 1.0))
    results = decode_with_fallback(pair()[0], AudioFeatures(needed, needed), options, [])
    assert asked == [(0.0, [0.0, 0.5, 0.0, 1.0, 9.0]), (0.5, [0.5, 1.0, 9.0]), (1.0, [1.0, 9.0])]
    assert [r.avg_logprob for r in results] == [-0.5, -0.5, -0.5, -0.5, -2.0]


@pytest.mark.parametrize("batch", [{}, {"batch_size": 3}])
def test_a_recording_has_one_language(batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    languages, decode_windows = [], window.decode_windows

    def recording(model: Whisper, features: AudioFeatures, options: DecodingOptions) -> list[DecodingResult]:
        languages.append(options.language)
        return decode_windows(model, features, options)

    monkeypatch.setattr(window, "decode_windows", recording)
    result = model.transcribe(noise(100), **{**ENGLISH, "language": None}, **batch)
    assert set(languages) == {result.language}


def test_recordings_of_two_languages_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    monkeypatch.setattr(batched, "spoken_languages", lambda *_: ["de", "az"])
    options = {**ENGLISH, "without_timestamps": True}
    german, azerbaijani = dawhisper.transcribe(
        model, [noise(3), noise(4)], batch_size=2, **{**options, "language": None}
    )
    assert (german.language, azerbaijani.language) == ("de", "az")
    assert german.text == dawhisper.transcribe(model, noise(3), **{**options, "language": "de"}).text
    assert azerbaijani.text == dawhisper.transcribe(model, noise(4), **{**options, "language": "az"}).text


def test_real_speech_loses_no_words(base_path: Path, assets: Path) -> None:
    """base on 45 seconds: the asset clip again and again, with pauses of half a second to four."""
    pytest.importorskip("jiwer")
    from dawhisper.evaluation.metrics import count_words, normalizer

    model = dawhisper.load_model(base_path, device="cpu")
    clip = load_audio(assets / "speech.opus")
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < 45 * 16000:
        parts += [clip, np.zeros([8000, 16000, 64000][len(parts) // 2 % 3], np.float32)]
    options = {"language": "en", "temperature": 0.0}
    said = model.transcribe(clip, **options).text + " "
    result = model.transcribe(np.concatenate(parts), batch_size=4, word_timestamps=True, **options)
    normal = normalizer("english", "en")
    counts = count_words(normal(said * (len(parts) // 2)), normal(result.text))
    assert counts.errors <= 0.03 * counts.reference, counts
    words = [word for s in result.segments for word in s.words or []]
    assert all(a.start <= b.start for a, b in itertools.pairwise(words))


def test_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings with a language, task, prompt or part of their own are decoded in the same pass."""
    asked = []

    def decode(model: Whisper, features: AudioFeatures, options: TranscribeOptions, prompt: list[int], of: list[int]):
        asked.append((options.decoding.language, options.decoding.task, len(prompt) > 0, len(features.primary)))
        return decode_with_fallback(model, features, options, prompt, of)

    monkeypatch.setattr(batched, "decode_with_fallback", decode)
    model, _ = pair()
    settings = [
        Settings(),
        Settings(language="de"),
        Settings(task="translate", initial_prompt="Szeged"),
        Settings(clip_timestamps="1,3"),
    ]
    recordings = [BatchedRecording(noise(4), own) for own in settings]
    common = TranscribeOptions.of(batch_size=4, **ENGLISH)
    assert {id(r) for r, _ in iter_batched(model, recordings, common)} == set(map(id, recordings))
    assert [r.language for r in recordings] == ["en", "de", "en", "en"]
    once = [("en", "transcribe", False, 2), ("de", "transcribe", False, 1), ("en", "translate", True, 1)]
    assert asked[:3] == once  # (what a window leaves unheard follows)
    assert all(1 <= segment.start <= segment.end <= 3 for segment in recordings[3].segments)


def test_many_readers_give_what_one_gives() -> None:
    sources = [bursts(3 + i, 1, 31) for i in range(7)]
    options = TranscribeOptions.of(batch_size=2)

    def heard_by(readers: int) -> list[list[int | None]]:
        recordings = [BatchedRecording(source) for source in sources]
        seeks: dict[int, list[int | None]] = {id(recording): [] for recording in recordings}
        for recording, piece in read_together(iter(recordings), options, 2, Readers(readers)):
            seeks[id(recording)].append(piece.seek if isinstance(piece, Chunk) else None)
        return list(seeks.values())

    assert heard_by(3) == heard_by(1)
    assert all(len(seeks) > 2 and seeks[-1] is None for seeks in heard_by(1))


# ------------------------------------------------------------------------------------------------------- bad input


def test_a_bad_recording_among_others(tmp_path: Path) -> None:
    model, _ = pair()
    sources = [noise(2), tmp_path / "missing.wav", noise(3)]
    with pytest.raises(AudioError, match="missing"):
        dawhisper.transcribe(model, sources, batch_size=2, **ENGLISH)
    recordings = [BatchedRecording(s) for s in sources]
    finished = [
        r for r, _ in iter_batched(model, recordings, TranscribeOptions.of(batch_size=2, **ENGLISH)) if r.finished
    ]
    assert set(map(id, finished)) == set(map(id, recordings))
    assert [r.error is None for r in recordings] == [True, False, True]
    assert recordings[2].result().segments
    with pytest.raises(OptionError, match="batch_size"):
        dawhisper.transcribe(model, noise(1), batch_size=0)


def test_the_command_goes_on_after_a_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = pair()
    dawhisper.save_model(model, tmp_path / "random.safetensors")
    good = [write_wav(tmp_path / f"{i}.wav", noise(1 + i)) for i in range(3)]
    files = [good[0], tmp_path / "missing.wav", *good[1:]]
    sure = [
        "--beam_size",
        "None",
        "--logprob_threshold",
        "None",
        "--no_speech_threshold",
        "None",
        "--compression_ratio_threshold",
        "None",
    ]
    given = ["--model", tmp_path / "random.safetensors", "--language", "en", "--device", "cpu", *sure]
    assert run("transcribe", *files, *given, "--batch_size", 2, "-f", "txt", "-o", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert err.count("error:") == 1
    assert "missing.wav" in err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.txt", "1.txt", "2.txt"]
