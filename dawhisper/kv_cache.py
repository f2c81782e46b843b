"""Keys and values that token steps read again: those of the tokens so far, and of the audio."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from .model import AudioFeatures, CrossMemory, TextDecoder


class KVCache:
    """Preallocated keys and values of a decoding run: self-attention by position, cross-attention by window.

    `rows` of tokens = windows * group. Keys and values of the audio are computed here, once, and are shared by the
    rows of a window; `repeat` and `select` touch the self-attention alone. `keep` drops windows.
    """

    def __init__(self, decoder: TextDecoder, features: AudioFeatures, max_length: int | None = None):
        self.memories = self.remember(decoder, features)
        self.length = 0
        n_ctx = min(len(decoder.positional_embedding), max_length or sys.maxsize)
        windows, e = features.primary.shape[0], self.memories[0].key.shape[-1]
        n_head = decoder.positional_embedding.shape[1] // e
        self.states = features.primary.new_zeros(len(self.memories), 2, windows, n_head, n_ctx, e)

    def remember(self, decoder: TextDecoder, features: AudioFeatures) -> list[CrossMemory]:
        """Each layer's keys and values of the audio."""
        return decoder.remember(features)

    @property
    def rows(self) -> int:
        return self.states.shape[2]

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the new positions [R, h, n, e]; return all positions so far [R, h, length + n, e].

        Also the mask [n, length + n] of what each may attend to, where "all" or "none that follow" doesn't say it.
        """
        n = key.shape[2]
        end = self.length + n
        keys, values = self.states[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        mask = None
        if n > 1 and self.length > 0:  # several tokens after earlier ones
            mask = torch.ones(n, end, dtype=torch.bool, device=key.device).tril(self.length)
        return keys[:, :, :end], values[:, :, :end], mask

    def first_logits(self, decoder: TextDecoder, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        """Read the first tokens [B, n], before `repeat` -> logits [B, positions, V] of what follows at `positions`."""
        return decoder(tokens, cache=self, positions=positions)

    def next_logits(self, decoder: TextDecoder, tokens: Tensor) -> Tensor:
        """The token step: tokens [R, 1] -> logits [R, V] of what follows."""
        return decoder(tokens, cache=self)[:, 0]

    def repeat(self, group: int) -> None:
        """Make `group` rows of every row."""
        self.states = self.states.repeat_interleave(group, dim=2)

    def select(self, rows: Tensor) -> None:
        """Row i continues what row rows[i] was; rows of one window stay in it."""
        self.states[..., : self.length, :] = self.states[:, :, rows, :, : self.length]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the windows, which have one row each."""
        self.memories = [one._replace(key=one.key[rows], value=one.value[rows]) for one in self.memories]
        self.states = self.states[:, :, rows]
