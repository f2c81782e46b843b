"""Text on the user's terminal, whatever letters that knows."""

from __future__ import annotations

import sys
import warnings
from typing import Any


def show(text: str) -> None:
    """Print a line; letters that the terminal lacks become question marks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def forgive_letters() -> None:
    """Let all that is printed, help and errors too, go to a terminal that lacks some letters."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def warn_in_one_line() -> None:
    """Let warnings say what they say, without the place in the code."""
    warnings.showwarning = _one_line


def _one_line(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"dawhisper: warning: {message}", file=sys.stderr)
