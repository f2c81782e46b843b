"""Sound in: any file or array -> 16 kHz mono samples -> log-mel spectrogram.

Files are decoded in process by PyAV (the ffmpeg libraries), so no ffmpeg command is needed. The constants and the
spectrogram are Whisper's; unlike openai-whisper's, the spectrogram of a batch takes one maximum per item, so that an
item's features do not depend on its neighbours.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import AudioError, OptionError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

SAMPLE_RATE = 16000
N_FFT = 400
HOP_LENGTH = 160
CHUNK_LENGTH = 30  # seconds in the encoder's window
N_SAMPLES = CHUNK_LENGTH * SAMPLE_RATE  # 480,000 samples in a window
N_FRAMES = N_SAMPLES // HOP_LENGTH  # 3,000 spectrogram frames in a window
N_SAMPLES_PER_TOKEN = HOP_LENGTH * 2  # the encoder's second convolution has stride 2
FRAMES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH  # a frame is 10 ms
TOKENS_PER_SECOND = SAMPLE_RATE // N_SAMPLES_PER_TOKEN  # an encoder position is 20 ms

MAX_CHANNELS = 64  # a 2-D array with more rows and columns than this is no multi-channel recording
SEEK_FROM = 10.0  # seconds; decoding this much is as quick as seeking, and exact in every format
SEEK_MARGIN = 1.0  # seconds decoded before `start` so that codecs with memory have settled
STFT_FRAMES = 30000  # spectrogram frames computed at once (5 minutes), to bound the memory of long recordings

ArrayT = TypeVar("ArrayT", np.ndarray, Tensor)


def load_audio(
    source: str | os.PathLike[str] | BinaryIO | np.ndarray | Tensor,
    sr: int = SAMPLE_RATE,
    start: float = 0.0,
    end: float | None = None,
) -> np.ndarray:
    """Decode a recording to mono float32 samples.

    Parameters
    ----------
    source: a file of any format that ffmpeg reads (audio, or a video's sound track), an address (http://...), an open
        binary file, or samples that are at `sr` already: float in [-1, 1], or int16/int32/uint8; shape [n], or 2-D
        where the smaller dimension is the channels
    sr: samples per second of the result
    start, end: the part to return, in seconds; far into a file this seeks, which some formats place to a millisecond

    Returns
    -------
    float32 samples in [-1, 1], shape [n] with n > 0; channels are mixed down to one

    Raises
    ------
    AudioError: one line that names the source and says what is wrong with it
    """
    if start < 0 or (end is not None and end <= start):
        raise AudioError(f"cannot take the part from {start:g} s to {end} s: it needs 0 <= start < end")
    if isinstance(source, (np.ndarray, Tensor)):
        samples, name = _from_array(source), "the array"
        length = len(samples) / sr
        samples = samples[round(start * sr) : None if end is None else round(end * sr)]
    elif isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        samples, length = _decode(_checked_path(name), name, sr, start, end)
    else:
        name = str(getattr(source, "name", "the open file"))
        samples, length = _decode(source, name, sr, start, end)
    if len(samples) == 0:
        if length and start >= length:
            raise AudioError(f"{name}: the part starts at {start:g} s but the recording is {length:.1f} s long")
        if length:
            raise AudioError(f"{name}: no sample lies between {start} s and {end} s; take a longer part")
        raise AudioError(f"{name}: there are no sound samples in it; it may be damaged or cut off, try another copy")
    return samples


class SampleReader:
    """A recording's samples from beginning to end, decoded as they are read, so that a long one takes no more memory.

    source, sr: as for `load_audio`. Reading raises AudioError where load_audio would.
    """

    def __init__(self, source: str | os.PathLike[str] | np.ndarray | Tensor, sr: int = SAMPLE_RATE):
        self.position = 0  # samples read or skipped
        self._blocks = _stream(source, sr)
        self._left = np.zeros(0, np.float32)  # decoded but not read

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

    def close(self) -> None:
        self._blocks.close()


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


def _from_array(array: np.ndarray | Tensor) -> np.ndarray:
    """Samples of any supported type and shape -> finite float32 mono [n]."""
    if isinstance(array, Tensor):
        # numpy has no bfloat16
        array = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    scales = {"int16": 2.0**15, "int32": 2.0**31, "uint8": 2.0**7}
    if array.dtype.kind == "f":
        samples = array.astype(np.float32, copy=False)
    elif array.dtype.name in scales:
        offset = 128 if array.dtype.name == "uint8" else 0
        samples = (array.astype(np.float64) - offset).astype(np.float32) / np.float32(scales[array.dtype.name])
    else:
        raise AudioError(f"the array has type {array.dtype}: give float samples in [-1, 1], or int16")
    if samples.ndim == 2 and 0 < min(samples.shape) <= MAX_CHANNELS:
        samples = samples.mean(axis=int(np.argmin(samples.shape)), dtype=np.float32)
    if samples.size == 0:
        return np.zeros(0, np.float32)
    if samples.ndim != 1:
        raise AudioError(f"the array has shape {array.shape}: give samples of one recording, [n] or [channels, n]")
    if not np.isfinite(samples).all():
        raise AudioError(f"the array has {int((~np.isfinite(samples)).sum())} NaN or infinite samples: clean it first")
    return samples


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
    file: str | BinaryIO, name: str, sr: int, start: float, end: float | None, seek: bool = True
) -> tuple[np.ndarray, float]:
    """Decode the best audio stream -> (samples from `start` to `end`, seconds known to be there in all)."""
    with _opened(file, name) as (container, stream):
        origin = _seek(container, stream, start) if seek and start > SEEK_FROM else 0.0
        if origin is not None:
            return _collect(container, stream, name, sr, start - origin, None if end is None else end - origin, origin)
    if not isinstance(file, str):
        file.seek(0)
    return _decode(file, name, sr, start, end, seek=False)


def open_media(source: Any) -> InputContainer:
    """PyAV's container of a file or file object. Tags that are not UTF-8 don't stop it; before 19 PyAV must be told."""
    import av

    options: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}
    return av.open(source, "r", **options)


@contextmanager
def _opened(file: str | BinaryIO, name: str) -> Iterator[tuple[InputContainer, AudioStream]]:
    """The container and its best audio stream."""
    import av

    try:
        container = open_media(file)
    except av.FFmpegError as e:
        raise AudioError(_unreadable(name, e)) from e
    with container:
        if not container.streams.audio:
            raise AudioError(f"{name}: there is no sound in this file; name one with an audio track")
        yield container, cast("AudioStream", container.streams.best("audio") or container.streams.audio[0])


def _stream(source: str | os.PathLike[str] | np.ndarray | Tensor, sr: int) -> Generator[np.ndarray, None, None]:
    """A recording's float32 samples in blocks of any size, from its beginning; AudioError as with load_audio."""
    if isinstance(source, (np.ndarray, Tensor)):
        yield load_audio(source, sr)
        return
    name, n, errors = os.fspath(source), 0, []  # type: str, int, list[str]
    with (
        _opened(_checked_path(name), name) as (container, stream),
        closing(_blocks(container, stream, sr, errors)) as decoded,
    ):
        for block in decoded:
            n += len(block)
            yield np.divide(block, 32768.0, dtype=np.float32)
        if n == 0:
            reason = errors[0] if errors else "there are no sound samples in it"
            raise AudioError(_unreadable(name, reason))
        _warn_if_damaged(name, n / sr, _expected_seconds(container, stream), errors)


def _collect(
    container: InputContainer, stream: AudioStream, name: str, sr: int, start: float, end: float | None, origin: float
) -> tuple[np.ndarray, float]:
    """Decode from where the container stands (`origin` seconds into the recording) and cut out start..end."""
    first, last = round(start * sr), None if end is None else round(end * sr)
    blocks: list[np.ndarray] = []
    errors: list[str] = []
    n = 0  # samples decoded
    with closing(_blocks(container, stream, sr, errors)) as decoded:
        for block in decoded:
            part = block[max(first - n, 0) : None if last is None else max(last - n, 0)]
            n += len(block)
            if len(part):
                blocks.append(part)
            if last is not None and n >= last:
                break
    length = origin + n / sr
    if n == 0 and errors:
        raise AudioError(_unreadable(name, errors[0]))
    _warn_if_damaged(name, length, None if end is not None else _expected_seconds(container, stream), errors)
    samples = np.empty(sum(map(len, blocks)), np.float32)
    at = 0
    for i, block in enumerate(blocks):
        np.divide(block, 32768.0, out=samples[at : at + len(block)], dtype=np.float32)
        at += len(block)
        blocks[i] = block[:0]  # so that the whole recording is not held twice
    return samples, length


def _blocks(
    container: InputContainer, stream: AudioStream, sr: int, errors: list[str]
) -> Generator[np.ndarray, None, None]:
    """Mono int16 blocks at `sr`, as the ffmpeg command gives them; a packet that fails is noted and skipped."""
    import av

    resampler = av.AudioResampler(format="s16", layout="mono", rate=sr)
    waiting = av.AudioFifo()  # frames are short, 20 ms in Opus: a second of them is resampled in one go
    given: tuple[Any, ...] | None = None

    def resampled(last: bool) -> Iterator[np.ndarray]:
        frame = waiting.read()
        if frame is not None:
            frame.pts = None  # a gap or jump in the time stamps must not reach the resampler
            yield from (f.to_ndarray()[0] for f in resampler.resample(frame))
        if last:
            yield from (f.to_ndarray()[0] for f in resampler.resample(None))

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
            frames = packet.decode()
        except StopIteration:
            break
        except av.FFmpegError as e:
            errors.append(str(e.strerror))
            if isinstance(e, av.error.EOFError) or len(errors) > 10000:
                break
            continue
        for frame in frames:
            now = (frame.format.name, frame.layout.name, frame.sample_rate)
            if given is not None and now != given:  # the stream changes its rate or channels half-way
                yield from resampled(last=True)
                resampler, waiting = av.AudioResampler(format="s16", layout="mono", rate=sr), av.AudioFifo()
            given = now
            frame.pts = None
            waiting.write(frame)
            if waiting.samples >= frame.sample_rate:
                yield from resampled(last=False)
    if given is not None:
        yield from resampled(last=True)


def _seek(container: InputContainer, stream: AudioStream, start: float) -> float | None:
    """Move shortly before `start` -> seconds from the beginning to the next frame; None where that cannot be done."""
    import av

    try:
        zero = _next_time(container, stream)
        if zero is None or stream.time_base is None:
            return None
        offset = round((zero + start - SEEK_MARGIN) / stream.time_base)
        container.seek(offset, stream=stream, backward=True)
        reached = _next_time(container, stream)
        if reached is None or not zero <= reached <= zero + start - SEEK_MARGIN / 2:
            return None
        container.seek(offset, stream=stream, backward=True)
    except av.FFmpegError:
        return None
    return reached - zero


def _next_time(container: InputContainer, stream: AudioStream) -> float | None:
    for frame in container.decode(stream):
        return frame.time
    return None


def _expected_seconds(container: InputContainer, stream: AudioStream) -> float | None:
    """How long the file says it is; None where ffmpeg only guesses from the bit rate."""
    if container.format.name in ("aac", "ac3", "amr"):
        return None
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None


def _warn_if_damaged(name: str, seconds: float, expected: float | None, errors: list[str]) -> None:
    short = expected is not None and seconds < 0.98 * expected - 0.5
    if short:
        warnings.warn(
            f"{name}: only {seconds:.1f} of {expected:.1f} s could be decoded; it is cut off or damaged", stacklevel=5
        )
    elif errors:
        warnings.warn(f"{name}: {len(errors)} damaged part(s) were left out ({errors[0]})", stacklevel=5)


def _unreadable(name: str, error: object) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return f"{name}: cannot be decoded as audio ({reason}); check that it is a whole sound or video file"
