"""What a room or a line does to audio: reverberation, band limits, a telephone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dawhisper.audio import SAMPLE_RATE
from dawhisper.distributed import onto

from .generators import filtered
from .mixing import length_mask
from .random_numbers import seeds, uniform


def reverberate(x: Tensor, rir: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Convolve with room impulse responses. x [B, S], rir [R] or [B, R] -> [B, S]

    The direct path (the response's largest tap) is put at time zero, so that words don't move, and each clip keeps
    its energy. With `lengths` [B] the tail beyond the clip is cut.
    """
    n_samples = x.shape[-1]
    rir = rir.expand(x.shape[0], -1).float()
    n_taps = rir.shape[-1]
    tap = torch.arange(n_taps, device=rir.device) + rir.abs().argmax(-1, keepdim=True)
    rir = rir.gather(-1, tap.clamp(max=n_taps - 1)) * (tap < n_taps)
    full = -(-(n_samples + n_taps) // 8000) * 8000  # a length with small prime factors: fast FFTs
    wet = torch.fft.irfft(torch.fft.rfft(x, n=full) * torch.fft.rfft(rir, n=full), n=full)[:, :n_samples]
    if lengths is not None:
        wet = wet * length_mask(lengths, n_samples)
    gain = x.square().sum(-1, keepdim=True) / wet.square().sum(-1, keepdim=True).clamp(min=1e-20)
    return wet * gain.sqrt()


def band_limit(x: Tensor, low: Tensor | float = 0.0, high: Tensor | float = SAMPLE_RATE / 2) -> Tensor:
    """Keep the band from `low` to `high` Hz, each a number or one per clip [B]. x [B, S] -> [B, S]

    The edges fall over 12% of their frequency, raised cosine in amplitude: about as steep as a telephone's filter.
    """
    frequency = torch.fft.rfftfreq(x.shape[-1], 1 / SAMPLE_RATE, device=x.device)
    low_hz = onto(x.device, torch.as_tensor(low, dtype=torch.float32)).reshape(-1, 1)
    high_hz = onto(x.device, torch.as_tensor(high, dtype=torch.float32)).reshape(-1, 1)
    rise = ((frequency - low_hz * 0.88) / (low_hz * 0.12).clamp(min=1e-3)).clamp(0, 1)
    fall = ((high_hz * 1.12 - frequency) / (high_hz * 0.12).clamp(min=1e-3)).clamp(0, 1)
    response = (0.5 - 0.5 * torch.cos(math.pi * rise)) * (0.5 - 0.5 * torch.cos(math.pi * fall))
    return filtered(x, response)


def mu_law(x: Tensor, generator: torch.Generator, levels: int = 256) -> Tensor:
    """8-bit mu-law (G.711) companding noise. x [B, S] -> [B, S], clipped to [-1, 1]

    The rounding error is drawn (uniform over one step) instead of computed: same size and spectrum, and a float's
    last bit can't flip a step, so that every device gives the same audio.
    """
    mu = levels - 1.0
    companded = x.clamp(-1, 1).abs().mul(mu).log1p() / math.log1p(mu) * x.sign()
    error = uniform(seeds(x.shape[0], generator, x.device), x.shape[-1]) - 0.5
    companded = (companded + error * (2 / mu)).clamp(-1, 1)
    return companded.sign() * torch.expm1(companded.abs() * math.log1p(mu)) / mu


def telephone(x: Tensor, generator: torch.Generator) -> Tensor:
    """A telephone line: 300 to 3400 Hz and 8-bit mu-law. x [B, S] -> [B, S]"""
    # Noise is made after the band limit, as a line does; what of it lies above 4 kHz would not survive 8 kHz sampling.
    return band_limit(mu_law(band_limit(x, 300.0, 3400.0), generator), 0.0, 3700.0)
