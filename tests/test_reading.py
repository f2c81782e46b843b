"""Recordings read in another process: what it gives, says and survives is what this one would."""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.recordings import Recipe, write
from helpers.sound import bursts, noise, write_wav

from dawhisper import batched
from dawhisper.audio import SAMPLE_RATE, to_int16
from dawhisper.batched import BatchedRecording, iter_batched, read_together
from dawhisper.data.manifest import encode_audio
from dawhisper.errors import AudioError
from dawhisper.reading import LONG, Readers, Reading, Span
from dawhisper.transcription import TranscribeOptions
from dawhisper.vad import BLOCK, Chunk, Skip, VadOptions, detector


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{i}.opus" for i in range(5)]
    for i, path in enumerate(paths):
        path.write_bytes(encode_audio(to_int16(bursts(20 + i, 3, 13 * i + 1))))
    return paths


@pytest.fixture(scope="module")
def one_process() -> Iterator[Readers]:
    with closing(Readers(1)) as readers:
        yield readers


@pytest.fixture
def readers(one_process: Readers) -> Readers:
    """One process, which is ready; started anew where a test has ended it."""
    (process,) = one_process.processes
    process.start()
    assert process.ready is not None
    assert process.ready.result(timeout=120) is None
    return one_process


def asked(source: Path | bytes | np.ndarray, drop_silence: bool = False) -> Reading:
    return Reading(source, None, [(0, None)], drop_silence, VadOptions())


def same(a: Chunk | Skip, b: Chunk | Skip) -> bool:
    if isinstance(a, Skip) or isinstance(b, Skip):
        return a == b
    return a.seek == b.seek and np.array_equal(a.samples, b.samples) and np.array_equal(a.speech, b.speech)


def test_its_pieces_are_those_read_here(files: list[Path], readers: Readers) -> None:
    sources: list[Path | bytes | np.ndarray] = [*files, files[1].read_bytes(), bursts(20, 3, 17)]
    for source in sources:
        for drop_silence in (False, True):
            reading = asked(source, drop_silence)
            here, there = list(reading.pieces()), list(readers.pieces(reading))
            assert len(here) == len(there) > 0
            assert all(map(same, here, there))


def said(pieces: Iterator[Chunk | Skip]) -> tuple[list[Chunk | Skip], list[str], str]:
    """The pieces, the warnings, and the error."""
    detector()  # whose package has warnings of its own when it is loaded
    given, error = [], ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for piece in pieces:
                given.append(piece)
        except AudioError as e:
            error = str(e)
    return given, [str(w.message) for w in caught], error


def test_its_warnings_and_errors_are_those_of_reading_here(files: list[Path], readers: Readers, tmp_path: Path) -> None:
    cut_short, no_sound = tmp_path / "cut.opus", tmp_path / "text.wav"
    cut_short.write_bytes(files[4].read_bytes()[:-3000])
    no_sound.write_text("no sound")

    for source in (cut_short, no_sound, tmp_path / "missing.mp3"):
        here, there = said(asked(source).pieces()), said(readers.pieces(asked(source)))
        assert here[1:] == there[1:]
        assert here[1] or here[2]
    assert list(readers.pieces(asked(files[0])))  # and goes on


def test_a_recording_that_is_given_up_leaves_nothing_to_the_next(files: list[Path], readers: Readers) -> None:
    pieces = readers.pieces(asked(files[4]))
    next(pieces)
    pieces.close()
    assert readers.processes[0].process is None
    assert all(map(same, asked(files[0]).pieces(), readers.pieces(asked(files[0]))))


def test_a_process_that_dies_loses_its_file_alone(files: list[Path], readers: Readers) -> None:
    pieces = readers.pieces(asked(files[4]))
    next(pieces)
    assert readers.processes[0].process is not None
    os.kill(readers.processes[0].process.pid, signal.SIGKILL)
    with pytest.raises(AudioError, match="ended with code"):
        list(pieces)
    assert all(map(same, asked(files[0]).pieces(), readers.pieces(asked(files[0]))))


@pytest.mark.parametrize("program", ["raise SystemExit(3)", "print('no answer')"])
def test_one_that_can_not_start_is_done_without(
    files: list[Path], program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dawhisper.reading.PROCESS", program)
    with closing(Readers(1)) as readers:
        for path in files[:3]:
            assert all(map(same, asked(path).pieces(), readers.pieces(asked(path))))
            if readers.processes[0].process is not None:
                readers.processes[0].process.wait()


def test_threads_with_processes_give_what_they_give_alone(files: list[Path]) -> None:
    options = TranscribeOptions.of(batch_size=2)

    def heard(readers: Readers | None) -> dict[str, list[Chunk | Skip]]:
        recordings = [BatchedRecording(path) for path in files]
        pieces: dict[str, list[Chunk | Skip]] = {}
        for recording, piece in read_together(iter(recordings), options, 2, readers):
            assert not isinstance(piece, Exception)
            if piece is not None:
                pieces.setdefault(str(recording.source), []).append(piece)
        return pieces

    with closing(Readers(2)) as readers:
        alone, together = heard(None), heard(readers)
    assert alone.keys() == together.keys() == {str(path) for path in files}
    assert all(len(alone[name]) == len(together[name]) for name in alone)
    assert all(same(a, b) for name in alone for a, b in zip(alone[name], together[name]))


def test_processes_are_started_for_what_needs_them(files: list[Path], tmp_path: Path) -> None:
    long = write_wav(tmp_path / "long.wav", np.zeros(int(LONG + 1) * SAMPLE_RATE))
    for sources, start in ((files[:2], False), ([bursts(9)], False), (files[:3], True), ([long], True)):
        with closing(Readers(2)) as readers:
            readers.expect(sources)
            assert [process.process is not None for process in readers.processes] == [start, start]


def test_beside_a_gpu_files_are_read_elsewhere(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Readers] = []
    model: Any = SimpleNamespace(device=torch.device("meta"), is_multilingual=True, num_languages=99)

    def noted(count: int) -> Readers:
        made.append(Readers(2))
        return made[-1]

    monkeypatch.setattr(batched, "Readers", noted)
    monkeypatch.setattr(batched, "hear_batch", lambda model, batch, options: [job.window.skip("") for job in batch])
    options = TranscribeOptions.of(batch_size=2)
    recordings = [BatchedRecording(path) for path in files]
    finished = [recording for recording, _ in iter_batched(model, recordings, options) if recording.finished]
    assert {id(each) for each in finished} == {id(each) for each in recordings}
    assert all(each.error is None and each.skipped[-1].end == each.duration for each in recordings)
    for recording, _ in iter_batched(model, [BatchedRecording(path) for path in files], options):
        assert recording.skipped
        break  # given up midway
    gc.collect()
    assert len(made) == 2
    assert all(readers.closed and process.process is None for readers in made for process in readers.processes)


# --------------------------------------------------------------------------------------------- spans of a long one

EXACT = {
    "a.wav": Recipe("pcm_s16le", 16000),
    "b.wav": Recipe("pcm_s16le", 22050, "stereo"),
    "a.flac": Recipe("flac", 44100, "stereo"),
    "a.mp3": Recipe("libmp3lame", 44100),
    "a.opus": Recipe("libopus"),
    "a.ogg": Recipe("flac", 32000),
    "a.m4a": Recipe("aac", 44100, codec_options=(("aac_pns", "0"),)),
}
INEXACT = {  # its bands are filled with random numbers; its times are those of milliseconds
    "b.m4a": Recipe("aac", 44100, bit_rate=32000, codec_options=(("aac_pns", "1"),)),
    "a.mka": Recipe("libopus"),
}


def written(path: Path, recipe: Recipe, audio: np.ndarray) -> Path:
    channels = [audio, audio / 2] if recipe.layout == "stereo" else [audio]
    return write(path, recipe, np.stack(channels))


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two blocks, and of recordings that are not long."""
    for name, value in (("SPAN", 2 * BLOCK), ("LONG", 100.0), ("LONG_BYTES", 0)):
        monkeypatch.setattr(f"dawhisper.reading.{name}", value)


@pytest.fixture
def rests(readers: Readers, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples from which on recordings were read in one piece."""
    rests: list[int] = []
    read = readers.read

    def noted(asked: Any) -> Iterator[Any]:
        rests.append(asked.first if isinstance(asked, Span) else 0)
        return read(asked)

    monkeypatch.setattr(readers, "read", noted)
    return rests


@pytest.mark.parametrize("name", [*EXACT, *INEXACT])
@pytest.mark.usefixtures("spans")
def test_a_long_recording_in_spans_is_that_read_as_a_whole(
    name: str, readers: Readers, rests: list[int], tmp_path: Path
) -> None:
    recipe = (EXACT | INEXACT)[name]
    reading = asked(written(tmp_path / name, recipe, noise(200 * recipe.rate / SAMPLE_RATE)))
    here, there = list(reading.pieces()), list(readers.pieces(reading))
    assert len(here) == len(there) > 3
    assert all(map(same, here, there))
    assert rests == ([] if name in EXACT else [2 * BLOCK])


@pytest.mark.usefixtures("spans")
def test_its_end_may_be_anywhere(readers: Readers, rests: list[int], tmp_path: Path) -> None:
    for blocks in (6, 6.5, 7, 7.5):
        path = write_wav(tmp_path / f"{blocks}.wav", noise(blocks * BLOCK / SAMPLE_RATE))
        assert all(map(same, asked(path).pieces(), readers.pieces(asked(path))))
    until = replace(asked(path), clips=[(0, 17000)])
    pieces = list(readers.pieces(until))
    assert all(map(same, until.pieces(), pieces))
    assert pieces[-1].seek + pieces[-1].size == 17000
    assert not rests


@pytest.mark.usefixtures("spans")
def test_where_silence_hides_the_place_the_rest_is_read_as_a_whole(
    readers: Readers, rests: list[int], tmp_path: Path
) -> None:
    path = write_wav(tmp_path / "a.wav", bursts(160, 60, 80))  # the sixth block is silent
    assert all(map(same, asked(path).pieces(), readers.pieces(asked(path))))
    assert rests == [6 * BLOCK]


@pytest.mark.usefixtures("spans")
def test_what_is_odd_in_a_span_is_said_once(readers: Readers, tmp_path: Path) -> None:
    sound = noise(200)
    mp3 = written(tmp_path / "a.mp3", EXACT["a.mp3"], noise(200 * 44100 / SAMPLE_RATE))
    content = bytearray(mp3.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 4000] = bytes(4000)
    damaged, cut_short = tmp_path / "damaged.mp3", tmp_path / "cut.wav"
    damaged.write_bytes(content)
    cut_short.write_bytes(write_wav(tmp_path / "a.wav", sound).read_bytes()[:-100_000])
    gap = write(tmp_path / "gap.mp4", Recipe("libopus", gap=(80.0, 3.0)), np.repeat(sound, 3)[None])
    quiet = write_wav(tmp_path / "quiet.wav", sound / 1000)
    channels = np.stack([sound, np.where(np.arange(len(sound)) < 140 * SAMPLE_RATE, sound, -sound)])
    opposite = write(tmp_path / "opposite.wav", Recipe("pcm_s16le", SAMPLE_RATE, "stereo"), channels)
    for path in (damaged, cut_short, gap, quiet, opposite):
        here, there = said(asked(path).pieces()), said(readers.pieces(asked(path)))
        assert here[1:] == there[1:], path.name
        assert here[1], path.name
        assert len(here[0]) == len(there[0])
        assert all(map(same, here[0], there[0])), path.name


@pytest.mark.usefixtures("spans")
def test_spans_by_a_process_that_dies(readers: Readers, rests: list[int], tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", noise(300))
    (process,) = readers.processes
    pieces = readers.pieces(asked(path))
    first = next(pieces)
    assert process.process is not None
    os.kill(process.process.pid, signal.SIGKILL)
    assert all(map(same, asked(path).pieces(), [first, *pieces]))
    assert len(rests) == 1
