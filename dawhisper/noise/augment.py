"""How training disturbs a batch: speed, gain, noise at a drawn SNR, a room, a channel; and SpecAugment.

Everything works on batches of 16 kHz audio [B, S] on the device of the batch, and every draw depends on (seed, rank,
step) alone (random_numbers.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dawhisper.audio import N_SAMPLES
from dawhisper.data.loader import padded_samples
from dawhisper.deepfilternet import SHORT_SPAN, TOGETHER, load_deepfilternet, weights_path
from dawhisper.distributed import onto
from dawhisper.errors import OptionError

from .channels import band_limit, reverberate, telephone
from .generators import COLOURS, MADE, babble, colored_noise, equalize
from .mixing import Mixture, active_samples, frame_energy, length_mask, noise_gain, power_over
from .random_numbers import between, step_generator
from .recordings import NoiseBank

CLEANED = 4  # stream of its random numbers, beside those of training/batches.py
SPEEDS = (0.9, 0.95, 1.05, 1.1)
NOISE_KINDS = ("real", "babble", *MADE)
NOISE_LEVELS = {"low": (10.0, 25.0), "medium": (0.0, 20.0), "high": (-5.0, 10.0)}  # dB


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
    real, babble, white, pink, brown, shaped: weights of the kinds. talkers: bounds of the number of voices in a babble.
    vary_prob: share of the real noises that are played at another speed (`vary_speed`) through a random filter with a
    deviation of `vary_db`, so that few recordings sound like many. noise_room_prob: share of the noisy clips whose
    noise passes through a room response of its own. cleaned_prob: share of all clips, clean ones too, that are heard
    through DeepFilterNet (deepfilternet.py), with bounds of its share, `cleaned_mix`: for a model that is to stand
    behind `--front_end deepfilternet`; cleaned_apart: share of them of which the secondary branch alone hears that.
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
    shaped: float = 0.0
    vary_prob: float = 0.0
    vary_speed: tuple[float, float] = (0.7, 1.4)
    vary_db: float = 5.0
    noise_room_prob: float = 0.0
    cleaned_prob: float = 0.0
    cleaned_mix: tuple[float, float] = (0.3, 1.0)
    cleaned_apart: float = 0.0
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
            if name in NOISE_KINDS and value < 0:
                raise OptionError(f"{name} is a weight and can't be negative, not {value}")
            if name in ("snr", "mild_snr", "gain_db", "talkers", "vary_speed", "cleaned_mix") and (
                len(value) != 2 or value[0] > value[1]
            ):
                raise OptionError(f"{name} must be two numbers in order, not {value}")


@cache
def speed_changer(speed: float, device: torch.device) -> torch.nn.Module:
    """torchaudio's `Speed`, which plays clips at another speed. Cached, because making its filter waits for the device.

    Raises OptionError where torchaudio is missing or doesn't load: its releases are compiled for some of torch's, and
    pip can't see for which.
    """
    try:
        from torchaudio.transforms import Speed
    except (ImportError, OSError, RuntimeError) as e:
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
        f"and torchaudio {found} does not load beside torch {torch.__version__} ({error.__cause__ or error}). "
        "torchaudio 2.11.0 fits torch 2.11 to 2.14, torchaudio 2.11.1 torch 2.13 and newer, both built for CUDA or "
        "both for the CPU alone: pip install torch==2.11.0 torchaudio==2.11.0"
    )


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
        if options.cleaned_prob > 0:
            weights_path()  # and a package that is missing

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
            for name in ("noise", "speed", "reverb", "codec", "clip", "second_noise", "mild", "noise_room")
        }
        only = torch.rand(batch, generator=g) < o.noise_only_prob
        noisy = chosen["noise"] | only
        if not any(self._weights(batch)):
            noisy, only = torch.zeros_like(noisy), torch.zeros_like(only)
        gain = 10 ** (between(o.gain_db, batch, g) / 20) * touched + ~touched
        snr = torch.where(chosen["mild"], between(o.mild_snr, batch, g), between(self.snr, batch, g))

        speech = audio.float() * onto(audio.device, gain)[:, None] * length_mask(lengths, audio.shape[-1])
        speech, lengths = self._speed(speech, lengths, chosen["speed"], g)
        energy = frame_energy(speech)
        active = active_samples(energy, lengths)
        noise, kind = self._noise(speech, active, lengths, noisy, chosen["second_noise"], g)
        noise = self._room(noise, lengths, chosen["noise_room"] & noisy, g)
        scale, true_snr = noise_gain(energy, frame_energy(noise), active, onto(audio.device, snr), lengths)
        noise *= scale[:, None]
        if only.any():
            rows = onto(audio.device, torch.nonzero(only).flatten())
            speech.index_fill_(0, rows, 0.0)
            true_snr.index_fill_(0, rows, -math.inf)
        heard = self._room(speech, lengths, chosen["reverb"] & ~only, g) + noise
        self._channel(heard, lengths, chosen["codec"], chosen["clip"], g)
        second = self._clean(heard, lengths, self.generator(step, CLEANED))
        return Mixture(heard, speech, noise, true_snr, lengths, kind, second)

    def _weights(self, batch: int) -> list[float]:
        """Weight of each of NOISE_KINDS, 0 for what can't be made."""
        o = self.options
        can = {"real": self.noises is not None, "babble": self.speech is not None or batch > 1}
        return [getattr(o, kind) if can.get(kind, True) else 0.0 for kind in NOISE_KINDS]

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
        longest = min(N_SAMPLES, padded_samples(longest))  # few lengths: each wants FFT plans of its own
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
        level = torch.stack([torch.ones(batch), 10 ** (between((-10.0, 0.0), batch, g) / 20)])
        names = [[NOISE_KINDS[k] for k in one] for one in drawn.tolist()]
        for turn, row in torch.nonzero(chosen).tolist():
            kind[row] = f"{kind[row]}+{names[turn][row]}" if turn else names[turn][row]
        others = ((kind,) for kind in NOISE_KINDS if kind not in COLOURS)
        for group in (*others, tuple(COLOURS)):
            places = torch.nonzero(
                chosen & torch.isin(drawn, torch.tensor([NOISE_KINDS.index(name) for name in group]))
            )
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
        """Noise of one kind, or of several colours, for these rows of the batch. -> [len(rows), S]"""
        count, n_samples = len(rows), speech.shape[-1]
        if kinds[0] == "real" and self.noises is not None:
            return self._recorded(count, n_samples, g).to(speech.device)
        if kinds[0] == "babble" and self.speech is not None:
            return self.speech.babble(count, n_samples, g, self.options.talkers).to(speech.device)
        if kinds[0] == "babble":
            return babble(speech, lengths, g, self.options.talkers, rows)
        if kinds[0] not in COLOURS:
            return MADE[kinds[0]](count, n_samples, g, speech.device)
        return colored_noise((count, n_samples), torch.tensor([COLOURS[kind] for kind in kinds]), g, speech.device)

    def _recorded(self, count: int, n_samples: int, g: torch.Generator) -> Tensor:
        """Real noise, some of it varied. -> [count, n_samples]"""
        assert self.noises is not None
        o = self.options
        if not o.vary_prob:
            return self.noises.batch(count, n_samples, g)
        varied = torch.rand(count, generator=g) < o.vary_prob
        speeds = torch.where(varied, between(o.vary_speed, count, g), 1.0)
        noise = self.noises.batch(count, n_samples, g, speeds=speeds)
        return torch.where(onto(noise.device, varied)[:, None], equalize(noise, o.vary_db, g), noise)

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
        edge, ceiling = torch.rand(codec.shape, generator=g), between((0.2, 0.9), len(clip), g)
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

    def _clean(self, x: Tensor, lengths: Tensor, g: torch.Generator) -> Tensor | None:
        """Some clips as DeepFilterNet leaves them, mixed with how they were, in place; in a copy for the secondary."""
        o = self.options
        if not o.cleaned_prob:
            return None
        index = torch.nonzero(torch.rand(len(x), generator=g) < o.cleaned_prob).flatten()
        mix, apart = between(o.cleaned_mix, len(x), g), torch.rand(len(x), generator=g) < o.cleaned_apart
        second = x.clone() if o.cleaned_apart else None
        for some in index.split(max(1, TOGETHER * N_SAMPLES // x.shape[-1])) if len(index) else ():
            rows, share = onto(x.device, some), onto(x.device, mix[some])[:, None]
            heard = x[rows]
            cleaned = load_deepfilternet(str(x.device))(heard, SHORT_SPAN)
            mixed = torch.lerp(heard, cleaned * length_mask(lengths[rows], x.shape[-1]), share)
            if second is not None:
                second.index_copy_(0, rows, mixed)
                mixed = torch.where(onto(x.device, apart[some])[:, None], heard, mixed)
            x.index_copy_(0, rows, mixed)
        return second
