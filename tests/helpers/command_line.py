"""`dawhisper` as it is called on the command line."""

from __future__ import annotations

from dawhisper.cli import main

# a random model is unsure of everything: don't let it fall back or call it silence
SURE = ["--logprob_threshold", "None", "--no_speech_threshold", "None", "--compression_ratio_threshold", "None"]
QUICK = [*SURE, "--beam_size", "None", "--language", "en", "--device", "cpu"]


def error_lines(err: str) -> list[str]:
    """Those of standard error's lines that tell of an error."""
    return [line for line in err.splitlines() if line.startswith("dawhisper: error:")]


def run(*args: object) -> int:
    try:
        return main([str(a) for a in args])
    except SystemExit as stop:  # argparse
        return int(stop.code or 0)
