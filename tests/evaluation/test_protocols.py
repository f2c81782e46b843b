"""Made-up miniatures of each corpus' layout: what is read of them, and one evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.sound import hiss, write_wav

from dawhisper.errors import DataError
from dawhisper.evaluation.conditions import write_wav as write_clip
from dawhisper.evaluation.protocols import PROTOCOLS, utterances_of
from dawhisper.evaluation.run import EvaluateOptions, evaluate


def sound(path: Path, seconds: float = 1.0) -> Path:
    write_clip(path, hiss(seconds, seed=len(path.name)))
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")
    return path


def librispeech(root: Path) -> Path:
    for subset, speaker in (("test-clean", "61"), ("test-other", "367"), ("dev-clean", "84")):
        chapter = root / "LibriSpeech" / subset / speaker / "1"
        text(chapter / f"{speaker}-1.trans.txt", f"{speaker}-1-0000 ONE TWO\n{speaker}-1-0001 THREE\n")
        for number in range(2):
            sound(chapter / f"{speaker}-1-000{number}.flac")  # a WAV by its content, which tells
    return root


def voicebank(root: Path) -> Path:
    for name in ("p232_001", "p257_002"):
        sound(root / "clean_testset_wav" / f"{name}.wav")
        sound(root / "noisy_testset_wav" / f"{name}.wav")
        text(root / "testset_txt" / f"{name}.txt", "Please call\n Stella.\n")
    return root


def chime4(root: Path) -> Path:
    texts = root / "data/transcriptions"
    for part, file, into in (
        ("dt05_bus_real", "F01_22GC010A_BUS.CH5.wav", "dt05_bus_real/F01_22GC010A_BUS.trn"),
        ("et05_str_simu", "M05_440C0201_STR.wav", "et05_simu.trn_all"),
        ("tr05_caf_real", "M03_052C0101_CAF.CH5.wav", "tr05_caf_real/M03_052C0101_CAF.trn"),
    ):
        sound(root / "data/audio/16kHz/isolated_1ch_track" / part / file)
        text(texts / into, f"{file.split('.')[0]} NEW YORK\n")
    return root


def ami(root: Path) -> Path:
    for meeting in ("ES2004a", "ES2002a"):  # the second one is not of the test set
        sound(root / "amicorpus" / meeting / "audio" / f"{meeting}.Array1-01.wav", 6.0)
        head = '<?xml version="1.0" encoding="ISO-8859-1"?><nite:root xmlns:nite="http://nite.sourceforge.net/">'
        spoken = [("w", "Hi"), ("w", ","), ("vocalsound", ""), ("w", "it's"), ("w", "me")]
        words = "".join(
            f"<{tag} nite:id='{meeting}.A.words{i}' punc='{str(word == ',').lower()}'>{word}</{tag}>"
            for i, (tag, word) in enumerate(spoken)
        )
        text(root / "annotations/words" / f"{meeting}.A.words.xml", f"{head}{words}</nite:root>")
        href = f"{meeting}.A.words.xml#id({meeting}.A.words"
        segments = "".join(
            f'<segment transcriber_start="{start}" transcriber_end="{end}"><nite:child href="{target}"/></segment>'
            for start, end, target in (
                (0.5, 2.0, f"{href}0)..id({meeting}.A.words3)"),
                (2.0, 2.5, f"{href}2)"),  # a cough
                (3.0, 4.0, f"{href}4)"),
            )
        )
        text(root / "annotations/segments" / f"{meeting}.A.segments.xml", f"{head}{segments}</nite:root>")
    return root


MADE = {"librispeech-musan": librispeech, "voicebank-demand": voicebank, "chime4": chime4, "ami-sdm": ami}
FOUND = {
    "librispeech-musan": [
        ("61-1-0000.flac", "ONE TWO", "libri-61", "test-clean"),
        ("61-1-0001.flac", "THREE", "libri-61", "test-clean"),
        ("367-1-0000.flac", "ONE TWO", "libri-367", "test-other"),
        ("367-1-0001.flac", "THREE", "libri-367", "test-other"),
    ],
    "voicebank-demand": [
        ("p232_001.wav", "Please call Stella.", "p232", "clean"),
        ("p257_002.wav", "Please call Stella.", "p257", "clean"),
        ("p232_001.wav", "Please call Stella.", "p232", "noisy"),
        ("p257_002.wav", "Please call Stella.", "p257", "noisy"),
    ],
    "chime4": [
        ("F01_22GC010A_BUS.CH5.wav", "NEW YORK", "F01", "dt05_real"),
        ("M05_440C0201_STR.wav", "NEW YORK", "M05", "et05_simu"),
    ],
    "ami-sdm": [
        ("ES2004a.Array1-01.wav", "Hi it's", "ES2004a.A", "ami-sdm"),
        ("ES2004a.Array1-01.wav", "me", "ES2004a.A", "ami-sdm"),
    ],
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_is_read(name: str, tmp_path: Path) -> None:
    found = utterances_of(name, MADE[name](tmp_path))
    assert [(Path(u.audio).name, u.text, u.speaker, u.source) for u in found] == FOUND[name]
    assert all(Path(u.audio).is_file() and u.language == "en" for u in found)
    if name == "ami-sdm":
        assert [(u.start, u.end) for u in found] == [(0.5, 2.0), (3.0, 4.0)]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_another_layout(name: str, tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.zeros(16000, np.float32))
    with pytest.raises(DataError, match=f"has nothing for --protocol {name}, which expects "):
        utterances_of(name, tmp_path)
    with pytest.raises(DataError, match="takes the corpus' folder"):
        utterances_of(name, tmp_path / "a.wav")


def test_what_is_missing(tmp_path: Path) -> None:
    (voicebank(tmp_path / "a") / "testset_txt" / "p232_001.txt").unlink()
    with pytest.raises(DataError, match=r"testset_txt has no p232_001\.txt"):
        utterances_of("voicebank-demand", tmp_path / "a")
    next(chime4(tmp_path / "b").rglob("F01*.trn")).unlink()
    with pytest.raises(DataError, match=r"no text of dt05_bus_real/F01_22GC010A_BUS\.CH5\.wav"):
        utterances_of("chime4", tmp_path / "b")


def measured(name: str, folder: Path, model: Path, out: Path, noise: Path):  # type: ignore[no-untyped-def]
    return evaluate(
        EvaluateOptions(
            [str(folder)],
            models=[str(model)],
            protocol=name,
            noise=[str(noise)],
            out=str(out),
            device="cpu",
            bootstrap_samples=10,
            plots=False,
            gates=False,
        )
    )


def test_recorded_sets_are_not_mixed(world: dict[str, Path], tmp_path: Path) -> None:
    results = measured("voicebank-demand", voicebank(tmp_path / "c"), world["model"], tmp_path / "out", world["noise"])
    assert [condition.name for condition in results.conditions] == ["recorded"]
    assert {score.group for score in results.scores} >= {"all", "source:clean", "source:noisy"}


def test_noise_is_mixed_and_heard_alone(world: dict[str, Path], tmp_path: Path) -> None:
    results = measured(
        "librispeech-musan", librispeech(tmp_path / "c"), world["model"], tmp_path / "out", world["noise"]
    )
    names = [condition.name for condition in results.conditions]
    assert names == ["clean", "real_10dB", "real_5dB", "real_0dB", "real_-5dB", "noise-only"]
    alone = results.score(next(iter(results.models)), "noise-only")
    said = sum(len(s.text) for s in results.scored if s.hypothesis.condition == "noise-only")
    assert alone.hallucinated_characters == pytest.approx(said / (alone.seconds / 60))
