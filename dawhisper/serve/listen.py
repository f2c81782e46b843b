"""`dawhisper stream`: words on the terminal as they become final, whole lines or JSON to a pipe or a file."""

from __future__ import annotations

import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TextIO

import torch

from dawhisper.audio import SAMPLE_RATE
from dawhisper.checkpoint import MODEL_HELP, OWN_MODEL, load_model
from dawhisper.device import DEVICE_HELP, DTYPE_HELP, DTYPE_NAMES, THREADS_HELP
from dawhisper.errors import OptionError
from dawhisper.options import option
from dawhisper.transcribe_files import usable_language
from dawhisper.transcription import printable

from .sources import read_ahead, read_microphone, read_pcm
from .stream import Stream, StreamOptions, Update, as_dict, warm_up

BEHIND = 5.0  # seconds of sound that wait, from which on it is said
ERASE, DIM, PLAIN = "\x1b[K", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class ListenOptions(StreamOptions):
    """What `dawhisper stream` hears, with which model, and how it tells."""

    source: str = option("mic", "mic, or - for standard input", name="input")
    input_device: str | None = option(None, "which microphone: number or name; the system's by default")
    model: str = option(OWN_MODEL, MODEL_HELP)
    device: str | None = option(None, DEVICE_HELP)
    dtype: str = option("auto", DTYPE_HELP, choices=DTYPE_NAMES)
    threads: int = option(0, THREADS_HELP)
    as_json: bool = option(False, "a JSON object for each update: words, segments", name="json", flag=True)


def stream(options: ListenOptions) -> None:
    """Print what is heard until the source ends or on Ctrl-C."""
    if options.threads:
        torch.set_num_threads(options.threads)
    source = options.source
    if source not in ("-", "mic"):
        raise OptionError(f"--input is mic or - (standard input), not {source!r}; for files: dawhisper transcribe")
    pipe = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)  # a thread that waits in a buffer would outlive the end
    pieces = read_microphone(options.input_device) if source == "mic" else read_ahead(read_pcm(pipe, options.step))
    model = load_model(options.model, options.device, options.dtype)
    heard = Stream(model, replace(options, language=usable_language(model, options.model, options.language)))
    warm_up(model)
    where = "the microphone" if source == "mic" else "standard input"
    print(f"Loaded {options.model}; listening to {where}. Ctrl-C ends it.", file=sys.stderr, flush=True)
    show = printer(sys.stdout, options.as_json)
    behind = False
    try:
        for piece in pieces:
            if len(piece) > BEHIND * SAMPLE_RATE and not behind:
                behind = True
                print(f"Sound comes faster than it is decoded: {len(piece) / SAMPLE_RATE:.0f} s wait.", file=sys.stderr)
            show(heard.feed(piece))
    except KeyboardInterrupt:
        pass
    finally:  # a microphone that fails takes no words with it
        show(heard.finish())


def printer(out: TextIO, as_json: bool) -> Callable[[Update], None]:
    if as_json:
        return lambda update: print_json(update, out)
    if out.isatty() and os.environ.get("TERM") != "dumb":
        return Terminal(out).show
    return lambda update: print_lines(update, out)


def print_json(update: Update, out: TextIO) -> None:
    if update.words or update.segments or update.end_of_turn:
        print(json.dumps(as_dict(update), ensure_ascii=False), file=out, flush=True)


def print_lines(update: Update, out: TextIO) -> None:
    for segment in update.segments:
        print(printable(segment), file=out, flush=True)


class Terminal:
    """Final words stay; the pending ones stand dimmed behind them, in the same row, until the next update.

    A segment is a line, which the terminal's rows are filled with.
    """

    def __init__(self, out: TextIO, columns: int | None = None):
        self.out, self.columns = out, columns
        self.at = 0  # column
        self.printed = 0  # words of the open segment

    def show(self, update: Update) -> None:
        made = [ERASE]
        words = update.words
        for segment in update.segments:
            new = list(segment.words or [])[self.printed :]
            made += [self._placed(word.word) for word in new] + ["\n"]
            words = words[len(new) :]
            self.at = self.printed = 0
        made += [self._placed(word.word) for word in words]
        self.printed += len(words)
        pending = fitting(update.pending if self.at else update.pending.lstrip(), self._width() - self.at - 1)
        if pending:
            made.append(f"{DIM}{pending}{PLAIN}\x1b[{width(pending)}D")
        self.out.write("".join(made))
        self.out.flush()

    def _width(self) -> int:
        return self.columns or shutil.get_terminal_size().columns

    def _placed(self, word: str) -> str:
        """The word, in the next row where this one is full."""
        if self.at and self.at + width(word) > self._width() - 1:
            self.at = 0
            return "\n" + self._placed(word)
        word = word if self.at else word.lstrip()
        self.at += width(word)
        return word


def width(text: str) -> int:
    """Columns that the text takes on a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fitting(text: str, columns: int) -> str:
    """The text's beginning that fits."""
    while width(text) > columns:
        text = text[:-1]
    return text
