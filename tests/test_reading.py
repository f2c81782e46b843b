"""Recordings read in another process: what it gives, says and survives is what this one would."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.sound import bursts

from dawhisper.audio import to_int16
from dawhisper.batched import BatchedRecording, read_together
from dawhisper.data.manifest import encode_audio
from dawhisper.errors import AudioError
from dawhisper.reading import Reading, ReadingProcess
from dawhisper.transcription import TranscribeOptions
from dawhisper.vad import Chunk, Skip, VadOptions


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{i}.opus" for i in range(5)]
    for i, path in enumerate(paths):
        path.write_bytes(encode_audio(to_int16(bursts(20 + i, 3, 13 * i + 1))))
    return paths


@pytest.fixture
def process() -> Iterator[ReadingProcess]:
    process = ReadingProcess()
    process.asked = 1  # the first one would be read here
    process.start()
    assert process.ready is not None
    assert process.ready.result(timeout=120) is None
    yield process
    process.close()


def asked(source: Path | bytes | np.ndarray, drop_silence: bool = False) -> Reading:
    return Reading(source, None, [(0, None)], drop_silence, VadOptions())


def same(a: Chunk | Skip, b: Chunk | Skip) -> bool:
    if isinstance(a, Skip) or isinstance(b, Skip):
        return a == b
    return a.seek == b.seek and np.array_equal(a.samples, b.samples) and np.array_equal(a.speech, b.speech)


def test_its_pieces_are_those_read_here(files: list[Path], process: ReadingProcess) -> None:
    sources: list[Path | bytes | np.ndarray] = [*files, files[1].read_bytes(), bursts(20, 3, 17)]
    for source in sources:
        for drop_silence in (False, True):
            reading = asked(source, drop_silence)
            here, there = list(reading.pieces()), list(process.pieces(reading))
            assert len(here) == len(there) > 0
            assert all(map(same, here, there))


def test_its_warnings_and_errors_are_those_of_reading_here(
    files: list[Path], process: ReadingProcess, tmp_path: Path
) -> None:
    cut_short, no_sound = tmp_path / "cut.opus", tmp_path / "text.wav"
    cut_short.write_bytes(files[4].read_bytes()[:-3000])
    no_sound.write_text("no sound")

    def said(pieces: Iterator[Chunk | Skip]) -> tuple[list[str], str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                list(pieces)
                error = ""
            except AudioError as e:
                error = str(e)
        return [str(w.message) for w in caught], error

    for source in (cut_short, no_sound, tmp_path / "missing.mp3"):
        here, there = said(asked(source).pieces()), said(process.pieces(asked(source)))
        assert here == there
        assert here[0] or here[1]
    assert list(process.pieces(asked(files[0])))  # and goes on


def test_a_recording_that_is_given_up_leaves_nothing_to_the_next(files: list[Path], process: ReadingProcess) -> None:
    pieces = process.pieces(asked(files[4]))
    next(pieces)
    pieces.close()
    assert process.process is None
    assert all(map(same, asked(files[0]).pieces(), process.pieces(asked(files[0]))))


def test_a_process_that_dies_loses_its_file_alone(files: list[Path], process: ReadingProcess) -> None:
    pieces = process.pieces(asked(files[4]))
    next(pieces)
    assert process.process is not None
    os.kill(process.process.pid, signal.SIGKILL)
    with pytest.raises(AudioError, match="ended with code"):
        list(pieces)
    assert all(map(same, asked(files[0]).pieces(), process.pieces(asked(files[0]))))


@pytest.mark.parametrize("program", ["raise SystemExit(3)", "print('no answer')"])
def test_one_that_can_not_start_is_done_without(
    files: list[Path], program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dawhisper.reading.PROCESS", program)
    process = ReadingProcess()
    for path in files[:3]:
        assert all(map(same, asked(path).pieces(), process.pieces(asked(path))))
        if process.process is not None:
            process.process.wait()


def test_threads_with_processes_give_what_they_give_alone(files: list[Path]) -> None:
    options = TranscribeOptions.of(batch_size=2)

    def heard(processes: bool) -> dict[str, list[Chunk | Skip]]:
        recordings = [BatchedRecording(path) for path in files]
        pieces: dict[str, list[Chunk | Skip]] = {}
        for recording, piece in read_together(iter(recordings), options, 2, 2, processes):
            assert not isinstance(piece, Exception)
            if piece is not None:
                pieces.setdefault(str(recording.source), []).append(piece)
        return pieces

    alone, together = heard(False), heard(True)
    assert alone.keys() == together.keys() == {str(path) for path in files}
    assert all(len(alone[name]) == len(together[name]) for name in alone)
    assert all(same(a, b) for name in alone for a, b in zip(alone[name], together[name]))
