"""Edit distances (Levenshtein) between sequences, and what two of them have in common; numpy alone.

A row of the table is filled at once: insertions, which depend on the place to the left, are a running minimum of
`cost - place`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

BAND = 1000  # places of the table beside its diagonal that are looked at
MATCH, SKIP_A, SKIP_B = 0, 1, 2


def ids_of(*sequences: Sequence[Hashable]) -> list[np.ndarray]:
    """Sequences of anything as sequences of numbers, equal where the things are."""
    known: dict[Hashable, int] = {}
    return [np.array([known.setdefault(each, len(known)) for each in some], np.int64) for some in sequences]


def distances(sequences: Sequence[Sequence[Hashable]]) -> np.ndarray:
    """Edit distances [N, N] between all pairs of N sequences, all of them at once."""
    coded = ids_of(*sequences)
    n, lengths = len(coded), np.array([len(x) for x in coded])
    width = int(lengths.max(initial=0))
    padded = np.full((n, width), -1)
    for row, x in zip(padded, coded):
        row[: len(x)] = x
    place = np.arange(width + 1)
    cost = np.broadcast_to(place, (n, n, width + 1)).copy()  # of nothing against each beginning of the second one
    made = np.where(lengths[:, None] == 0, lengths[None, :], 0)
    for i in range(width):
        replaced = cost[:, :, :-1] + (padded[:, None, i, None] != padded[None, :, :])
        cost[:, :, 0] += 1
        cost[:, :, 1:] = np.minimum(cost[:, :, 1:] + 1, replaced)
        cost = np.minimum.accumulate(cost - place, axis=2) + place
        ended = lengths == i + 1
        made[ended] = np.take_along_axis(cost, np.broadcast_to(lengths, (n, n))[:, :, None], axis=2)[ended, :, 0]
    return made


def common(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Pairs of places where two sequences are equal, along the shortest edit path from one to the other.

    Long ones are compared near the table's diagonal alone, so that time and memory grow with their length.
    """
    x, y = ids_of(a, b)
    n, m = len(x), len(y)
    half = max(BAND, abs(n - m) + BAND // 2) if max(n, m) > 2 * BAND else n + m
    first = np.clip(np.arange(n + 1) * m // max(n, 1) - half, 0, m)  # of each row's places
    width = min(2 * half, m) + 1
    far = n + m + 1
    moves = np.zeros((n + 1, width), np.int8)
    moves[0] = SKIP_B
    cost = first[0] + np.arange(width)
    for i in range(1, n + 1):
        place = first[i] + np.arange(width)
        step = first[i] - first[i - 1]
        before = np.concatenate([cost, np.full(step + 1, far)])
        up = before[step : step + width] + 1
        # the place to the left of the row above; at the first column there is none
        left_up = before[step - 1 : step - 1 + width] if step else np.concatenate([[far], before[: width - 1]])
        other = np.where(place == 0, -1, y[np.clip(place - 1, 0, m - 1)] if m else -1)
        replaced = left_up + (x[i - 1] != other)
        best = np.minimum(up, replaced)
        cost = np.minimum.accumulate(best - place) + place
        moves[i] = np.where(cost < best, SKIP_B, np.where(replaced <= up, MATCH, SKIP_A))
        cost = np.where(place > m, far, cost)
    found, i, j = [], n, m
    while i or j:
        move = moves[i, j - first[i]] if i else SKIP_B
        if move == MATCH:
            i, j = i - 1, j - 1
            if x[i] == y[j]:
                found.append((i, j))
        elif move == SKIP_A:
            i -= 1
        else:
            j -= 1
    return found[::-1]
