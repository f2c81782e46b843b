"""Edit distances and common places against rapidfuzz."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from rapidfuzz.distance import Levenshtein

from dawhisper import edits
from dawhisper.edits import common, distances


def sequences(count: int, longest: int, letters: str, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(letters, k=rng.randint(0, longest))) for _ in range(count)]


@pytest.mark.parametrize("letters", ["ab", "abcdefgh"])
def test_distances(letters: str) -> None:
    some = sequences(12, 20, letters, seed=1)
    expected = [[Levenshtein.distance(a, b) for b in some] for a in some]
    np.testing.assert_array_equal(distances(some), expected)
    assert distances(["", ""]).tolist() == [[0, 0], [0, 0]]
    assert distances([["one", "two"], ["one"]])[0, 1] == 1


@pytest.mark.parametrize("band", [1000, 10])
def test_common_is_on_a_shortest_path(band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going through the pairs, and replacing or skipping what lies between them, costs what the edit distance says."""
    monkeypatch.setattr(edits, "BAND", band)
    rng = random.Random(2)
    for a in sequences(30, 60, "abcd", seed=3):
        b = "".join(c for c in a if rng.random() > 0.1) + "".join(rng.choices("abcd", k=rng.randint(0, 6)))
        pairs = [(-1, -1), *common(a, b), (len(a), len(b))]
        cost = sum(max(i - k, j - n) - 1 for (k, n), (i, j) in itertools.pairwise(pairs))
        assert cost == Levenshtein.distance(a, b)
        assert all(a[i] == b[j] for i, j in pairs[1:-1])
    assert common("", "ab") == common("ab", "") == []


def test_a_long_text() -> None:
    """Within seconds, where the whole table would have a hundred million places."""
    rng = random.Random(4)
    words = [str(rng.randint(0, 5000)) for _ in range(10_000)]
    heard = [word for word in words if rng.random() > 0.05]
    assert len(common(words, heard)) == len(heard)
