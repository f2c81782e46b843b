"""Recordings of noise, of room impulse responses or of speech, held on the device to be drawn from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dawhisper.audio import SAMPLE_RATE, from_int16, to_int16
from dawhisper.data.manifest import Utterance, decode_audio, read_manifest
from dawhisper.data.processes import in_processes
from dawhisper.distributed import onto
from dawhisper.errors import DataError
from dawhisper.files import AUDIO_SUFFIXES, audio_files

from .generators import _talker_levels
from .mixing import SNR_FRAME, unit_power


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
        self,
        count: int,
        n_samples: int,
        generator: torch.Generator,
        exclude: Sequence[int | None] | None = None,
        speeds: Tensor | None = None,
    ) -> Tensor:
        """`count` such stretches. -> float32 [count, n_samples]; row i is never of recording exclude[i]

        speeds [count]: how fast each is played, pitch and all.
        """
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
        time = torch.arange(n_samples, device=self.data.device)
        if speeds is None:
            return from_int16(self.data[offset + (start + time) % period])
        moment = time * onto(self.data.device, speeds)[:, None]
        whole = moment.long()
        before, after = (from_int16(self.data[offset + (start + whole + k) % period]) for k in (0, 1))
        return torch.lerp(before, after, moment - whole)

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
        return from_int16(self.data[position]) * onto(self.data.device, tap < length[:, None])


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


def _read_noise(recording: Utterance, trim: bool) -> tuple[np.ndarray | None, str]:
    try:
        audio = decode_audio(recording)
    except DataError as error:
        return None, str(error)
    if trim:
        frames = np.pad(audio, (0, -len(audio) % SNR_FRAME)).reshape(-1, SNR_FRAME)
        power = np.square(frames, dtype=np.float32).mean(-1)
        audio = frames[power > power.max() * 1e-6].reshape(-1)
    return audio, ""
