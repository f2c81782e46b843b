"""A window's candidates in their order: by score, or by minimum Bayes risk, the text nearest to what may be said.

For the risk, beams and a few samples are compared with each other (Eikema & Aziz 2022, "Sampling-Based Approximations
to Minimum Bayes Risk Decoding", arXiv:2108.04718): the candidate comes first whose expected edit distance to the
samples, by characters, is the least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from whisper.tokenizer import Tokenizer

from .edits import distances
from .search import NEVER, Candidates, by_length

SAMPLES = 8  # drawn of each window
TEMPERATURE = 0.4  # at which they are drawn

Candidate = tuple[list[int], list[float], float]  # tokens, their log probabilities, score


@dataclass(frozen=True)
class Alternative:
    """One of the texts of a window; score: its log probability by length, as candidates are ranked by."""

    text: str
    score: float
    tokens: list[int]


def ranked_candidates(found: Candidates, begin: int, eot: int, length_penalty: float | None) -> list[Candidate]:
    """A window's candidates [N, L], best first: tokens from `begin` to <|endoftext|>, log probabilities, and score.

    The log probabilities are those of the tokens and, where it was reached, of <|endoftext|>.
    """
    made: list[Candidate] = []
    for row, logprobs, score in zip(*(x.tolist() for x in found)):
        if score > NEVER or not made:
            tokens = trimmed(row[begin:], eot)
            of_tokens = logprobs[begin : begin + len(tokens) + 1]
            made.append((tokens, of_tokens, by_length(score, len(tokens), length_penalty)))
    return sorted(made, key=lambda candidate: -candidate[2])


def by_risk(ranked: list[Candidate], samples: list[Candidate], tokenizer: Tokenizer) -> list[Candidate]:
    """Candidates and samples, the one of least risk first; of equal ones the candidate that was ahead."""
    pool = [*ranked, *samples]
    texts = [tokenizer.decode(tokens).strip() for tokens, _, _ in pool]
    risk = risks(texts, texts[len(ranked) :])
    return [pool[i] for i in np.argsort(risk, kind="stable")]


def n_best(ranked: Sequence[Candidate], count: int, tokenizer: Tokenizer) -> list[Alternative]:
    """Up to `count` alternatives of ranked candidates; of those that differ in their time stamps alone, the best."""
    texts: dict[str, Alternative] = {}
    for tokens, _, score in ranked:
        text = tokenizer.decode(tokens).strip()
        texts.setdefault(text, Alternative(text, score, tokens))
    return list(texts.values())[:count]


def risks(candidates: Sequence[str], evidence: Sequence[str]) -> np.ndarray:
    """The mean edit distance [N] of each candidate to the texts that the model drew, in characters."""
    texts = list(dict.fromkeys([*candidates, *evidence]))
    place = {text: i for i, text in enumerate(texts)}
    between = distances(texts)[np.ix_([place[text] for text in candidates], [place[text] for text in evidence])]
    return between.mean(axis=1)


def trimmed(tokens: list[int], eot: int) -> list[int]:
    """The tokens before <|endoftext|>."""
    return tokens[: tokens.index(eot)] if eot in tokens else tokens
