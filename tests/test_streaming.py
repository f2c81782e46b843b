"""Streaming: every word once, in order, however the audio is cut; bounded memory; pauses; the command."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peer import pair, talkative, trained

import dawhisper
from dawhisper.audio import load_audio
from dawhisper.cli import main
from dawhisper.errors import OptionError
from dawhisper.streaming import Floor, Stream, StreamOptions, Update, read_pcm, text_of


def words_in(text: str) -> str:
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())


def listen(model: dawhisper.Whisper, audio: np.ndarray, piece: int = 16000, **options: object) -> Update:
    stream = Stream(model, StreamOptions(**options))  # type: ignore[arg-type]
    update = Update()
    for first in range(0, len(audio), piece):
        update += stream.feed(audio[first : first + piece])
    return update + stream.finish()


@pytest.fixture(scope="module")
def speech(assets: Path) -> np.ndarray:
    """The clip twice with short pauses: longer than what is decoded again."""
    clip = load_audio(assets / "speech.opus")
    return np.tile(np.concatenate([clip, np.zeros(4800, np.float32)]), 2)


@pytest.fixture(scope="module")
def tiny_en(tiny_en_path: Path) -> dawhisper.Whisper:
    return dawhisper.load_model(str(tiny_en_path), device="cpu")


@pytest.mark.parametrize("policy", ["attention", "agreement"])
def test_no_word_is_lost_or_said_twice(tiny_en: dawhisper.Whisper, speech: np.ndarray, policy: str) -> None:
    update = listen(tiny_en, speech, language="en", policy=policy, step=2.0, longest=8.0)
    once = "modern printers .{10,20} but it is only practiced in the very best establishments"
    assert re.fullmatch(f"{once} {once}", words_in(text_of(update.words)))  # how it hears the middle varies
    assert update.end_of_turn
    assert "".join(s.text for s in update.segments) == text_of(update.words)
    starts = [word.start for word in update.words]
    assert all(b >= a - 0.3 for a, b in itertools.pairwise(starts))  # times of two decodings may differ a little
    assert [s.id for s in update.segments] == list(range(len(update.segments)))


def test_words_come_before_the_end(tiny_en: dawhisper.Whisper, speech: np.ndarray) -> None:
    stream = Stream(tiny_en, StreamOptions(language="en"))
    early = text_of(stream.feed(speech[: 16000 * 4]).words)
    assert words_in(early).startswith("modern printers")


@pytest.mark.parametrize("piece", [160, 7777, 16000 * 40])
def test_any_size_of_pieces_and_bounded_memory(piece: int) -> None:
    model = talkative(trained(dawhisper.DualOptions()), eot_bias=30.0)
    stream = Stream(model, StreamOptions(language="en", step=5.0, longest=5.0, gates=True))
    audio = (0.1 * np.random.default_rng(0).normal(size=16000 * 45)).astype(np.float32)
    audio *= np.sin(np.arange(len(audio)) / 8000)  # louder and softer: not a steady background
    for first in range(0, len(audio), piece):
        stream.feed(audio[first : first + piece])
        assert len(stream.buffer) <= 30 * 16000
        assert len(stream.context) <= 64
        assert len(stream.floor.levels) <= 1500
    assert stream.now == pytest.approx(45.0)
    stream.finish()
    assert len(stream.buffer) == 0


def test_silence_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(pair()[0], StreamOptions(language="en"))
    monkeypatch.setattr(stream, "_decode", lambda: pytest.fail("decoded silence"))
    quiet = (1e-4 * np.random.default_rng(0).normal(size=16000 * 120)).astype(np.float32)
    assert stream.feed(quiet) == Update()
    assert len(stream.buffer) < 16000


def test_the_floor_knows_a_pause_in_steady_noise() -> None:
    generator = np.random.default_rng(0)
    noise = 0.02 * generator.normal(size=16000 * 10)
    noisy = noise.copy()
    noisy[: 16000 * 8] += 0.2 * generator.normal(size=16000 * 8) * (np.sin(np.arange(16000 * 8) / 2000) > 0)
    floor = Floor()
    floor.hear(noisy)
    assert floor.is_silent(noisy[-16000:])
    assert not floor.is_silent(noisy[: 16000 * 2])


def test_gates_of_words() -> None:
    model = talkative(trained(dawhisper.DualOptions()), eot_bias=6.0)
    stream = Stream(model, StreamOptions(language="en", gates=True))
    stream.buffer = (0.1 * np.random.default_rng(0).normal(size=16000 * 3)).astype(np.float32)
    words = stream._decode().words
    assert words
    assert all(word.gate is not None and 0 <= word.gate <= 1 for word in words)


def test_pcm_cut_in_the_middle_of_a_sample() -> None:
    class Pipe(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            return super().read(3)

    samples = np.arange(-5, 6, dtype="<i2") * 1000
    heard = np.concatenate(list(read_pcm(Pipe(samples.tobytes()), 1.0)))
    np.testing.assert_array_equal(heard * 32768, samples)


@pytest.mark.parametrize(
    "options", [{"policy": "luck"}, {"task": "dance"}, {"step": 0}, {"longest": 29}, {"language": "klingon"}]
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        StreamOptions(**options)  # type: ignore[arg-type]


def test_the_command_reads_a_pipe(tiny_en_path: Path, assets: Path) -> None:
    data = (load_audio(assets / "speech.opus") * 32767).astype("<i2").tobytes()
    command = [sys.executable, "-m", "dawhisper", "stream", "--input", "-", "--model", str(tiny_en_path), "--json"]
    done = subprocess.run([*command, "--device", "cpu"], input=data, capture_output=True, timeout=120, check=True)
    updates = [json.loads(line) for line in done.stdout.splitlines()]
    said = "".join(segment["text"] for update in updates for segment in update["segments"])
    assert "best establishments" in said
    assert updates[-1]["end_of_turn"]


def test_a_wrong_source_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stream", "--input", "a.wav"]) == 1
    assert capsys.readouterr().err.startswith("dawhisper: error: --input is mic or -")
