"""One micro-batch as student and teacher take it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dawhisper.decoding import Rules

from . import losses

COUNTS = ("speech", "silence", "target", "frame", "noisy")  # what the losses are divided by, see `count`


class Inputs(NamedTuple):
    """One micro-batch as the student takes it. S samples, n tokens, T encoder positions, all on one device."""

    mel: Tensor  # [B, n_mels, 2T] what the student hears; 2 n_mels where its secondary branch hears something else
    tokens: Tensor  # [B, n] decoder input
    labels: Tensor  # [B, n] next tokens, losses.IGNORE where there is no loss
    snr_db: Tensor  # [B] +inf without noise, -inf for noise alone
    frames: Tensor  # [B, T] bool, encoder positions that hear audio
    clean_mel: Tensor | None = None  # [B, n_mels, 3000 or 2T] what the teacher hears
    noise_mel: Tensor | None = None  # [B, n_mels, 2T] the noise alone
    dominance: Tensor | None = None  # [B, T] the noise's share of the energy
    held: Tensor | None = None  # [B, 1, 1] windows heard through one branch alone: the gate, nan where it decides


class Hypotheses(NamedTuple):
    """What the student itself said to a micro-batch, N samples a window; see risk.py."""

    tokens: Tensor  # [B * N, n] decoder input
    labels: Tensor  # [B * N, n] what was said next, losses.IGNORE where there is no loss
    advantage: Tensor  # [B * N] word errors above the mean of the window's other samples
    errors: Tensor  # [] mean word errors of a sample, for the log
    rules: Rules  # by which they were drawn
    begin: int  # how many of the tokens were given


def count(inputs: Inputs) -> Tensor:
    """How many positions each kind of loss covers in this micro-batch: float [5], see COUNTS."""
    target = inputs.labels != losses.IGNORE
    silent = (inputs.snr_db == -torch.inf)[:, None]
    noisy = torch.isfinite(inputs.snr_db)[:, None] | silent
    masks = (target & ~silent, target & silent, target, inputs.frames, target & noisy)
    return torch.stack([mask.sum() for mask in masks]).float()


def pad_tokens(x: Tensor, multiple: int, value: int, limit: int) -> Tensor:
    """[B, n] -> [B, m], m the next multiple within the limit: few shapes mean few compilations."""
    n = x.shape[1]
    return F.pad(x, (0, min(-n % multiple, max(0, limit - n))), value=value)
