"""A function of many items, in several processes."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dawhisper.errors import DataError

AHEAD = 2  # chunks for each process
T = TypeVar("T")
R = TypeVar("R")


def in_processes(
    function: Callable[[T], R], items: Sequence[T], workers: int | None = None, chunk: int = 16
) -> Iterator[R]:
    """function(item) for each item, in order; in processes where there is more than one `chunk`, which each takes.

    The processes work ahead of what is asked for, AHEAD chunks each, so that results don't pile up. Leaving early
    (Ctrl-C) stops them. DataError where one of them dies.
    (Not in threads: an Opus file has a frame every 20 ms, each one takes the interpreter's lock, and sixteen threads
    that decode so are slower than one.)
    """
    workers = min(workers or os.cpu_count() or 1, -(-len(items) // chunk))
    if workers < 2:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, initializer=start_process) as pool:
        coming: deque[Future[list[R]]] = deque()
        try:
            for start in range(0, len(items), chunk):
                coming.append(pool.submit(_each, function, items[start : start + chunk]))
                if len(coming) > AHEAD * workers:
                    yield from coming.popleft().result()
            while coming:
                yield from coming.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process died (out of memory?): run again with fewer workers; what is done is kept"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _each(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [function(item) for item in items]


def start_process() -> None:
    """Ctrl-C is the main process's affair; damaged files go to the report instead of the terminal.

    Where the main process is killed, nobody tells its workers: they look for themselves, and end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
