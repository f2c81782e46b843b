from __future__ import annotations

import jiwer
import numpy as np
import pytest

from dawhisper.errors import OptionError
from dawhisper.evaluation import metrics
from dawhisper.evaluation.metrics import Counts

PAIRS = [
    ("the cat sat on the mat", "the cat sat on the mat"),
    ("the cat sat on the mat", "a cat sat the mat today"),
    ("hello", ""),
    ("one two three", "four five six seven"),
    ("kitten", "sitting"),
]


@pytest.mark.parametrize("reference,hypothesis", PAIRS)
def test_counts_equal_jiwer(reference: str, hypothesis: str) -> None:
    words, characters = metrics.count_words(reference, hypothesis), metrics.count_characters(reference, hypothesis)
    assert words.errors / words.reference == pytest.approx(jiwer.wer(reference, hypothesis))
    assert characters.errors / characters.reference == pytest.approx(jiwer.cer(reference, hypothesis))
    assert (words.reference, words.hypothesis) == (len(reference.split()), len(hypothesis.split()))


def test_corpus_rate_equals_jiwer_over_the_list() -> None:
    references, hypotheses = map(list, zip(*PAIRS))
    assert metrics.error_rate([metrics.count_words(*p) for p in PAIRS]) == pytest.approx(
        jiwer.wer(references, hypotheses)
    )
    assert metrics.error_rate([metrics.count_characters(*p) for p in PAIRS]) == pytest.approx(
        jiwer.cer(references, hypotheses)
    )


def test_counts_by_hand() -> None:
    assert metrics.count_words("a b c d", "a x c e f") == Counts(hits=2, substitutions=2, deletions=0, insertions=1)
    assert metrics.count_words("a b c", "a c") == Counts(2, 0, 1, 0)
    assert metrics.count_words("", "thank you") == Counts(0, 0, 0, 2)
    assert metrics.count_words("", "") == Counts(0, 0, 0, 0)
    assert np.isnan(metrics.error_rate([Counts(0, 0, 0, 2)]))


def test_normalizers() -> None:
    english = metrics.normalizer("auto", "en")
    assert english("Mr. Brown's colour isn't grey, it's £20!") == english("mister brown's color is not gray it is £20")
    assert metrics.normalizer("auto", "fr")("« Voilà, c'est ça ! »") == "voilà c est ça"
    assert metrics.normalizer("auto", "zh")("你好。") == "你 好"
    assert metrics.normalizer("auto", "az")("İslandiya, Işıq.") == "islandiya ışıq"
    assert metrics.normalizer("basic", "az")("İslandiya") == "i slandiya"  # as Whisper's own does
    assert metrics.normalizer("english", "fr")("the colour") == "the color"
    assert metrics.normalizer("none", "en")(" A  b. ") == "A b."
    with pytest.raises(OptionError, match="unknown normalizer 'whisper'"):
        metrics.normalizer("whisper", "en")


@pytest.mark.parametrize(
    "text,loop",
    [
        ("", False),
        ("No, no, no, no.", False),
        ("no no no no no", True),
        ("I was so very very very tired", False),
        ("thank you " * 5, True),
        ("thank you " * 4, False),
        ("so we went on and then " + "I do not know " * 5 + "what it was", True),
        ("ha" * 60, True),  # one word: only its compression gives it away
        ("The quick brown fox jumps over the lazy dog near the river bank.", False),
    ],
)
def test_loops(text: str, loop: bool) -> None:
    assert metrics.is_loop(text) is loop


def test_percentiles() -> None:
    assert metrics.percentiles([1, 2, 3, 10]) == pytest.approx({"mean": 4, "median": 2.5, "p95": 8.95})
    assert all(np.isnan(x) for x in metrics.percentiles([]).values())


def test_bootstrap_covers_a_binomial_rate() -> None:
    """1000 one-word utterances with error probability 0.2: the interval is the binomial one, 1.96 sqrt(pq/n) wide."""
    errors = (np.random.default_rng(0).random(1000) < 0.2).astype(int)
    rate = errors.mean()
    interval = metrics.bootstrap(errors, np.ones(1000), seed=1)
    half = 1.96 * np.sqrt(rate * (1 - rate) / 1000)
    assert interval.value == pytest.approx(rate)
    assert interval.low == pytest.approx(rate - half, abs=2e-3)
    assert interval.high == pytest.approx(rate + half, abs=2e-3)
    assert interval == metrics.bootstrap(errors, np.ones(1000), seed=1)
    assert interval != metrics.bootstrap(errors, np.ones(1000), seed=2)


def test_bootstrap_coverage() -> None:
    """About 95 of 100 intervals contain the truth."""
    rng = np.random.default_rng(3)
    words = rng.integers(5, 30, size=(100, 150))
    errors = rng.binomial(words, 0.1)
    intervals = [metrics.bootstrap(e, w, samples=500, seed=i) for i, (e, w) in enumerate(zip(errors, words))]
    assert 85 <= sum(i.low <= 0.1 <= i.high for i in intervals) <= 100


def test_bootstrap_over_speakers_is_wider() -> None:
    """Speakers differ and their utterances do not: the utterance interval is too sure of itself."""
    speakers = np.repeat([f"s{i}" for i in range(10)], 50)
    errors = np.repeat(np.arange(10), 50)
    words = np.full(500, 20)
    by_utterance = metrics.bootstrap(errors, words)
    by_speaker = metrics.bootstrap(errors, words, clusters=speakers)
    assert by_speaker.value == pytest.approx(by_utterance.value)
    assert by_speaker.high - by_speaker.low > 3 * (by_utterance.high - by_utterance.low)
    one = metrics.bootstrap(errors, words, clusters=["only"] * 500)
    assert one.value == by_utterance.value and np.isnan(one.low) and np.isnan(one.high)


def test_bootstrap_of_several_conditions_is_the_mean_rate() -> None:
    errors, words = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[10, 10, 10], [10, 10, 10]])
    interval = metrics.bootstrap(errors, words)
    assert interval.value == pytest.approx((6 / 30 + 15 / 30) / 2)
    # paired draws: resampling keeps the conditions' common spread instead of averaging it away
    assert interval.low == pytest.approx((1 + 4) / 20) and interval.high == pytest.approx((3 + 6) / 20)


def test_bootstrap_without_reference_words() -> None:
    interval = metrics.bootstrap([1, 2], [0, 0])
    assert all(np.isnan(x) for x in interval)


def test_paired_test_detects_a_small_steady_gain() -> None:
    """Ten utterances in a hundred lose one error each: far less than the spread of utterances, yet certain."""
    rng = np.random.default_rng(0)
    before = rng.integers(1, 20, size=200)
    after = before - (np.arange(200) % 10 == 0)
    words = np.full(200, 20)
    a, b = metrics.bootstrap(before, words), metrics.bootstrap(after, words)
    assert a.low < b.value  # their intervals overlap
    result = metrics.compare(before, after, words)
    assert result.p_value < 0.001
    assert result.difference.value == pytest.approx(-20 / 4000)
    assert result.difference.high < 0 and result.relative.low > 0
    assert result.relative.value == pytest.approx(20 / before.sum())
    assert result.improvement == 1.0


def test_paired_test_does_not_see_what_is_not_there() -> None:
    rng = np.random.default_rng(1)
    words = np.full(200, 20)
    values = []
    for seed in range(40):
        before, after = rng.binomial(words, 0.2), rng.binomial(words, 0.2)
        values.append(metrics.compare(before, after, words, samples=500, seed=seed).p_value)
    assert np.mean(np.array(values) < 0.05) <= 0.15
    same = metrics.compare(before, before, words)
    assert same.p_value == 1.0 and same.difference == (0, 0, 0) and same.improvement == 0


def test_paired_test_over_speakers() -> None:
    speakers = [f"s{i % 4}" for i in range(40)]
    before, after, words = np.full(40, 3), np.full(40, 2), np.full(40, 10)
    result = metrics.compare(before, after, words, clusters=speakers, samples=2000)
    assert result.difference.value == pytest.approx(-0.1) and result.p_value < 0.01
    assert np.isnan(metrics.compare(before, after, words, clusters=["x"] * 40).p_value)


def test_paired_test_without_reference_words() -> None:
    """One of two utterances has no words: a resample of it alone says nothing, and the others all say the same."""
    assert np.isnan(metrics.compare([1, 2], [1, 3], [0, 0]).p_value)
    better, worse = metrics.compare([5, 0], [4, 0], [10, 0]), metrics.compare([4, 0], [5, 0], [10, 0])
    assert better.p_value == worse.p_value < 0.001
    assert (better.improvement, worse.improvement) == (1, 0)
    assert metrics.compare([5, 0], [5, 0], [10, 0]).p_value == 1


def test_correlations() -> None:
    x = np.arange(10.0)
    assert metrics.pearson(x, 2 * x + 1) == pytest.approx(1)
    assert metrics.pearson(x, x**3) < 1
    assert metrics.spearman(x, x**3) == pytest.approx(1)
    assert metrics.spearman(x, -np.exp(x)) == pytest.approx(-1)
    assert metrics.spearman([1, 2, np.inf], [1, 5, 9]) == pytest.approx(1)
    # ties at their mean rank: (1.5, 1.5, 3) with (1, 2, 3)
    assert metrics.spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(np.corrcoef([1.5, 1.5, 3], [1, 2, 3])[0, 1])
    assert np.isnan(metrics.pearson([1, 1], [1, 2])) and np.isnan(metrics.spearman([1], [1]))
