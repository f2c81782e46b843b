"""Audio: decoding against the samples that were written, the spectrogram against Whisper's, and every bad input."""

from __future__ import annotations

import io
import os
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import whisper

from dawhisper.audio import SAMPLE_RATE, load_audio, log_mel_spectrogram, pad_or_trim
from dawhisper.errors import AudioError, OptionError


def speechlike(seconds: float, rate: int = SAMPLE_RATE, seed: int = 0) -> np.ndarray:
    """Low tones whose loudness changes, below 3.5 kHz so that every rate can carry them; float32 [n]."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * (f * t + rng.random())) * np.sin(2 * np.pi * t * rng.random() * 3) for f in TONES]
    return (0.1 * np.sum(tones, axis=0)).astype(np.float32)


TONES = (131, 220, 440, 697, 1209, 2011, 3089)


def write(
    path: Path, channels: np.ndarray, rate: int, codec: str, video: bool = False, bit_rate: int | None = None
) -> Path:
    """Write float samples [channels, n] with PyAV, with a few pictures before them for a video."""
    layouts = {1: "mono", 2: "stereo", 8: "7.1"}
    with av.open(str(path), "w") as container:
        if video:
            pictures = container.add_stream("mpeg4", rate=10)
            pictures.width, pictures.height, pictures.pix_fmt = 64, 64, "yuv420p"
        stream = container.add_stream(codec, rate=rate, layout=layouts[len(channels)])
        if bit_rate:
            stream.bit_rate = bit_rate
        if video:
            for i in range(10):
                picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * i, np.uint8), format="rgb24")
                container.mux(pictures.encode(picture))
            container.mux(pictures.encode(None))
        packed = np.ascontiguousarray(channels.T, np.float32).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, "flt", layouts[len(channels)])
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        resampler = av.AudioResampler(stream.format, stream.layout, rate, stream.frame_size or None)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def write_pcm(path: Path, samples: np.ndarray, rate: int = SAMPLE_RATE) -> Path:
    """int16 mono wav, without any library of ours."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def lag_and_error(got: np.ndarray, want: np.ndarray) -> tuple[int, float]:
    """By how many samples `got` is late, and the relative error that remains when that is undone."""
    size = 1 << (len(got) + len(want)).bit_length()
    correlation = np.fft.irfft(np.fft.rfft(got, size) * np.conj(np.fft.rfft(want, size)), size)
    lag = int(correlation.argmax())
    lag = lag - size if lag > size // 2 else lag
    got = got[lag:] if lag > 0 else np.pad(got, (-lag, 0))
    n = min(len(got), len(want)) - 2000  # codecs are not exact at the end
    return lag, float(np.linalg.norm(got[2000:n] - want[2000:n]) / np.linalg.norm(want[2000:n]))


# ---- decoding


FORMATS = [  # name, codec, rate, channels, lag allowed, error allowed
    ("8k.wav", "pcm_s16le", 8000, 1, 0, 0.02),
    ("stereo.mp3", "libmp3lame", 44100, 2, 1200, 0.05),
    ("eight.wav", "pcm_s24le", 96000, 8, 0, 0.01),
    ("eight.flac", "flac", 96000, 8, 0, 0.01),
    ("22k.flac", "flac", 22050, 1, 0, 0.01),
    ("48k.opus", "libopus", 48000, 1, 1, 0.15),
    ("float.wav", "pcm_f32le", 11025, 1, 0, 0.01),
    ("sound.m4a", "aac", 48000, 2, 1100, 0.10),
    ("alaw.wav", "pcm_alaw", 8000, 1, 0, 0.05),
]


@pytest.mark.parametrize(("name", "codec", "rate", "channels", "lag", "error"), FORMATS, ids=[f[0] for f in FORMATS])
def test_formats(name: str, codec: str, rate: int, channels: int, lag: int, error: float, tmp_path: Path) -> None:
    written = np.tile(speechlike(3, rate), (channels, 1))
    got = load_audio(write(tmp_path / name, written, rate, codec, bit_rate=128_000))
    assert got.dtype == np.float32 and got.ndim == 1
    assert len(got) == pytest.approx(3 * SAMPLE_RATE, abs=2500)
    if channels == 8:  # ffmpeg mixes 7.1 down by its own weights, without the LFE
        got = got * np.dot(got, speechlike(3)[: len(got)]) / np.dot(got, got)
    found_lag, found_error = lag_and_error(got, speechlike(3))
    assert abs(found_lag) <= lag and found_error < error


def test_sound_track_of_a_video(tmp_path: Path) -> None:
    sound = speechlike(3, 48000)[None]
    lag, error = lag_and_error(
        load_audio(write(tmp_path / "v.mp4", sound, 48000, "aac", video=True, bit_rate=128_000)), speechlike(3)
    )
    assert abs(lag) <= 1100 and error < 0.1


def test_16_bit_samples_are_exact(tmp_path: Path) -> None:
    samples = np.array([0, 1, -1, 32767, -32768, 1234] * 100)
    assert np.array_equal(load_audio(write_pcm(tmp_path / "a.wav", samples)), (samples / 32768).astype(np.float32))


def test_one_sample(tmp_path: Path) -> None:
    assert load_audio(write_pcm(tmp_path / "a.wav", np.array([16384]))).tolist() == [0.5]


def test_other_rate(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", speechlike(2)[None], SAMPLE_RATE, "pcm_s16le")
    lag, error = lag_and_error(load_audio(path, sr=8000), speechlike(2, 8000))
    assert lag == 0 and error < 0.02


def test_open_file_and_bytes(tmp_path: Path) -> None:
    path = write_pcm(tmp_path / "a.wav", np.arange(1000))
    with path.open("rb") as file:
        assert np.array_equal(load_audio(file), load_audio(path))
    assert np.array_equal(load_audio(io.BytesIO(path.read_bytes())), load_audio(path))


def test_names_that_ffmpeg_would_misread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("10:30.wav", "-i.wav", "%03d.wav", "naïve 声.wav"):
        write_pcm(tmp_path / name, np.arange(50))
        assert len(load_audio(name)) == 50


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_part_of_a_file_is_that_part(name: str, tmp_path: Path) -> None:
    codec = {"wav": "pcm_s16le", "flac": "flac"}[name.rsplit(".", 1)[-1]]
    path = write(tmp_path / name, speechlike(40)[None], SAMPLE_RATE, codec)
    whole = load_audio(path)
    for start, end in [(0.0, 1.0), (1.25, 2.5), (12.3, 13.7), (35.0, None), (39.0, 99.0)]:
        want = whole[round(start * SAMPLE_RATE) : None if end is None else round(end * SAMPLE_RATE)]
        assert np.array_equal(load_audio(path, start=start, end=end), want)
        assert np.array_equal(load_audio(whole, start=start, end=end), want)


@pytest.mark.parametrize(("name", "codec"), [("a.mp3", "libmp3lame"), ("a.opus", "libopus"), ("a.m4a", "aac")])
def test_part_of_a_compressed_file_is_at_the_right_time(name: str, codec: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, speechlike(40, 48000)[None], 48000, codec)
    lag, error = lag_and_error(
        load_audio(path, start=20, end=24), load_audio(path)[20 * SAMPLE_RATE : 24 * SAMPLE_RATE]
    )
    assert abs(lag) <= 1 and error < 0.3  # a shift of half a sample makes up to 0.3 at 3 kHz


def test_part_of_a_stream_that_cannot_be_positioned(tmp_path: Path) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    path = write(tmp_path / "a.wav", speechlike(30)[None], SAMPLE_RATE, "pcm_s16le")
    got = load_audio(Pipe(path.read_bytes()), start=20, end=21)
    assert np.array_equal(got, load_audio(path)[20 * SAMPLE_RATE : 21 * SAMPLE_RATE])


def test_against_openai_whisper(assets: Path) -> None:
    """Where there is an ffmpeg command, its samples are ours to a few 16-bit steps."""
    import shutil

    if shutil.which("ffmpeg") is None:
        pytest.skip("install ffmpeg to compare with openai-whisper's decoding")
    got, want = load_audio(assets / "speech.opus"), whisper.load_audio(str(assets / "speech.opus"))
    assert len(got) == len(want) and np.abs(got - want).max() < 4 / 32768


# ---- arrays


def test_arrays_of_any_type_and_shape() -> None:
    samples = (speechlike(0.1) * 20000).astype(np.int16)
    want = samples.astype(np.float32) / 32768
    for array in (
        samples,
        want,
        want.astype(np.float64),
        samples.astype(np.int32) * 65536,
        torch.from_numpy(samples),
        torch.from_numpy(want).requires_grad_(),
        np.stack([samples, samples]),
        np.stack([want, want], axis=1),
        torch.from_numpy(want)[None],
    ):
        got = load_audio(array)
        assert got.dtype == np.float32 and got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=1e-7)
    np.testing.assert_allclose(load_audio(torch.from_numpy(want).bfloat16()), want, atol=2e-3)
    np.testing.assert_allclose(load_audio(np.array([0, 128, 255], np.uint8)), [-1, 0, 127 / 128])
    np.testing.assert_allclose(load_audio(np.array([[1.0, 0, 0], [0, 0, 1.0]])), [0.5, 0, 0.5])


@pytest.mark.parametrize(
    ("array", "part"),
    [
        (np.array([0.0, np.nan]), "1 NaN"),
        (np.array([np.inf, 1.0, -np.inf]), "2 NaN or infinite"),
        (torch.tensor([float("nan")]), "NaN"),
        (np.zeros(0, np.float32), "no sound samples"),
        (np.zeros((2, 0)), "no sound samples"),
        (np.zeros((2, 3, 4)), "(2, 3, 4)"),
        (np.zeros((100, 200)), "(100, 200)"),
        (np.array(1.0), "()"),
        (np.zeros(5, np.int64), "int64"),
        (np.zeros(5, bool), "bool"),
        (np.zeros(5, complex), "complex"),
        (np.array(["x"]), "type"),
    ],
)
def test_bad_array(array: np.ndarray, part: str) -> None:
    fails(array, part)


# ---- bad files


def fails(source: object, *parts: str, start: float = 0.0, end: float | None = None) -> None:
    with pytest.raises(AudioError) as error:
        load_audio(source, start=start, end=end)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_missing_file_with_near_names(tmp_path: Path) -> None:
    (tmp_path / "interview.mp3").touch()
    fails(tmp_path / "intervew.mp3", "intervew.mp3", "no such file", "did you mean interview.mp3?")
    fails(tmp_path / "xyz.ogg", "xyz.ogg", "no such file")
    fails(tmp_path / "nowhere" / "a.wav", "no such file")
    fails("a\0b.wav", "b.wav")
    fails("x" * 5000, "xxx")


def test_folder(tmp_path: Path) -> None:
    fails(tmp_path, str(tmp_path), "folder")


def test_files_without_sound(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").touch()
    fails(tmp_path / "empty.wav", "empty.wav", "empty")
    for name in ("text.wav", "text.mp3", "text.flac"):
        (tmp_path / name).write_text("this is not sound\n" * 200)
        fails(tmp_path / name, name)
    fails(tmp_path / "text.wav", "cannot be decoded")
    (tmp_path / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(20_000))
    fails(tmp_path / "noise.mp3", "noise.mp3")
    fails(write_pcm(tmp_path / "zero.wav", np.zeros(0)), "zero.wav", "no sound samples")
    with av.open(str(tmp_path / "mute.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    fails(tmp_path / "mute.mp4", "mute.mp4", "no sound in this file")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission(tmp_path: Path) -> None:
    path = write_pcm(tmp_path / "a.wav", np.zeros(100))
    path.chmod(0)
    fails(path, "a.wav", "Permission denied")


def test_truncated_mp3_gives_what_is_left(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp3", speechlike(20, 44100)[None], 44100, "libmp3lame")
    whole, content = load_audio(path), path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"a\.mp3: only 1?\d\.\d of 20\.\d s"):
        part = load_audio(path)
    assert 8 * SAMPLE_RATE < len(part) < 12 * SAMPLE_RATE
    assert np.allclose(part[: 7 * SAMPLE_RATE], whole[: 7 * SAMPLE_RATE])
    path.write_bytes(content[:60])
    fails(path, "a.mp3")


def test_damage_in_the_middle_becomes_silence(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", speechlike(20)[None], SAMPLE_RATE, "flac")
    whole, content = load_audio(path), bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) * 2 // 3] = bytes(len(content) * 2 // 3 - len(content) // 2)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"a\.flac: [34]\.\d s of sound are missing from \d+\.\d s on"):
        got = load_audio(path)
    assert np.array_equal(got[: 9 * SAMPLE_RATE], whole[: 9 * SAMPLE_RATE])
    assert np.array_equal(got[15 * SAMPLE_RATE :], whole[15 * SAMPLE_RATE :])  # at the same times as before


def test_part_outside_the_recording(tmp_path: Path) -> None:
    path = write_pcm(tmp_path / "a.wav", np.ones(SAMPLE_RATE * 2))
    fails(path, "a.wav", "2.0 s long", start=5)
    fails(path, "2.0 s long", start=500)
    fails(np.ones(100), "0.0 s long", start=5)
    fails(path, "start < end", start=2, end=1)
    fails(path, "start < end", start=-1)
    fails(path, "longer part", start=1, end=1.00001)


# ---- spectrogram


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("padding", [0, 480_000])
def test_log_mel_is_whispers(n_mels: int, padding: int, assets: Path) -> None:
    noise = torch.randn(50_123, generator=torch.Generator().manual_seed(0))
    for audio in (
        speechlike(3.3),
        noise,
        noise.numpy() * 1e-6,
        np.zeros(16000, np.float32),
        load_audio(assets / "speech.opus"),
    ):
        want = whisper.log_mel_spectrogram(torch.as_tensor(audio), n_mels, padding)
        got = log_mel_spectrogram(audio, n_mels, padding)
        assert got.shape == want.shape and got.dtype == torch.float32
        assert (got - want).abs().max() < 1e-4


def test_long_audio_is_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    audio = speechlike(5.01)
    want = log_mel_spectrogram(audio)
    monkeypatch.setattr("dawhisper.audio.STFT_FRAMES", 7)
    torch.testing.assert_close(log_mel_spectrogram(audio), want, atol=1e-6, rtol=0)


def test_batch_equals_its_items() -> None:
    """Neighbours of other loudness change nothing: each item has its own maximum."""
    batch = torch.from_numpy(np.stack([speechlike(2), 1e-3 * speechlike(2, seed=1), 0 * speechlike(2)]))
    got = log_mel_spectrogram(batch)
    assert got.shape == (3, 80, 200)
    for item, audio in zip(got, batch):
        torch.testing.assert_close(item, log_mel_spectrogram(audio), atol=1e-5, rtol=0)
        assert (item - whisper.log_mel_spectrogram(audio)).abs().max() < 1e-4


def test_log_mel_of_a_file_and_of_other_types(tmp_path: Path) -> None:
    path = write_pcm(tmp_path / "a.wav", speechlike(1) * 32767)
    want = log_mel_spectrogram(load_audio(path))
    assert torch.equal(log_mel_spectrogram(path), want)
    torch.testing.assert_close(log_mel_spectrogram(load_audio(path).astype(np.float64)), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(log_mel_spectrogram(path), want)


def test_log_mel_needs_no_gradient() -> None:
    assert not log_mel_spectrogram(torch.randn(4000, requires_grad=True)).requires_grad


def test_log_mel_refuses() -> None:
    with pytest.raises(AudioError, match="too short"):
        log_mel_spectrogram(np.ones(1, np.float32))
    assert log_mel_spectrogram(np.ones(1, np.float32), padding=480_000).shape == (80, 3000)
    with pytest.raises(AudioError, match="shape"):
        log_mel_spectrogram(np.ones((1, 2, 3), np.float32))
    with pytest.raises(OptionError, match="80 and 128"):
        log_mel_spectrogram(np.ones(1000, np.float32), n_mels=64)


@pytest.mark.parametrize("length", [3, 5, 8])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_pad_or_trim_is_whispers(length: int, axis: int) -> None:
    array = np.arange(30.0).reshape(5, 6)
    want = whisper.pad_or_trim(array, length, axis=axis)
    assert np.array_equal(pad_or_trim(array, length, axis=axis), want)
    assert np.array_equal(pad_or_trim(torch.from_numpy(array), length, axis=axis).numpy(), want)
