"""Recordings as people have them: their clock, channels, tracks, and ends that are missing."""

from __future__ import annotations

import io
import re
import warnings
import wave
from pathlib import Path

import numpy as np
import pytest
from helpers.recordings import Recipe, beeps, heard_beeps, write

from dawhisper.audio import SAMPLE_RATE, SampleReader, load_audio
from dawhisper.errors import AudioError, OptionError

CONTAINERS = [
    ("a.mp4", "aac", False),
    ("a.mp4", "libmp3lame", True),
    ("a.m4a", "aac", False),
    ("a.mov", "alac", True),
    ("a.mkv", "aac", True),
    ("a.mkv", "flac", False),
    ("a.mkv", "pcm_s16le", True),
    ("a.webm", "libopus", False),
    ("a.ts", "aac", True),
    ("a.ts", "libmp3lame", True),
    ("a.mp4", "libopus", True),
]


def read_all(path: Path) -> np.ndarray:
    reader, parts = SampleReader(path), []
    while len(part := reader.read(50_000)):
        parts.append(part)
    return np.concatenate(parts)


@pytest.mark.parametrize(("name", "codec", "video"), CONTAINERS)
def test_late_start_and_gap_are_silence(name: str, codec: str, video: bool, tmp_path: Path) -> None:
    """The first second of sound comes 2.5 s late and the next after a gap of 3 s, as a player plays them."""
    sound = beeps(3, 48000, [0.5, 2.0])[None]
    path = write(tmp_path / name, Recipe(codec, start=2.5, gap=(1.2, 3.0), video=video), sound)
    with pytest.warns(UserWarning) as said:
        got = load_audio(path)
    (line,) = {str(warning.message) for warning in said}
    assert re.search(r"3\.0 s of sound are missing from 3\.[78] s on, and are silence now", line)
    assert heard_beeps(got) == pytest.approx([3.0, 7.5], abs=0.06)
    assert len(got) / SAMPLE_RATE == pytest.approx(8.5, abs=0.06)
    with pytest.warns(UserWarning, match="missing"):
        assert np.array_equal(read_all(path), got)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.opus", "libopus"), ("a.mp3", "libmp3lame"), ("a.m4a", "aac"), ("a.webm", "libopus")]
)
def test_encoder_delay_shifts_nothing(name: str, codec: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, Recipe(codec), beeps(3, 48000, [0.0, 2.0])[None])
    got = heard_beeps(load_audio(path))
    assert got == pytest.approx([0.0, 2.0], abs=0.006)


def test_part_of_a_late_track_is_at_the_media_time(tmp_path: Path) -> None:
    """Also where the part is sought."""
    sound = beeps(40, 48000, [5, 15, 25, 35])[None]
    path = write(tmp_path / "a.mkv", Recipe("aac", start=4.0, gap=(20, 6.0), video=True), sound)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert heard_beeps(load_audio(path)) == pytest.approx([9, 19, 35, 45], abs=0.06)
    assert heard_beeps(load_audio(path, start=30, end=47)) == pytest.approx([5, 15], abs=0.06)
    assert heard_beeps(load_audio(path, start=1, end=10)) == pytest.approx([8], abs=0.06)


def test_recordings_joined_to_one_follow_each_other(tmp_path: Path) -> None:
    """Time stamps that start anew in the middle don't put the second recording over the first."""
    parts = [write(tmp_path / f"{i}.ts", Recipe("aac"), beeps(4, 48000, [1, 3])[None]) for i in range(2)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert heard_beeps(load_audio(joined)) == pytest.approx([1, 3, 5, 7], abs=0.15)


# ---- channels


def write_wav(path: Path, channels: np.ndarray, rate: int = SAMPLE_RATE) -> Path:
    """A WAV without a layout, as recorders with many microphones make them."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((channels.T * 32767).astype("<i2").tobytes())
    return path


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 9, 12, 24])
def test_each_of_any_number_of_channels_is_heard(count: int, tmp_path: Path) -> None:
    for place in {*range(min(count, 6)), count - 1}:
        channels = np.zeros((count, SAMPLE_RATE), np.float32)
        channels[place] = beeps(1, SAMPLE_RATE, [0.5])
        for got in (load_audio(write_wav(tmp_path / "a.wav", channels)), load_audio(channels)):
            np.testing.assert_allclose(got, channels[place] / count, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "codec", "layout", "count"),
    [
        ("a.flac", "flac", "5.1", 6),
        ("a.wav", "pcm_s16le", "2.1", 3),
        ("a.wav", "pcm_f32le", "7.1", 8),
        ("a.flac", "flac", "3.0", 3),
        ("a.mkv", "pcm_s32le", "quad", 4),
    ],
)
def test_each_channel_of_a_layout_is_heard(name: str, codec: str, layout: str, count: int, tmp_path: Path) -> None:
    """The subwoofer's too."""
    for place in range(count):
        channels = np.zeros((count, 48000), np.float32)
        channels[place] = beeps(1, 48000, [0.5])
        path = write(tmp_path / name, Recipe(codec, layout=layout), channels)
        assert np.abs(load_audio(path)).max() == pytest.approx(0.4 / count, rel=0.02)


@pytest.mark.parametrize(
    "channels",
    [
        [1.0, -1.0],
        [0.5, -0.6],
        [1.0, 0.0, -1.0],
        [0.5, 0.5, -1.0],
    ],
)
def test_where_channels_cancel_the_loudest_is_heard(channels: list[float], tmp_path: Path) -> None:
    sound = 2 * beeps(2, SAMPLE_RATE, [0.5])
    array = np.array(channels, np.float32)[:, None] * sound
    for source in (write_wav(tmp_path / "a.wav", array), array, array.T):
        with pytest.warns(UserWarning, match="cancel each other; the loudest one is heard"):
            got = load_audio(source)
        assert np.abs(got).max() == pytest.approx(0.8 * max(map(abs, channels)), rel=0.01)


# ---- tracks


def test_the_default_of_several_tracks_and_a_chosen_one(tmp_path: Path) -> None:
    sounds = [beeps(2, 48000, [0.5])[None], beeps(2, 48000, [1.2])[None], beeps(2, 48000, [1.7])[None]]
    for name in ("a.mkv", "a.mp4"):
        path = write(tmp_path / name, Recipe("aac", video=True), *sounds)
        with pytest.warns(UserWarning, match="sound track 1 of 3 is heard .*--audio_track N chooses"):
            assert heard_beeps(load_audio(path)) == pytest.approx([0.5], abs=0.06)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert heard_beeps(load_audio(path, track=2)) == pytest.approx([1.2], abs=0.06)
            reader = SampleReader(path, track=3)
            assert heard_beeps(reader.read(100_000)) == pytest.approx([1.7], abs=0.06)
        for wrong in (0, -1, 4):
            with pytest.raises(OptionError, match=f"no sound track {wrong}; there are 1, 2, 3"):
                load_audio(path, track=wrong)


# ---- ends that are missing


CUT = [  # a name, a codec, options of the container
    ("a.wav", "pcm_s16le", ()),
    ("a.w64", "pcm_s16le", ()),
    ("a.aiff", "pcm_s16be", ()),
    ("a.au", "pcm_s16be", ()),
    ("a.caf", "pcm_s16le", ()),
    ("a.opus", "libopus", ()),
    ("a.oga", "flac", ()),
    ("a.flac", "flac", ()),
    ("a.mp3", "libmp3lame", ()),
    ("plain.mp3", "libmp3lame", (("write_xing", "0"),)),
    ("a.mp2", "mp2", ()),
    ("a.aac", "aac", ()),
    ("a.ac3", "ac3", ()),
    ("a.m4a", "aac", (("movflags", "faststart"),)),
    ("a.mp4", "aac", (("movflags", "frag_keyframe+empty_moov"), ("frag_duration", "500000"))),
    ("a.mkv", "libmp3lame", ()),
    ("a.webm", "libopus", ()),
    ("a.ts", "aac", ()),
    ("a.avi", "libmp3lame", ()),
    ("a.flv", "aac", ()),
    ("a.wv", "wavpack", ()),
    ("a.tta", "tta", ()),
]


@pytest.mark.parametrize(("name", "codec", "options"), CUT, ids=[c[0] for c in CUT])
def test_what_is_cut_short_says_so(name: str, codec: str, options: tuple[tuple[str, str], ...], tmp_path: Path) -> None:
    rate = 48000 if codec == "libopus" else 44100
    path = write(tmp_path / name, Recipe(codec, rate=rate, options=options), beeps(8, rate, [1, 3, 5, 7])[None])
    whole = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_audio(path)
        load_audio(path, end=2)
    for share in (0.613, 0.951):
        path.write_bytes(whole[: int(share * len(whole))])
        for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
            with pytest.warns(UserWarning, match="cut off"):
                got = load_audio(source)
            assert 0.3 * 8 < len(got) / SAMPLE_RATE < 8.1


def test_a_browsers_ogg_is_whole_without_a_mark_at_its_end(tmp_path: Path) -> None:
    """Firefox's MediaRecorder leaves its last page unmarked; no warning may call that cut off."""
    path = write(tmp_path / "a.ogg", Recipe("libopus", rate=48000), beeps(4, 48000, [1, 3])[None])
    data = bytearray(path.read_bytes())
    page = data.rfind(b"OggS")
    assert data[page + 5] & 4
    data[page + 5] &= ~4
    data[page + 22 : page + 26] = bytes(4)
    data[page + 22 : page + 26] = ogg_checksum(data[page:]).to_bytes(4, "little")
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_audio(path)) / SAMPLE_RATE == pytest.approx(4, abs=0.05)


def ogg_checksum(page: bytes) -> int:
    """The CRC of an Ogg page whose own field is zero (RFC 3533, section 6)."""
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = crc << 1 & 0xFFFFFFFF ^ (0x04C11DB7 if crc & 0x80000000 else 0)
    return crc


def test_a_file_whose_table_is_lost_is_named_as_cut(tmp_path: Path) -> None:
    path = write(tmp_path / "a.m4a", Recipe("aac"), beeps(8, 48000, [1])[None])
    whole = path.read_bytes()
    for share in (0.5, 0.97):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(AudioError, match="cut off"):
            load_audio(path)


# ---- loudness


def test_samples_of_another_scale_are_scaled(tmp_path: Path) -> None:
    sound = beeps(2, SAMPLE_RATE, [0.5])
    large = (sound * 32768).astype(np.float32)
    path = write(tmp_path / "a.wav", Recipe("pcm_f32le", rate=SAMPLE_RATE), large[None])
    for source in (large, large.astype(np.float64), path):
        with pytest.warns(UserWarning, match="far outside"):
            got = load_audio(source)
        assert np.abs(got).max() <= 1 and heard_beeps(got) == [0.5]
        assert np.dot(got, sound) / np.linalg.norm(got) / np.linalg.norm(sound) > 0.99
    np.testing.assert_array_equal(load_audio(sound * 3), np.clip(sound * 3, -1, 1))  # a little too loud


def test_speech_60_dB_down_is_said_to_be_quiet(tmp_path: Path) -> None:
    sound = beeps(2, SAMPLE_RATE, [0.5])
    path = write(tmp_path / "a.wav", Recipe("pcm_f32le", rate=SAMPLE_RATE), 1e-3 * sound[None])
    for source in (path, 1e-3 * sound):
        with pytest.warns(UserWarning, match="very quiet, -68 dB at its loudest; make it louder"):
            load_audio(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_audio(np.zeros(1000, np.float32))  # silence is not quiet speech


def test_one_damaged_sample_does_not_silence_the_rest(tmp_path: Path) -> None:
    sound = beeps(2, SAMPLE_RATE, [0.5])
    for value in (1e30, np.nan, -np.inf):
        damaged = sound.copy()
        damaged[100] = value
        path = write(tmp_path / "a.wav", Recipe("pcm_f32le", rate=SAMPLE_RATE), damaged[None])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = load_audio(path)
        np.testing.assert_allclose(got[200:], sound[200:], atol=1e-6)


# ---- what can be a recording in Python


def test_files_in_every_shape(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", beeps(1, SAMPLE_RATE, [0.5])[None])
    want, content = load_audio(path), path.read_bytes()
    with path.open("rb") as file:
        for source in (path, str(path), content, bytearray(content), memoryview(content), file, file):  # read twice
            assert np.array_equal(load_audio(source), want)
            assert np.array_equal(SampleReader(source).read(10**6), want)
    with pytest.raises(AudioError, match="closed"):
        load_audio(file)
    with path.open() as text, pytest.raises(AudioError, match="mode 'rb'"):
        load_audio(text)
    with pytest.raises(AudioError, match="no bytes"):
        load_audio(b"")


def test_arrays_of_any_memory() -> None:
    sound = beeps(1, SAMPLE_RATE, [0.5])
    frozen = sound.copy()
    frozen.flags.writeable = False
    for source, want in (
        (sound[::-1], sound[::-1]),
        (sound[::2], sound[::2]),
        (frozen, sound),
        (sound.tolist(), sound),
        (tuple(sound.tolist()), sound),
        (sound.astype(">f4"), sound),
        ((sound * 32767).astype(">i2"), (sound * 32767).astype(np.int16) / np.float32(32768)),
        (np.asfortranarray(np.stack([sound, sound])), sound),
        (np.ma.masked_array(sound), sound),
        (sound.astype(np.float16), sound.astype(np.float16)),
    ):
        got = load_audio(source)
        assert got.flags.writeable and got.flags.c_contiguous and got.strides[0] > 0
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
    "source", [None, 5, 0.5, object(), {}, {"array": [1.0]}, ["a", "b"], [[1.0], [1.0, 2.0]], [], iter([0.1]), True]
)
def test_what_is_no_recording(source: object) -> None:
    with pytest.raises(AudioError) as error:
        load_audio(source)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
