"""Noise for training and evaluation: mixing at a known SNR, babble, coloured noise, reverberation, channels.

Everything works on batches of 16 kHz audio [B, S] on the device of the batch. Every random draw comes from an
explicit CPU `torch.Generator`; long random signals are made on the device by an integer hash of seeds drawn from it.
So the CPU and the GPU give the same mixtures (within 1e-4), and a step can be repeated from its number alone.

Active speech: the 20 ms frames whose power is within 40 dB of the clip's loudest frame, the rule by which STOI drops
silent frames (Taal et al., "An Algorithm for Intelligibility Prediction of Time-Frequency Weighted Noisy Speech",
2011). An SNR is the mean power of the speech over that of the noise, both over the samples of these frames.
torchaudio's `add_noise` measures over the whole clip, pauses included, so it is not used here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dawhisper.audio import N_SAMPLES, SAMPLE_RATE
from dawhisper.data.manifest import Utterance, decode_audio, in_processes, read_manifest, to_int16
from dawhisper.distributed import onto
from dawhisper.errors import DataError, OptionError

FRAME = SAMPLE_RATE // 50  # samples of a 20 ms frame
PIECE = 32  # samples (2 ms) that babble is put together of
ACTIVE_RANGE_DB = 40.0  # a frame this far below the loudest one is a pause
MAX_NOISE_CREST_DB = 20.0  # noise may be this much louder in the pauses than under the speech, no more
SPEEDS = (0.9, 0.95, 1.05, 1.1)
KINDS = ("real", "babble", "white", "pink", "brown")
COLOURS = {"white": 0.0, "pink": 1.0, "brown": 2.0}
NOISE_LEVELS = {"low": (10.0, 25.0), "medium": (0.0, 20.0), "high": (-5.0, 10.0)}  # dB
AUDIO_SUFFIXES = frozenset(
    f".{name}"
    for name in "aac aif aiff amr au flac m4a mp3 mp4 oga ogg opus sph wav webm wma".split()  # noqa: SIM905
)


# ---- measuring ----------------------------------------------------------------------------------------------------


def length_mask(lengths: Tensor, n_samples: int) -> Tensor:
    """True where a sample belongs to the clip. lengths [B] -> bool [B, n_samples]"""
    return torch.arange(n_samples, device=lengths.device) < lengths[:, None]


def frame_energy(x: Tensor) -> Tensor:
    """Sum of the squares of each 20 ms frame, the last one filled up with zeros. x [B, S] -> [B, F]"""
    frames = F.pad(x.float(), (0, -x.shape[-1] % FRAME)).unflatten(-1, (-1, FRAME))
    return torch.linalg.vector_norm(frames, dim=-1).square()  # reads x once and writes nothing else


def active_samples(energy: Tensor, lengths: Tensor) -> Tensor:
    """How many samples of active speech each frame has: 0 in a pause. energy [B, F], lengths [B] -> int64 [B, F]"""
    start = torch.arange(energy.shape[-1], device=energy.device) * FRAME
    count = (lengths[:, None] - start).clamp(0, FRAME)
    power = energy / count.clamp(min=1)  # the last frame may be a partial one
    return count * (power > power.amax(-1, keepdim=True) * 10 ** (-ACTIVE_RANGE_DB / 10))


def power_over(energy: Tensor, samples: Tensor) -> Tensor:
    """Mean power over the frames that have such samples: energy, their number, both [B, F] -> [B]; 0 without any."""
    return (energy * (samples > 0)).sum(-1) / samples.sum(-1).clamp(min=1)


def active_mask(x: Tensor, lengths: Tensor) -> Tensor:
    """True on the samples of active speech (see the module's docstring). x [B, S], lengths [B] -> bool [B, S]"""
    valid = length_mask(lengths, x.shape[-1])
    active = active_samples(frame_energy(x * valid), lengths) > 0
    return active.repeat_interleave(FRAME, dim=-1)[:, : x.shape[-1]] & valid


def active_power(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean power over active speech. x [B, S], lengths [B] -> [B]"""
    energy = frame_energy(x * length_mask(lengths, x.shape[-1]))
    return power_over(energy, active_samples(energy, lengths))


def measure_snr(speech: Tensor, noise: Tensor, lengths: Tensor) -> Tensor:
    """SNR in dB over active speech. Both [B, S], lengths [B] -> [B]; +inf without noise, -inf without speech."""
    valid = length_mask(lengths, speech.shape[-1])
    energy = frame_energy(speech * valid)
    active = active_samples(energy, lengths)
    return _ratio_db(power_over(energy, active), power_over(frame_energy(noise * valid), active))


def _ratio_db(speech_power: Tensor, noise_power: Tensor) -> Tensor:
    ratio = 10 * (speech_power.log10() - noise_power.log10())
    return torch.where(noise_power > 0, ratio, math.inf)


# ---- building blocks ----------------------------------------------------------------------------------------------


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
    return gain, _ratio_db(speech_power, under * gain.square())


def unit_power(x: Tensor) -> Tensor:
    """Each row scaled to a mean square of 1. x [B, S] -> [B, S]"""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (math.sqrt(x.shape[-1]) / norm.clamp(min=1e-10))


def colored_noise(
    shape: Sequence[int], exponent: float | Tensor, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Gaussian noise with a power spectrum of 1/f**exponent: 0 white, 1 pink, 2 brown. shape [..., S], unit power.

    exponent: one for all rows, or a tensor with one for each.
    """
    n_samples, rows = shape[-1], math.prod(shape[:-1])
    noise = _gaussian(_seeds(rows, generator, device), n_samples)
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
    return torch.fft.irfft(torch.fft.rfft(x) * response, n=x.shape[-1])


def mu_law(x: Tensor, generator: torch.Generator, levels: int = 256) -> Tensor:
    """8-bit mu-law (G.711) companding noise. x [B, S] -> [B, S], clipped to [-1, 1]

    The rounding error is drawn (uniform over one step) instead of computed: same size and spectrum, and a float's
    last bit can't flip a step, so that every device gives the same audio.
    """
    mu = levels - 1.0
    companded = x.clamp(-1, 1).abs().mul(mu).log1p() / math.log1p(mu) * x.sign()
    error = _uniform(_seeds(x.shape[0], generator, x.device), x.shape[-1]) - 0.5
    companded = (companded + error * (2 / mu)).clamp(-1, 1)
    return companded.sign() * torch.expm1(companded.abs() * math.log1p(mu)) / mu


def telephone(x: Tensor, generator: torch.Generator) -> Tensor:
    """A telephone line: 300 to 3400 Hz and 8-bit mu-law. x [B, S] -> [B, S]"""
    # Noise is made after the band limit, as a line does; what of it lies above 4 kHz would not survive 8 kHz sampling.
    return band_limit(mu_law(band_limit(x, 300.0, 3400.0), generator), 0.0, 3700.0)


def spec_augment(
    mel: Tensor,
    generator: torch.Generator,
    freq_masks: int = 2,
    freq_width: int = 15,
    time_masks: int = 2,
    time_width: int = 70,
    max_time_share: float = 0.1,
    frames: Tensor | None = None,
) -> Tensor:
    """SpecAugment (Park et al., 2019) without the time warp: masked bands and stretches take the clip's mean.

    mel [B, n_mels, T] -> a new tensor of the same shape. Each mask is 0 to `freq_width` bands or `time_width` frames
    wide; a time mask is at most `max_time_share` of the clip's frames, given by `frames` [B] (default: T each).
    torchaudio's `mask_along_axis_iid` draws from the device's own state, which can't be replayed by step: not used.
    """
    batch, n_mels, n_frames = mel.shape
    draws = onto(mel.device, torch.rand(batch, freq_masks + time_masks, 2, generator=generator))
    total = torch.full((batch,), n_frames, device=mel.device) if frames is None else onto(mel.device, frames)

    def masked(draws: Tensor, limit: Tensor | int, total: Tensor | int, n: int) -> Tensor:
        """draws [B, k, 2] -> bool [B, n]: what k stretches of up to `limit` of `total` places cover"""
        width = (draws[..., 0] * (limit + 1)).floor()
        start = (draws[..., 1] * (total - width + 1)).floor()
        place = torch.arange(n, device=mel.device)
        return ((place >= start[..., None]) & (place < (start + width)[..., None])).any(1)

    bands = masked(draws[:, :freq_masks], min(freq_width, n_mels), n_mels, n_mels)
    limit = (total * max_time_share).floor().clamp(max=time_width)[:, None]
    times = masked(draws[:, freq_masks:], limit, total[:, None], n_frames)
    return torch.where(bands[:, :, None] | times[:, None], mel.mean((1, 2), keepdim=True), mel)


# ---- random numbers that are the same on every device -------------------------------------------------------------


def step_generator(seed: int, rank: int = 0, step: int = 0, stream: int = 0) -> torch.Generator:
    """The CPU generator of one step on one rank; `stream` tells uses within a step apart."""
    state = np.random.SeedSequence([seed & (2**63 - 1), rank, step, stream]).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state[0]))


def _seeds(count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    return onto(device, torch.randint(-(2**62), 2**62, (count,), generator=generator))


def _hash(seeds: Tensor, n: int) -> Tensor:
    """splitmix64 (Steele et al., 2014) of seed + counter, in wrapping int64. seeds [B] -> [B, n]"""
    z = seeds[:, None] + torch.arange(1, n + 1, device=seeds.device) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)  # torch shifts int64 with its sign


def _uniform(seeds: Tensor, n: int) -> Tensor:
    """Uniform in [0, 1). seeds [B] -> float32 [B, n]"""
    return _shift(_hash(seeds, n), 40).float() * 2**-24


def _gaussian(seeds: Tensor, n: int) -> Tensor:
    """Standard normal (Box-Muller). seeds [B] -> float32 [B, n]"""
    bits = _hash(seeds, -(-n // 2))
    radius = (-2 * ((_shift(bits, 40).float() + 0.5) * 2**-24).log()).sqrt()
    angle = (bits & (2**24 - 1)).float() * (2 * math.pi * 2**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[:, :n]


def _talker_levels(count: int, talkers: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Amplitude of each of the possible talkers, 0 beyond the number drawn. -> [count, talkers[1]]"""
    low, high = talkers
    if not 1 <= low <= high:
        raise OptionError(f"talkers must be two numbers, 1 or more and in order, not {talkers}")
    number = torch.randint(low, high + 1, (count, 1), generator=generator)
    level = 10 ** (-5 * torch.rand(count, high, generator=generator) / 20)  # nearer and farther ones, 5 dB
    return level * (torch.arange(high) < number)


# ---- recordings of noise ------------------------------------------------------------------------------------------


class NoiseBank:
    """Recordings held as int16 on the device: noises, room impulse responses, or speech to make babble of.

    `names` and `skipped` [(file, why)] say what was read and what was not. All recordings stand behind one another
    in `data` [N]; `offsets` and `lengths` [n_clips] (CPU, int64) say where each one lies.
    """

    def __init__(self, clips: Iterable[np.ndarray], device: torch.device | str = "cpu", names: Sequence[str] = ()):
        arrays = [to_int16(clip) for clip in clips]
        if not arrays or min(len(a) for a in arrays) == 0:
            raise DataError("a noise bank needs at least one recording, none of them empty")
        self.lengths = torch.tensor([len(a) for a in arrays], dtype=torch.int64)
        self.offsets = self.lengths.cumsum(0) - self.lengths
        self.data = torch.from_numpy(np.concatenate(arrays)).to(device)
        self.names = list(names) or [str(i) for i in range(len(arrays))]
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def seconds(self) -> float:
        return self.data.numel() / SAMPLE_RATE

    @classmethod
    def from_manifest(
        cls,
        source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        device: torch.device | str = "cpu",
        trim_silence: bool = True,
        max_hours: float = 12.0,
        workers: int | None = None,
    ) -> NoiseBank:
        """Read a manifest, a shard, a folder with either, a folder of audio, or several of them.

        trim_silence: drop the 20 ms frames 60 dB or more below the file's loudest one (noise files are often padded
        with zeros). Set it to False for impulse responses. Unreadable files are named in `skipped`.
        Raises DataError when nothing can be read, or when it is more than `max_hours` (it all lies in memory).
        """
        sources = [source] if isinstance(source, (str, os.PathLike)) else source
        found = [recording for one in sources for recording in recordings(one)]
        clips: list[np.ndarray] = []
        names: list[str] = []
        skipped: list[tuple[str, str]] = []
        total = 0.0
        results = in_processes(partial(_read_noise, trim=trim_silence), found, workers)
        for recording, (clip, why) in zip(found, results):
            if clip is None:
                skipped.append((recording.name, why))
                continue
            clips.append(clip)
            names.append(recording.name)
            total += len(clip) / SAMPLE_RATE / 3600
            if total > max_hours:
                raise DataError(f"more than {max_hours:g} hours of noise in {source}: give fewer files")
        if not clips:
            raise DataError(f"no readable audio in {source}" + (f" ({skipped[0][1]})" if skipped else ""))
        bank = cls(clips, device, names)
        bank.skipped = skipped
        return bank

    def sample(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """A stretch of a random recording from a random place, looped where it is too short. -> [n_samples]"""
        return self.batch(1, n_samples, generator)[0]

    def batch(
        self, count: int, n_samples: int, generator: torch.Generator, exclude: Sequence[int | None] | None = None
    ) -> Tensor:
        """`count` such stretches. -> float32 [count, n_samples]; row i is never of recording exclude[i]"""
        which = torch.randint(len(self), (count,), generator=generator)
        if exclude is not None:
            if len(self) < 2:
                raise DataError("the bank's only recording is the one to leave out: add recordings")
            step = 1 + torch.randint(len(self) - 1, (count,), generator=generator)
            banned = torch.tensor([-1 if e is None else e for e in exclude])
            which = torch.where(which == banned, (which + step) % len(self), which)
        period = self.lengths[which]
        start = (torch.rand(count, generator=generator, dtype=torch.float64) * period).long()
        offset, period, start = (onto(self.data.device, t)[:, None] for t in (self.offsets[which], period, start))
        position = offset + (start + torch.arange(n_samples, device=self.data.device)) % period
        return self.data[position].float() / 32768

    def babble(
        self,
        count: int,
        n_samples: int,
        generator: torch.Generator,
        talkers: tuple[int, int] = (3, 8),
        exclude: Sequence[int | None] | None = None,
    ) -> Tensor:
        """Babble of the bank's recordings, which must be speech. -> [count, n_samples], unit power

        Row i has nothing of recording exclude[i].
        """
        levels = onto(self.data.device, _talker_levels(count, talkers, generator))
        total = torch.zeros(count, n_samples, device=self.data.device)
        for k in range(talkers[1]):
            voice = self.batch(count, n_samples, generator, exclude)
            total += voice * (levels[:, k : k + 1] / voice.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-5))
        return unit_power(total)

    def responses(self, count: int, generator: torch.Generator, max_seconds: float = 2.0) -> Tensor:
        """`count` random recordings from their beginning, zero-padded: impulse responses. -> [count, R]"""
        which = torch.randint(len(self), (count,), generator=generator)
        length = self.lengths[which]
        n_taps = min(int(self.lengths.max()), int(max_seconds * SAMPLE_RATE))
        tap = torch.arange(n_taps)
        position = onto(self.data.device, (self.offsets[which][:, None] + tap).clamp(max=self.data.numel() - 1))
        return self.data[position].float() / 32768 * onto(self.data.device, tap < length[:, None])


def recordings(source: str | os.PathLike[str]) -> list[Utterance]:
    """What a manifest, a shard, a folder with either, a folder of audio (sorted) or one audio file holds."""
    path = Path(source)
    if path.is_file() and path.suffix.lower() in AUDIO_SUFFIXES:
        return [Utterance(str(path))]
    if path.is_dir() and not (path / "manifest.jsonl").is_file() and not any(path.glob("*.tar")):
        return [Utterance(str(file)) for file in audio_files(path)]
    if not path.exists():
        raise DataError(f"no such file or folder: {path}")
    return read_manifest(path)


def audio_files(folder: Path) -> list[Path]:
    """All audio files below a folder, sorted."""
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES and f.is_file())


def _read_noise(recording: Utterance, trim: bool) -> tuple[np.ndarray | None, str]:
    try:
        audio = decode_audio(recording)
    except DataError as error:
        return None, str(error)
    if trim:
        frames = np.pad(audio, (0, -len(audio) % FRAME)).reshape(-1, FRAME)
        power = np.square(frames, dtype=np.float32).mean(-1)
        audio = frames[power > power.max() * 1e-6].reshape(-1)
    return audio, ""


# ---- the training augmentation ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AugmentOptions:
    """How a training batch is disturbed. Shares are probabilities per clip.

    clean_prob: clips left exactly as they are. Of the others: noise_prob get noise, speed_prob another speed,
    reverb_prob a room, codec_prob a channel (telephone, low-pass or high-pass), clip_prob clipping, all a gain.
    noise_level: "low", "medium" or "high" sets the SNR range (NOISE_LEVELS) instead of `snr`.
    mild_prob: share of the noisy clips whose SNR is drawn from `mild_snr` instead.
    second_noise_prob: share of the noisy clips with a second noise of any kind, 0 to 10 dB under the first.
    noise_only_prob: share of all clips whose speech is silenced (SNR -inf); their target must become empty.
    real, babble, white, pink, brown: weights of the kinds. talkers: bounds of the number of voices in a babble.
    """

    noise_prob: float = 0.8
    noise_level: str | None = None
    snr: tuple[float, float] = (-5.0, 20.0)  # dB
    mild_prob: float = 0.1
    mild_snr: tuple[float, float] = (20.0, 35.0)  # dB
    clean_prob: float = 0.1
    second_noise_prob: float = 0.15
    noise_only_prob: float = 0.03
    real: float = 0.5
    babble: float = 0.3
    white: float = 0.08
    pink: float = 0.07
    brown: float = 0.05
    talkers: tuple[int, int] = (3, 8)
    reverb_prob: float = 0.2
    reverb_seconds: float = 2.0
    codec_prob: float = 0.1
    clip_prob: float = 0.0
    speed_prob: float = 0.2
    gain_db: tuple[float, float] = (-12.0, 3.0)

    @classmethod
    def off(cls) -> AugmentOptions:
        """No disturbance at all."""
        return cls(noise_prob=0, noise_only_prob=0, reverb_prob=0, codec_prob=0, speed_prob=0, gain_db=(0.0, 0.0))

    def __post_init__(self) -> None:
        if self.noise_level is not None and self.noise_level not in NOISE_LEVELS:
            raise OptionError(f"noise_level must be one of {', '.join(NOISE_LEVELS)}, not {self.noise_level!r}")
        for name, value in vars(self).items():
            if name.endswith("_prob") and not 0 <= value <= 1:
                raise OptionError(f"{name} must lie between 0 and 1, not {value}")
            if name in KINDS and value < 0:
                raise OptionError(f"{name} is a weight and can't be negative, not {value}")
            if name in ("snr", "mild_snr", "gain_db", "talkers") and (len(value) != 2 or value[0] > value[1]):
                raise OptionError(f"{name} must be two numbers in order, not {value}")


@cache
def speed_changer(speed: float, device: torch.device) -> torch.nn.Module:
    """torchaudio's `Speed`, which plays clips at another speed. Kept, because making its filter waits for the device.

    Raises OptionError where torchaudio is missing or doesn't load: its releases are compiled for some of torch's, and
    pip can't see for which.
    """
    try:
        from torchaudio.transforms import Speed
    except (ImportError, OSError) as e:
        raise OptionError(f"a changed speed needs torchaudio, {_torchaudio_fault(e)}, or set speed_prob to 0") from e
    # The rate is given in hundredths: int(0.95 * 16000) and the like would be off by one.
    return Speed(100, speed + 1e-9).to(device)


def _torchaudio_fault(error: Exception) -> str:
    """What is wrong with torchaudio here, which versions fit, and the command that puts it right."""
    try:
        found = version("torchaudio")
    except PackageNotFoundError:
        return "which is not installed: pip install 'dawhisper[train]'"
    return (
        f"and torchaudio {found} does not load beside torch {torch.__version__} ({error}). torch 2.11.0 goes with "
        "torchaudio 2.11.0, torch 2.13 and newer with 2.11.1, both of them for CUDA or both for the CPU alone: "
        "pip install torch==2.11.0 torchaudio==2.11.0"
    )


@dataclass(frozen=True)
class Mixture:
    """A disturbed batch; float32 on the device of the batch. All audio is zero from `lengths` on."""

    audio: Tensor  # [B, S] what the model hears
    clean: Tensor  # [B, S] the speech in it: after speed and gain; before room, noise and channel
    noise: Tensor  # [B, S] the scaled noise that was added, before the channel; zeros where there is none
    snr_db: Tensor  # [B] of clean over noise, over active speech; +inf without noise, -inf for noise alone
    lengths: Tensor  # [B] int64 samples: a changed speed changes them
    kind: list[str]  # "clean", or the noise: "real", "babble", "white", "pink", "brown", or two: "real+white"

    @property
    def noise_only(self) -> Tensor:
        """[B] bool: speech silenced; the target must be empty."""
        return self.snr_db == -math.inf


class Augment:
    """Disturbs training batches. What it draws at a step depends on (seed, rank, step) alone.

    noises: real noises; rirs: impulse responses (read with trim_silence=False); speech: voices for babble, otherwise
    the batch's other clips. Kinds that can't be made are left out. `snr` may be set between steps (a curriculum).
    """

    def __init__(
        self,
        options: AugmentOptions = AugmentOptions(),
        noises: NoiseBank | None = None,
        rirs: NoiseBank | None = None,
        seed: int = 0,
        rank: int = 0,
        speech: NoiseBank | None = None,
    ):
        self.options, self.noises, self.rirs, self.speech = options, noises, rirs, speech
        self.seed, self.rank = seed, rank
        self.snr = NOISE_LEVELS[options.noise_level] if options.noise_level else options.snr
        if options.noise_prob > 0 and not any(self._weights(batch=2)):
            raise OptionError("noise is asked for but no kind has a weight: give noise files, or set noise_prob to 0")
        if options.speed_prob > 0:
            speed_changer(SPEEDS[0], torch.device("cpu"))  # a torchaudio that doesn't load is found here, not at a step

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "snr": list(self.snr)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed, self.snr = int(state["seed"]), (float(state["snr"][0]), float(state["snr"][1]))

    def generator(self, step: int, stream: int = 1) -> torch.Generator:
        """A generator for this step's other draws, SpecAugment for one; stream 0 is the augmentation's own."""
        return step_generator(self.seed, self.rank, step, stream)

    @torch.no_grad()
    def __call__(self, audio: Tensor, lengths: Tensor, step: int) -> Mixture:
        """audio [B, S] float, lengths [B] -> Mixture. S grows when a clip is slowed down."""
        o, g = self.options, self.generator(step, stream=0)
        batch = audio.shape[0]
        lengths = onto(audio.device, lengths)
        touched = torch.rand(batch, generator=g) >= o.clean_prob
        chosen = {
            name: (torch.rand(batch, generator=g) < getattr(o, f"{name}_prob")) & touched
            for name in ("noise", "speed", "reverb", "codec", "clip", "second_noise", "mild")
        }
        only = torch.rand(batch, generator=g) < o.noise_only_prob
        noisy = chosen["noise"] | only
        if not any(self._weights(batch)):
            noisy, only = torch.zeros_like(noisy), torch.zeros_like(only)
        gain = 10 ** (_draw(o.gain_db, batch, g) / 20) * touched + ~touched
        snr = torch.where(chosen["mild"], _draw(o.mild_snr, batch, g), _draw(self.snr, batch, g))

        speech = audio.float() * onto(audio.device, gain)[:, None] * length_mask(lengths, audio.shape[-1])
        speech, lengths = self._speed(speech, lengths, chosen["speed"], g)
        energy = frame_energy(speech)
        active = active_samples(energy, lengths)
        noise, kind = self._noise(speech, active, lengths, noisy, chosen["second_noise"], g)
        scale, true_snr = noise_gain(energy, frame_energy(noise), active, onto(audio.device, snr), lengths)
        noise *= scale[:, None]
        if only.any():
            rows = onto(audio.device, torch.nonzero(only).flatten())
            speech.index_fill_(0, rows, 0.0)
            true_snr.index_fill_(0, rows, -math.inf)
        heard = self._room(speech, lengths, chosen["reverb"] & ~only, g) + noise
        self._channel(heard, lengths, chosen["codec"], chosen["clip"], g)
        return Mixture(heard, speech, noise, true_snr, lengths, kind)

    def _weights(self, batch: int) -> list[float]:
        """Weight of each of KINDS, 0 for what can't be made."""
        o = self.options
        can = {"real": self.noises is not None, "babble": self.speech is not None or batch > 1}
        return [getattr(o, kind) if can.get(kind, True) else 0.0 for kind in KINDS]

    def _speed(self, x: Tensor, lengths: Tensor, chosen: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Play the chosen clips at another speed (and pitch); slower only where the result stays within 30 s."""
        factor = torch.randint(len(SPEEDS), chosen.shape, generator=g)
        # Whether it fits is told by the batch's padded length: asking for each clip's would make the CPU wait.
        allowed = [math.ceil(x.shape[-1] / speed) <= N_SAMPLES or speed > 1 for speed in SPEEDS]
        rows = [torch.nonzero(chosen & (factor == k)).flatten() for k in range(len(SPEEDS))]
        changed = {SPEEDS[k]: onto(x.device, rows[k]) for k in range(len(SPEEDS)) if allowed[k] and rows[k].numel()}
        if not changed:
            return x, lengths
        longest = max([x.shape[-1]] + [math.ceil(x.shape[-1] / speed) for speed in changed])
        out, lengths = F.pad(x, (0, longest - x.shape[-1])), lengths.clone()
        for speed, index in changed.items():
            y, n = speed_changer(speed, x.device)(x[index], lengths[index])
            n = n.clamp(max=longest)
            y = y[:, :longest] * length_mask(n, min(y.shape[-1], longest))
            out.index_copy_(0, index, F.pad(y, (0, longest - y.shape[-1])))
            lengths.index_copy_(0, index, n)
        return out, lengths

    def _noise(
        self, speech: Tensor, active: Tensor, lengths: Tensor, noisy: Tensor, second: Tensor, g: torch.Generator
    ) -> tuple[Tensor, list[str]]:
        """Noise of a drawn kind for the noisy clips, zeros for the others. -> [B, S], names of the kinds

        Noises are made together by how they are made, first and second ones alike.
        """
        batch = speech.shape[0]
        noise, kind = torch.zeros_like(speech), ["clean"] * batch
        weights = torch.tensor(self._weights(batch))
        if not weights.sum():
            return noise, kind
        chosen = torch.stack([noisy, noisy & second])
        drawn = torch.multinomial(weights, 2 * batch, replacement=True, generator=g).view(2, batch)
        level = torch.stack([torch.ones(batch), 10 ** (_draw((-10.0, 0.0), batch, g) / 20)])
        names = [[KINDS[k] for k in one] for one in drawn.tolist()]
        for turn, row in torch.nonzero(chosen).tolist():
            kind[row] = f"{kind[row]}+{names[turn][row]}" if turn else names[turn][row]
        for group in (("real",), ("babble",), tuple(COLOURS)):
            places = torch.nonzero(chosen & torch.isin(drawn, torch.tensor([KINDS.index(name) for name in group])))
            if not len(places):
                continue
            turn, row = places.unbind(1)
            rows = onto(speech.device, row)
            y = self._make([names[i][j] for i, j in places.tolist()], rows, speech, lengths, g)
            energy = frame_energy(y)
            rms = power_over(energy, active[rows]).sqrt()
            rms = rms.clamp(min=(energy.sum(-1) / y.shape[-1]).sqrt() / 10 + 1e-10)
            y *= (onto(speech.device, level[turn, row]) / rms)[:, None]
            n = int((turn == 0).sum())  # a clip's first and second noise are added one after the other
            noise.index_add_(0, rows[:n], y[:n]).index_add_(0, rows[n:], y[n:])
        return noise.mul_(length_mask(lengths, noise.shape[-1])), kind

    def _make(self, kinds: Sequence[str], rows: Tensor, speech: Tensor, lengths: Tensor, g: torch.Generator) -> Tensor:
        """Noise for these rows of the batch: real noise, babble, or coloured noises. -> [len(rows), S]"""
        count, n_samples = len(rows), speech.shape[-1]
        if kinds[0] == "real" and self.noises is not None:
            return self.noises.batch(count, n_samples, g).to(speech.device)
        if kinds[0] == "babble" and self.speech is not None:
            return self.speech.babble(count, n_samples, g, self.options.talkers).to(speech.device)
        if kinds[0] == "babble":
            return babble(speech, lengths, g, self.options.talkers, rows)
        return colored_noise((count, n_samples), torch.tensor([COLOURS[kind] for kind in kinds]), g, speech.device)

    def _room(self, x: Tensor, lengths: Tensor, chosen: Tensor, g: torch.Generator) -> Tensor:
        rows = onto(x.device, torch.nonzero(chosen).flatten())
        if self.rirs is None or not len(rows):
            return x
        rir = self.rirs.responses(len(rows), g, self.options.reverb_seconds).to(x.device)
        return x.index_copy(0, rows, reverberate(x[rows], rir, lengths[rows]))

    def _channel(self, x: Tensor, lengths: Tensor, codec: Tensor, clip: Tensor, g: torch.Generator) -> None:
        """Telephone, low-pass (2 to 7 kHz) or high-pass (100 to 500 Hz), a third each; clipping at 0.2 to 0.9.

        In place.
        """
        which = torch.randint(3, codec.shape, generator=g)
        edge, ceiling = torch.rand(codec.shape, generator=g), _draw((0.2, 0.9), len(clip), g)
        for k in range(3):
            index = torch.nonzero(codec & (which == k)).flatten()
            if not index.numel():
                continue
            rows, place = onto(x.device, index), edge[index]
            if k == 0:
                y = telephone(x[rows], g)
            elif k == 1:
                y = band_limit(x[rows], 0.0, 2000 + 5000 * place)
            else:
                y = band_limit(x[rows], 100 + 400 * place)
            x.index_copy_(0, rows, y * length_mask(lengths[rows], x.shape[-1]))
        index = torch.nonzero(clip).flatten()
        if index.numel():
            rows = onto(x.device, index)
            limit = x[rows].abs().amax(-1, keepdim=True) * onto(x.device, ceiling[index])[:, None]
            x.index_copy_(0, rows, torch.maximum(torch.minimum(x[rows], limit), -limit))


def _draw(bounds: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(count, generator=generator)
