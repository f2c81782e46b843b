"""`dawhisper` and the project's scripts as they are called on the command line, but in this process."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from unittest import mock

from dawhisper.cli import main

# a random model is unsure of everything: don't let it fall back or call it silence
SURE = ["--logprob_threshold", "None", "--no_speech_threshold", "None", "--compression_ratio_threshold", "None"]
QUICK = [*SURE, "--beam_size", "None", "--language", "en", "--device", "cpu"]


def error_lines(err: str) -> list[str]:
    """Those of standard error's lines that tell of an error."""
    return [line for line in err.splitlines() if line.startswith("dawhisper: error:")]


def run_script(path: Path, *args: object) -> int:
    """Run a Python file as a program; returns its exit code."""
    with mock.patch.object(sys, "argv", [str(path), *(str(a) for a in args)]):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def run(*args: object) -> int:
    try:
        return main([str(a) for a in args])
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)
