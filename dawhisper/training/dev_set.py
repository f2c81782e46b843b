"""Word error rates during training: dev manifests, clean and in noise that is the same at every evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from dawhisper.audio import CHUNK_LENGTH, fitted_int16, from_int16
from dawhisper.decoding import DecodingOptions
from dawhisper.distributed import World
from dawhisper.evaluation.conditions import Condition, EvaluationItem, Mixer, conditions, read_items
from dawhisper.evaluation.metrics import count_words, normalizer
from dawhisper.model import Whisper
from dawhisper.noise.recordings import NoiseBank
from dawhisper.window import decode_clips

from .recipe import DataOptions, DevSetOptions


class DevSet:
    """The windows that this process decodes, mixed once and kept as int16.

    Every utterance is heard clean and in `per_clip` of the noisy conditions, taken in turn over the utterances.
    """

    def __init__(self, data: DataOptions, options: DevSetOptions, seed: int, world: World):
        self.options, self.world = options, world
        items = [item for manifest in read_items(data.dev) for item in _some(manifest, options.clips)]
        items = [item for item in items if item.seconds <= CHUNK_LENGTH]
        kinds = [kind for kind in options.kinds if kind != "real" or data.dev_noise]
        noises = NoiseBank.from_manifest(data.dev_noise) if data.dev_noise and "real" in kinds else None
        mixer = Mixer(items, seed, noises)
        mixer.check(kinds)
        noisy = conditions(kinds, options.snr_db) if kinds else []
        self.windows: list[tuple[str, EvaluationItem, np.ndarray]] = []  # condition, utterance, int16 samples
        for index in range(world.rank, len(items), world.size):
            turns = range(index * options.per_clip, index * options.per_clip + min(options.per_clip, len(noisy)))
            for condition in [Condition("clean"), *(noisy[turn % len(noisy)] for turn in turns)]:
                audio = mixer(items[index], condition).audio[0].numpy()
                self.windows.append((condition.name, items[index], fitted_int16(audio)))
        self.names = ["clean", *(condition.name for condition in noisy)]

    @torch.no_grad()
    def evaluate(self, model: Whisper) -> dict[str, float]:
        """Greedy decoding -> word error rates in percent by condition, `noisy` being the mean over noisy conditions.

        All processes take part and get the same numbers.
        """
        # by language first, so that a batch is decoded in one; then by length
        order = sorted(range(len(self.windows)), key=lambda i: (self._language(i), len(self.windows[i][2])))
        totals = torch.zeros(len(self.names), 2, dtype=torch.float64)  # errors, words
        start = 0
        while start < len(order):
            chosen = order[start : start + self.options.batch_size]
            chosen = [i for i in chosen if self._language(i) == self._language(chosen[0])]
            start += len(chosen)
            for i, text in zip(chosen, self._transcribe(model, chosen)):
                name, item, _ = self.windows[i]
                normalize = normalizer("auto", item.utterance.language)
                counts = count_words(normalize(item.utterance.text or ""), normalize(text))
                totals[self.names.index(name)] += torch.tensor([counts.errors, counts.reference], dtype=torch.float64)
        totals = self.world.sum(totals.to(self.world.device, torch.float32)).cpu()
        rates = {name: 100 * float(e / n) for name, (e, n) in zip(self.names, totals) if n > 0}
        noisy = [rate for name, rate in rates.items() if name != "clean"]
        return rates | {"noisy": sum(noisy) / len(noisy) if noisy else rates.get("clean", math.nan)}

    def _language(self, index: int) -> str:
        return self.windows[index][1].utterance.language or ""

    def _transcribe(self, model: Whisper, chosen: Sequence[int]) -> list[str]:
        options = DecodingOptions(
            language=(self._language(chosen[0]) or None) if model.is_multilingual else "en",
            without_timestamps=True,
            sample_len=self.options.max_tokens,
        )
        clips = [from_int16(self.windows[i][2]) for i in chosen]
        return [result.text for result in decode_clips(model, clips, options)]


def _some(items: Sequence[EvaluationItem], most: int) -> Sequence[EvaluationItem]:
    """At most `most` items, spread evenly over the manifest; 0 is all."""
    return items if not most or len(items) <= most else [items[i * len(items) // most] for i in range(most)]
