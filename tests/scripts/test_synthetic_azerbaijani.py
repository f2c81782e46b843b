"""scripts/synthetic_azerbaijani.py: nothing of dev and test is in train, and espeak-ng's absence is told."""

from __future__ import annotations

import random
import runpy
import shutil
from pathlib import Path

import pytest
from helpers.command_line import run_script

from dawhisper.data.loader import read_audio, read_manifest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "synthetic_azerbaijani.py"
WORDS = ["ev", "yol", "su", "dağ", "bağ", "çay", "ana", "ata", "dil", "söz", "gün", "ay", "il", "daş", "quş"]


def sentences(n: int) -> list[str]:
    rng = random.Random(1)
    return [" ".join(rng.choices(WORDS, k=6)) + "." for _ in range(n)]


def test_sentences_and_voices_of_dev_and_test_are_not_in_train() -> None:
    script = runpy.run_path(str(SCRIPT))
    twin = "Bu cümlə iki dəfə yazılıb, birində nöqtə var"
    given = [*sentences(60), twin, f"{twin}."]
    for seed in range(20):  # some seed puts one twin into test and the other into the rest
        plan = script["plan_readings"](given, 10, 20, 2, random.Random(seed))
        texts = {split: {r.text for r in readings} for split, readings in plan.items()}
        voices = {split: {r.voice for r in readings} for split, readings in plan.items()}
        assert (len(plan["dev"]), len(plan["test"])) == (10, 20)
        assert len(plan["train"]) == 2 * len(texts["train"]) > 0
        held_out = texts["dev"] | texts["test"]
        assert not texts["train"] & held_out and not texts["dev"] & texts["test"]
        assert not voices["train"] & (voices["dev"] | voices["test"]) and not voices["dev"] & voices["test"]
        assert not (held_out & {twin, f"{twin}."} and texts["train"] & {twin, f"{twin}."})


def test_a_missing_espeak_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_script(SCRIPT, tmp_path / "none.txt", "--out", tmp_path) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "espeak-ng is not installed" in said


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_manifests_of_what_espeak_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join([*sentences(5), "Saat 5-dir."]), "utf-8")
    assert run_script(SCRIPT, text, "--out", tmp_path, "--dev", 1, "--test", 2) == 0
    splits = {s: read_manifest(tmp_path / f"az_{s}") for s in ("train", "dev", "test")}
    assert [len(splits[s]) for s in ("dev", "test")] == [1, 2] and 0 < len(splits["train"]) <= 4
    assert not any("5" in u.text for utterances in splits.values() for u in utterances if u.text)
    u = splits["test"][0]
    assert (u.language, u.source, u.speaker) == ("az", "espeak-ng az", "espeak-m7")
    assert len(read_audio(u)) == pytest.approx(16000 * u.duration, abs=800)
    capsys.readouterr()
    assert run_script(SCRIPT, tmp_path / "none.txt", "--out", tmp_path) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot read" in said
