"""Mixing at a known SNR over active speech."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.noise import bank, generator, voices

from dawhisper.noise.augment import NOISE_KINDS
from dawhisper.noise.generators import babble, colored_noise, shaped_noise
from dawhisper.noise.mixing import active_mask, active_power, add_noise, measure_snr


def reference_snr(speech: np.ndarray, noise: np.ndarray) -> float:
    """The definition, written again the slow way: 20 ms frames within 40 dB of the loudest."""
    frames = [slice(i, i + 320) for i in range(0, len(speech), 320)]
    power = [float(np.mean(speech[f].astype(np.float64) ** 2)) for f in frames]
    active = np.concatenate([np.arange(len(speech))[f] for f, p in zip(frames, power) if p > max(power) * 1e-4])
    return 10 * math.log10(np.mean(speech[active].astype(np.float64) ** 2) / np.mean(noise[active].astype(float) ** 2))


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_add_noise_reaches_the_snr_over_active_speech(kind: str) -> None:
    speech, lengths = voices()
    noise = {
        "real": lambda: bank().batch(len(speech), speech.shape[1], generator(1)),
        "babble": lambda: babble(speech, lengths, generator(1)),
        "white": lambda: colored_noise(speech.shape, 0, generator(1)),
        "pink": lambda: colored_noise(speech.shape, 1, generator(1)),
        "brown": lambda: colored_noise(speech.shape, 2, generator(1)),
        "shaped": lambda: shaped_noise(*speech.shape, generator(1)),
    }[kind]()
    asked = torch.tensor([-10.0, -5.0, 0.0, 5.0, 20.0, 40.0])
    mixture, scaled = add_noise(speech, noise, asked, lengths)
    for i, n in enumerate(lengths.tolist()):
        measured = reference_snr(speech[i, :n].numpy(), scaled[i, :n].numpy())
        assert measured == pytest.approx(float(asked[i]), abs=0.1)
        assert not scaled[i, n:].any() and not mixture[i, n:].any()
    assert torch.equal(mixture, speech + scaled)
    assert torch.allclose(measure_snr(speech, scaled, lengths), asked, atol=0.01)


def test_pauses_do_not_count() -> None:
    speech, lengths = voices(1)
    padded = torch.cat([speech, torch.zeros(1, 64000)], dim=1)
    assert torch.allclose(active_power(padded, lengths + 64000), active_power(speech, lengths), rtol=1e-3)
    mask = active_mask(speech, lengths)
    assert 0.3 < mask.float().mean() < 0.9  # the pauses are left out, the words are not
    assert active_power(torch.zeros(1, 1000), torch.tensor([1000])) == 0


def test_add_noise_that_lies_in_the_pauses_is_not_raised_without_end() -> None:
    speech, lengths = voices(1)
    noise = torch.where(active_mask(speech, lengths), 0.0, 1.0) * colored_noise(speech.shape, 0, generator())
    _, scaled = add_noise(speech, noise, torch.tensor([0.0]), lengths)
    assert 0 < scaled.square().mean() <= 101 * active_power(speech, lengths)
    silent, nothing = add_noise(torch.zeros_like(speech), noise, torch.tensor([0.0]), lengths)
    assert not silent.any() and not nothing.any()
    _, none = add_noise(speech, torch.zeros_like(speech), torch.tensor([0.0]), lengths)
    assert not none.any() and measure_snr(speech, none, lengths)[0] == math.inf
