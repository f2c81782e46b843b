"""Sounds made for tests, and files of them."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Bursts of noise between faint pauses."""
    rng = np.random.default_rng(seed)
    audio = rng.standard_normal(int(seconds * 16000)).astype(np.float32) * 0.1
    return np.where(np.arange(len(audio)) // 20000 % 3 > 0, audio, audio / 100)


def write_wav(path: Path, audio: np.ndarray, rate: int = 16000) -> Path:
    with wave.open(str(path), "wb") as f:
        f.setnchannels(1 if audio.ndim == 1 else audio.shape[1])
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes((audio * 32767).astype("<i2").tobytes())
    return path
