"""What `dawhisper evaluate` plays to a model: the utterances of manifests under named conditions.

A mixture depends on the seed, the utterance and the kind of noise alone: not on the order of the manifests, the batch,
the rank, the model, or the device, for it is always made on the CPU. The noise of an utterance is the same at every
SNR, only louder, so that a curve over SNR shows the SNR and not the luck of the draw.
"""

from __future__ import annotations

import hashlib
import io
import math
import wave
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from whisper.tokenizer import LANGUAGES

from dawhisper.audio import SAMPLE_RATE, fitted_int16, load_audio
from dawhisper.data.manifest import Report, Utterance, read_manifest
from dawhisper.data.targets import whisper_language
from dawhisper.errors import DataError, OptionError, near_names
from dawhisper.noise.channels import reverberate
from dawhisper.noise.generators import MADE
from dawhisper.noise.mixing import Mixture, active_power, add_noise, measure_snr
from dawhisper.noise.recordings import NoiseBank

WITH_SNR = (*MADE, "babble", "real")
CONDITION_KINDS = ("clean", *WITH_SNR, "reverb", "noise-only", "recorded")
UNMIXED = ("clean", "recorded")  # the recordings as they are: speech alone, or in noise when it was recorded
DEFAULT_KINDS = ("clean", "white", "babble", "real", "reverb", "noise-only")
DEFAULT_SNRS = (20.0, 10.0, 5.0, 0.0, -5.0)

BABBLE_VOICES = 5
REVERB_SECONDS = (0.3, 0.9)  # reverberation time (60 dB) of a made room
DIRECT_DB = (-3.0, 6.0)  # energy of its direct path over that of its reverberation


@dataclass(frozen=True)
class Condition:
    """A kind of noise, at an SNR in dB where the kind has one."""

    kind: str
    snr: float | None = None

    @property
    def name(self) -> str:
        return self.kind if self.snr is None else f"{self.kind}_{self.snr:g}dB"

    @property
    def noisy(self) -> bool:
        """Speech in noise: what the mean over noisy conditions is taken of."""
        return self.snr is not None


def conditions(kinds: Sequence[str], snrs: Sequence[float]) -> list[Condition]:
    """Each kind at each SNR; clean, reverb and noise-only stand alone. OptionError for what can't be asked."""
    for kind in kinds:
        if kind not in CONDITION_KINDS:
            raise OptionError(
                f"unknown kind {kind!r}; kinds are {', '.join(CONDITION_KINDS)}{near_names(kind, CONDITION_KINDS)}"
            )
    if not kinds:
        raise OptionError(f"no kind of condition is asked for; kinds are {', '.join(CONDITION_KINDS)}")
    if not snrs and any(kind in WITH_SNR for kind in kinds):
        raise OptionError("noise needs an SNR: give --snr, for example --snr 10 0")
    if not all(math.isfinite(snr) for snr in snrs):
        raise OptionError(f"an SNR is a number of dB, not {' '.join(map(str, snrs))}; for no noise use the kind clean")
    both = [(kind, snr) for kind in kinds for snr in (snrs if kind in WITH_SNR else [None])]
    return [Condition(kind, None if snr is None else float(snr)) for kind, snr in dict.fromkeys(both)]


@dataclass(frozen=True)
class EvaluationItem:
    """An utterance and the name that it has in results and on other machines."""

    id: str
    utterance: Utterance

    @property
    def recording(self) -> tuple[str, int | None]:
        """The file, or the place in a shard, that the utterance is or is a part of."""
        return self.utterance.audio, self.utterance.offset

    @property
    def source(self) -> str:
        return self.utterance.source or Path(self.utterance.audio).parent.name

    @property
    def seconds(self) -> float:
        return self.utterance.duration or len(read_samples(self)) / SAMPLE_RATE


def read_items(manifests: Sequence[str | Path], language: str | None = None) -> list[list[EvaluationItem]]:
    """The utterances of each manifest, their languages as codes; `language` is that of all, whatever they say.

    DataError for an utterance that can't be read, has no text, or whose audio is missing.
    """
    found: list[list[EvaluationItem]] = []
    taken: set[str] = set()
    for manifest in manifests:
        report = Report()
        utterances = read_manifest(manifest, report)
        for place, why in report:  # training skips such a line, but a test set must be whole
            raise DataError(f"{place}: {why}; correct the line or drop it")
        found.append(items_of(utterances, manifest, language, taken))
    return found


def items_of(
    utterances: Iterable[Utterance], manifest: str | Path, language: str | None, taken: set[str]
) -> list[EvaluationItem]:
    """The utterances of a manifest or corpus under names that are not taken yet; as `read_items`."""
    items = []
    for utterance in utterances:
        path = Path(utterance.audio)
        if not (utterance.text or "").strip():
            raise DataError(
                f"{manifest}: {path.name} has no text; errors are counted against it, so write it or drop it"
            )
        if not path.is_file():
            raise DataError(f"{manifest}: no such audio file: {path}; check the manifest's audio paths")
        utterance = replace(utterance, language=language or _code(utterance.language))
        items.append(EvaluationItem(_unique(_name(utterance), taken), utterance))
    return items


def _code(language: str | None) -> str | None:
    """Whisper's code for a language given by code, tag or English name; others as they are."""
    return whisper_language(language, len(LANGUAGES)) or (language or "").lower() or None


def _name(utterance: Utterance) -> str:
    path = Path(utterance.audio)
    name = f"{path.parent.name}/{path.name}" + ("" if utterance.offset is None else f"@{utterance.offset}")
    if utterance.start is None and utterance.end is None:
        return name
    return f"{name}@{utterance.start or 0:g}" + ("" if utterance.end is None else f"-{utterance.end:g}")


def _unique(name: str, taken: set[str]) -> str:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}#{number}"
    taken.add(unique)
    return unique


class Mixer:
    """Makes the mixture of an utterance under a condition: float32 on the CPU, a batch of one.

    pool: the utterances that babble is made of, those of other speakers where there are any.
    noises: recordings for the kinds "real" and "noise-only" (which is white noise without them).
    rirs: room impulse responses; without them a room is made up, exponentially decaying noise after a direct path
    (Polack 1988), with a reverberation time of 0.3 to 0.9 s.
    """

    def __init__(
        self,
        pool: Sequence[EvaluationItem],
        seed: int = 0,
        noises: NoiseBank | None = None,
        rirs: NoiseBank | None = None,
    ):
        self.pool = sorted(pool, key=lambda item: item.id)
        self.seed, self.noises, self.rirs = seed, noises, rirs

    def check(self, kinds: Collection[str]) -> None:
        """OptionError where a kind can't be made of what there is."""
        if "real" in kinds and self.noises is None:
            raise OptionError("the kind real needs recordings of noise: give --noise DIR, or leave it out of --kinds")
        if "babble" in kinds and len({item.recording for item in self.pool}) < 2:
            raise OptionError("the kind babble needs other utterances: give more manifests, or leave it out of --kinds")

    def __call__(self, item: EvaluationItem, condition: Condition) -> Mixture:
        speech = torch.from_numpy(read_samples(item))[None]  # [1, S]
        lengths = torch.tensor([speech.shape[1]])
        generator = self.generator(item, condition.kind)
        silence = torch.zeros_like(speech)
        clean = Mixture(speech, speech, silence, torch.tensor([math.inf]), lengths, [condition.kind])
        if condition.kind in UNMIXED:
            return clean
        if condition.kind == "reverb":
            return replace(clean, audio=reverberate(speech, self._room(generator), lengths))
        noise = self._noise(item, condition.kind, speech.shape[1], generator)
        if condition.snr is None:  # noise-only: as loud as the speech would be
            audio, noise = add_noise(speech, noise, torch.zeros(1), lengths)
            return replace(clean, audio=noise, clean=silence, noise=noise, snr_db=torch.tensor([-math.inf]))
        audio, noise = add_noise(speech, noise, torch.tensor([condition.snr]), lengths)
        return replace(clean, audio=audio, noise=noise, snr_db=measure_snr(speech, noise, lengths))

    def generator(self, item: EvaluationItem, kind: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}\n{item.id}\n{kind}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def signature(self, kind: str) -> str:
        """Changes when the recordings do that mixtures of this kind are made of, or the seed."""
        if kind in UNMIXED:
            return kind.removeprefix("clean")
        bank = {"real": self.noises, "noise-only": self.noises, "reverb": self.rirs}.get(kind)
        names = [item.id for item in self.pool] if kind == "babble" else []
        if bank is not None:
            names = [f"{Path(name).name} {n}" for name, n in zip(bank.names, bank.lengths.tolist())]
        return hashlib.sha256("\n".join([str(self.seed), *names]).encode()).hexdigest()

    def _noise(self, item: EvaluationItem, kind: str, n_samples: int, generator: torch.Generator) -> Tensor:
        """-> [1, n_samples]"""
        if kind == "babble":
            return self._babble(item, n_samples, generator)[None]
        if kind in MADE or self.noises is None:
            return MADE.get(kind, MADE["white"])(1, n_samples, generator)
        return self.noises.sample(n_samples, generator)[None]

    def _babble(self, item: EvaluationItem, n_samples: int, generator: torch.Generator) -> Tensor:
        """Five equally loud other utterances, looped from random places; of other speakers where there are any."""
        others = [x for x in self.pool if x.recording != item.recording]
        speaker = item.utterance.speaker
        if speaker is not None:
            others = [x for x in others if x.utterance.speaker != speaker] or others
        order = torch.randperm(len(others), generator=generator)[:BABBLE_VOICES].tolist()
        starts = torch.rand(len(order), generator=generator).tolist()
        total = torch.zeros(n_samples)
        for index, start in zip(order, starts):
            voice = torch.from_numpy(read_samples(others[index]))
            power = active_power(voice[None], torch.tensor([len(voice)]))
            position = (torch.arange(n_samples) + int(start * len(voice))) % len(voice)
            total += voice[position] / power.sqrt().clamp(min=1e-5)
        return total

    def _room(self, generator: torch.Generator) -> Tensor:
        """An impulse response [1, R]"""
        if self.rirs is not None:
            return self.rirs.responses(1, generator)
        draw = torch.rand(2, generator=generator)
        seconds = REVERB_SECONDS[0] + (REVERB_SECONDS[1] - REVERB_SECONDS[0]) * float(draw[0])
        direct_db = DIRECT_DB[0] + (DIRECT_DB[1] - DIRECT_DB[0]) * float(draw[1])
        n_taps = int(seconds * SAMPLE_RATE)
        tail = MADE["white"](1, n_taps, generator) * 10 ** (-3 * torch.arange(n_taps) / n_taps)
        tail = tail / tail.square().sum().sqrt() * 10 ** (-direct_db / 20)
        tail[0, 0] = 1.0
        return tail


def read_samples(item: EvaluationItem) -> np.ndarray:
    """The samples of an utterance, float32 [n]."""
    u = item.utterance
    return _read(u.audio, u.start or 0.0, u.end, u.offset, u.size)


@lru_cache(maxsize=512)
def _read(path: str, start: float, end: float | None, offset: int | None, size: int | None) -> np.ndarray:
    """Cached, since every condition and every babble reads it again."""
    if offset is None:
        return load_audio(path, start=start, end=end)
    with Path(path).open("rb") as shard:
        shard.seek(offset)
        return load_audio(io.BytesIO(shard.read(size or 0)), start=start, end=end)


def write_wav(path: Path, audio: np.ndarray) -> None:
    """16-bit WAV; audio beyond [-1, 1] is scaled down as a whole, not clipped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = fitted_int16(audio)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, len(samples), "NONE", "not compressed"))
        file.writeframes(samples.tobytes())
