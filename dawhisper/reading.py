"""What a recording holds, read in this process or in one of its own.

Threads share Python's lock, which a codec's many small packets hold for much of the time, and which the model needs to
keep a GPU busy. A reading process has a lock of its own, and where a damaged file ends it, the file alone is lost.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import torch
from whisper.audio import HOP_LENGTH

from .audio import SampleReader, Source
from .errors import AudioError, DawhisperError, unforeseen
from .vad import Chunk, Skip, VadOptions, cut, detector

PROCESS = "from dawhisper.reading import answer; answer()"


@dataclass(frozen=True)
class Reading:
    """What is to be read of a recording. clips: first and last spectrogram frame of each part, None being its end."""

    source: Source
    track: int | None
    clips: list[tuple[int, int | None]]
    drop_silence: bool
    vad: VadOptions

    def pieces(self) -> Iterator[Chunk | Skip]:
        """The clips, cut into windows. Raises AudioError where load_audio would."""
        with closing(SampleReader(self.source, track=self.track)) as reader:
            for first, last in self.clips:
                reader.skip_to(first * HOP_LENGTH)
                yield from cut(reader, None if last is None else last * HOP_LENGTH, self.drop_silence, self.vad)


@dataclass(frozen=True)
class Warned:
    """A warning of the reading process, to be repeated here."""

    message: str
    category: type[Warning]


class ReadingProcess:
    """A process that reads files. It takes seconds to start: from the second recording on it is, and until then, and
    for what is no file, this process reads.

    It is started as a program and not by multiprocessing, which would run a caller's script a second time.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.usable = bool(sys.executable)  # a program that Python is built into may have none
        self.process: subprocess.Popen[bytes] | None = None
        self.ready: Future[Any] | None = None

    def pieces(self, reading: Reading) -> Generator[Chunk | Skip, None, None]:
        """As `reading.pieces()`; AudioError too where the process dies of it."""
        self.asked += 1
        if self.asked > 1 and self.usable and self.process is None:
            self.start()
        if isinstance(reading.source, (str, os.PathLike, bytes)) and self.takes(reading):
            yield from self.answers()
        else:
            yield from reading.pieces()

    def start(self) -> None:
        command = [sys.executable, "-c", PROCESS]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.curdir for entry in sys.path)}
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        pool = ThreadPoolExecutor(1)
        self.ready = pool.submit(pickle.load, self.process.stdout)  # type: ignore[arg-type]
        pool.shutdown(wait=False)

    def takes(self, reading: Reading) -> bool:
        """Ask for a recording; False where the process is not ready for it."""
        if self.process is None or self.ready is None or not self.ready.done():
            return False
        try:
            self.ready.result()
            pickle.dump(reading, self.process.stdin)  # type: ignore[arg-type]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # it could not start, or was killed
            self.usable = False
            self.close()
        return self.usable

    def answers(self) -> Generator[Chunk | Skip, None, None]:
        """The pieces of the recording that was asked for."""
        process = self.process
        assert process is not None
        try:
            while (answer := pickle.load(process.stdout)) is not None:  # type: ignore[arg-type]
                if isinstance(answer, Exception):
                    raise answer
                if isinstance(answer, Warned):
                    warnings.warn(answer.message, answer.category, stacklevel=2)
                else:
                    yield answer
        except (EOFError, pickle.UnpicklingError):
            code = process.wait()
            self.close()
            raise AudioError(f"the process that read it ended with code {code}; is the file damaged?") from None
        except GeneratorExit:
            self.close()  # what it would still say of this recording is no answer to the next
            raise

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.process = self.ready = None


def answer() -> None:
    """In the process: read what standard input asks for, and write its pieces, then None, to standard output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    torch.set_num_threads(1)
    detector()

    def say(message: Any) -> None:
        pickle.dump(message, answers)
        answers.flush()

    def repeat(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        say(Warned(str(message), category))

    warnings.simplefilter("always")
    warnings.showwarning = repeat  # type: ignore[assignment]
    with suppress(EOFError, BrokenPipeError):  # the main process has gone
        say(None)
        while True:
            reading = pickle.load(sys.stdin.buffer)
            try:
                for piece in reading.pieces():
                    say(piece)
                say(None)
            except (DawhisperError, OSError) as error:
                say(error)
            except Exception as error:
                say(AudioError(unforeseen(error)))
