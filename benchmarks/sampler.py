"""Where a thread's time goes: its stack is looked at a few hundred times a second, by another thread.

What is seen counts for as long as the last look was ago: a call that keeps Python's lock keeps the sampler waiting too.
Unlike a profiler it costs the thread hardly anything, and a wait for a GPU shows as the line that waits.
"""

from __future__ import annotations

import linecache
import sys
import time
from collections import Counter
from pathlib import Path
from threading import Event, Thread, get_ident

EVERY = 0.003  # seconds


class Sampler:
    """Seconds of the thread that makes it, from `start` to `stop`, by function and by line of one package.

    functions: with what they call, once where they call themselves. lines: with what they call outside the package.
    """

    def __init__(self, package: Path):
        self.package, self.thread = str(package), get_ident()
        self.functions, self.lines = Counter[str](), Counter[str]()
        self.seconds = 0.0
        self.done = Event()
        self.watch = Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self.watch.start()

    def stop(self) -> None:
        self.done.set()
        self.watch.join()

    def table(self, least: float = 0.005) -> str:
        """Both as Markdown, the longest first, those of at least this share of the time."""
        rows = [f"\n{self.seconds:.1f} s of the model's own thread"]
        for name, counted in (("function, with what it calls", self.functions), ("line", self.lines)):
            rows += [f"\n| seconds | share | {name} |", "|---|---|---|"]
            kept = [(what, took) for what, took in counted.most_common() if took >= least * self.seconds]
            rows += [f"| {took:.2f} | {100 * took / self.seconds:.1f}% | {what} |" for what, took in kept]
        return "\n".join(rows)

    def _watch(self) -> None:
        before = time.perf_counter()
        while not self.done.wait(EVERY):
            frame = sys._current_frames().get(self.thread)
            now = time.perf_counter()
            took, before = now - before, now
            self.seconds += took
            stack = []
            while frame is not None:
                if frame.f_code.co_filename.startswith(self.package):
                    stack.append((Path(frame.f_code.co_filename), frame.f_lineno, frame.f_code.co_name))
                frame = frame.f_back
            self.functions.update(dict.fromkeys((f"{path.stem}.{name}" for path, _, name in stack), took))
            if stack:
                path, number, _ = stack[0]
                line = linecache.getline(str(path), number).strip()
                self.lines[f"{path.stem}:{number} `{line.replace('|', '/')}`"] += took
