"""Where live sound comes from: a pipe or the microphone. Each piece is all that has come since the last one.

So a model that is slow gets larger pieces, and decodes less often.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from dawhisper.audio import SAMPLE_RATE, from_int16
from dawhisper.errors import AudioError, OptionError

MIC_PIECE = 0.1  # seconds
MIC_BACKLOG = 60.0  # seconds that a microphone may be ahead of the model
PIPE_BACKLOG = 20  # pieces that are read ahead of the model; then the pipe's writer waits


def read_pcm(source: BinaryIO, seconds: float) -> Iterator[np.ndarray]:
    """s16le 16 kHz mono from a pipe -> float samples, up to `seconds` of them at once, as they come."""
    rest = b""
    read = getattr(source, "read1", source.read)
    while data := read(round(seconds * SAMPLE_RATE) * 2):
        data = rest + data
        even = len(data) // 2 * 2
        rest = data[even:]
        if even:
            yield pcm_samples(data[:even])


def pcm_samples(data: bytes) -> np.ndarray:
    return from_int16(np.frombuffer(data, "<i2"))


def read_ahead(pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same samples, read by a thread: each time as many as have come."""
    waiting: queue.Queue[np.ndarray | Exception | None] = queue.Queue(PIPE_BACKLOG)

    def read() -> None:
        end = None
        try:
            for piece in pieces:
                waiting.put(piece)
        except Exception as error:  # it belongs to the one who takes
            end = error
        waiting.put(end)

    threading.Thread(target=read, daemon=True).start()
    while True:
        taken = [waiting.get()]
        while not waiting.empty():
            taken.append(waiting.get())
        if samples := [piece for piece in taken if isinstance(piece, np.ndarray)]:
            yield np.concatenate(samples)
        if isinstance(taken[-1], Exception):
            raise taken[-1]
        if taken[-1] is None:
            return


def read_microphone(device: str | None = None) -> Iterator[np.ndarray]:
    """Samples of the microphone, as many as there are each time, until Ctrl-C. AudioError where there is none."""
    try:
        import sounddevice
    except (ImportError, OSError) as e:  # OSError: PortAudio itself is missing
        raise OptionError(
            f"the microphone needs sounddevice and PortAudio ({e}): pip install 'dawhisper[stream]', on Linux also "
            "apt-get install libportaudio2; or pipe s16le 16 kHz mono samples in and give --input -"
        ) from None
    return _record(sounddevice, device)


def _record(sounddevice: Any, device: str | None) -> Iterator[np.ndarray]:
    pieces: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    ended = threading.Event()
    error: str | None = "the microphone has stopped; is it still plugged in?"

    def heard(data: np.ndarray, *_: Any) -> None:  # in a thread of PortAudio's
        nonlocal error
        if pieces.qsize() >= MIC_BACKLOG / MIC_PIECE:
            error = f"the model is {MIC_BACKLOG:g} s behind the microphone; use a smaller model or a longer --step"
            raise sounddevice.CallbackAbort
        pieces.put(data[:, 0].copy())

    def end() -> None:
        ended.set()
        pieces.put(np.zeros(0, np.float32))  # wakes who waits

    def interrupted(*_: Any) -> None:  # what was said before Ctrl-C still becomes text; a second one interrupts that
        nonlocal error
        error = None
        signal.signal(signal.SIGINT, before)
        end()

    def start() -> Any:
        try:
            opened = sounddevice.InputStream(
                SAMPLE_RATE,
                round(MIC_PIECE * SAMPLE_RATE),
                int(device) if device and device.isdigit() else device,
                channels=1,
                callback=heard,
                finished_callback=end,
            )
            opened.start()
        except (sounddevice.PortAudioError, ValueError) as e:
            raise AudioError(f"can't record from the microphone: {e}; name another with --input_device") from None
        return opened

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        with contextlib.closing(start()):
            while not (ended.is_set() and pieces.empty()):
                taken = [pieces.get()]
                while not pieces.empty():
                    taken.append(pieces.get())
                yield np.concatenate(taken)
    finally:
        signal.signal(signal.SIGINT, before)
    if error:
        raise AudioError(error)
