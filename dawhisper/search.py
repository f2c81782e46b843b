"""How the next tokens are chosen: greedily, by sampling, by beam search.

Shapes: B windows, G rows a window (beams, or samples), R = B * G rows, V vocabulary, L token positions. Everything runs
for the whole batch at once, on the model's device.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical

from .fast.cache import StaticKVCache
from .hotwords import Hotwords
from .kv_cache import KVCache

NEVER = float("-inf")


class Candidates(NamedTuple):
    """What a search found in each window.

    tokens [B, N, L]; logprobs [B, N, L]: each token's log probability, 0 where none was chosen; scores [B, N]: what the
    search ranks by, -inf for rows that are not in use.
    """

    tokens: Tensor
    logprobs: Tensor
    scores: Tensor


class Search(Protocol):
    """How the next tokens are chosen. `tokens` [R, L] is filled up to `length` and prefilled with <|endoftext|>."""

    def step(self, tokens: Tensor, length: int, logits: Tensor, cache: KVCache) -> Tensor:
        """Write tokens[:, length]; returns one boolean on the device: whether every window is done."""

    def candidates(self, tokens: Tensor) -> Candidates: ...


class Sampling:
    """Greedy at temperature 0, independent samples above."""

    def __init__(
        self,
        rows: int,
        group: int,
        temperature: float,
        eot: int,
        max_length: int,
        device: torch.device,
        hotwords: Hotwords | None = None,
    ):
        self.group, self.temperature, self.eot, self.hotwords = group, temperature, eot, hotwords
        self.logprobs = torch.zeros(rows, max_length, device=device)
        self.places = torch.arange(rows, device=device)  # of the rows that are still decoded, in the batch
        self.left: tuple[Tensor, Tensor] | None = None  # the batch's tokens and log probabilities, once rows left it

    def step(self, tokens: Tensor, length: int, logits: Tensor, cache: KVCache) -> Tensor:
        if self.temperature == 0 and isinstance(cache, StaticKVCache) and cache.fused and self.hotwords is None:
            from dawhisper.fast.token_step import most_likely

            chosen, logprob = most_likely(logits)
        else:
            favoured = logits if self.hotwords is None else self.hotwords.raised(logits)
            if self.temperature == 0:
                chosen = favoured.argmax(dim=-1)
            else:
                chosen = Categorical(logits=favoured / self.temperature, validate_args=False).sample()
            logprob = F.log_softmax(logits, dim=1).gather(1, chosen[:, None])[:, 0]
        alive = tokens[:, length - 1] != self.eot
        self.logprobs[:, length] = torch.where(alive, logprob, 0.0)
        chosen = torch.where(alive, chosen, self.eot)
        tokens[:, length] = chosen
        if self.hotwords is not None:
            self.hotwords.follow(chosen)
        return (chosen == self.eot).all()

    def without_done(self, tokens: Tensor, length: int, cache: KVCache) -> Tensor:
        """The rows [R', L] to go on with: those that are done leave once they are a quarter.

        On a CPU a step takes as long as it has rows; leaving costs a copy of the others' keys and values.
        """
        going = (tokens[:, length] != self.eot).nonzero()[:, 0]
        if 4 * len(going) > 3 * len(tokens):
            return tokens
        self.left = self._batch(tokens)
        self.places, self.logprobs = self.places[going], self.logprobs[going]
        cache.keep(going)
        if self.hotwords is not None:
            self.hotwords.keep(going)
        return tokens[going]

    def _batch(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and log probabilities of the whole batch."""
        if self.left is None:
            return tokens, self.logprobs
        for kept, rows in zip(self.left, (tokens, self.logprobs)):
            kept[self.places] = rows
        return self.left

    def candidates(self, tokens: Tensor) -> Candidates:
        tokens, logprobs = (rows.unflatten(0, (-1, self.group)) for rows in self._batch(tokens))
        return Candidates(tokens, logprobs, logprobs.sum(dim=-1))


class BeamSearch:
    """Beam search with patience; ends a window at round(beam_size * patience) finished candidates."""

    def __init__(
        self,
        windows: int,
        beams: int,
        patience: float | None,
        eot: int,
        max_length: int,
        device: torch.device,
        hotwords: Hotwords | None = None,
    ):
        self.windows, self.beams, self.eot, self.hotwords = windows, beams, eot, hotwords
        self.wanted = round(beams * (patience or 1.0))
        # the beams of a window start equal: only the first may branch
        self.scores = torch.full((windows, beams), NEVER, device=device)
        self.scores[:, 0] = 0.0
        self.logprobs = torch.zeros(windows * beams, max_length, device=device)
        self.n_finished = torch.zeros(windows, 1, dtype=torch.long, device=device)
        # one place more than is kept takes what is not
        shape = (windows, self.wanted + 1, max_length)
        self.finished = Candidates(
            torch.full(shape, eot, dtype=torch.long, device=device),
            torch.zeros(shape, device=device),
            torch.full(shape[:2], NEVER, device=device),
        )
        self.first_row = torch.arange(windows, device=device)[:, None] * beams

    def step(self, tokens: Tensor, length: int, logits: Tensor, cache: KVCache) -> Tensor:
        open_ = self.n_finished < self.wanted  # [B, 1]; other windows stay as they are
        # one candidate more than there are beams: at most one of a beam's ends
        logprobs = F.log_softmax(logits, dim=-1)
        favoured = logprobs if self.hotwords is None else self.hotwords.raised(logprobs)
        scores, ids = favoured.topk(self.beams + 1, dim=-1)
        logprobs = logprobs.gather(1, ids)
        scores = (self.scores[:, :, None] + scores.view(self.windows, self.beams, -1)).flatten(1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)  # [B, beams * (beams + 1)]
        ids, logprobs = (each.view(self.windows, -1).gather(1, order) for each in (ids, logprobs))
        rows = self.first_row + order // (self.beams + 1)
        ends = ids == self.eot
        rank = (~ends).long().cumsum(dim=1)  # of the candidates that go on
        self._finish(tokens, length, scores, logprobs, rows, ends & (rank < self.beams) & open_)
        kept = (
            ((~ends) & (rank <= self.beams)).long().sort(dim=1, descending=True, stable=True).indices[:, : self.beams]
        )
        stay = torch.arange(self.beams, device=tokens.device) + self.first_row
        rows = torch.where(open_, rows.gather(1, kept), stay).flatten()
        tokens[:, :length], self.logprobs[:, :length] = tokens[rows, :length], self.logprobs[rows, :length]
        tokens[:, length] = torch.where(open_, ids.gather(1, kept), self.eot).flatten()
        self.logprobs[:, length] = torch.where(open_, logprobs.gather(1, kept), 0.0).flatten()
        self.scores = torch.where(open_, scores.gather(1, kept), self.scores)
        cache.select(rows)
        if self.hotwords is not None:
            self.hotwords.follow(tokens[:, length], rows)
        return (self.n_finished >= self.wanted).all()

    def _finish(
        self, tokens: Tensor, length: int, scores: Tensor, logprobs: Tensor, rows: Tensor, ending: Tensor
    ) -> None:
        """Keep the ending candidates [B, C], best first, while there are places."""
        candidates = ending.long().sort(dim=1, descending=True, stable=True).indices[:, : self.beams]
        ending = ending.gather(1, candidates)  # no more than one ends a beam
        place = self.n_finished + ending.long().cumsum(dim=1) - 1
        place = torch.where(ending, place, self.wanted).clamp(max=self.wanted)
        rows = rows.gather(1, candidates)
        of_tokens = self.logprobs[rows]
        of_tokens[:, :, length] = logprobs.gather(1, candidates)
        finished, places = self.finished, place[:, :, None].expand_as(of_tokens)
        finished.tokens.scatter_(1, places, tokens[rows])
        finished.logprobs.scatter_(1, places, of_tokens)
        finished.scores.scatter_(1, place, scores.gather(1, candidates))
        finished.scores[:, -1] = NEVER
        self.n_finished = (self.n_finished + ending.sum(dim=1, keepdim=True)).clamp(max=self.wanted)

    def candidates(self, tokens: Tensor) -> Candidates:
        """The finished ones, and where they are fewer than the beams, the best unfinished."""
        best, order = self.scores.sort(dim=1, descending=True, stable=True)
        needed = torch.arange(self.beams, device=tokens.device) < self.beams - self.n_finished
        rows = self.first_row + order
        unfinished = Candidates(tokens[rows], self.logprobs[rows], best.masked_fill(~needed, NEVER))
        return Candidates(*(torch.cat([done[:, :-1], rest], dim=1) for done, rest in zip(self.finished, unfinished)))


def by_length(score: float, length: int, penalty: float | None) -> float:
    """A score by the number of tokens: their mean, or with a penalty as in Wu et al. 2016 (arXiv:1609.08144)."""
    return score / (max(length, 1) if penalty is None else ((5 + length) / 6) ** penalty)
