"""A recording as a model heard it: what the pictures of `dawhisper visualize` show.

W words, T encoder positions of 20 ms, L decoder layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
import torch
from torch import Tensor

from dawhisper.timing import Word


@dataclass(frozen=True)
class View:
    """A recording as a model heard it; times in seconds from its own start.

    primary, secondary: attention [W, T] while a word was written, mean over heads and chosen layers, each row summing
        to 1; gate: the primary branch's share a, [W, L]. secondary and gate are None for single-branch models.
    noise: the noise's true share of the energy at each position [T], None where it is not known. audio: the samples
        [n] at 16 kHz.
    """

    title: str
    text: str
    language: str
    seconds: float
    spectrogram: Tensor  # [n_mels, frames of 10 ms], log-mel as the model gets it
    words: list[Word]
    primary: Tensor
    secondary: Tensor | None = None
    gate: Tensor | None = None
    noise: Tensor | None = None
    audio: np.ndarray | None = None

    @property
    def difference(self) -> Tensor:
        """What the primary branch attends to more than the second one [W, T]; below 0 where it is less."""
        assert self.secondary is not None
        return self.primary - self.secondary

    def on_noise(self, attention: Tensor) -> float:
        """Share of an attention map [W, T] that falls where noise is louder than speech."""
        assert self.noise is not None
        return float((attention * (self.noise > 0.5)).sum() / attention.sum())


def changed_words(view: View, other: View) -> set[int]:
    """Which words of a view the other one has not, or not at this place; case and punctuation aside."""
    heard, before = ([re.sub(r"\W", "", w.word).lower() for w in v.words] for v in (view, other))
    same = SequenceMatcher(None, before, heard, autojunk=False).get_matching_blocks()
    return set(range(len(heard))) - {i for block in same for i in range(block.b, block.b + block.size)}


def changes(views: Sequence[View]) -> list[set[int]]:
    """For each view the words that are heard otherwise than in the first."""
    return [changed_words(view, views[0]) for view in views]


def notes(views: Sequence[View]) -> list[str]:
    """What the labels of a picture can't say."""
    first = views[0]
    if first.secondary is None or first.gate is None:
        return []
    if torch.allclose(first.primary, first.secondary, atol=1e-4) and float(first.gate.std()) < 1e-4:
        return ["This model's second branch is untrained: a copy of the primary one, with the same gate everywhere."]
    return []


def pitches(bands: int) -> list[tuple[float, float]]:
    """(kHz, band) of what stands beside a spectrogram, on Whisper's mel scale (Slaney's): even up to 1 kHz, then in
    ratios."""

    def mel(hertz: float) -> float:
        return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)

    return [(hertz / 1000, round(bands * mel(hertz) / mel(8000), 2)) for hertz in (0, 500, 1000, 2000, 4000, 8000)]
