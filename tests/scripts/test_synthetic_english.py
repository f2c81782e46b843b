"""scripts/synthetic_english.py: a manifest of what a speech synthesiser read; its absence is told in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import run_script

from dawhisper.data.loader import read_audio, read_manifest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "synthetic_english.py"
FLITE = f"""#!{sys.executable}
import sys, wave, numpy as np
text, target = sys.argv[sys.argv.index("-t") + 1], sys.argv[sys.argv.index("-o") + 1]
if "broken" in text:
    sys.exit(1)
sound = 3000 * np.sin(np.arange(4000 * len(text.split())) / 5)
if "silent" in text:
    sound *= 0
with wave.open(target, "wb") as f:
    f.setparams((1, 2, 16000, 0, "NONE", ""))
    f.writeframes(np.pad(sound, 8000).astype("<i2").tobytes())
"""


def test_manifest_of_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "flite").write_text(FLITE)
    (tmp_path / "flite").chmod(0o755)
    good = [f"Sentence number {i} has seven words." for i in "abcdefgh"]
    text = tmp_path / "text.txt"
    text.write_text("\n".join([*good, good[0], "", "This one is broken.", "A silent one it is."]), "utf-8")
    out = tmp_path / "tts"
    assert run_script(SCRIPT, text, "--out", out, "--processes", 1) == 0
    assert "8 of 10 clips" in capsys.readouterr().out  # an engine that fails and silence are left out
    clips = read_manifest(out)
    assert sorted(str(u.text) for u in clips) == good
    for u in clips:
        audio = read_audio(u)
        assert abs(len(audio) - u.duration * 16000) <= 1
        assert 1.5 * 0.9 < u.duration < 1.5 * 1.12 + 0.3  # the silence around it is cut, the rest resampled
        assert 0.15 < np.abs(audio.astype(np.float32)).max() / 32768 < 0.95


def test_nothing_to_read_with_or_from_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = tmp_path / "text.txt"
    text.write_text("One.", "utf-8")
    assert run_script(SCRIPT, text, "--out", tmp_path / "tts") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "neither flite nor pico2wave is installed" in said
    (tmp_path / "flite").write_text(FLITE)
    (tmp_path / "flite").chmod(0o755)
    assert run_script(SCRIPT, tmp_path / "none.txt", "--out", tmp_path / "tts") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "none.txt" in said
