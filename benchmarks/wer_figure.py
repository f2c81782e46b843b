"""The picture of word errors over SNR that `dawhisper evaluate` draws, of a results.csv that it wrote.

    python benchmarks/wer_figure.py docs/log/2026-11-30-h200-strangers.csv --out assets/wer.png

Each group of utterances in the file (or those of --groups) is a row of panels.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from dawhisper.evaluation.conditions import Condition
from dawhisper.evaluation.figures import Wers, wer_figure
from dawhisper.evaluation.metrics import Interval


def read(path: Path) -> dict[str, dict[str, Wers]]:
    """Group -> model -> word error rates of clean and noisy speech."""
    found: dict[str, dict[str, dict[Condition, Interval]]] = {}
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            condition = Condition(row["kind"], float(row["snr"]) if row["snr"] else None)
            if condition.noisy or condition.kind == "clean":
                wer = Interval(*(float(row[column] or "nan") for column in ("wer", "wer_low", "wer_high")))
                found.setdefault(row["group"], {}).setdefault(row["model"], {})[condition] = wer
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--groups", nargs="+", help="rows of the picture; all of the file's by default")
    parser.add_argument("--out", type=Path, default=Path("wer.png"))
    arguments = parser.parse_args()
    groups = read(arguments.results)
    wer_figure({name: groups[name] for name in arguments.groups or groups}).savefig(arguments.out, dpi=110)
