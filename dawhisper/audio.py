"""Sound in: any file or array -> 16 kHz mono samples -> log-mel spectrogram.

Files are decoded in process by PyAV (the ffmpeg libraries), so no ffmpeg command is needed. The constants and the
spectrogram are Whisper's; unlike openai-whisper's, the spectrogram of a batch takes one maximum per item, so that an
item's features do not depend on its neighbours.
"""

from __future__ import annotations

import difflib
import io
import math
import os
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import AudioError, OptionError
from .media import Media, in_range, mix_channels, opened, quiet_note, scale_of, to_float, unreadable

SAMPLE_RATE = 16000
N_FFT = 400
HOP_LENGTH = 160
CHUNK_LENGTH = 30  # seconds in the encoder's window
N_SAMPLES = CHUNK_LENGTH * SAMPLE_RATE  # 480,000 samples in a window
N_FRAMES = N_SAMPLES // HOP_LENGTH  # 3,000 spectrogram frames in a window
N_SAMPLES_PER_TOKEN = HOP_LENGTH * 2  # the encoder's second convolution has stride 2
FRAMES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH  # a frame is 10 ms
TOKENS_PER_SECOND = SAMPLE_RATE // N_SAMPLES_PER_TOKEN  # an encoder position is 20 ms

MIXED = SAMPLE_RATE  # samples whose channels are mixed alike
MAX_CHANNELS = 64  # a 2-D array with more rows and columns than this is no multi-channel recording
SEEK_FROM = 10.0  # seconds; decoding this much is as quick as seeking, and exact in every format
STFT_FRAMES = 30000  # spectrogram frames computed at once (5 minutes), to bound the memory of long recordings

ArrayT = TypeVar("ArrayT", np.ndarray, Tensor)
Source = Union[str, "os.PathLike[str]", bytes, BinaryIO, np.ndarray, Tensor, Sequence[float]]  # what can be heard


def load_audio(
    source: Source,
    sr: int = SAMPLE_RATE,
    start: float = 0.0,
    end: float | None = None,
    track: int | None = None,
) -> np.ndarray:
    """Decode a recording to mono float32 samples.

    Parameters
    ----------
    source: a file of any format that ffmpeg reads (audio, or a video's sound track), an address (http://...), a file's
        bytes, an open binary file, or samples that are at `sr` already: float in [-1, 1], or int16/int32/uint8; shape
        [n], or 2-D where the smaller dimension is the channels; a list of floats is samples too
    sr: samples per second of the result
    start, end: the part to return, in seconds; far into a file this seeks, which some formats place to a millisecond
    track: which of a file's sound tracks, counted from 1; None: the default one

    Returns
    -------
    float32 samples in [-1, 1], shape [n] with n > 0; channels are mixed down to one. The times are those of the media:
    where the sound of a video starts late or has a gap, there is silence.

    Raises
    ------
    AudioError: one line that names the source and says what is wrong with it
    """
    if not 0 <= start < math.inf or (end is not None and not start < end):
        raise AudioError(f"cannot take the part from {start:g} s to {end} s: it needs 0 <= start < end")
    if is_file(source):
        file, name = _file(source)
        samples, length = _decode(file, name, sr, start, end, track)
    else:
        samples, name = _from_array(source), "the array"
        length = len(samples) / sr
        samples = samples[round(start * sr) : None if end is None else round(end * sr)]
    if len(samples) == 0:
        if length and end is not None and round(start * sr) == round(end * sr):
            raise AudioError(f"{name}: no sample lies between {start} s and {end} s; take a longer part")
        if length:
            raise AudioError(f"{name}: the part starts at {start:g} s but the recording is {length:.1f} s long")
        raise AudioError(f"{name}: there are no sound samples in it; it may be damaged or cut off, try another copy")
    return samples


class SampleReader:
    """A recording's samples from beginning to end, decoded as they are read, so that a long one takes no more memory.

    source, sr, track: as for `load_audio`. Reading raises AudioError where load_audio would.
    start: seconds; what comes before is left out but for seconds, where the format can be sought.
    """

    def __init__(self, source: Source, sr: int = SAMPLE_RATE, track: int | None = None, start: float = 0.0):
        self.position = 0  # samples read or skipped
        self._blocks = self._decoded(source, sr, track, start)
        self._media: Media | None = None
        self._left = next(self._blocks, np.zeros(0, np.float32)) if start else np.zeros(0, np.float32)  # not read yet

    def read(self, n: int) -> np.ndarray:
        """The next samples, float32 [n]; fewer at the end of the recording."""
        parts, missing = [], n
        while missing > 0:
            if not len(self._left):
                block = next(self._blocks, None)
                if block is None:
                    break
                self._left = block
            parts.append(self._left[:missing])
            self._left = self._left[missing:]
            missing -= len(parts[-1])
        self.position += n - missing
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def skip_to(self, position: int) -> None:
        """Leave out samples up to this one."""
        while (missing := position - self.position) > 0 and len(self.read(min(missing, N_SAMPLES))):
            pass

    def warn(self) -> None:
        """Say what was odd so far; at the end of a recording it is said anyway."""
        if self._media is not None:
            self._media.warn(None)

    def close(self) -> None:
        self._blocks.close()

    def _decoded(self, source: Source, sr: int, track: int | None, start: float) -> Generator[np.ndarray, None, None]:
        """Float32 samples in blocks of any size, from `position` on."""
        if not is_file(source):
            yield load_audio(source, sr)
            return
        file, name = _file(source)
        with opened(file, name, track) as media:
            self._media = media
            origin = (media.seek(start) or 0.0) if start else 0.0
            self.position = n = round(origin * sr)
            with closing(media.blocks(sr, origin)) as decoded:
                for block in decoded:
                    n += len(block)
                    yield block
            if n == 0:
                raise AudioError(unreadable(name, [*media.errors, "there are no sound samples in it"][0]))
            media.warn(n / sr)


def log_mel_spectrogram(
    audio: str | os.PathLike[str] | np.ndarray | Tensor,
    n_mels: int = 80,
    padding: int = 0,
    device: str | torch.device | None = None,
) -> Tensor:
    """Whisper's log-mel spectrogram, computed in float32 on the device where the audio is (or on `device`).

    Parameters
    ----------
    audio: a file, or 16 kHz samples of shape [n] or [B, n]
    n_mels: 80 or 128
    padding: zero samples added at the end
    device: where to compute; None = where the audio is

    Returns
    -------
    [n_mels, T] or [B, n_mels, T] with T = (n + padding) // 160; each item is scaled by its own maximum
    """
    if n_mels not in (80, 128):
        raise OptionError(f"n_mels is {n_mels}: Whisper's mel filters exist for 80 and 128")
    if isinstance(audio, (str, os.PathLike)):
        audio = load_audio(audio)
    samples = torch.as_tensor(audio)
    if samples.ndim not in (1, 2):
        raise AudioError(f"audio has shape {tuple(samples.shape)}: a spectrogram needs [n] or [batch, n] samples")
    # whisper's package is heavy to import (numba), and training code that brings its own features does not need it
    from whisper.audio import mel_filters

    with (
        torch.no_grad(),
        torch.autocast(samples.device.type if device is None else torch.device(device).type, enabled=False),
    ):
        batch = torch.atleast_2d(samples if device is None else samples.to(device)).float()  # [B, n]
        n = batch.shape[-1] + padding
        if n <= N_FFT // 2:
            raise AudioError(
                f"audio of {n} samples is too short for a spectrogram: pad it, for example padding={N_SAMPLES}"
            )
        filters = mel_filters(batch.device, n_mels)  # [n_mels, N_FFT // 2 + 1]
        batch = F.pad(F.pad(batch, (0, padding)), (N_FFT // 2, N_FFT // 2), mode="reflect")
        mel = torch.cat([filters @ power for power in _power_blocks(batch, n // HOP_LENGTH)], dim=-1)
        log_mel = mel.clamp_(min=1e-10).log10_()
        log_mel = torch.maximum(log_mel, log_mel.amax(dim=(-2, -1), keepdim=True) - 8.0)
        log_mel = log_mel.add_(4.0).div_(4.0)
    return log_mel if samples.ndim == 2 else log_mel[0]


def pad_or_trim(array: ArrayT, length: int = N_SAMPLES, *, axis: int = -1) -> ArrayT:
    """Cut `array` to `length` along `axis`, or fill it up with zeros at the end."""
    missing = length - array.shape[axis]
    if isinstance(array, Tensor):
        if missing <= 0:
            return array.narrow(axis, 0, length)
        after = array.ndim - 1 - axis % array.ndim  # F.pad counts dimensions from the last
        return F.pad(array, [0, 0] * after + [0, missing])
    if missing <= 0:
        return array.take(range(length), axis=axis)
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return np.pad(array, widths)


def _power_blocks(padded: Tensor, n_frames: int) -> Iterator[Tensor]:
    """[B, n] samples (already reflected at both ends) -> power spectra [B, N_FFT // 2 + 1, frames], block by block."""
    window = _hann_window(padded.device)
    if n_frames == 0:
        yield padded.new_zeros(len(padded), N_FFT // 2 + 1, 0)
    for first in range(0, n_frames, STFT_FRAMES):
        last = min(first + STFT_FRAMES, n_frames) - 1
        part = padded[:, first * HOP_LENGTH : last * HOP_LENGTH + N_FFT]
        stft = torch.stft(part, N_FFT, HOP_LENGTH, window=window, center=False, return_complex=True)
        yield stft.abs().square_()


@lru_cache(maxsize=8)
def _hann_window(device: torch.device) -> Tensor:
    return torch.hann_window(N_FFT).to(device)  # made on the CPU, so that every device has the same values


def is_file(source: object) -> bool:
    """Whether a recording is a file: its name, its content or an open one; otherwise it is samples."""
    return isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(source, "read")


def is_samples(source: object) -> bool:
    """Whether a list holds the samples of one recording, and not recordings."""
    return (
        isinstance(source, Sequence)
        and not is_file(source)
        and len(source) > 0
        and np.ndim(source[0]) == 0
        and isinstance(source[0], (float, int, np.number))
    )


def _file(source: Any) -> tuple[str | BinaryIO, str]:
    """What PyAV should open, and its name in messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not source:
            raise AudioError("there are no bytes in this recording; give the whole content of a file")
        return io.BytesIO(source), "the bytes"
    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)
        return _checked_path(name), name
    name = str(getattr(source, "name", "the open file"))
    try:
        _rewind(source)
        text = isinstance(source.read(0), str)
    except (OSError, ValueError) as e:  # it is closed
        raise AudioError(f"{name}: cannot be read ({e}); open it again") from e
    if text:
        raise AudioError(f"{name}: it was opened as text; open it with mode 'rb'")
    return source, name


def _from_array(source: Any) -> np.ndarray:
    """Samples of any supported type and shape -> float32 mono [n] of its own memory or the given one."""
    if isinstance(source, Tensor):
        # numpy has no bfloat16
        source = (source.float() if source.is_floating_point() else source).detach().cpu().numpy()
    try:
        array = np.asarray(source)
    except (TypeError, ValueError) as e:  # lists of different lengths
        raise AudioError(f"the list cannot be made an array of samples ({e})") from e
    if source is None or array.dtype.kind == "O":
        raise AudioError(f"no audio in a {type(source).__name__}: give a file, its bytes, or samples")
    try:
        samples = to_float(array)
    except TypeError:
        raise AudioError(f"the array has type {array.dtype}: give float samples in [-1, 1], or int16") from None
    if samples.size == 0:
        return np.zeros(0, np.float32)
    several = samples.ndim == 2 and 0 < min(samples.shape) <= MAX_CHANNELS
    if samples.ndim != 1 and not several:
        raise AudioError(f"the array has shape {array.shape}: give samples of one recording, [n] or [channels, n]")
    if not np.isfinite(samples).all():
        raise AudioError(f"the array has {int((~np.isfinite(samples)).sum())} NaN or infinite samples: clean it first")
    notes: dict[str, None] = {}
    if several:
        channels = samples if np.argmin(samples.shape) == 0 else samples.T
        samples = np.concatenate(
            [mix_channels(channels[:, i : i + MIXED], notes) for i in range(0, channels.shape[1], MIXED)]
        )
    if (scale := scale_of(samples)) != 1.0 or max(samples.max(), -samples.min()) > 1.0:
        samples = in_range(samples, scale, notes)
    if quiet := quiet_note(float(np.abs(samples).max())):
        notes[quiet] = None
    for note in notes:
        warnings.warn(f"the array: {note}", stacklevel=3)
    return np.require(samples, np.float32, ["C", "W"])  # torch wants neither flipped nor read-only memory


def _checked_path(name: str) -> str:
    """The name that PyAV should open; raises for what no decoder can open."""
    if "://" in name:
        return name
    path = Path(name)
    try:
        if path.is_dir():
            raise AudioError(f"{name}: this is a folder; name the audio files in it")
        if not path.exists():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.75)
            hint = f"did you mean {' or '.join(near)}?" if near else "check the name and the folder"
            raise AudioError(f"{name}: no such file; {hint}")
        if path.is_file() and path.stat().st_size == 0:
            raise AudioError(f"{name}: the file is empty; record or copy it again")
    except (OSError, ValueError) as e:  # no permission for the folder, a name with a null byte or too long
        raise AudioError(f"{name!r}: cannot be opened ({e})") from e
    # a plain file name may hold a colon, which ffmpeg would take for a protocol
    return f"file:{name}"


def _decode(
    file: str | BinaryIO, name: str, sr: int, start: float, end: float | None, track: int | None, seek: bool = True
) -> tuple[np.ndarray, float]:
    """Decode a sound track -> (samples from `start` to `end`, seconds known to be there in all)."""
    with opened(file, name, track) as media:
        origin = media.seek(start) if seek and start > SEEK_FROM else 0.0
        if origin is not None:
            return _collect(media, sr, start - origin, None if end is None else end - origin, origin)
    _rewind(file)
    return _decode(file, name, sr, start, end, track, seek=False)


def _rewind(file: str | BinaryIO) -> None:
    """Go to the beginning of an open file, where it can go back."""
    if not isinstance(file, str) and getattr(file, "seekable", lambda: hasattr(file, "seek"))():
        file.seek(0)


def _collect(media: Media, sr: int, start: float, end: float | None, origin: float) -> tuple[np.ndarray, float]:
    """Decode from where the container stands (`origin` seconds into the recording) and cut out start..end."""
    first, last = round(start * sr), None if end is None else round(end * sr)
    blocks: list[np.ndarray] = []
    n = 0  # samples decoded
    with closing(media.blocks(sr, origin)) as decoded:
        for block in decoded:
            part = block[max(first - n, 0) : None if last is None else max(last - n, 0)]
            n += len(block)
            if len(part):
                blocks.append(part)
            if last is not None and n >= last:
                break
    length = origin + n / sr
    if n == 0 and media.errors:
        raise AudioError(unreadable(media.name, media.errors[0]))
    media.warn(None if end is not None else length)
    samples = np.empty(sum(map(len, blocks)), np.float32)
    at = 0
    for i, block in enumerate(blocks):
        samples[at : at + len(block)] = block
        at += len(block)
        blocks[i] = block[:0]  # so that the whole recording is not held twice
    return samples, length


def to_int16(audio: np.ndarray) -> np.ndarray:
    """Float audio in [-1, 1] -> int16, rounded and clipped; int16 stays as it is."""
    if audio.dtype == np.int16:
        return audio
    return np.clip(np.rint(audio * 32768.0), -32768, 32767).astype(np.int16)


def from_int16(samples: ArrayT) -> ArrayT:
    """16-bit samples as float32 in [-1, 1)."""
    return (samples.float() if isinstance(samples, Tensor) else samples.astype(np.float32)) / 32768


def fitted_int16(audio: np.ndarray) -> np.ndarray:
    """Float audio -> 16-bit samples; audio beyond [-1, 1] is scaled down as a whole, not clipped."""
    return np.rint(audio / max(1.0, float(np.abs(audio).max(initial=0.0))) * 32767).astype("<i2")
