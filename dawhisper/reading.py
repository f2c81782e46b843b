"""What a recording holds, read in this process or in others, a long one by several of them at once.

Threads share Python's lock, which a codec's many small packets hold for much of the time, and which the model needs to
keep a GPU busy. A reading process has a lock of its own, and where a damaged file ends it, the file alone is lost.

Each of a long recording's spans is decoded from shortly before it on, and begins with what the span before it ends
with. Where that is not the same to the last bit (the format can't be sought exactly, or decoding draws random numbers),
and where there is anything to be said of a span, the rest of the recording is read in one piece.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from typing import Any

import numpy as np
import torch
from whisper.audio import HOP_LENGTH

from .audio import SAMPLE_RATE, SampleReader, Source
from .errors import AudioError, DawhisperError, unforeseen
from .media import sought_length
from .vad import BLOCK, SILENCE, Block, Chunk, Skip, VadOptions, cut, detector, judged

PROCESS = "from dawhisper.reading import answer; answer()"
SPAN = 10 * BLOCK  # samples, 320 s
SETTLED = 8.0  # seconds after which a decoder gives the same, wherever it began
LONG = 4 * SPAN / SAMPLE_RATE  # seconds from which on processes are worth starting for one recording
PIPE = 1 << 20  # bytes that a pipe holds
LONG_BYTES = 2_000_000  # a file of fewer is hardly that long, and not looked at


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
                blocks = judged(reader, None if last is None else last * HOP_LENGTH)
                yield from cut(blocks, reader.position, self.drop_silence, self.vad)

    def length(self) -> float | None:
        """Seconds of a long recording of which spans may be read; None of others."""
        return long_seconds(self.source) if len(self.clips) == 1 and self.clips[0][0] == 0 else None


@dataclass(frozen=True)
class Span:
    """A part of a recording, from sample `first`, where a block begins, to before `end`; None is the recording's end.

    sought: little before it is decoded, and it is said what was odd in it; otherwise all is.
    """

    source: Source
    track: int | None
    first: int
    end: int | None
    sought: bool

    def pieces(self) -> Iterator[Block]:
        """Its blocks, behind the one before them, which is not judged. Nothing where it can't be sought."""
        before = max(self.first - BLOCK, 0)
        start = max(before / SAMPLE_RATE - SETTLED, 0.0) if self.sought else 0.0
        with closing(SampleReader(self.source, track=self.track, start=start)) as reader:
            if start and not 0 < reader.position <= before:
                return
            reader.skip_to(before)
            overlap = reader.read(self.first - before)
            if self.first:
                yield Block(overlap, SILENCE)
            yield from judged(reader, self.end, overlap)
            if self.sought:
                reader.warn()


@dataclass(frozen=True)
class Warned:
    """A warning of the reading process, to be repeated here."""

    message: str
    category: type[Warning]


class ReadingProcess:
    """A process that reads files. It takes seconds to start.

    It is started as a program and not by multiprocessing, which would run a caller's script a second time.
    """

    def __init__(self) -> None:
        self.usable = bool(sys.executable)  # a program that Python is built into may have none
        self.process: subprocess.Popen[bytes] | None = None
        self.ready: Future[Any] | None = None

    def start(self) -> None:
        """Where it has not been started and can be."""
        if self.process is not None or not self.usable:
            return
        command = [sys.executable, "-c", PROCESS]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.curdir for entry in sys.path)}
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        widen(self.process.stdout)
        pool = ThreadPoolExecutor(1)
        self.ready = pool.submit(pickle.load, self.process.stdout)  # type: ignore[arg-type]
        pool.shutdown(wait=False)

    def takes(self, asked: Reading | Span, wait: bool = False) -> bool:
        """Ask for a recording or a span; False where the process can't read, or without `wait` is not ready to."""
        if self.process is None or self.ready is None or not (wait or self.ready.done()):
            return False
        try:
            self.ready.result()
            pickle.dump(asked, self.process.stdin)  # type: ignore[arg-type]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # it could not start, or was killed
            self.usable = False
            self.close()
        return self.usable

    def answers(self) -> Generator[Any, None, None]:
        """The pieces of what was asked for, and what was `Warned` of. AudioError too where the process dies of it."""
        process = self.process
        assert process is not None
        try:
            while (answer := pickle.load(process.stdout)) is not None:  # type: ignore[arg-type]
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        except (EOFError, pickle.UnpicklingError):
            code = process.wait()
            self.close()
            raise AudioError(f"the process that read it ended with code {code}; is the file damaged?") from None
        except GeneratorExit:
            self.close()  # what it would still say of this recording is no answer to the next
            raise

    def stop(self) -> None:
        """End it, and what is being read of it."""
        self.usable = False
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.process = self.ready = None


class Readers:
    """`count` reading processes for up to `at_once` recordings at once; those that none needs read spans of long ones.

    They are started when there are more recordings than that, or for a long one; until then, and for what is no file,
    this process reads.
    """

    def __init__(self, count: int, at_once: int | None = None) -> None:
        self.count, self.at_once = count, min(at_once or count, count)
        self.lock, self.closed = Lock(), False
        self.asked = self.long = 0  # recordings so far, and those that are read in spans now
        self.processes = [ReadingProcess() for _ in range(count)]
        self.idle: LifoQueue[ReadingProcess] = LifoQueue()
        for process in self.processes:
            self.idle.put(process)
        self.threads = ThreadPoolExecutor(count)

    def expect(self, sources: Sequence[Source]) -> None:
        """Start those that will be needed for these, while there is something else to do."""
        if len(sources) > self.at_once or any(long_seconds(source) is not None for source in sources):
            for process in self.processes:
                process.start()

    def pieces(self, reading: Reading) -> Iterator[Chunk | Skip]:
        """As `reading.pieces()`; AudioError too where a process dies of it."""
        self.asked += 1
        seconds = reading.length()
        if seconds is None:
            yield from self.read(reading)
            return
        ((_, last),) = reading.clips
        whole = Span(reading.source, reading.track, 0, None if last is None else last * HOP_LENGTH, sought=False)
        with self.lock:
            self.long += 1
        try:
            with closing(self.blocks(whole, seconds)) as blocks:
                yield from cut(blocks, 0, reading.drop_silence, reading.vad)
        finally:
            with self.lock:
                self.long -= 1

    def read(self, asked: Reading | Span) -> Iterator[Any]:
        """The pieces of a recording or a span, from a process that is ready, or read here."""
        process = self.idle.get()
        try:
            is_file = isinstance(asked.source, (str, os.PathLike, bytes))
            if is_file and self.asked > self.at_once:
                process.start()
            if is_file and process.takes(asked):
                for answer in process.answers():
                    if isinstance(answer, Warned):
                        warnings.warn(answer.message, answer.category, stacklevel=2)
                    else:
                        yield answer
            else:
                yield from asked.pieces()
        finally:
            self.idle.put(process)

    def blocks(self, whole: Span, seconds: float) -> Generator[Block, None, None]:
        """The blocks of a recording of about so many seconds: those of its spans, and from the first span on that is
        not believed those of the rest."""
        known, last = 0, SILENCE  # samples, and the last block of them
        spans = spans_of(whole, round(seconds * SAMPLE_RATE))
        coming: deque[tuple[Span, Future[list[Block] | None]]] = deque()
        try:
            while spans or coming:
                while spans and len(coming) < max(2 * self.count // self.long, 1):
                    coming.append((spans[0], self.threads.submit(self.span, spans.popleft())))
                span, future = coming.popleft()
                blocks = following(last, future.result())
                if blocks is None:
                    break
                yield from blocks
                known, last = known + sum(len(block.samples) for block in blocks), blocks[-1].samples
                if known != span.end or known == whole.end:
                    return
        finally:
            for _, future in coming:
                future.cancel()
        if not self.closed:
            rest = self.read(replace(whole, first=known))
            if known:
                next(rest)  # the last block again
            yield from rest

    def span(self, span: Span) -> list[Block] | None:
        """What a process gives of a span; None where it can't be read, or something is to be said of it."""
        process = self.idle.get()
        try:
            process.start()
            answers = list(process.answers()) if process.takes(span, wait=True) else None
        except Exception:  # reading the rest will say so
            return None
        finally:
            self.idle.put(process)
        return None if answers is None or any(isinstance(answer, Warned) for answer in answers) else answers

    def close(self) -> None:
        self.closed = True
        for process in self.processes:
            process.stop()
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.close()


def spans_of(whole: Span, length: int) -> deque[Span]:
    """A recording of about `length` samples in spans; the last may take more, since some are longer than they say."""
    end = length if whole.end is None else whole.end
    firsts = range(0, max(end - SPAN, 0) + 1, SPAN)
    ends = [*firsts[1:], whole.end or end + SPAN]
    return deque(replace(whole, first=first, end=last, sought=True) for first, last in zip(firsts, ends))


def following(last: np.ndarray, blocks: list[Block] | None) -> list[Block] | None:
    """A span's blocks, where it begins with the last samples before it; None where not, or where these tell nothing."""
    if blocks is None or not len(last):
        return blocks or None
    same = len(blocks) > 1 and np.ptp(last) > 0 and np.array_equal(blocks[0].samples, last)
    return blocks[1:] if same else None


def widen(pipe: Any) -> None:
    """Let a pipe hold more than 64 KiB, where the system can: after each part that it reads a thread waits for Python's
    lock, for 5 ms beside a busy one."""
    with suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE)


def long_seconds(source: Source) -> float | None:
    """Seconds of a file on this machine of which spans may be read; None of what is none, or not long."""
    try:
        if not isinstance(source, (str, os.PathLike)) or Path(source).stat().st_size < LONG_BYTES:
            return None
    except (OSError, ValueError):
        return None
    seconds = sought_length(f"file:{os.fsdecode(source)}")
    return seconds if seconds is not None and seconds >= LONG else None


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
