"""Minimum word error rate training: hypotheses of the student itself, and their errors relative to one another.

The loss is the expected number of word errors (minimum risk training, Shen et al. 2016, arXiv:1512.02433; for speech
Prabhavalkar et al. 2018, arXiv:1712.01818), its gradient estimated over a few samples of each window, each against the
mean of the window's others (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"). Distillation
shows the decoder right beginnings alone; its own samples show it loops and inventions, and what they cost. Samples
with time stamps show it what an end that is set too early costs: the words behind it.
"""

from __future__ import annotations

import re

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from dawhisper.decoding import DecodingOptions, Rules, model_tokenizer, sample_windows
from dawhisper.model import Whisper

from .losses import IGNORE
from .objective import Hypotheses, Inputs
from .recipe import ObjectiveOptions

NOT_WORD = re.compile(r"[^\w\s']+")


class Sampler:
    """Draws hypotheses from a copy of the student in half precision, whose weights follow the student's."""

    def __init__(self, model: Whisper, options: ObjectiveOptions, dtype: torch.dtype):
        self.options = options
        self.copy = Whisper(model.dims, model.dual, model.variable_audio_ctx).to(model.device, dtype)
        self.copy.eval().requires_grad_(False)
        self.tokenizer = model_tokenizer(model)

    @torch.no_grad()
    def __call__(self, model: Whisper, inputs: Inputs) -> Hypotheses:
        """Samples of each window of the batch, and their advantage over one another; see Hypotheses."""
        o, tokenizer = self.options, self.tokenizer
        torch._foreach_copy_(list(self.copy.parameters()), list(model.parameters()))
        texts = [self.words([t for t in row if 0 <= t < tokenizer.eot]) for row in inputs.labels.tolist()]
        spoken = [bool(words) and snr > -torch.inf for words, snr in zip(texts, inputs.snr_db.tolist())]
        stamped = bool(torch.rand(()) < o.risk_timestamps)
        first = self.first_tokens(inputs.tokens, stamped)
        longest = int((inputs.labels != IGNORE).sum(1).max())
        drawn = DecodingOptions(
            temperature=o.risk_temperature,
            best_of=o.risk_samples,
            sample_len=min(-(-(longest * 3 // 2 + 8) // 32) * 32, model.dims.n_text_ctx // 2),
            without_timestamps=not stamped,
        )
        rows = sample_windows(self.copy, self.copy.encode(inputs.mel.to(self.copy.dtype)), first, drawn)  # [B, N, n]
        errors = torch.zeros(rows.shape[:2])
        for window, samples in enumerate(rows[:, :, first.shape[1] :].tolist()):
            for k, sample in enumerate(samples):
                heard = self.words([t for t in sample if t < tokenizer.eot])
                most = 2 * len(texts[window]) + 4  # a loop is wrong whatever its length
                errors[window, k] = min(most, Levenshtein.distance(texts[window], heard)) if spoken[window] else 0
        advantage = (errors - errors.mean(1, keepdim=True)) * (errors.shape[1] / (errors.shape[1] - 1))
        tokens, labels = self.next_tokens(rows.flatten(0, 1).to(inputs.mel.device), first.shape[1])
        mean = errors[torch.tensor(spoken)].mean() if any(spoken) else torch.zeros(())
        costs = (advantage.flatten().to(tokens.device), mean.to(tokens.device))
        return Hypotheses(tokens, labels, *costs, Rules(self.copy, tokenizer, drawn), first.shape[1])

    def next_tokens(self, rows: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        """rows [R, n], of which `begin` tokens were given -> decoder input and labels [R, m], to the longest's end."""
        width = int((rows != self.tokenizer.eot).sum(1).max()) + 1
        rows = rows[:, : min(-(-width // 8) * 8, rows.shape[1])]
        ended = rows[:, :-1] == self.tokenizer.eot  # the first <|endoftext|> is said, those after it are not
        place = torch.arange(1, rows.shape[1], device=rows.device)
        return rows[:, :-1], rows[:, 1:].masked_fill(ended | (place < begin), IGNORE)

    def first_tokens(self, tokens: Tensor, stamped: bool) -> Tensor:
        """Each window's <|startoftranscript|>, language and task, and <|notimestamps|> if so: [B, n] -> [B, k]"""
        tokenizer = self.tokenizer
        start = (tokens == tokenizer.sot).long().argmax(1, keepdim=True)
        place = torch.arange(len(tokenizer.sot_sequence), device=tokens.device)
        given = tokens.gather(1, start + place)
        return given if stamped else torch.cat([given, torch.full_like(start, tokenizer.no_timestamps)], dim=1)

    def words(self, tokens: list[int]) -> list[str]:
        return NOT_WORD.sub(" ", self.tokenizer.decode(tokens).lower()).split()
