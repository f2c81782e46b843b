"""Noise added at a known SNR, measured over active speech; batches of 16 kHz audio [B, S].

Active speech: the 20 ms frames whose power is within 40 dB of the clip's loudest frame, the rule by which STOI drops
silent frames (Taal et al., "An Algorithm for Intelligibility Prediction of Time-Frequency Weighted Noisy Speech",
2011). An SNR is the mean power of the speech over that of the noise, both over the samples of these frames.
torchaudio's `add_noise` measures over the whole clip, pauses included, so it is not used here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dawhisper.audio import N_SAMPLES_PER_TOKEN

SNR_FRAME = N_SAMPLES_PER_TOKEN  # samples of a 20 ms frame, which is also a position of the encoder
ACTIVE_RANGE_DB = 40.0  # a frame this far below the loudest one is a pause
MAX_NOISE_CREST_DB = 20.0  # noise may be this much louder in the pauses than under the speech, no more


def length_mask(lengths: Tensor, n_samples: int) -> Tensor:
    """True where a sample belongs to the clip. lengths [B] -> bool [B, n_samples]"""
    return torch.arange(n_samples, device=lengths.device) < lengths[:, None]


def frame_energy(x: Tensor) -> Tensor:
    """Sum of the squares of each 20 ms frame, the last one filled up with zeros. x [B, S] -> [B, F]"""
    frames = F.pad(x.float(), (0, -x.shape[-1] % SNR_FRAME)).unflatten(-1, (-1, SNR_FRAME))
    return torch.linalg.vector_norm(frames, dim=-1).square()  # reads x once and writes nothing else


def active_samples(energy: Tensor, lengths: Tensor) -> Tensor:
    """How many samples of active speech each frame has: 0 in a pause. energy [B, F], lengths [B] -> int64 [B, F]"""
    start = torch.arange(energy.shape[-1], device=energy.device) * SNR_FRAME
    count = (lengths[:, None] - start).clamp(0, SNR_FRAME)
    power = energy / count.clamp(min=1)  # the last frame may be a partial one
    return count * (power > power.amax(-1, keepdim=True) * 10 ** (-ACTIVE_RANGE_DB / 10))


def power_over(energy: Tensor, samples: Tensor) -> Tensor:
    """Mean power over frames of active speech: energy and `active_samples`, both [B, F] -> [B]; 0 without any."""
    return (energy * (samples > 0)).sum(-1) / samples.sum(-1).clamp(min=1)


def active_mask(x: Tensor, lengths: Tensor) -> Tensor:
    """True on the samples of active speech (see the module's docstring). x [B, S], lengths [B] -> bool [B, S]"""
    valid = length_mask(lengths, x.shape[-1])
    active = active_samples(frame_energy(x * valid), lengths) > 0
    return active.repeat_interleave(SNR_FRAME, dim=-1)[:, : x.shape[-1]] & valid


def active_power(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean power over active speech. x [B, S], lengths [B] -> [B]"""
    energy = frame_energy(x * length_mask(lengths, x.shape[-1]))
    return power_over(energy, active_samples(energy, lengths))


def measure_snr(speech: Tensor, noise: Tensor, lengths: Tensor) -> Tensor:
    """SNR in dB over active speech. Both [B, S], lengths [B] -> [B]; +inf without noise, -inf without speech."""
    valid = length_mask(lengths, speech.shape[-1])
    energy = frame_energy(speech * valid)
    active = active_samples(energy, lengths)
    return ratio_db(power_over(energy, active), power_over(frame_energy(noise * valid), active))


def ratio_db(speech_power: Tensor, noise_power: Tensor) -> Tensor:
    ratio = 10 * (speech_power.log10() - noise_power.log10())
    return torch.where(noise_power > 0, ratio, math.inf)


def add_noise(speech: Tensor, noise: Tensor, snr_db: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the noise so that the SNR over active speech is `snr_db`, and add it.

    speech, noise [B, S]; snr_db, lengths [B] -> (mixture, scaled noise), both [B, S], zero from `lengths` on.
    A noise that falls almost wholly into the pauses is not raised without end: it is taken to be at most 20 dB
    weaker under the speech than over the whole clip. A silent clip gets no noise: there is nothing to scale it by.
    """
    valid = length_mask(lengths, speech.shape[-1])
    speech, noise = speech * valid, noise * valid
    energy = frame_energy(speech)
    gain, _ = noise_gain(energy, frame_energy(noise), active_samples(energy, lengths), snr_db, lengths)
    scaled = noise * gain[:, None]
    return speech + scaled, scaled


def noise_gain(speech: Tensor, noise: Tensor, active: Tensor, snr_db: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The factor by which `add_noise` scales the noise, and the SNR in dB that comes of it, both [B].

    speech, noise: their `frame_energy` [B, F]; active: the speech's `active_samples`; snr_db asked for, lengths [B].
    """
    speech_power, under = power_over(speech, active), power_over(noise, active)
    whole = noise.sum(-1) / lengths.clamp(min=1)
    noise_power = torch.maximum(under, whole * 10 ** (-MAX_NOISE_CREST_DB / 10))
    gain = (speech_power / noise_power.clamp(min=1e-20)).sqrt() * 10 ** (-snr_db.float() / 20)
    gain = torch.where(noise_power > 1e-20, gain, 0.0)
    return gain, ratio_db(speech_power, under * gain.square())


def unit_power(x: Tensor) -> Tensor:
    """Each row scaled to a mean square of 1. x [B, S] -> [B, S]"""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (math.sqrt(x.shape[-1]) / norm.clamp(min=1e-10))


@dataclass(frozen=True)
class Mixture:
    """A disturbed batch; float32 on the device of the batch. All audio is zero from `lengths` on."""

    audio: Tensor  # [B, S] what the model hears
    clean: Tensor  # [B, S] the speech in it: after speed and gain; before room, noise and channel
    noise: Tensor  # [B, S] the scaled noise that was added, before the channel; zeros where there is none
    snr_db: Tensor  # [B] of clean over noise, over active speech; +inf without noise, -inf for noise alone
    lengths: Tensor  # [B] int64 samples: a changed speed changes them
    kind: list[str]  # "clean", or the noise: "real", "babble", "white", "pink", "brown", or two: "real+white"
    second: Tensor | None = None  # [B, S] what the secondary branch hears, where that may be something else

    @property
    def noise_only(self) -> Tensor:
        """[B] bool: speech silenced; the target must be empty."""
        return self.snr_db == -math.inf
