"""benchmarks/wer_figure.py: the README's picture is drawn of the committed results."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from dawhisper.evaluation.conditions import Condition
from dawhisper.evaluation.figures import wer_figure

pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_row_for_each_group_and_a_panel_for_each_kind() -> None:
    groups = runpy.run_path(str(ROOT / "benchmarks" / "wer_figure.py"))["read"](
        ROOT / "docs" / "log" / "2026-12-01-h200-transcripts.csv"
    )
    chosen = {name: groups[name] for name in ("all 376 clips", "LibriSpeech and VCTK, 171 clips")}
    panels = wer_figure(chosen).axes
    assert [axes.get_title() for axes in panels] == ["real noise", "babble noise", "white noise"] * 2
    for panel, models in ((panels[0], chosen["all 376 clips"]), (panels[3], chosen["LibriSpeech and VCTK, 171 clips"])):
        for line, (model, wers) in zip(panel.containers, models.items()):
            assert line.get_label() == model
            drawn = line.lines[0].get_ydata()
            assert list(drawn) == [wers[Condition("real", snr)].value for snr in (-5.0, 0.0, 5.0, 10.0, 20.0)]
