"""scripts/synthetic_english.py: a manifest of what a speech synthesiser read; its absence is told in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from dawhisper.data.loader import read_audio, read_manifest

ROOT = Path(__file__).parent.parent.parent
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


def run(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": str(path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "synthetic_english.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_manifest_of_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "flite").write_text(FLITE)
    (tmp_path / "flite").chmod(0o755)
    good = [f"Sentence number {i} has seven words." for i in "abcdefgh"]
    text = tmp_path / "text.txt"
    text.write_text("\n".join([*good, good[0], "", "This one is broken.", "A silent one it is."]), "utf-8")
    out = tmp_path / "tts"
    result = run(str(text), "--out", str(out), "--processes", "1", path=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "8 of 10 clips" in result.stdout  # an engine that fails and silence are left out
    clips = read_manifest(out)
    assert sorted(str(u.text) for u in clips) == good
    for u in clips:
        audio = read_audio(u)
        assert abs(len(audio) - u.duration * 16000) <= 1
        assert 1.5 * 0.9 < u.duration < 1.5 * 1.12 + 0.3  # the silence around it is cut, the rest resampled
        assert 0.15 < np.abs(audio.astype(np.float32)).max() / 32768 < 0.95


def test_nothing_to_read_with_or_from_is_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One.", "utf-8")
    result = run(str(text), "--out", str(tmp_path / "tts"), path=tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "neither flite nor pico2wave is installed" in result.stderr
    (tmp_path / "flite").write_text(FLITE)
    (tmp_path / "flite").chmod(0o755)
    result = run(str(tmp_path / "none.txt"), "--out", str(tmp_path / "tts"), path=tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "none.txt" in result.stderr
