"""The results of an evaluation as pictures: word errors and the gate over SNR, each as PNG, PDF and SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .conditions import Condition
from .gates import GateSummary, over_layers
from .metrics import Interval

if TYPE_CHECKING:
    from .tables import Results

Wers = Mapping[Condition, Interval]  # a model's word error rate under each condition, in percent
FORMATS = ("png", "pdf", "svg")
MARKERS = "os^Dv*"


def draw_results(results: Results, folder: Path) -> list[str]:
    """wer: word errors over SNR (`wer_figure`); gate_MODEL: the gate over SNR. Returns notes for the user."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ["no plots: matplotlib is not installed (pip install 'dawhisper[plot]')"]
    spoken = [c for c in results.conditions if c.kind == "clean" or c.noisy]
    if any(c.noisy for c in spoken):
        wers = {model: {c: results.score(model, c.name).wer for c in spoken} for model in results.models}
        save(wer_figure({"": wers}), folder / "wer")
    for summary in results.gates:
        name = "".join(x if x.isalnum() or x in "-_." else "_" for x in summary.model)
        figure = Figure(figsize=(6, 4), layout="constrained")
        _gate_lines(results, summary, figure.subplots())
        save(figure, folder / f"gate_{name}")
    return []


def save(figure: Any, path: Path) -> None:
    """In each format, under the path with its ending."""
    for name in FORMATS:
        figure.savefig(path.with_name(f"{path.name}.{name}"), dpi=150)


def wer_figure(groups: Mapping[str, Mapping[str, Wers]]) -> Any:
    """A matplotlib Figure with a row for each group of utterances and a panel for each kind of noise.

    groups: title -> model -> its word error rates in percent, of noisy conditions and of clean speech.
    """
    from matplotlib.figure import Figure

    kinds = list(
        dict.fromkeys(c.kind for models in groups.values() for wers in models.values() for c in wers if c.noisy)
    )
    figure = Figure(figsize=(3.6 * len(kinds) + 0.4, 3.0 * len(groups) + 0.6), layout="constrained")
    panels = figure.subplots(len(groups), len(kinds), squeeze=False)
    for row, (title, models) in zip(panels, groups.items()):
        for axes, kind in zip(row, kinds):
            _wer_lines(models, kind, axes)
            axes.set_title(f"{kind} noise", fontsize=10)
        row[0].set_ylabel(f"{title}\nWER (%)" if title else "WER (%)")
    for axes in panels[-1]:
        axes.set_xlabel("SNR (dB), dotted: clean speech")
    panels[0, 0].legend(loc="upper left", fontsize=9)
    return figure


def _wer_lines(models: Mapping[str, Wers], kind: str, axes: Any) -> None:
    """A line for each model with its intervals; a point for each SNR that was measured, at that SNR."""
    for i, (model, wers) in enumerate(models.items()):
        places = sorted((c.snr, wer) for c, wer in wers.items() if c.kind == kind and c.snr is not None)
        below = [0 if math.isnan(w.low) else w.value - w.low for _, w in places]
        above = [0 if math.isnan(w.high) else w.high - w.value for _, w in places]
        snrs, values = [snr for snr, _ in places], [w.value for _, w in places]
        look = {"marker": MARKERS[i % len(MARKERS)], "capsize": 3 + 2 * i, "label": model}  # intervals may overlap
        line = axes.errorbar(snrs, values, [below, above], **look)
        for clean in (wer.value for c, wer in wers.items() if c.kind == "clean"):
            axes.axhline(clean, color=line[0].get_color(), linestyle=":")
        axes.set_xticks([snr for snr, _ in places])
    axes.set_ylim(bottom=0)
    _over_snr(axes)


def _over_snr(axes: Any) -> None:
    axes.invert_xaxis()  # harder to the right
    axes.grid(alpha=0.3)


def _gate_lines(results: Results, summary: GateSummary, axes: Any) -> None:
    for kind in dict.fromkeys(c.kind for c in results.conditions if c.noisy):
        places = sorted((c.snr, c.name) for c in results.conditions if c.kind == kind and c.snr is not None)
        gates = [over_layers(summary.conditions[name]["gate"]) for _, name in places]
        axes.plot([snr for snr, _ in places], gates, marker="o", label=kind)
    if "clean" in summary.conditions:
        axes.axhline(over_layers(summary.conditions["clean"]["gate"]), color="black", linestyle=":", label="clean")
    axes.set(title=f"gate of {summary.model}", xlabel="SNR (dB)", ylabel="mean gate")
    axes.legend()
    _over_snr(axes)
