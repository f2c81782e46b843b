"""Noise that is made: coloured noise, and babble of other clips of speech."""

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
from .random_numbers import gaussian, seeds

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
        noise = torch.fft.irfft(torch.fft.rfft(noise) * gain, n=n_samples)
    return unit_power(noise).view(*shape)


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
MADE: dict[str, Callable[..., Tensor]] = {kind: partial(of_colour, exponent) for kind, exponent in COLOURS.items()}
