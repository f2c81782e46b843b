"""Does the second branch model noise, or is it a second speech branch? What gates and attentions say of known noise.

A position of the encoder (20 ms) is noise-dominated where the noise that was mixed in has more energy than the speech.
A branch that looks for noise puts more of its attention there than the share of such positions, and than the primary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dawhisper.audio import N_SAMPLES_PER_TOKEN, pad_or_trim
from dawhisper.decoding import DecodingOptions, encode_text, initial_tokens, model_tokenizer
from dawhisper.model import Whisper
from dawhisper.noise.mixing import Mixture, frame_energy
from dawhisper.trace import Trace

from .conditions import Condition
from .metrics import pearson, spearman

CHUNK = 8  # windows traced at once: the attention scores of all layers are kept


@dataclass(frozen=True)
class GateReading:
    """One window, decoded: means over its text positions, by decoder layer.

    gate: the primary's share a. primary, secondary: share of the branch's attention within the utterance that falls on
    noise-dominated positions. noise_frames: share of the utterance's positions that are.
    """

    snr: float
    gate: list[float]
    primary: list[float]
    secondary: list[float]
    noise_frames: float


@dataclass(frozen=True)
class GateSummary:
    """A dual model's gate and attention: by condition, each a mean over utterances of what `GateReading` holds.

    pearson, spearman: correlation over utterances of gate and SNR, by layer and then of the mean over layers; pearson
    over mixtures of speech and noise, spearman with clean speech, whose SNR is infinite, as well.
    """

    model: str
    conditions: dict[str, dict[str, list[float] | float]]
    pearson: list[float]
    spearman: list[float]


def noise_dominated(mixture: Mixture, positions: int) -> tuple[Tensor, Tensor]:
    """Of a mixture of one: which encoder positions are noise-dominated, and which lie in the utterance; bool [T]."""
    noise, clean = (pad_or_trim(frame_energy(x)[0], positions) for x in (mixture.noise, mixture.clean))
    inside = torch.arange(positions) * N_SAMPLES_PER_TOKEN < int(mixture.lengths[0])
    return (noise > clean) & inside, inside


@torch.no_grad()
def read_gates(
    model: Whisper, mel: Tensor, texts: Sequence[str], mixtures: Sequence[Mixture], language: str | None
) -> list[GateReading]:
    """Force the hypotheses through a dual model. mel [B, n_mels, 2T], B texts and mixtures of one -> B readings."""
    return [
        reading
        for i in range(0, len(texts), CHUNK)
        for reading in _read(model, mel[i : i + CHUNK], texts[i : i + CHUNK], mixtures[i : i + CHUNK], language)
    ]


def _read(
    model: Whisper, mel: Tensor, texts: Sequence[str], mixtures: Sequence[Mixture], language: str | None
) -> list[GateReading]:
    tokens, wanted = _tokens(model, texts, language)
    trace = Trace(attention=True)
    model(mel.to(model.dtype), tokens, trace)
    masks = [noise_dominated(m, mel.shape[-1] // 2) for m in mixtures]
    noisy, inside = (torch.stack(x).to(model.device) for x in zip(*masks))  # [B, T]
    weight = wanted / wanted.sum(dim=1, keepdim=True)  # [B, n]
    gates = torch.stack([(trace.gate[layer].float() * weight).sum(dim=1) for layer in sorted(trace.gate)], dim=1)
    shares = [
        torch.stack([_share(scores[layer], weight, noisy, inside) for layer in sorted(scores)], dim=1)
        for scores in (trace.primary, trace.secondary)
    ]
    frames = noisy.sum(dim=1) / inside.sum(dim=1)
    return [
        GateReading(float(mixture.snr_db[0]), _rounded(gate), _rounded(primary), _rounded(secondary), float(share))
        for mixture, gate, primary, secondary, share in zip(mixtures, gates, *shares, frames)
    ]


def _rounded(x: Tensor) -> list[float]:
    """To what float32 is sure of: a constant gate must not seem to correlate with anything."""
    return [round(value, 6) for value in x.tolist()]


def _tokens(model: Whisper, texts: Sequence[str], language: str | None) -> tuple[Tensor, Tensor]:
    """Prompt and text [B, n], filled up with <|endoftext|>; and which positions predict text or its end, [B, n]."""
    tokenizer = model_tokenizer(model, language or "en", "transcribe")
    prompt = initial_tokens(model, tokenizer, DecodingOptions(language=language or "en", without_timestamps=True))
    room = model.dims.n_text_ctx - len(prompt)
    rows = [prompt + (encode_text(tokenizer, text)[:room] if text.strip() else []) for text in texts]
    n = max(map(len, rows))
    tokens = torch.tensor([row + [tokenizer.eot] * (n - len(row)) for row in rows], device=model.device)
    position = torch.arange(n, device=model.device)
    ends = torch.tensor([len(row) for row in rows], device=model.device)[:, None]
    return tokens, ((position >= len(prompt) - 1) & (position < ends)).float()


def _share(scores: Tensor, weight: Tensor, noisy: Tensor, inside: Tensor) -> Tensor:
    """Scores [B, h, n, T], weights of positions [B, n], masks [B, T] -> share of attention on the noisy ones [B]."""
    attention = (scores.float().softmax(dim=-1).mean(dim=1) * weight[:, :, None]).sum(dim=1)  # [B, T]
    return (attention * noisy).sum(dim=1) / (attention * inside).sum(dim=1).clamp(min=1e-20)


def summarize(model: str, readings: Sequence[tuple[Condition, GateReading]]) -> GateSummary:
    """The readings of a model under conditions -> their means and correlations."""
    by_condition: dict[str, dict[str, list[float] | float]] = {}
    for name in dict.fromkeys(condition.name for condition, _ in readings):
        here = [reading for condition, reading in readings if condition.name == name]
        by_condition[name] = {
            "gate": np.mean([r.gate for r in here], axis=0).tolist(),
            "primary": np.mean([r.primary for r in here], axis=0).tolist(),
            "secondary": np.mean([r.secondary for r in here], axis=0).tolist(),
            "noise_frames": float(np.mean([r.noise_frames for r in here])),
        }
    mixed = [r for condition, r in readings if condition.noisy and math.isfinite(r.snr)]
    spoken = mixed + [r for condition, r in readings if condition.kind == "clean"]
    return GateSummary(
        model,
        by_condition,
        *([f(*pair) for pair in _gate_pairs(rs)] for f, rs in ((pearson, mixed), (spearman, spoken))),
    )


def _gate_pairs(readings: Sequence[GateReading]) -> list[tuple[list[float], list[float]]]:
    """(SNRs, gates) by layer and then of the mean over layers."""
    snr = [r.snr for r in readings]
    layers = zip(*(r.gate for r in readings))
    return [(snr, list(gates)) for gates in layers] + [(snr, [float(np.mean(r.gate)) for r in readings])]


def over_layers(x: list[float] | float) -> float:
    """The mean over layers of what a summary has for each, or its one number."""
    return sum(x) / len(x) if isinstance(x, list) else x
