"""`dawhisper visualize`'s pictures by matplotlib: the gate, the spectrogram, and where each branch listens."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from whisper.audio import FRAMES_PER_SECOND, TOKENS_PER_SECOND

from dawhisper.errors import OptionError

from .view import View, changes, notes, pitches

PRIMARY, SECOND, CHANGED = "#1f5fa8", "#d1590f", "#c8102e"  # the branches have their colours in every panel
NOISE = "#3c3c3c"


def draw_views(views: Sequence[View], model: str) -> Any:
    """A matplotlib Figure, a column for each view. ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure

    words = max(len(v.words) for v in views)
    width = min(22.0, max(9.0, 0.35 * words + 3))  # inches, of a column
    attention = max(4.0, 0.15 * words)
    heights = [2.0, 2.5, attention, attention, attention] if views[0].gate is not None else [2.5, attention]
    figure = Figure(figsize=(width * len(views), sum(heights) + 2.5), layout="constrained")
    figure.suptitle(f"What {model} hears, and where it listens", fontsize=15, fontweight="bold")
    if told := notes(views):
        figure.supxlabel("\n".join(told), x=0.01, ha="left", fontsize=10)
    panels = figure.subplots(len(heights), len(views), squeeze=False, height_ratios=heights)
    strip = any(v.noise is not None for v in views)
    for column, view, changed in zip(panels.T, views, changes(views)):
        above = _draw_branches(view, column, figure)
        _draw_spectrogram(view, column[len(above)], strip)
        for axes in column:
            axes.set_xlim(0, view.seconds)
            for word in view.words:
                axes.axvline(word.start, color="#888888", linewidth=0.5, alpha=0.5)
        column[-1].set_xlabel("seconds")
        _name(view, column[0], round(9 * width), bool(changed))
        _write_words(view, column[0])
        _mark(changed, column, len(above) + 1)
    return figure


def _draw_branches(view: View, panels: Sequence[Any], figure: Any) -> Sequence[Any]:
    """The gate above the spectrogram, and below where each branch listens and how they differ; for a single-branch
    model its one map. Returns the panels above the spectrogram."""
    blues, oranges, both = _colours()
    if view.secondary is None or view.gate is None:
        _draw_attention(view, view.primary, panels[1], "Cross-attention", blues)
        return []
    _draw_scale(figure, _draw_gate(view, view.gate, panels[0]), panels[0])
    _draw_attention(view, view.primary, panels[2], "Primary branch", blues)
    _draw_attention(view, view.secondary, panels[3], "Second branch", oranges)
    _draw_attention(view, view.difference, panels[4], "Difference: blue the primary, orange the second", both, -1)
    return panels[:1]


def _colours() -> tuple[Any, Any, Any]:
    """Of the primary branch, of the second one, and from one to the other."""
    from matplotlib.colors import LinearSegmentedColormap

    made = LinearSegmentedColormap.from_list
    blues = made("primary", ["white", PRIMARY, "#0b2545"])
    return blues, made("second", ["white", SECOND, "#4a1c02"]), made("both", [SECOND, "#f4f1ea", PRIMARY])


def _name(view: View, axes: Any, columns: int, is_changed: bool) -> None:
    """The column's title, and the text in lines of up to `columns` characters."""
    red = "; in red what is heard otherwise" if is_changed else ""
    lines = textwrap.wrap(f"heard ({view.language}{red}): “{view.text}”", columns)
    lines = lines if len(lines) <= 3 else [*lines[:2], lines[2] + " …"]
    axes.set_title("\n".join([view.title, *lines, axes.get_title(loc="left")]), loc="left", fontsize=11, pad=8)


def _mark(changed: set[int], panels: Sequence[Any], first_map: int) -> None:
    """Colour the names of changed words, above the first panel and beside the maps."""
    above = panels[0].child_axes[0].get_xticklabels()
    for labels in (above, *(axes.get_yticklabels() for axes in panels[first_map:])):
        for i in changed:
            labels[i].set_color(CHANGED)


def _draw_spectrogram(view: View, axes: Any, strip: bool) -> None:
    """The spectrogram; strip: leave room below it for where the noise truly was."""
    bands = len(view.spectrogram)
    extent = (0, view.spectrogram.shape[1] / FRAMES_PER_SECOND, 0, bands)
    axes.imshow(view.spectrogram.numpy(), origin="lower", aspect="auto", extent=extent, cmap="magma")
    ticks = {band: f"{kilohertz:g}" for kilohertz, band in pitches(bands)}
    if strip:
        axes.set_ylim(-0.15 * bands, bands)
        louder = view.noise > 0.5 if view.noise is not None else torch.zeros(1, dtype=torch.bool)
        for position in louder.nonzero().flatten().tolist():
            start = position / TOKENS_PER_SECOND
            axes.axvspan(start, start + 1 / TOKENS_PER_SECOND, 0.02, 0.1, color=NOISE, linewidth=0)
        ticks[-0.1 * bands] = "noise\nlouder" if view.noise is not None else "no noise"
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.set_ylabel("pitch (kHz)")


def _draw_attention(view: View, attention: Tensor, axes: Any, title: str, colours: Any, lowest: float = 0) -> None:
    """Each row to its own largest value, so that faint words are seen; a line where the word is spoken."""
    shown = attention / attention.abs().amax(dim=1, keepdim=True).clamp(min=1e-9)
    extent = (0, attention.shape[1] / TOKENS_PER_SECOND, len(attention), 0)
    axes.imshow(shown.numpy(), aspect="auto", extent=extent, cmap=colours, vmin=lowest, vmax=1, interpolation="nearest")
    for row, word in enumerate(view.words):  # where the word was spoken
        axes.plot([word.start, word.end], [row + 1, row + 1], color="black", linewidth=1.2, solid_capstyle="butt")
    axes.set_yticks(np.arange(len(view.words)) + 0.5, [w.word for w in view.words], fontsize=8)
    axes.set_ylabel("word being written")
    if view.noise is not None and lowest == 0:
        shares = 100 * view.on_noise(attention), 100 * float((view.noise > 0.5).float().mean())
        title += "\n{:.0f}% of it where noise is louder than speech, which is {:.0f}% of the time".format(*shares)
    axes.set_title(title, loc="left", fontsize=10)


def _write_words(view: View, axes: Any) -> None:
    """The words above a panel, each at the middle of its time."""
    words = axes.secondary_xaxis("top")
    words.set_xticks([(w.start + w.end) / 2 for w in view.words], [w.word for w in view.words])
    words.tick_params(rotation=55, labelsize=9, length=2)
    for label in words.get_xticklabels():
        label.set(ha="left", rotation_mode="anchor")


def _draw_gate(view: View, gate: Tensor, axes: Any) -> Any:
    """A rectangle for each word and layer, as wide as the word is long."""
    colours = _colours()[2]
    layers = gate.shape[1]
    for column, word in zip(gate, view.words):
        extent = (word.start, max(word.end, word.start + 0.02), -0.5, layers - 0.5)
        image = axes.imshow(
            column[:, None].numpy(), origin="lower", aspect="auto", extent=extent, cmap=colours, vmin=0, vmax=1
        )
    axes.set(ylim=(-0.5, layers - 0.5), ylabel="decoder layer", facecolor="#dddddd")
    axes.set_yticks(range(0, layers, max(1, layers // 6)))
    axes.set_title(
        f"Gate: which branch each word is read with, by layer (mean {float(gate.mean()):.2f}; grey: no word)",
        loc="left",
        fontsize=10,
    )
    return image


def _draw_scale(figure: Any, image: Any, axes: Any) -> None:
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", aspect=60, pad=0.02, ticks=[0, 0.5, 1])
    labels = bar.ax.set_xticklabels(["0: second branch alone", "0.5: both alike", "1: primary branch alone"])
    for label, side in zip(labels, ("left", "center", "right")):  # within the panel
        label.set_horizontalalignment(side)


def draw_gates(views: Sequence[View]) -> Any:
    """A matplotlib Figure of the words and the gate alone, a row for each view. OptionError for a single branch."""
    from matplotlib.figure import Figure

    if any(view.gate is None for view in views):
        raise OptionError("this model has one branch, so no gate; give one with two, as dawhisper-base is")
    words = max(len(v.words) for v in views)
    figure = Figure(figsize=(min(16.0, max(7.0, 0.4 * words)), 2.2 * len(views) + 0.4), layout="constrained")
    panels = figure.subplots(len(views), 1, squeeze=False)[:, 0]
    for view, changed, axes in zip(views, changes(views), panels):
        assert view.gate is not None
        image = _draw_gate(view, view.gate, axes)
        _write_words(view, axes)
        axes.set_title(f"{view.title}: gate {float(view.gate.mean()):.2f} on average", loc="left", fontsize=11, pad=8)
        axes.set_xlim(0, view.seconds)
        _mark(changed, [axes], 1)
    _draw_scale(figure, image, panels[-1])
    return figure
