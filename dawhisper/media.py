"""A recording's file -> mono samples on the media's own clock, decoded in process by PyAV (the ffmpeg libraries).

What the file leaves out of its time, a sound track that starts late, a gap, a damaged part, becomes silence, so that a
sample's place is its time in the video. Channels are mixed here, not by ffmpeg, which drops some and refuses many.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import numpy as np

from .errors import AudioError, OptionError
from .wholeness import is_cut_off

if TYPE_CHECKING:
    from av import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

T = TypeVar("T")

SEEK_MARGIN = 2.0  # seconds decoded before `start` so that codecs with memory have settled
JITTER = 0.05  # seconds that a frame's time may be off without meaning a gap
OVERLAP = 1.0  # seconds: a frame that comes this much too early belongs to another recording, joined to the first
LATEST_START = 60.0  # seconds: sound that starts later was cut out of something longer, and starts at 0
MOST_SILENCE = 3600.0  # seconds that are put into a recording in all
LONGEST_GAP = 600.0  # seconds of silence that are believed where the file does not say how long it is
SHORT_GAP = 0.5  # seconds missing in all that are not worth a line
LONGEST_BLOCK = 480_000  # samples of silence given at once
RATES = (1000, 2_000_000)  # samples per second; others are damage, and would make hours of a second
TOO_LOUD = 2.0  # codecs overshoot 1 a little, which is cut; beyond this the samples have another scale
QUIET = 0.003  # -50 dB
CANCELLED = 0.02  # power of the sum of all channels over the sum of their powers: 1 for unrelated ones
MOST_PLANES = 7
UNTIMED = ("wav", "w64", "aiff", "au", "caf", "mp3", "aac", "ac3", "eac3", "amr", "tta", "wv")  # sound without gaps
EQUAL_PACKETS = ("mp3", "mp3float", "mp2", "mp2float", "mp1", "mp1float", "ac3", "eac3", "dca")


@dataclass
class Media:
    """An open recording: the sound track that is heard, where its clock starts, and what went wrong so far."""

    name: str
    container: InputContainer
    stream: AudioStream
    zero: float | None  # the time stamp, in seconds, that is the recording's 0; None: that of the first frame
    end: float | None  # how long the file says it is
    cut_off: bool = False  # the file lacks its end
    scale: float = 1.0  # of the samples
    peak: float = 0.0  # the loudest so far
    lead: float = 0.0  # seconds to be left out of the next frames
    gaps: list[tuple[float, float]] = field(default_factory=list)  # seconds, where silence was put between frames
    errors: list[str] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)  # a set that keeps its order

    def blocks(self, sr: int, origin: float = 0.0) -> Generator[np.ndarray, None, None]:
        """Mono float32 blocks at `sr`, of any size, from where the container stands: `origin` seconds."""
        given, mixer = 0, None  # type: int, _Mixer | None
        for at, frame in self._placed(origin - self.lead):
            if mixer is None or at is not None or not mixer.fits(frame):
                lead = self.lead if mixer is None and at is None else 0.0
                for block in [] if mixer is None else mixer.rest():
                    given += len(block)
                    yield block
                silence = 0 if at is None else round((at - origin) * sr) - given
                while silence > 0:
                    block = np.zeros(min(silence, LONGEST_BLOCK), np.float32)
                    given, silence = given + len(block), silence - len(block)
                    yield block
                mixer = _Mixer(self, frame, sr, lead)
            for block in mixer.add(frame):
                given += len(block)
                yield block
        if mixer is not None:
            yield from mixer.rest()

    def seek(self, start: float) -> float | None:
        """Move shortly before `start` -> whole seconds from the beginning to what comes next; None where that fails.

        Whole ones, since resampling then goes on as if it had come from the beginning.
        """
        import av

        try:
            first = self._next_time()
            if first is None or self.stream.time_base is None:
                return None
            zero = first if self.zero is None else self.zero
            offset = round((zero + start - SEEK_MARGIN) / self.stream.time_base)
            self.container.seek(offset, stream=self.stream, backward=True)
            reached = self._next_time()
            if reached is None or not zero <= reached <= zero + start - SEEK_MARGIN / 2:
                return None
            self.container.seek(offset, stream=self.stream, backward=True)
        except (av.FFmpegError, OverflowError):
            return None
        origin = math.ceil(reached - zero)
        self.lead = origin - (reached - zero)
        return origin

    def warn(self, seconds: float | None) -> None:
        """Say what was odd; `seconds` were decoded, None: not all was asked for."""
        if seconds is not None and (quiet := quiet_note(self.peak)):
            self.notes[quiet] = None
        for note in self.notes:
            warnings.warn(f"{self.name}: {note}", stacklevel=2)
        missing = sum(end - start for start, end in self.gaps)
        if missing > SHORT_GAP:
            message = f"{missing:.1f} s of sound are missing from {self.gaps[0][0]:.1f} s on, and are silence now"
            warnings.warn(f"{self.name}: {message}", stacklevel=2)
        expected = None if seconds is None else self._expected_seconds()
        if seconds is not None and expected is not None and seconds < expected - max(0.2, 0.01 * expected):
            message = f"only {seconds:.1f} of {expected:.1f} s could be decoded; it is cut off or damaged"
            warnings.warn(f"{self.name}: {message}", stacklevel=2)
        elif self.cut_off and seconds is not None:
            warnings.warn(f"{self.name}: the file is cut off, after {seconds:.1f} s of sound", stacklevel=2)
        elif self.errors:
            message = f"{len(self.errors)} damaged part(s) were left out ({self.errors[0]})"
            warnings.warn(f"{self.name}: {message}", stacklevel=2)

    def _frames(self) -> Iterator[AudioFrame]:
        """A packet or a frame that can't be decoded is noted and left out."""
        import av

        packets = self.container.demux(self.stream)
        sizes: list[int] = []  # of the last packets
        broken = False  # the last packet could not be decoded
        while len(self.errors) < 10000:
            try:
                packet = next(packets)
                if packet.size:
                    sizes = [*sizes[-8:], packet.size]
                frames = packet.decode()
                broken &= not frames
            except StopIteration:
                self.cut_off |= broken or (self.stream.codec_context.name in EQUAL_PACKETS and _ends_short(sizes))
                return
            except (av.FFmpegError, ValueError, OSError, IndexError) as e:  # PyAV knows no stream that appears later
                self.errors.append(reason(e))
                broken = True
                if isinstance(e, av.error.EOFError):
                    return
                continue
            for frame in frames:
                if RATES[0] <= frame.sample_rate <= RATES[1] and frame.samples and frame.layout.nb_channels:
                    yield frame
                else:
                    self.errors.append(f"{frame.sample_rate} samples per second")

    def _placed(self, origin: float) -> Iterator[tuple[float | None, AudioFrame]]:
        """Each frame, with its time in seconds where it does not simply follow the frame before it."""
        due, zero, timed = origin, self.zero, self.container.format.name not in UNTIMED
        for frame, following in _with_next(self._frames()):
            length = frame.samples / frame.sample_rate
            if zero is None:
                zero = (frame.time or 0.0) - origin
            at = due if frame.time is None or not timed else frame.time - zero
            # where the next frame starts after the end of this one; a single wrong time stamp is not followed
            then = 0.0 if following is None or following.time is None else following.time - zero - at - length
            jump: float | None = None
            if abs(at - due) <= JITTER or (then < -JITTER if at > due else abs(then) > JITTER):
                pass
            elif due - OVERLAP < at < due and due > origin:
                continue  # heard already
            elif at > due and self._is_believed(due, at):
                if due > origin:
                    self.gaps.append((due, at))
                jump = due = at
            else:  # the time stamps start anew
                zero += at - due
            due += length
            yield jump, frame

    def _is_believed(self, due: float, at: float) -> bool:
        """Whether there may be silence between these times; damaged time stamps would fill the memory with it."""
        silent = at - due + sum(end - start for start, end in self.gaps)
        return silent < MOST_SILENCE and at < (due + LONGEST_GAP if self.end is None else self.end + 1.0)

    def _next_time(self) -> float | None:
        for frame in self.container.decode(self.stream):
            return frame.time
        return None

    def _expected_seconds(self) -> float | None:
        """How long the file says its sound is; None where ffmpeg only guesses from the bit rate."""
        if self.container.format.name in ("aac", "ac3", "amr"):
            return None
        stream = self.stream
        if stream.time_base is None:
            return None
        start = float((stream.start_time or 0) * stream.time_base)
        if stream.duration is None:  # only the whole file's length is known: of sound alone, it is that of the sound
            return None if len(self.container.streams) > 1 or self.end is None else self.end - start
        # an MP4's track is as long as its sound; elsewhere what comes before it may be counted
        late = start - (self.zero or 0.0) if self.container.format.name.startswith("mov,") else -start
        return float(stream.duration * stream.time_base) + late


class _Mixer:
    """Frames of one rate and kind -> mono at another rate; a second of them at a time, since frames are short."""

    def __init__(self, media: Media, frame: AudioFrame, sr: int, lead: float):
        import av

        self.media, self.sr = media, sr
        self.rate, self.format, self.channels = _kind(frame)
        self.lead = round(lead * self.rate)
        self.resampler = None if sr == self.rate else av.AudioResampler(format="fltp", layout="mono", rate=sr)
        self.waiting = av.AudioFifo()
        # PyAV reads beyond the memory of planar frames of eight channels and more
        crowded = frame.format.is_planar and self.channels > MOST_PLANES
        self.packer = av.AudioResampler(frame.format.packed.name, frame.layout, self.rate) if crowded else None

    def fits(self, frame: AudioFrame) -> bool:
        return (self.rate, self.format, self.channels) == _kind(frame)

    def add(self, frame: AudioFrame) -> Iterator[np.ndarray]:
        import av

        frame.pts = None  # _placed has seen to the times
        try:
            for part in [frame] if self.packer is None else self.packer.resample(frame):
                part.pts = None
                self.waiting.write(part)
        except (av.FFmpegError, ValueError) as e:  # its channels can't be told apart
            self.media.errors.append(reason(e))
        if self.lead and self.waiting.read(self.lead) is not None:
            self.lead = 0
        while not self.lead and (second := self.waiting.read(self.rate)) is not None:
            yield from self._mixed(second)

    def rest(self) -> Iterator[np.ndarray]:
        if not self.lead and (waiting := self.waiting.read()) is not None:
            yield from self._mixed(waiting)
        if self.resampler is not None:
            yield from (frame.to_ndarray()[0] for frame in self.resampler.resample(None))

    def _mixed(self, waiting: AudioFrame) -> Iterator[np.ndarray]:
        import av

        channels = np.ascontiguousarray(to_float(frame_samples(waiting)))
        if not np.isfinite(channels).all():
            self.media.errors.append("NaN samples")
            channels = np.nan_to_num(channels, posinf=0.0, neginf=0.0)
        mono = mix_channels(channels, self.media.notes)
        self.media.scale = max(self.media.scale, scale_of(mono))
        mono = in_range(mono, self.media.scale, self.media.notes)
        self.media.peak = max(self.media.peak, float(np.abs(mono).max()))
        if self.resampler is None:
            yield mono
            return
        frame = av.AudioFrame.from_ndarray(mono[None], format="fltp", layout="mono")
        frame.sample_rate = self.rate
        yield from (f.to_ndarray()[0] for f in self.resampler.resample(frame))


def _kind(frame: AudioFrame) -> tuple[int, str, int]:
    return frame.sample_rate, frame.format.name, frame.layout.nb_channels


def open_media(source: Any) -> InputContainer:
    """PyAV's container of a file or file object. Tags that are not UTF-8 don't stop it; before 19 PyAV must be told."""
    import av

    options: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "ignore"}
    return av.open(source, "r", **options)


@contextmanager
def opened(file: str | BinaryIO, name: str, track: int | None = None) -> Iterator[Media]:
    """A recording and its sound track: number `track`, counted from 1, or the default one."""
    import av

    cut_off = _is_cut_off(file)
    try:
        container = open_media(file)
    except (av.FFmpegError, ValueError, OSError) as e:
        raise AudioError(f"{name}: the file is cut off; get a whole copy" if cut_off else unreadable(name, e)) from e
    with container:
        if not container.streams.audio:
            why = "the file is cut off; get a whole copy" if cut_off else "name one with an audio track"
            raise AudioError(f"{name}: there is no sound in this file; {why}")
        stream = _track(container, name, track)
        start, length = (None if t is None else t / 1e6 for t in (container.start_time, container.duration))
        zero = start
        if start is not None and _has_timeline(container) and start <= LATEST_START:
            zero = min(start, 0.0)
        end = None if length is None else length + (start or 0.0) - (zero or 0.0)
        yield Media(name, container, stream, zero, end, cut_off)


def sought_length(name: str) -> float | None:
    """Seconds that a file says it is long; None where it does not say so, is cut off, or its sound is to be chosen."""
    import av

    try:
        with open_media(name) as container:
            told, tracks = container.duration, len(container.streams.audio)
    except (av.FFmpegError, ValueError, OSError):
        return None
    return None if told is None or tracks != 1 or _is_cut_off(name) else told / 1e6


def _is_cut_off(file: str | BinaryIO) -> bool:
    """Of a file on this machine, or an open one that can go back."""
    if not isinstance(file, str):
        return getattr(file, "seekable", bool)() and is_cut_off(file)
    try:
        with Path(file.removeprefix("file:")).open("rb") as opened_file:
            return opened_file.seekable() and is_cut_off(opened_file)
    except (OSError, ValueError):  # an address, or what can't be opened at all
        return False


def _has_timeline(container: InputContainer) -> bool:
    """Whether a first time stamp above 0 means a late start, as an edit list does, and not just any clock."""
    return container.format.name.startswith(("mov,", "matroska"))


def _track(container: InputContainer, name: str, track: int | None) -> AudioStream:
    tracks = cast("list[AudioStream]", list(container.streams.audio))
    listed = ", ".join(f"{i} {_title(stream)}".strip() for i, stream in enumerate(tracks, 1))
    if track is not None:
        if not 1 <= track <= len(tracks):
            raise OptionError(f"{name}: there is no sound track {track}; there are {listed}")
        return tracks[track - 1]
    default = [stream for stream in tracks if int(getattr(stream, "disposition", 0)) & 1]
    chosen = default[0] if default else cast("AudioStream", container.streams.best("audio") or tracks[0])
    if len(tracks) > 1:
        number = tracks.index(chosen) + 1
        warnings.warn(
            f"{name}: sound track {number} of {len(tracks)} is heard ({listed}); --audio_track N chooses", stacklevel=4
        )
    return chosen


def _title(stream: AudioStream) -> str:
    told = (stream.metadata.get(key, "") for key in ("language", "title"))
    return " ".join(text for text in told if text not in ("", "und"))  # und: undetermined


def frame_samples(frame: AudioFrame) -> np.ndarray:
    """A decoded frame as [channels, n], in its own type."""
    array = frame.to_ndarray()
    return array if frame.format.is_planar else array.reshape(-1, frame.layout.nb_channels).T


def to_float(samples: np.ndarray) -> np.ndarray:
    """Samples of floats, int16, int32 or uint8 -> float32, integers scaled to [-1, 1]; TypeError for other types."""
    kind = samples.dtype.name
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    if kind == "int16":
        return np.divide(samples, 2.0**15, dtype=np.float32)
    if kind == "int32":
        return np.divide(samples, 2.0**31, dtype=np.float64).astype(np.float32)
    if kind == "uint8":
        return np.divide(samples.astype(np.int16) - 128, 2.0**7, dtype=np.float32)
    raise TypeError(samples.dtype)


def mix_channels(channels: np.ndarray, notes: dict[str, None]) -> np.ndarray:
    """[channels, n] -> their mean [n]; where they cancel each other, the loudest one."""
    if len(channels) == 1:
        return channels[0]
    mono = channels.mean(axis=0, dtype=np.float32)
    powers = np.array([np.dot(channel, channel) for channel in channels])
    if np.dot(mono, mono) * len(channels) ** 2 < CANCELLED * powers.sum():
        notes["the channels cancel each other; the loudest one is heard"] = None
        return channels[powers.argmax()]
    return mono


def scale_of(samples: np.ndarray) -> float:
    """What samples are to be divided by: 1, but for those far outside [-1, 1], such as 16-bit numbers in floats."""
    if not len(samples) or max(samples.max(), -samples.min()) <= TOO_LOUD:
        return 1.0
    loud = float(np.quantile(np.abs(samples), 0.999))  # a single damaged sample must not silence the rest
    return loud if loud > TOO_LOUD else 1.0


def in_range(samples: np.ndarray, scale: float, notes: dict[str, None]) -> np.ndarray:
    """Samples divided by their scale, and cut off at -1 and 1."""
    if scale != 1.0:
        notes["samples far outside [-1, 1] were scaled down"] = None
        samples = samples / np.float32(scale)
    return np.clip(samples, -1.0, 1.0)


def _ends_short(sizes: list[int]) -> bool:
    """Whether packets of one size, but for their padding, end with a shorter one."""
    *others, last = sizes or [0]
    return len(others) > 2 and max(others) - min(others) <= 2 and last < min(others) - 2


def quiet_note(peak: float) -> str | None:
    """What to say of a recording whose loudest sample is this."""
    if not 0 < peak < QUIET:
        return None
    return f"very quiet, {20 * np.log10(peak):.0f} dB at its loudest; make it louder if words are missing"


def _with_next(items: Iterable[T]) -> Iterator[tuple[T, T | None]]:
    """Each item and the one after it."""
    items = iter(items)
    if (item := next(items, None)) is None:
        return
    for following in items:
        yield item, following
        item = following
    yield item, None


def reason(error: object) -> str:
    return getattr(error, "strerror", None) or str(error)


def unreadable(name: str, error: object) -> str:
    return f"{name}: cannot be decoded as audio ({reason(error)}); check that it is a whole sound or video file"
