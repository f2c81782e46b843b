"""What made noise is like, and whose voices a babble has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.noise import RATE, generator

from dawhisper.errors import OptionError
from dawhisper.noise.generators import babble, colored_noise


@pytest.mark.parametrize("exponent, slope_db", [(0, 0.0), (1, -3.01), (2, -6.02)])
def test_coloured_noise_falls_by_its_slope_per_octave(exponent: float, slope_db: float) -> None:
    x = colored_noise((4, 2**17), exponent, generator())
    power = torch.fft.rfft(x).abs().square().mean(0)
    octaves = [10 * math.log10(power[2**k : 2 ** (k + 1)].mean()) for k in range(10, 16)]
    assert np.diff(octaves) == pytest.approx([slope_db] * 5, abs=0.4)
    assert torch.allclose(x.square().mean(-1), torch.ones(4), atol=1e-4)
    correlation = torch.corrcoef(x).triu(1).abs().max()
    assert correlation < 0.1  # rows are different noises


def test_white_noise_is_gaussian() -> None:
    x = colored_noise((400_000,), 0, generator()).double()
    assert abs(x.mean()) < 0.01 and abs((x**3).mean()) < 0.03 and abs((x**4).mean() - 3) < 0.06
    assert abs((x[1:] * x[:-1]).mean()) < 0.01


def test_babble_is_made_of_the_others_only() -> None:
    lengths = torch.full((4,), 8000)  # each clip is a tone: a spectrum tells what a babble is mixed from
    tones = torch.sin(2 * math.pi * torch.tensor([500.0, 1000.0, 1500.0, 2000.0])[:, None] * torch.arange(8000) / RATE)
    mixed = babble(tones, lengths, generator(), talkers=(3, 8))
    spectrum = torch.fft.rfft(mixed).abs()
    for i in range(4):
        at = [float(spectrum[i, hz // 2]) for hz in (500, 1000, 1500, 2000)]
        assert at[i] < 0.02 * max(at)
        assert sum(level > 0.1 * max(at) for level in at) >= 2
    assert torch.allclose(mixed.square().mean(-1), torch.ones(4), atol=1e-3)
    rows = torch.tensor([1, 3])
    assert torch.allclose(babble(tones, lengths, generator(), rows=rows), mixed[rows], atol=1e-5)
    with pytest.raises(OptionError, match="two clips"):
        babble(tones[:1], lengths[:1], generator())
