"""A speech enhancer in front of the recogniser: the recording is mixed with its enhanced version.

Alone an enhancer takes away what a recogniser needs; "observation adding", a share of the original, gives it back
(Iwamoto et al. 2022, "How Bad Are Artifacts?", arXiv:2201.06685).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .deepfilternet import load_deepfilternet
from .errors import OptionError

FrontEnd = Callable[[np.ndarray], np.ndarray]  # samples [n] at 16 kHz -> as many enhanced ones

FRONT_END_MIX = 0.6
CPU = torch.device("cpu")


def through(
    samples: np.ndarray, front_end: str | FrontEnd | None, mix: float, device: torch.device = CPU
) -> np.ndarray:
    """Samples [n], of which the share `mix` is replaced by what a front end makes of them; None leaves them alone.

    device: the model's; a GPU of NVIDIA's computes the enhancer too.
    """
    if front_end is None or mix == 0 or not len(samples):
        return samples
    enhance = known_front_end(front_end, device)
    enhanced = np.asarray(enhance(samples), np.float32)
    if enhanced.shape != samples.shape:
        raise OptionError(f"a front end gives as many samples as it gets: {len(samples)}, not {list(enhanced.shape)}")
    return (samples + mix * (enhanced - samples)).astype(np.float32)


def known_front_end(front_end: str | FrontEnd, device: torch.device = CPU) -> FrontEnd:
    """The front end of this name, or the callable that was given. OptionError for other names."""
    if callable(front_end):
        return front_end
    if front_end != "deepfilternet":
        raise OptionError(f"front_end is deepfilternet, or in Python a callable, not {front_end!r}")
    return load_deepfilternet(str(device if device.type == "cuda" else CPU)).enhanced
