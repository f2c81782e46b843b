"""Hypotheses -> scores: error rates by model, condition and group, with intervals, and models against the first one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import metrics
from .conditions import Condition, EvaluationItem
from .gates import GateReading
from .metrics import Comparison, Counts, Interval

NOISY_MEAN = "noisy mean"
NAN = float("nan")


@dataclass(frozen=True)
class Hypothesis:
    """What a model said to a mixture.

    seconds: of audio. latency: wall time until its text was there, which is that of the batch it was in.
    cost: its share of that time, the batch's time over the batch's size.
    """

    key: str
    model: str
    condition: str
    utterance: str
    text: str
    seconds: float
    latency: float
    cost: float
    gates: GateReading | None = None


@dataclass(frozen=True)
class Scored:
    """A hypothesis beside its reference, both also as normalised for counting."""

    hypothesis: Hypothesis
    item: EvaluationItem
    reference: str
    text: str
    words: Counts
    characters: Counts
    empty: bool
    loop: bool


@dataclass(frozen=True)
class Score:
    """A model under a condition, over one group of utterances ("all", "source:NAME" or "language:CODE").

    wer is in percent; its interval is over utterances, that of wer_speakers over speakers. Substitutions, deletions,
    insertions, empty (of what should not be) and loops are counts. hallucinated, hallucinated_characters: words and
    characters per minute of noise without speech, there alone. latency in seconds; rtf: processing over audio time.
    The condition "noisy mean" is the mean of the rates at all kinds of noise and SNRs; its counts are sums.
    """

    model: str
    condition: str
    kind: str
    snr: float | None
    group: str
    utterances: int
    words: int
    seconds: float
    wer: Interval
    wer_speakers: Interval
    cer: float
    substitutions: int
    deletions: int
    insertions: int
    empty: int
    loops: int
    hallucinated: float
    hallucinated_characters: float
    latency: dict[str, float]
    rtf: float


@dataclass(frozen=True)
class Paired:
    """A model against the baseline under a condition; units are what was resampled, "utterances" or "speakers"."""

    baseline: str
    model: str
    condition: str
    units: str
    result: Comparison


@dataclass
class Scorer:
    """Scores hypotheses; the seed and number of samples are the bootstrap's."""

    items: Sequence[EvaluationItem]
    conditions: Sequence[Condition]
    normalizer: str = "auto"
    samples: int = 10_000
    seed: int = 0
    by_id: dict[str, EvaluationItem] = field(init=False)
    references: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.by_id = {item.id: item for item in self.items}
        self.references = {item.id: self._normalize(item)(item.utterance.text or "") for item in self.items}

    def _normalize(self, item: EvaluationItem) -> Callable[[str], str]:
        return metrics.normalizer(self.normalizer, item.utterance.language)

    def score_one(self, hypothesis: Hypothesis) -> Scored:
        item = self.by_id[hypothesis.utterance]
        reference = self.references[item.id] if hypothesis.condition != "noise-only" else ""
        text = self._normalize(item)(hypothesis.text)
        return Scored(
            hypothesis,
            item,
            reference,
            text,
            metrics.count_words(reference, text),
            metrics.count_characters(reference, text),
            empty=bool(reference) and not text,
            loop=metrics.is_loop(hypothesis.text),
        )

    def scores(self, scored: Sequence[Scored]) -> list[Score]:
        """By model, condition and group, in the order in which they were asked for."""
        found = []
        for model in dict.fromkeys(s.hypothesis.model for s in scored):
            for group, ids in self.groups().items():
                cells = self._cells(scored, model, ids)
                found += [self._score(model, c.name, c.kind, c.snr, group, [cells[c.name]]) for c in self.conditions]
                noisy = [cells[c.name] for c in self.conditions if c.noisy]
                if noisy:
                    found.append(self._score(model, NOISY_MEAN, "mean", None, group, noisy))
        return found

    def compare(self, scored: Sequence[Scored]) -> list[Paired]:
        """Every model against the first one, over utterances and over speakers where there are two or more."""
        models = list(dict.fromkeys(s.hypothesis.model for s in scored))
        ids = [item.id for item in self.items]
        cells = {model: self._cells(scored, model, ids) for model in models}
        wanted = {c.name: [c.name] for c in self.conditions if c.kind != "noise-only"}
        if noisy := [c.name for c in self.conditions if c.noisy]:
            wanted[NOISY_MEAN] = noisy
        units: dict[str, list[str] | None] = {"utterances": None}
        speakers = _speakers(self.items)
        if speakers is not None and len(set(speakers)) > 1:
            units["speakers"] = speakers
        found = []
        for model in models[1:]:
            for condition, names in wanted.items():
                before = [cells[models[0]][name] for name in names]
                after = [cells[model][name] for name in names]
                counts = _array(before, _errors), _array(after, _errors), _array(before, _words)
                for unit, clusters in units.items():
                    result = metrics.compare(*counts, clusters, self.samples, self.seed)
                    found.append(Paired(models[0], model, condition, unit, result))
        return found

    def groups(self) -> dict[str, list[str]]:
        """Utterance ids of all, and of each source and language where there are several."""
        groups = {"all": [item.id for item in self.items]}
        for kind, of in (("source", lambda i: i.source), ("language", lambda i: i.utterance.language or "unknown")):
            names = sorted({of(item) for item in self.items})
            if len(names) > 1:
                groups |= {f"{kind}:{name}": [item.id for item in self.items if of(item) == name] for name in names}
        return groups

    def _cells(self, scored: Sequence[Scored], model: str, ids: Sequence[str]) -> dict[str, list[Scored]]:
        """What the model said under each condition, in the order of the ids."""
        of = {(s.hypothesis.condition, s.item.id): s for s in scored if s.hypothesis.model == model}
        return {c.name: [of[c.name, i] for i in ids] for c in self.conditions}

    def _score(
        self, model: str, condition: str, kind: str, snr: float | None, group: str, cells: Sequence[Sequence[Scored]]
    ) -> Score:
        """cells: the same utterances under one condition or several."""
        flat = [s for cell in cells for s in cell]
        seconds = sum(s.hypothesis.seconds for s in flat)
        errors, words = _array(cells, _errors), _array(cells, _words)
        if kind == "noise-only":
            wer = over_speakers = Interval(NAN, NAN, NAN)
        else:
            wer = _percent(metrics.bootstrap(errors, words, None, self.samples, self.seed))
            over_speakers = Interval(wer.value, NAN, NAN)
            speakers = _speakers([s.item for s in cells[0]])
            if speakers is not None:
                over_speakers = _percent(metrics.bootstrap(errors, words, speakers, self.samples, self.seed))
        minutes = seconds / 60 if kind == "noise-only" and seconds else NAN
        return Score(
            model=model,
            condition=condition,
            kind=kind,
            snr=snr,
            group=group,
            utterances=len(cells[0]),
            words=int(words.sum()),
            seconds=seconds,
            wer=wer,
            wer_speakers=over_speakers,
            cer=100 * float(np.mean([metrics.error_rate([s.characters for s in cell]) for cell in cells])),
            substitutions=sum(s.words.substitutions for s in flat),
            deletions=sum(s.words.deletions for s in flat),
            insertions=sum(s.words.insertions for s in flat),
            empty=sum(s.empty for s in flat),
            loops=sum(s.loop for s in flat),
            hallucinated=sum(s.words.insertions for s in flat) / minutes,
            hallucinated_characters=sum(s.characters.insertions for s in flat) / minutes,
            latency=metrics.percentiles([s.hypothesis.latency for s in flat]),
            rtf=sum(s.hypothesis.cost for s in flat) / seconds if seconds else NAN,
        )


def _errors(s: Scored) -> int:
    return s.words.errors


def _words(s: Scored) -> int:
    return s.words.reference


def _array(cells: Sequence[Sequence[Scored]], value: Callable[[Scored], int]) -> metrics.Floats:
    """-> [conditions, utterances]"""
    return np.array([[value(s) for s in cell] for cell in cells], dtype=np.float64)


def _speakers(items: Sequence[EvaluationItem]) -> list[str] | None:
    """The speaker of each; None where one is not known."""
    names = [item.utterance.speaker for item in items]
    return None if None in names else [str(name) for name in names]


def _percent(interval: Interval) -> Interval:
    return Interval(*(100 * x for x in interval))
