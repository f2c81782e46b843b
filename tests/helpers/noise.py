"""Made clips of speech, noises and rooms, for the tests of noise."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dawhisper.noise.recordings import NoiseBank

RATE = 16000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def voices(batch: int = 6, n: int = 48000) -> tuple[Tensor, Tensor]:
    """Clips with words and pauses: tones of different pitch, switched on and off, of different lengths."""
    time = torch.arange(n) / RATE
    pitch = 120.0 + 60 * torch.arange(batch)[:, None]
    on = (torch.sin(2 * math.pi * (1.3 + 0.2 * torch.arange(batch)[:, None]) * time) > -0.3).float()
    lengths = torch.linspace(n, n // 3, batch).long()
    x = 0.2 * torch.sin(2 * math.pi * pitch * time) * on + 1e-5 * torch.sin(2 * math.pi * 50 * time)
    return x * (torch.arange(n) < lengths[:, None]), lengths


def bank(count: int = 5, seconds: float = 1.0, seed: int = 3) -> NoiseBank:
    rng = np.random.default_rng(seed)
    return NoiseBank([0.1 * rng.standard_normal(int(RATE * seconds * (1 + 0.3 * k))) for k in range(count)])


def rirs() -> NoiseBank:
    decay = np.exp(-np.arange(4000) / 600)
    rng = np.random.default_rng(5)
    clips = []
    for delay in (0, 37, 200):
        rir = 0.1 * rng.standard_normal(4000) * decay
        rir[:delay] *= 0.01
        rir[delay] = 0.9
        clips.append(rir)
    return NoiseBank(clips)


def torchaudio_loads() -> bool:
    """Whether clips can be played at another speed here: PyPI's torchaudio needs a torch built for CUDA."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True
