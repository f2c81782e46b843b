"""Recordings shared out among devices, a process for each, as they are done. A process that dies loses its file alone.

A process asks for a recording when it has room for one, so a slow device gets fewer. Where one dies that had begun
several, each of these is tried again alone, and only the one with which a process dies again is given up.
"""

from __future__ import annotations

import signal
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from threading import Lock
from typing import Any, Protocol

from dawhisper.console import forgive_letters, warn_in_one_line
from dawhisper.errors import DawhisperError, OptionError, unforeseen
from dawhisper.reading import Readers

from .inputs import Input
from .outcomes import Outcome


class Work(Protocol):
    """What a process does; it is sent to it."""

    def load(self, device: str) -> Any:
        """The model, once."""

    def run(self, model: Any, inputs: Iterator[Input], readers: Readers) -> Iterator[Outcome]:
        """What becomes of each, in any order."""


@dataclass(frozen=True)
class Unusable:
    """A device whose process could not begin, and why."""

    why: str


@dataclass(eq=False)
class Worker:
    """A device's process: what it was given and has not answered yet."""

    device: str
    process: BaseProcess
    pipe: Connection
    held: dict[str, Input] = field(default_factory=dict)  # by the name of their outputs
    alone: bool = False  # what it holds is not to be joined by others
    has_begun: bool = False


def share(work: Work, devices: Sequence[str], inputs: Sequence[Input], readers: int) -> Iterator[Outcome]:
    """What becomes of each recording, as it is known; each device has so many processes that read.

    Raises OptionError where no device can be used.
    """
    waiting, suspects = deque(inputs), deque[Input]()
    at_once = max(1, min(readers, len(inputs) // len(devices)))  # a process must not hold what another could do
    workers = [start(work, device, readers, at_once) for device in devices]
    why = ""
    try:
        while workers:
            pipes = {worker.pipe: worker for worker in workers}
            for pipe in wait(list(pipes)):
                worker = pipes[pipe]  # type: ignore[index]
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    workers.remove(worker)
                    worker.process.join()
                    lost, again = buried(worker)
                    suspects += again
                    yield from lost
                    if not worker.has_begun:
                        why = why or f"the process of {worker.device} died while it loaded the model (out of memory?)"
                    elif waiting or suspects:
                        workers.append(start(work, worker.device, readers, at_once))
                    continue
                if isinstance(message, Outcome):
                    del worker.held[message.item.output]
                    yield message
                elif isinstance(message, Unusable):
                    why = message.why
                    warnings.warn(f"{worker.device} is left out: {message.why}", stacklevel=2)
                else:
                    worker.has_begun = True
                    with suppress(OSError):  # it has died since, which shows at the next look
                        worker.pipe.send(next_for(worker, waiting, suspects))
        if waiting or suspects:
            raise OptionError(why or "every process died")
    finally:
        for worker in workers:
            worker.process.terminate()


def next_for(worker: Worker, waiting: deque[Input], suspects: deque[Input]) -> Input | None:
    """What it is to do next; None lets it finish what it holds, and then ask again or, holding nothing, end."""
    worker.alone = worker.alone and bool(worker.held)
    if worker.alone:
        return None
    if waiting:
        item = waiting.popleft()
    elif suspects and not worker.held:
        item, worker.alone = suspects.popleft(), True
    else:
        return None
    worker.held[item.output] = item
    return item


def buried(worker: Worker) -> tuple[list[Outcome], list[Input]]:
    """What is lost with a process that has died, and what is to be tried again."""
    held = list(worker.held.values())
    if len(held) > 1:
        return [], held
    code = worker.process.exitcode or 0
    how = f"by signal {-code}" if code < 0 else f"with code {code}"
    why = f"the process that transcribed it died {how}; if memory ran out, lower --batch_size"
    return [Outcome(item, error=f"{item.label}: {why}") for item in held], []


# ---- in the process -----------------------------------------------------------------------------------------------


def start(work: Work, device: str, readers: int, at_once: int) -> Worker:
    context = get_context("spawn")  # a forked process can't use a GPU
    here, there = context.Pipe()
    process = context.Process(target=work_through, args=(work, device, readers, at_once, there), daemon=True)
    process.start()
    there.close()  # so that its end shows here
    return Worker(device, process, here)


def work_through(work: Work, device: str, readers: int, at_once: int, pipe: Connection) -> None:
    """Ask for recordings and answer what became of them, until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's affair
    forgive_letters()
    warn_in_one_line()
    lock = Lock()  # recordings are asked for by the threads that read them

    def send(message: Any) -> None:
        with lock:
            pipe.send(message)

    def ask() -> Input | None:
        send(None)
        return pipe.recv()

    try:
        model = work.load(device)
        with closing(Readers(readers, at_once)) as reading:
            while (first := ask()) is not None:
                for outcome in work.run(model, chain([first], iter(ask, None)), reading):
                    send(outcome)
    except (EOFError, BrokenPipeError):  # the main process has gone
        return
    except DawhisperError as error:
        send(Unusable(str(error)))
    except Exception as error:
        send(Unusable(unforeseen(error, device)))
