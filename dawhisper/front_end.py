"""A speech enhancer in front of the recogniser: the recording is mixed with its enhanced version.

Alone an enhancer takes away what a recogniser needs; "observation adding", a share of the original, gives it back
(Iwamoto et al. 2022, "How Bad Are Artifacts?", arXiv:2201.06685).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .deepfilternet import load_deepfilternet, weights_path
from .errors import OptionError

Enhancer = Callable[[np.ndarray], np.ndarray]  # samples [n] at 16 kHz -> as many enhanced ones
Shares = str | float | Sequence[float]  # how much of what is heard is enhanced; two ("0,0.6"): one for each branch

FRONT_END_MIX = 0.6
FRONT_END_SNR = 5.0  # dB; chosen on dev: below it cleaning gains, above it clean and mild speech would lose
CPU = torch.device("cpu")


@dataclass(frozen=True)
class FrontEnd:
    """How recordings are heard.

    enhancer: "deepfilternet", or a callable; None leaves recordings alone.
    mix: the share of what is heard that the enhancer made; two: what the primary branch hears, and the secondary.
    snr: recordings in which the enhancer finds so many dB of speech over noise, or more, stay as they are; None: none.
    choose: what is changed is heard as it is, too, and of a window's two texts the likelier is kept.
    """

    enhancer: str | Enhancer | None = None
    mix: Shares = FRONT_END_MIX
    snr: float | None = FRONT_END_SNR
    choose: bool = False

    def __post_init__(self) -> None:
        """OptionError for what can't be meant, a name that is not known, or where its packages are missing."""
        shares_of(self.mix)
        if self.enhancer is not None and not callable(self.enhancer):
            if self.enhancer != "deepfilternet":
                raise OptionError(f"front_end is deepfilternet, or in Python a callable, not {self.enhancer!r}")
            weights_path()


def hearings(
    recordings: Sequence[np.ndarray], front_end: FrontEnd, device: torch.device = CPU
) -> tuple[list[np.ndarray], list[int]]:
    """What is heard of recordings [n], and which of them each is a hearing of: the first ones of one each, in order."""
    heard = through(recordings, front_end, device)
    if not front_end.choose:
        return heard, list(range(len(heard)))
    as_they_are = [np.broadcast_to(x, y.shape) for x, y in zip(recordings, heard)]
    changed = [i for i, pair in enumerate(zip(as_they_are, heard)) if not np.array_equal(*pair)]
    if changed and device.type == "cuda":  # whose graphs are kept by the number of rows: two numbers, not many
        changed = list(range(len(heard)))
    return [*as_they_are, *(heard[i] for i in changed)], [*range(len(heard)), *changed]


def through(recordings: Sequence[np.ndarray], front_end: FrontEnd, device: torch.device = CPU) -> list[np.ndarray]:
    """Recordings [n], of which a share is replaced by what the enhancer makes of them; [2, n] with two shares.

    device: the model's; a GPU of NVIDIA's computes the enhancer too.
    """
    shares = shares_of(front_end.mix)
    if front_end.enhancer is None or not any(shares):
        return list(recordings)
    made = []
    for samples, made_of_it in zip(recordings, enhanced(recordings, front_end.enhancer, device)):
        other = np.asarray(made_of_it, np.float32)
        if other.shape != samples.shape:
            raise OptionError(f"a front end gives as many samples as it gets: {len(samples)}, not {list(other.shape)}")
        change = other - samples
        quiet = front_end.snr is not None and kept_over_taken(other, change) >= front_end.snr
        mixed = [samples if quiet else (samples + share * change).astype(np.float32) for share in shares]
        made.append(mixed[0] if len(mixed) == 1 else np.stack(mixed))
    return made


def kept_over_taken(enhanced: np.ndarray, change: np.ndarray) -> float:
    """The energy that an enhancer left over the energy of what it took away, in dB: the SNR as it hears it."""
    kept, taken = (float(np.square(x, dtype=np.float64).sum()) for x in (enhanced, change))
    return 10 * math.log10((kept + 1e-12) / (taken + 1e-12))


def shares_of(mix: Shares) -> Sequence[float]:
    """One share or two. OptionError for what can't be meant."""
    try:
        shares = [float(x) for x in (mix.split(",") if isinstance(mix, str) else np.atleast_1d(mix))]
    except ValueError:
        shares = []
    if not (len(shares) in (1, 2) and all(0 <= share <= 1 for share in shares)):
        raise OptionError(f"front_end_mix lies between 0 and 1, as 0.6, or 0,0.6 for the two branches, not {mix}")
    return shares


def enhanced(recordings: Sequence[np.ndarray], enhancer: str | Enhancer, device: torch.device) -> list[np.ndarray]:
    """What an enhancer makes of each recording."""
    if callable(enhancer):
        return [enhancer(samples) for samples in recordings]
    return load_deepfilternet(str(device if device.type == "cuda" else CPU)).enhanced(recordings)
