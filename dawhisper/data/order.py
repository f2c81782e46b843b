"""The order of training samples: one endless stream that depends only on the seed and the manifests.

Position p belongs to epoch p // N. A run's place in it is one number, so it can be resumed bit for bit, and on any
number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

POOL_BLOCKS = 32  # global batches that are sorted by length together


class Order:
    """The endless stream of sample indices. Runs of `block` samples (a global batch) have similar lengths.

    Each epoch is a new permutation; pools of POOL_BLOCKS blocks are sorted by duration, cut into blocks, and these are
    shuffled. Blocks keep in step with the global batches across epochs, so that only one batch an epoch is mixed.
    """

    def __init__(
        self, durations: Sequence[float] | np.ndarray, seed: int, block: int, shuffle: bool = True, bucket: bool = True
    ):
        self.durations = np.asarray(durations, dtype=np.float64)
        self.seed, self.block, self.shuffle, self.bucket = seed, block, shuffle, bucket
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.durations)

    def epoch(self, number: int) -> np.ndarray:
        """The indices of one epoch, in order. -> int64 [N]"""
        if self._epoch[0] != number:
            self._epoch = (number, self._arrange(number))
        return self._epoch[1]

    def take(self, position: int, count: int) -> list[int]:
        """The `count` indices from a position of the stream on."""
        out: list[int] = []
        while len(out) < count:
            number, start = divmod(position + len(out), len(self))
            out.extend(self.epoch(number)[start : start + count - len(out)].tolist())
        return out

    def _arrange(self, number: int) -> np.ndarray:
        n = len(self)
        if not self.shuffle:
            return np.arange(n)
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(n)
        if not self.bucket:
            return order
        head = min(-number * n % self.block, n)  # completes the batch that the last epoch began
        end = n - (n - head) % self.block  # what is left over begins the next epoch's first batch
        blocks: list[np.ndarray] = []
        for pool in np.split(order[head:end], range(self.block * POOL_BLOCKS, end - head, self.block * POOL_BLOCKS)):
            pool = pool[np.argsort(self.durations[pool], kind="stable")]
            blocks.extend(rng.permutation(block) for block in pool.reshape(-1, self.block))
        return np.concatenate([order[:head], *(blocks[i] for i in rng.permutation(len(blocks))), order[end:]])
