"""Word and character errors, loops, latencies, and how sure one can be of them.

Rates are fractions here (0.061 is 6.1 %). A corpus rate is the sum of errors over the sum of reference words, as
usual, and not the mean of the utterances' rates. Intervals and tests resample whole utterances, or whole speakers.

Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004.
Efron and Tibshirani, "An Introduction to the Bootstrap", 1993: percentile intervals, section 13.3.
Radford et al., "Robust speech recognition via large-scale weak supervision", 2022, appendix C: text normalisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import jiwer
import numpy as np
from numpy.typing import ArrayLike, NDArray
from whisper.utils import compression_ratio

from dawhisper.data.targets import lower
from dawhisper.errors import OptionError

Floats = NDArray[np.float64]
NORMALIZERS = ("auto", "english", "basic", "none")
UNSPACED = ("zh", "ja", "th", "lo", "my", "yue")  # written without spaces: every letter counts as a word (Whisper, C)

LOOP_COMPRESSION = 2.4  # Whisper's own compression_ratio_threshold
LOOP_REPEATS = 5
LOOP_WORDS = 8


class Counts(NamedTuple):
    """Units (words or characters) of one alignment of a hypothesis with its reference."""

    hits: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def reference(self) -> int:
        return self.hits + self.substitutions + self.deletions

    @property
    def hypothesis(self) -> int:
        return self.hits + self.substitutions + self.insertions

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


class Interval(NamedTuple):
    """A value with its confidence interval; the bounds are nan where there is too little to resample."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """System B against system A on the same utterances.

    difference: rate of B - rate of A; relative: how much of A's errors B saves, (A - B) / A.
    p_value: two-sided, of the hypothesis that both are equally good.
    improvement: share of the resampled corpora on which B is better (Bisani and Ney's probability of improvement).
    """

    difference: Interval
    relative: Interval
    p_value: float
    improvement: float


@cache
def normalizer(name: str, language: str | None) -> Callable[[str], str]:
    """Whisper's text normaliser: English for English and basic for others ("auto"), or the one that is named.

    "auto" also lower-cases by the language: of the dotted İ of Turkish and Azerbaijani the basic one makes "i" and a
    space, and so two words, and of I the other letter.
    """
    from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

    if name not in NORMALIZERS:
        raise OptionError(f"unknown normalizer {name!r}: choose one of {', '.join(NORMALIZERS)}")
    if name == "none":
        return lambda text: " ".join(text.split())
    if name == "english" or (name == "auto" and language == "en"):
        return EnglishTextNormalizer()
    basic = BasicTextNormalizer(split_letters=language in UNSPACED)
    known = (language or "") if name == "auto" else ""
    return lambda text: " ".join(basic(lower(text, known)).split())  # the basic one leaves spaces at the ends


def count_words(reference: str, hypothesis: str) -> Counts:
    """The word errors of one normalised pair, as jiwer aligns it; an empty reference makes every word an insertion."""
    return _counts(jiwer.process_words(reference, hypothesis))


def count_characters(reference: str, hypothesis: str) -> Counts:
    """The character errors of one normalised pair, spaces included, as jiwer aligns it."""
    return _counts(jiwer.process_characters(reference, hypothesis))


def _counts(alignment: jiwer.WordOutput | jiwer.CharacterOutput) -> Counts:
    return Counts(alignment.hits, alignment.substitutions, alignment.deletions, alignment.insertions)


def error_rate(counts: Sequence[Counts]) -> float:
    """Corpus WER or CER: all errors over all reference units; nan where the references are empty."""
    units = sum(c.reference for c in counts)
    return sum(c.errors for c in counts) / units if units else float("nan")


def is_loop(text: str) -> bool:
    """Whether a hypothesis is caught in a repetition.

    That is: its zlib compression ratio exceeds 2.4 (Whisper's own sign of a failed window), or some sequence of one to
    eight words stands five times or more in a row.
    """
    if text and compression_ratio(text) > LOOP_COMPRESSION:
        return True
    words = text.lower().split()
    return any(_repeats(words, length) >= LOOP_REPEATS for length in range(1, LOOP_WORDS + 1))


def _repeats(words: Sequence[str], length: int) -> int:
    """How many times in a row a sequence of `length` words stands at most."""
    longest = run = 0
    for here, before in zip(words[length:], words):
        run = run + 1 if here == before else 0
        longest = max(longest, run)
    return longest // length + 1 if len(words) >= length else 0


def percentiles(values: ArrayLike) -> dict[str, float]:
    """Mean, median and 95th percentile; nan of nothing."""
    x = np.asarray(values, dtype=np.float64)
    if not x.size:
        return dict.fromkeys(("mean", "median", "p95"), float("nan"))
    return {"mean": float(x.mean()), "median": float(np.median(x)), "p95": float(np.percentile(x, 95))}


def bootstrap(
    errors: ArrayLike,
    units: ArrayLike,
    clusters: Sequence[str] | None = None,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Corpus error rate with its percentile bootstrap interval.

    errors, units: [n] of the utterances, or [c, n] of the same utterances in c conditions; the rate is then the mean
    of the conditions' rates, and a resampled utterance is drawn in all of them at once.
    clusters: [n] speaker names; whole speakers are drawn instead of utterances (a speaker's utterances are not
    independent, so this interval is the honest one, and wider).
    """
    e, u = _grouped(errors, clusters), _grouped(units, clusters)
    value = float(_rates(np.ones((1, e.shape[1])), e, u)[0])
    if e.shape[1] < 2:
        return Interval(value, float("nan"), float("nan"))
    drawn = np.concatenate([_rates(w, e, u) for w in _resamples(e.shape[1], samples, seed)])
    return Interval(value, *_bounds(drawn, confidence))


def compare(
    errors_a: ArrayLike,
    errors_b: ArrayLike,
    units: ArrayLike,
    clusters: Sequence[str] | None = None,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Comparison:
    """Paired bootstrap of two systems: the same resampled utterances for both (Bisani and Ney 2004, section 4).

    Shapes as in `bootstrap`. p = 2 min(P(d* <= 0), P(d* >= 0)) over the resampled differences d*, each share taken as
    (count + 1) / (samples + 1), so that p is never 0, and at most 1. Resampled corpora without a word have no d*.
    """
    a, b, u = (_grouped(x, clusters) for x in (errors_a, errors_b, units))
    one = np.ones((1, u.shape[1]))
    before, after = float(_rates(one, a, u)[0]), float(_rates(one, b, u)[0])
    nan = float("nan")
    relative = (before - after) / before if before else nan
    if u.shape[1] < 2 or not np.isfinite(after):
        return Comparison(Interval(after - before, nan, nan), Interval(relative, nan, nan), nan, nan)
    weights = list(_resamples(u.shape[1], samples, seed))
    rates_a = np.concatenate([_rates(w, a, u) for w in weights])
    difference = np.concatenate([_rates(w, b, u) for w in weights]) - rates_a
    rates_a, difference = rates_a[np.isfinite(difference)], difference[np.isfinite(difference)]
    with np.errstate(invalid="ignore", divide="ignore"):
        saved = np.where(rates_a > 0, -difference / rates_a, nan)
    tails = [(np.sum(x) + 1) / (len(x) + 1) for x in (difference <= 0, difference >= 0)]
    return Comparison(
        Interval(after - before, *_bounds(difference, confidence)),
        Interval(relative, *_bounds(saved, confidence)),
        float(min(1.0, 2 * min(tails))),
        float(np.mean(difference < 0)),
    )


def _grouped(values: ArrayLike, clusters: Sequence[str] | None) -> Floats:
    """[n] or [c, n] -> [c, n], or [c, speakers] with each speaker's values added up."""
    x = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if clusters is None:
        return x
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    return np.stack([np.bincount(member, weights=row) for row in x])


def _resamples(n: int, samples: int, seed: int) -> Iterator[Floats]:
    """How often each of n units is drawn in each resampled corpus, [<= 4M / n, n] at a time."""
    rows = max(1, 4_000_000 // n)
    return (_resample(n, min(rows, samples - start), seed, start) for start in range(0, samples, rows))


@lru_cache(maxsize=4)
def _resample(n: int, rows: int, seed: int, start: int) -> Floats:
    """Cached, since all conditions of an evaluation have the same utterances."""
    rng = np.random.default_rng([seed, start])
    return rng.multinomial(n, np.full(n, 1 / n), size=rows).astype(np.float64)


def _rates(weights: Floats, errors: Floats, units: Floats) -> Floats:
    """weights [b, n], errors and units [c, n] -> rate of each of the b corpora, the mean over conditions."""
    with np.errstate(invalid="ignore", divide="ignore"):
        total = weights @ units.T
        return np.where(total > 0, (weights @ errors.T) / total, np.nan).mean(axis=1)


def _bounds(values: Floats, confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    if not np.isfinite(values).any():
        return float("nan"), float("nan")
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Linear correlation; nan where either side is constant or there are fewer than two pairs."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation, ties at their mean rank; infinite values rank like any other."""
    return pearson(_ranks(np.asarray(x)), _ranks(np.asarray(y)))


def _ranks(x: NDArray[Any]) -> Floats:
    _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[inverse]
