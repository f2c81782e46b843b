"""scripts/rooms.py: responses that die away as fast as was asked; what can't be made is told in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command_line import run_script

from dawhisper.noise.recordings import NoiseBank

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "rooms.py"


def reverberation(response: np.ndarray) -> float:
    """Seconds in which 60 dB are gone, from what is left after 5 and 25 dB (Schroeder 1965, backward integration)."""
    left = 10 * np.log10(np.square(response.astype(np.float64))[::-1].cumsum()[::-1])
    at_5, at_25 = (int(np.count_nonzero(left > left[0] - decibels)) for decibels in (5, 25))
    return 3 * (at_25 - at_5) / 16000


@pytest.mark.parametrize(("seconds", "size"), [(0.3, (3, 5)), (1.2, (12, 15))])
def test_rooms_die_away_as_asked(tmp_path: Path, seconds: float, size: tuple[float, float]) -> None:
    pytest.importorskip("pyroomacoustics")
    asked = ("--count", 5, "--size", *size, "--reverberation", seconds, seconds, "--processes", 1)
    banks = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert run_script(SCRIPT, "--out", folder, *asked) == 0
        banks.append(NoiseBank.from_manifest([str(folder)], trim_silence=False))
    first, second = banks
    assert len(first) == 5 and torch.equal(first.data, second.data)
    rooms = [x.numpy() for x in first.data.split(first.lengths.tolist())]
    assert np.median([reverberation(x) for x in rooms]) == pytest.approx(seconds, rel=0.3)
    for response in rooms:
        assert np.abs(response).argmax() <= 16  # the direct sound, a millisecond after the start


def test_what_can_t_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyroomacoustics", None)
    assert run_script(SCRIPT, "--out", tmp_path) == 1
    assert capsys.readouterr().err == "rooms: error: pyroomacoustics is not installed: pip install pyroomacoustics\n"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--size", 5, 3), "--size is two numbers"),
        (("--reverberation", 0, 1), "--reverberation is two numbers"),
        (("--count", 0), "--count must be 1 or more"),
        (("--size", 20, 20, "--reverberation", 0.05, 0.05), "no room of 20 to 20 m has 0.05 to 0.05 s"),
    ],
)
def test_bad_numbers_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: tuple[object, ...], said: str
) -> None:
    pytest.importorskip("pyroomacoustics")
    assert run_script(SCRIPT, "--out", tmp_path / "out", "--processes", 1, *asked) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("rooms: error: ") and said in error
