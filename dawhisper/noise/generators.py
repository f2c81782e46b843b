"""Synthetic noise: coloured noise, noise with a random spectrum, and babble of other clips of speech."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dawhisper.audio import SAMPLE_RATE
from dawhisper.distributed import onto
from dawhisper.errors import OptionError

from .mixing import frame_energy, unit_power
from .random_numbers import between, gaussian, seeds

FFT_ROWS = 16
SHAPE_KNOTS = 24  # of a random spectrum, evenly spaced over the mel scale
PIECE = 32  # samples (2 ms) that babble is put together of
COLOURS = {"white": 0.0, "pink": 1.0, "brown": 2.0}  # exponents, see `colored_noise`


def colored_noise(
    shape: Sequence[int], exponent: float | Tensor, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Gaussian noise with a power spectrum of 1/f**exponent: 0 white, 1 pink, 2 brown. shape [..., S], unit power.

    exponent: one for all rows, or a tensor with one for each.
    """
    n_samples, rows = shape[-1], math.prod(shape[:-1])
    noise = gaussian(seeds(rows, generator, device), n_samples)
    if isinstance(exponent, Tensor) or exponent:
        frequency = torch.arange(n_samples // 2 + 1, device=device).float()
        frequency = frequency.clamp(min=20 * n_samples / SAMPLE_RATE)  # flat under 20 Hz: nobody hears it
        power = onto(device, exponent.reshape(-1, 1)) if isinstance(exponent, Tensor) else exponent
        gain = frequency.pow(-power / 2)
        gain[..., 0].zero_()  # no constant offset; `gain[0] = 0` would wait for the device
        noise = filtered(noise, gain)
    return unit_power(noise).view(*shape)


def shaped_noise(count: int, n_samples: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Noise with a random spectrum, level and hum, as of machines or traffic. -> [count, n_samples], unit power

    A random smooth spectrum (knots with a deviation of 12 dB, over a slope of 0 to 2 times pink), a level that wanders
    (up to 10 dB, with a knot every 0.1 to 2 s), and in two of five a hum: harmonics of 25 to 400 Hz.
    """
    exponent = between((0.0, 2.0), count, generator)
    noise = equalize(colored_noise((count, n_samples), exponent, generator, device), 12.0, generator)
    levels = onto(device, _hum_levels(count, generator))
    phases = onto(device, torch.rand(count, levels.shape[1], generator=generator))
    turns = onto(device, 25 * 16 ** torch.rand(count, 1, generator=generator))
    turns = turns * (torch.arange(n_samples, device=device) / SAMPLE_RATE)  # of the first harmonic
    for k in range(levels.shape[1]):
        noise += levels[:, k, None] * (2 * math.pi * (turns * (k + 1) + phases[:, k, None]).frac()).sin()
    return unit_power(noise * _wandering(count, n_samples, generator, device))


def equalize(x: Tensor, deviation_db: float, generator: torch.Generator) -> Tensor:
    """Each clip through a random smooth filter: knots over the mel scale, normal in dB. x [B, S] -> [B, S]"""
    knots = onto(x.device, torch.randn(len(x), SHAPE_KNOTS, generator=generator) * deviation_db)
    frequency = torch.fft.rfftfreq(x.shape[-1], 1 / SAMPLE_RATE, device=x.device)
    place = (1 + frequency / 700).log() * ((SHAPE_KNOTS - 1) / math.log(1 + SAMPLE_RATE / 2 / 700))
    low = place.long().clamp(max=SHAPE_KNOTS - 2)
    gain_db = torch.lerp(knots[:, low], knots[:, low + 1], place - low)
    return filtered(x, 10 ** (gain_db / 20))


def filtered(x: Tensor, response: Tensor) -> Tensor:
    """Each clip through a filter given by its real response [S // 2 + 1], or one for each [B, S // 2 + 1].

    Rows are filled up to a multiple of 16: each new shape wants a cuFFT plan, with memory outside of torch's own.
    """
    rows, n_samples = x.shape
    spectrum = torch.fft.rfft(F.pad(x, (0, 0, 0, -rows % FFT_ROWS)))
    spectrum[:rows] *= response
    return torch.fft.irfft(spectrum, n=n_samples)[:rows]


def _hum_levels(count: int, generator: torch.Generator, harmonics: int = 12) -> Tensor:
    """Amplitudes of the harmonics of a hum beside noise of unit power, most often none at all. -> [count, harmonics]"""
    has = torch.rand(count, 1, generator=generator) < 0.4
    level = 10 ** (between((-15.0, 5.0), count, generator)[:, None] / 20)
    each = torch.rand(count, harmonics, generator=generator) / (1 + torch.arange(harmonics)) ** 0.7
    return each * level * has


def _wandering(count: int, n_samples: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """A gain that wanders between knots, linear in dB; -> [count, n_samples]"""
    depth = between((0.0, 5.0), count, generator)[:, None]
    knots = onto(device, torch.randn(count, 512, generator=generator) * depth)
    period = onto(device, 0.1 * 20 ** torch.rand(count, 1, generator=generator))  # seconds between knots
    place = (torch.arange(n_samples, device=device) / SAMPLE_RATE / period) % 510
    low = place.long()
    return 10 ** (torch.lerp(knots.gather(1, low), knots.gather(1, low + 1), place - low) / 20)


def babble(
    speech: Tensor,
    lengths: Tensor,
    generator: torch.Generator,
    talkers: tuple[int, int] = (3, 8),
    rows: Tensor | None = None,
) -> Tensor:
    """For each clip a babble of the other clips of the batch, never of itself.

    speech [B, S], zero from `lengths` [B] on -> [B, S], unit power; with `rows` (int64, on the device) only theirs.
    Each of the talkers (between the two bounds, both counted) is another clip, looped from a random place. With fewer
    clips than talkers a clip is heard more than once.
    Raises OptionError when B is 1: use `NoiseBank.babble`.
    """
    batch, n_samples = speech.shape
    if batch < 2:
        raise OptionError("babble needs two clips or more in the batch, or a bank of speech")
    order = torch.rand(batch, batch, generator=generator)
    order.fill_diagonal_(2.0)  # itself comes last and is never reached
    others = order.argsort(-1)[:, : batch - 1]
    columns = torch.arange(talkers[1]) % (batch - 1)
    start = torch.rand(batch, talkers[1], generator=generator)
    levels = onto(speech.device, _talker_levels(batch, talkers, generator))
    who, start = onto(speech.device, others[:, columns]), onto(speech.device, start)
    if rows is not None:
        who, start, levels = who[rows], start[rows], levels[rows]
    rms = (frame_energy(speech).sum(-1) / lengths.clamp(min=1)).sqrt().clamp(min=1e-5)
    # Pieces of 2 ms are looked up and summed in one go, instead of every sample of each talker in turn.
    pieces = F.pad(speech, (0, -n_samples % PIECE)).view(batch, -1, PIECE)
    period = (lengths // PIECE).clamp(min=1)[who][:, None]  # [n, 1, K], in pieces
    time = torch.arange(pieces.shape[1], device=speech.device)[:, None]
    place = (time + (start[:, None] * period).long()) % period + who[:, None] * pieces.shape[1]  # [n, P, K]
    weight = (levels / rms[who])[:, None].expand_as(place)
    total = F.embedding_bag(
        place.flatten(0, 1), pieces.flatten(0, 1), mode="sum", per_sample_weights=weight.flatten(0, 1)
    )
    return unit_power(total.view(len(who), -1)[:, :n_samples])


def _talker_levels(count: int, talkers: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Amplitude of each of the possible talkers, 0 beyond the number drawn. -> [count, talkers[1]]"""
    low, high = talkers
    if not 1 <= low <= high:
        raise OptionError(f"talkers must be two numbers, 1 or more and in order, not {talkers}")
    number = torch.randint(low, high + 1, (count, 1), generator=generator)
    level = 10 ** (-5 * torch.rand(count, high, generator=generator) / 20)  # nearer and farther ones, 5 dB
    return level * (torch.arange(high) < number)


def of_colour(
    exponent: float, count: int, n_samples: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    return colored_noise((count, n_samples), exponent, generator, device)


# kinds that need no recordings: count, n_samples, generator, device -> [count, n_samples], unit power. A new kind is a
# function here and its weight in AugmentOptions (augment.py)
MADE: dict[str, Callable[..., Tensor]] = {
    **{kind: partial(of_colour, exponent) for kind, exponent in COLOURS.items()},
    "shaped": shaped_noise,
}
