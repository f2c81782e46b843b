"""Sounds made for tests, files of them, and manifests."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Bursts of noise between faint pauses."""
    rng = np.random.default_rng(seed)
    audio = rng.standard_normal(int(seconds * 16000)).astype(np.float32) * 0.1
    return np.where(np.arange(len(audio)) // 20000 % 3 > 0, audio, audio / 100)


def hiss(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise without pauses."""
    return np.random.default_rng(seed).standard_normal(round(seconds * 16000)).astype(np.float32) * 0.1


def bursts(*seconds: float) -> np.ndarray:
    """Hiss for seconds[0], silence for seconds[1], noise for seconds[2], ..."""
    parts = [hiss(s, seed=i) if i % 2 == 0 else np.zeros(round(s * 16000), np.float32) for i, s in enumerate(seconds)]
    return np.concatenate(parts)


def write_wav(path: Path, audio: np.ndarray, rate: int = 16000) -> Path:
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1 if audio.ndim == 1 else audio.shape[1])
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes((audio * 32767).astype("<i2").tobytes())
    return path


def write_clips(folder: Path, count: int, seed: int) -> Path:
    """Clips of one to two seconds: a gliding tone in bursts, as unlike silence as speech is."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        t = np.arange(int(16000 * rng.uniform(1.0, 1.9))) / 16000
        tone = np.sin(2 * np.pi * (150 + 100 * rng.random() * t) * t) * (np.sin(2 * np.pi * 3 * t) > -0.3)
        write_wav(folder / f"{i}.wav", 0.3 * tone + 0.01 * rng.standard_normal(len(t)))
        text = " ".join(rng.choice(WORDS, 3))
        line = {"audio": f"{i}.wav", "duration": len(t) / 16000, "text": text, "language": "en", "speaker": str(i)}
        lines.append(json.dumps(line))
    manifest = folder / "manifest.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest
