"""What a room and a line do to the sound."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.noise import generator, rirs, voices
from torch import Tensor

from dawhisper.noise.channels import band_limit, mu_law, reverberate, telephone
from dawhisper.noise.generators import colored_noise


def test_reverberation_keeps_time_and_energy() -> None:
    x, lengths = voices(3)
    delayed = torch.zeros(3, 500)
    delayed[:, 120] = 0.7  # a pure delay: the direct path goes back to time zero
    assert torch.allclose(reverberate(x, delayed), x, atol=1e-4)
    rir = rirs().responses(3, generator())
    wet = reverberate(x, rir, lengths)
    assert torch.allclose(wet.square().sum(-1), x.square().sum(-1), rtol=1e-3)
    assert (wet - x).abs().max() > 0.01
    assert all(not wet[i, n:].any() for i, n in enumerate(lengths.tolist()))
    noise = colored_noise((3, 16000), 0, generator())
    wet = reverberate(noise, rir)
    lag = torch.fft.irfft(torch.fft.rfft(wet) * torch.fft.rfft(noise).conj()).argmax(-1)
    assert not lag.any()


def test_band_limit_and_telephone() -> None:
    x = colored_noise((2, 32000), 0, generator())

    def power(y: Tensor, low: int, high: int) -> float:
        return float(torch.fft.rfft(y[0]).abs().square()[low * 2 : high * 2].mean())

    y = band_limit(x, 300.0, 3400.0)
    assert power(y, 400, 3300) == pytest.approx(power(x, 400, 3300), rel=1e-3)
    assert power(y, 0, 200) < 1e-6 * power(x, 0, 200) and power(y, 4000, 8000) < 1e-6 * power(x, 4000, 8000)
    each = band_limit(x, 0.0, torch.tensor([1000.0, 5000.0]))
    assert torch.fft.rfft(each).abs().square()[:, 4000:8000].mean(-1)[0] < 1e-6
    assert power(band_limit(x), 0, 8000) == pytest.approx(power(x, 0, 8000), rel=0.01)
    line = telephone(0.1 * x, generator())
    assert power(line, 4200, 8000) < 1e-5 * power(line, 400, 3300)


def test_mu_law_noise_is_that_of_8_bits() -> None:
    x = 0.3 * colored_noise((1, 100_000), 0, generator())
    error = mu_law(x, generator(1)) - x.clamp(-1, 1)
    snr = 10 * math.log10(x.clamp(-1, 1).square().mean() / error.square().mean())
    assert 36 < snr < 40  # G.711's well-known 38 dB
