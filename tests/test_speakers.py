"""Turns of speakers are joined to words and segments; pyannote.audio is a fake here, as its weights need a token."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers.command_line import QUICK

from dawhisper.cli import main
from dawhisper.errors import OptionError
from dawhisper.speakers import Turn, most_heard, pyannote_diarizer, with_speakers
from dawhisper.timing import Word
from dawhisper.transcribe_files import WriterOptions, write_outputs
from dawhisper.transcription import Segment, Transcription

ANNA, BEN = Turn(0.0, 2.0, "SPEAKER_00"), Turn(2.0, 4.0, "SPEAKER_01")


def segment(start: float, end: float, *words: Word) -> Segment:
    text = "".join(word.word for word in words) or " Yes."
    return Segment(0, 0, start, end, text, [1], 0.0, -0.1, 1.0, 0.0, list(words) or None)


TALK = [
    segment(0.1, 3.9, Word(" Are", 0.1, 1.0, 0.9), Word(" you?", 1.0, 2.2, 0.9), Word(" I <3", 2.2, 3.0, 0.9)),
    segment(3.0, 3.9, Word(" am.", 3.0, 3.9, 0.9)),
]


def test_words_and_segments_have_the_speaker_that_covers_most() -> None:
    told = with_speakers(Transcription("", TALK, "en"), [BEN, ANNA])
    assert [word.speaker for s in told.segments for word in s.words or ()] == ["SPEAKER_00"] * 2 + ["SPEAKER_01"] * 2
    assert [s.speaker for s in told.segments] == ["SPEAKER_00", "SPEAKER_01"]
    assert told["segments"][0]["words"][2]["speaker"] == "SPEAKER_01"  # type: ignore[index]
    without_words = with_speakers(Transcription("", [segment(1.5, 3.0)], "en"), [ANNA, BEN])
    assert without_words.segments[0].speaker == "SPEAKER_01"


def test_who_is_near() -> None:
    two_of_a_kind = [Turn(0, 1, "a"), Turn(1.4, 2, "a"), Turn(0.9, 1.9, "b")]
    assert most_heard([(0.5, 2.0)], two_of_a_kind) == "a"  # 1.1 s in two turns against 1.0
    assert most_heard([(4.2, 5.0)], [ANNA, BEN]) == "SPEAKER_01"
    assert most_heard([(5.0, 6.0)], [ANNA, BEN]) is None and most_heard([(0.0, 1.0)], []) is None


@pytest.mark.parametrize("words", [True, False])
def test_what_is_written(words: bool, tmp_path: Path) -> None:
    talk = [s if words else replace(s, words=None) for s in TALK]
    turns = [replace(ANNA, speaker="<A>"), BEN]
    write_outputs(with_speakers(Transcription("", talk, "en"), turns), "talk", tmp_path, WriterOptions())
    srt = (tmp_path / "talk.srt").read_text("utf-8")
    assert "[<A>]: Are you? " + ("[SPEAKER_01]: I <3" if words else "I <3") in srt
    assert srt.splitlines()[-2] == "[SPEAKER_01]: am." and "[SPEAKER_01]: am." in (tmp_path / "talk.txt").read_text()
    assert "[&lt;A&gt;]: Are you?" in (tmp_path / "talk.vtt").read_text("utf-8")
    made = json.loads((tmp_path / "talk.json").read_text("utf-8"))
    assert [s["speaker"] for s in made["segments"]] == ["<A>", "SPEAKER_01"]
    assert made["segments"][0]["text"].startswith(" Are")  # the JSON's text is the text


class FakePipeline:
    heard: ClassVar[dict[str, Any]] = {}

    @classmethod
    def from_pretrained(cls, name: str, token: str | None = None) -> FakePipeline | None:
        return cls() if token == "hf_good" else None

    def to(self, device: torch.device) -> None:
        FakePipeline.heard["device"] = device

    def __call__(self, file: dict[str, Any], num_speakers: int | None = None) -> SimpleNamespace:
        FakePipeline.heard |= {"samples": file["waveform"].shape[1], "num_speakers": num_speakers}
        half = file["waveform"].shape[1] / file["sample_rate"] / 2

        def itertracks(yield_label: bool) -> Iterator[tuple[SimpleNamespace, str, str]]:
            yield SimpleNamespace(start=0.0, end=half), "A", "SPEAKER_00"
            yield SimpleNamespace(start=half, end=2 * half), "B", "SPEAKER_01"

        return SimpleNamespace(exclusive_speaker_diarization=SimpleNamespace(itertracks=itertracks))


@pytest.fixture
def pyannote(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("pyannote.audio")
    module.Pipeline = FakePipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyannote", ModuleType("pyannote"))
    monkeypatch.setitem(sys.modules, "pyannote.audio", module)


def test_pyannotes_turns(pyannote: None, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = pyannote_diarizer("hf_good", torch.device("cpu"), 2)(np.zeros(64000, np.float32))
    assert list(turns) == [ANNA, BEN] and FakePipeline.heard["num_speakers"] == 2
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert callable(pyannote_diarizer(None, torch.device("cpu")))


def test_the_command(pyannote: None, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["transcribe", str(assets / "speech_noisy.opus"), "--diarize", "True", *QUICK, "-o", str(tmp_path)]
    assert main([*words, "--hf_token", "hf_good", "--language", "en", "-f", "json"]) == 0
    made = json.loads((tmp_path / "speech_noisy.json").read_text("utf-8"))
    speakers = [word["speaker"] for s in made["segments"] for word in s["words"]]
    assert speakers == sorted(speakers) and set(speakers) == {"SPEAKER_00", "SPEAKER_01"}
    assert main([*words, "--hf_token", "hf_bad"]) == 1
    assert "accept its conditions" in capsys.readouterr().err


def test_the_fake_is_as_the_package() -> None:
    real = pytest.importorskip("pyannote.audio")
    pipelines = importlib.import_module("pyannote.audio.pipelines.speaker_diarization")
    inspect.signature(real.Pipeline.from_pretrained).bind("name", token="hf_good")
    assert "num_speakers" in inspect.signature(pipelines.SpeakerDiarization.apply).parameters
    assert "exclusive_speaker_diarization" in pipelines.DiarizeOutput.__dataclass_fields__


@pytest.mark.parametrize("fault", ["ModuleNotFoundError('pyannote')", "OSError('torchaudio: undefined symbol')"])
def test_without_the_package(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = ModuleType("pyannote")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "pyannote", package)
    monkeypatch.delitem(sys.modules, "pyannote.audio", raising=False)
    (tmp_path / "audio.py").write_text(f"raise {fault}")
    with pytest.raises(OptionError, match=r"\(.*(pyannote|undefined symbol)\): pip install 'dawhisper\[diarize\]'"):
        pyannote_diarizer("hf_good", torch.device("cpu"))
