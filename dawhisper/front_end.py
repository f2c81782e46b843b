"""A speech enhancer in front of the recogniser: the recording is mixed with its enhanced version.

Alone an enhancer takes away what a recogniser needs; "observation adding", a share of the original, gives it back
(Iwamoto et al. 2022, "How Bad Are Artifacts?", arXiv:2201.06685).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from .deepfilternet import load_deepfilternet
from .errors import OptionError

FrontEnd = Callable[[np.ndarray], np.ndarray]  # samples [n] at 16 kHz -> as many enhanced ones
Shares = Sequence[float] | float  # how much of what is heard is enhanced; two: for the primary and the secondary branch

FRONT_END_MIX = 0.6
CPU = torch.device("cpu")


def through(
    recordings: Sequence[np.ndarray], front_end: str | FrontEnd | None, mix: Shares, device: torch.device = CPU
) -> list[np.ndarray]:
    """Recordings [n], of which the share `mix` is replaced by what a front end makes of them; None leaves them alone.

    mix: one share, or two: then the results are [2, n], what the primary branch hears and what the secondary hears.
    device: the model's; a GPU of NVIDIA's computes the enhancer too.
    """
    shares = shares_of(mix)
    if front_end is None or not any(shares):
        return list(recordings)
    made = []
    for samples, enhanced in zip(recordings, known_front_end(front_end, device)(recordings)):
        change = np.asarray(enhanced, np.float32)
        if change.shape != samples.shape:
            raise OptionError(f"a front end gives as many samples as it gets: {len(samples)}, not {list(change.shape)}")
        change = change - samples
        mixed = [(samples + share * change).astype(np.float32) for share in shares]
        made.append(mixed[0] if len(mixed) == 1 else np.stack(mixed))
    return made


def shares_of(mix: Shares) -> Sequence[float]:
    """One share or two. OptionError for what can't be meant."""
    shares = (mix,) if isinstance(mix, float | int) else mix
    if not (len(shares) in (1, 2) and all(0 <= share <= 1 for share in shares)):
        raise OptionError(f"front_end_mix lies between 0 and 1, one share or one for each branch, not {mix}")
    return shares


def known_front_end(
    front_end: str | FrontEnd, device: torch.device = CPU
) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """What takes recordings through the front end of this name, or the callable given. OptionError for other names."""
    if callable(front_end):
        return lambda recordings: [front_end(samples) for samples in recordings]
    if front_end != "deepfilternet":
        raise OptionError(f"front_end is deepfilternet, or in Python a callable, not {front_end!r}")
    return load_deepfilternet(str(device if device.type == "cuda" else CPU)).enhanced
