"""Errors a user can act on: one line each, saying what is wrong and what to do about it.

The command line prints the message alone and exits with code 1; of any other exception, which is a bug, it prints one
line too, and the traceback where DAWHISPER_TRACEBACK is set.
"""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable

TRACEBACK_VARIABLE = "DAWHISPER_TRACEBACK"


class DawhisperError(Exception):
    """Base of every error that bad input can cause."""


class AudioError(DawhisperError):
    """A recording that cannot be opened, decoded or used."""


class CheckpointError(DawhisperError):
    """A model name, checkpoint file or folder that cannot be found, read or used."""


class OptionError(DawhisperError, ValueError):
    """An option whose value is unknown, out of range, or at odds with another one."""


class DataError(DawhisperError):
    """A manifest, shard or training item that cannot be used."""


def unforeseen(error: Exception, where: str = "") -> str:
    """One line about an error that no code expected; its traceback is printed where that was asked for."""
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)
    what = " ".join(f"{type(error).__name__}: {error}".split())
    where = f"{where}: " if where else ""
    return f"{where}unexpected {what}; this is a bug in dawhisper, and {TRACEBACK_VARIABLE}=1 shows where"


def near_names(name: str, known: Iterable[str]) -> str:
    """What to append to an "unknown name" message: "; did you mean a, b?", or nothing when no known name is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(near)}?" if near else ""


def one_line(error: object) -> str:
    """An error's text as one short line."""
    text = " ".join(str(error).split())
    text = text or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
