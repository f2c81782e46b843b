"""What made noise is like, and whose voices a babble has."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.noise import RATE, generator

from dawhisper.errors import OptionError
from dawhisper.noise.generators import babble, colored_noise, equalize, filtered, shaped_noise


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


def test_shaped_noises_are_no_two_alike() -> None:
    x = shaped_noise(6, 2**15, generator())
    assert torch.equal(x, shaped_noise(6, 2**15, generator())) and torch.isfinite(x).all()
    assert torch.allclose(x.square().mean(-1), torch.ones(6), atol=1e-3)
    bands = torch.fft.rfft(x).abs().square()[:, :16384].unflatten(1, (16, -1)).mean(-1)
    level = 10 * bands.log10()
    for i in range(6):
        for j in range(i):
            assert (level[i] - level[j] - (level[i] - level[j]).mean()).abs().max() > 5  # dB, in some band


def test_a_random_filter_colours_and_keeps_length() -> None:
    x = colored_noise((3, 16000), 0, generator())
    y = equalize(x, 6.0, generator(1))
    assert y.shape == x.shape and not torch.allclose(x, y, atol=0.1)
    torch.testing.assert_close(equalize(x, 0.0, generator(1)), x, atol=1e-5, rtol=0)


def test_rows_are_filtered_alike_however_many_there_are() -> None:
    x, response = torch.randn(19, 800), torch.rand(19, 401)
    wanted = torch.fft.irfft(torch.fft.rfft(x) * response, n=800)
    torch.testing.assert_close(filtered(x, response), wanted)
    torch.testing.assert_close(
        filtered(x[:3], response[0]), torch.fft.irfft(torch.fft.rfft(x[:3]) * response[0], n=800)
    )


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
