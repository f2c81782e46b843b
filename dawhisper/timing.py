"""When each word was spoken: the cross-attention's path through the text (dynamic time warping), as in Whisper.

The warping, the median filter and the punctuation rules are openai-whisper's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from whisper.audio import TOKENS_PER_SECOND
from whisper.timing import WordTiming, dtw, median_filter, merge_punctuations
from whisper.tokenizer import Tokenizer

from .model import AudioFeatures, Whisper
from .trace import Trace

SENTENCE_END = ".。!！?？"


@dataclass(frozen=True)
class Word:
    """A word with its times in seconds and the model's mean probability of its tokens.

    gate: the primary branch's mean share in predicting its tokens; None where the model has no second branch.
    logprobs: its tokens' log probabilities as they were decoded, speaker: who says it; None where not asked for.
    """

    word: str
    start: float
    end: float
    probability: float
    gate: float | None = None
    logprobs: list[float] | None = None
    speaker: str | None = None


@dataclass
class Timing(WordTiming):
    """openai-whisper's, with the gate."""

    gate: float | None = None


@dataclass(frozen=True)
class TimedText:
    """What is to be timed: a segment's text tokens and its own times in seconds, refined by those of its words.

    logprobs: of the tokens, for the words to have; None where they were not asked for.
    """

    tokens: Sequence[int]
    start: float
    end: float
    words: tuple[Word, ...] = ()
    logprobs: Sequence[float] | None = None


def alignment_scores(
    model: Whisper, features: AudioFeatures, tokens: Tensor
) -> tuple[Tensor, Tensor, list[float] | None]:
    """Attention scores [heads, n, T] of the alignment heads, before the softmax, the logits [n, V], and the gates [n].

    The gates are the means over all layers of the primary branch's share, None without second branch.
    """
    heads = model.alignment_heads.nonzero().tolist()
    trace = Trace(layers={layer for layer, _ in heads} if model.dual is None else None, attention=True)
    logits = model.decoder(tokens[None], features, trace=trace)[0]
    gates = torch.stack(list(trace.gate.values())).float().mean(dim=(0, 1)).tolist() if trace.gate else None
    scores = torch.stack([trace.primary[layer][0, head] for layer, head in heads]).float()
    # the warping works in double precision, which mps does not have
    return (scores if scores.is_cuda else scores.cpu()), logits, gates


@torch.no_grad()
def find_alignment(
    model: Whisper,
    tokenizer: Tokenizer,
    text_tokens: list[int],
    features: AudioFeatures,
    num_frames: int,
    *,
    filter_width: int = 7,
) -> list[Timing]:
    """Words of `text_tokens` with times in seconds from the window's start, and their gates.

    features: one window, [1, T, d]; num_frames: mel frames of it that hold audio.
    """
    if not text_tokens:
        return []
    n_start = len(tokenizer.sot_sequence)
    tokens = [*tokenizer.sot_sequence, tokenizer.no_timestamps, *text_tokens, tokenizer.eot]
    scores, logits, gates = alignment_scores(model, features, torch.tensor(tokens, device=model.device))
    probs = logits[n_start : n_start + len(text_tokens), : tokenizer.eot].softmax(dim=-1)
    token_probs = probs[torch.arange(len(text_tokens)), text_tokens].tolist()

    weights = scores[:, :, : num_frames // 2].softmax(dim=-1)
    std, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
    weights = median_filter((weights - mean) / std, filter_width)
    threads = torch.get_num_threads()
    text_path, time_path = dtw(-weights.mean(dim=0)[n_start:-1])
    torch.set_num_threads(threads)  # numba's first parallel function gives torch a thread for each processor

    words, word_tokens = tokenizer.split_to_word_tokens([*text_tokens, tokenizer.eot])
    if len(word_tokens) <= 1:
        return []
    bounds = np.cumsum([0, *(len(t) for t in word_tokens[:-1])])
    # the time at which the path first reaches each token
    arrivals = time_path[np.diff(text_path, prepend=text_path[0] - 1) > 0] / TOKENS_PER_SECOND
    # what predicts a token stands before it
    shares = gates and gates[n_start : n_start + len(text_tokens)]
    return [
        Timing(
            word,
            ids,
            float(arrivals[i]),
            float(arrivals[j]),
            float(np.mean(token_probs[i:j])),
            round(float(np.mean(shares[i:j])), 3) if shares else None,
        )
        for word, ids, i, j in zip(words, word_tokens, bounds[:-1], bounds[1:])
    ]


def add_word_times(
    segments: list[TimedText],
    alignment: list[Timing],
    time_offset: float,
    last_speech: float,
    prepend_punctuations: str,
    append_punctuations: str,
) -> list[TimedText]:
    """Give the segments of one window their words, and fit the segments' own times to them.

    alignment: of the segments' tokens together, changed here; time_offset: the window's start; last_speech: the end of
    the last word before it (seconds).
    """
    durations = [t.end - t.start for t in alignment if t.end != t.start]
    median = min(0.7, float(np.median(durations))) if durations else 0.0
    if durations:
        shorten_at_sentence_ends(alignment, 2 * median)
    merge_punctuations(alignment, prepend_punctuations, append_punctuations)

    timed, timings = [], iter(alignment)
    for segment in segments:
        words, taken = [], 0
        while taken < len(segment.tokens) and (timing := next(timings, None)) is not None:
            ends = taken + len(timing.tokens)
            logprobs = None if segment.logprobs is None else list(segment.logprobs[taken:ends])
            taken = ends
            if timing.word:
                start, end = round(time_offset + timing.start, 2), round(time_offset + timing.end, 2)
                words.append(Word(timing.word, start, end, timing.probability, timing.gate, logprobs))
        segment = fit_to_words(segment, words, median, last_speech)
        if words:
            last_speech = segment.end
        timed.append(segment)
    return timed


def shorten_at_sentence_ends(alignment: list[Timing], longest: float) -> None:
    """A word beside a full stop takes the pause with it; cut it to `longest` seconds."""
    for before, timing in itertools.pairwise(alignment):
        if timing.end - timing.start > longest:
            if timing.word in SENTENCE_END:
                timing.end = timing.start + longest
            elif before.word in SENTENCE_END:
                timing.start = timing.end - longest


def fit_to_words(segment: TimedText, words: list[Word], median: float, last_speech: float) -> TimedText:
    """The segment with its words, each one's times corrected by the other's."""
    if not words:
        return replace(segment, words=())
    longest = 2 * median
    first = words[0]
    # the first words after a pause take it with them
    if first.end - last_speech > 4 * median and (
        first.end - first.start > longest or (len(words) > 1 and words[1].end - first.start > 2 * longest)
    ):
        if len(words) > 1 and words[1].end - words[1].start > longest:
            border = max(words[1].end / 2, words[1].end - longest)
            words[0], words[1] = replace(first, end=border), replace(words[1], start=border)
        words[0] = replace(words[0], start=max(0, words[0].end - longest))

    start, end = segment.start, segment.end
    if start < words[0].end and start - 0.5 > words[0].start:  # the first word is too long
        words[0] = replace(words[0], start=max(0, min(words[0].end - median, start)))
    else:
        start = words[0].start
    if end > words[-1].start and end + 0.5 < words[-1].end:  # the last word is too long
        words[-1] = replace(words[-1], end=max(words[-1].start + median, end))
    else:
        end = words[-1].end
    return TimedText(segment.tokens, start, end, tuple(words))
