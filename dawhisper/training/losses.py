"""What training minimises: small pure functions, one per objective. Weights live in the recipe.

Shapes: B windows, n target positions, T encoder positions (one per 20 ms), V vocabulary, L decoder layers, d width.
Each function sums over the positions that its mask keeps and divides by `count`, the number of such positions. Under
several devices or accumulation steps the caller passes the count of the whole step, so that the gradient is that of
one large batch however the step is split; without it, the positions at hand are counted.
Everything is computed in float32, whatever the inputs' type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dawhisper.audio import N_SAMPLES_PER_TOKEN, pad_or_trim
from dawhisper.data.targets import IGNORE
from dawhisper.noise.mixing import frame_energy

ROWS = 1024  # token positions whose distributions over the vocabulary are looked at together


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, count: Tensor | None = None) -> Tensor:
    """Cross-entropy of the next token; logits [B, n, V], labels [B, n] with `IGNORE` where there is none.

    Label smoothing after Szegedy et al. 2016 (arXiv:1512.00567, section 7): the target is
    (1 - e) one_hot(label) + e / V.
    """

    def entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        q, keep, label = F.log_softmax(logits.float(), dim=-1), labels != IGNORE, labels.clamp(min=0)[:, None]
        hit, spread = 1 - label_smoothing, label_smoothing / logits.shape[-1]
        value = (hit * q.gather(-1, label)[:, 0] + spread * q.sum(-1)) * keep
        gradient = (q.exp() - spread).scatter_add(-1, label, torch.full_like(q[:, :1], -hit))
        return -value.sum(), gradient * keep[:, None]

    total = _ByRows.apply(entropy, logits.flatten(0, 1), labels.flatten())
    return total / _number(labels != IGNORE, count)


def distil_logits(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0, count: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of the next-token distributions; logits [B, n, V], mask [B, n] bool.

    t^2 KL(softmax(teacher / t) || softmax(student / t)), after Hinton et al. 2015 (arXiv:1503.02531, section 2.1):
    the factor t^2 keeps the gradient's size when the temperature changes.
    """

    def divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        p = F.log_softmax(teacher.float() / temperature, dim=-1)
        q = F.log_softmax(student.float() / temperature, dim=-1)
        value = ((p.exp() * (p - q)).sum(-1) * mask).sum()
        return value, (q.exp() - p.exp()) * (mask / temperature)[:, None]

    total = _ByRows.apply(divergence, student.flatten(0, 1), teacher.flatten(0, 1), mask.flatten())
    return temperature**2 * total / _number(mask, count)


class _ByRows(torch.autograd.Function):
    """The sum of a loss over rows of logits [R, V], some rows at a time, and its gradient made on the way.

    Logits are a step's largest tensors: autograd would keep several more of them in float32, or compute them twice.
    The rule takes logits and the other tensors' rows, and gives the loss and its gradient for these logits.
    """

    @staticmethod
    def forward(ctx: Any, rule: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, *others: Tensor) -> Tensor:
        gradients, values = torch.empty_like(logits), []
        for mine, *rows in zip(*(x.split(ROWS) for x in (gradients, logits, *others))):
            value, gradient = rule(*rows)
            mine.copy_(gradient)
            values.append(value)
        ctx.save_for_backward(gradients)
        ctx.n_others = len(others)
        return torch.stack(values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (for_logits,) = ctx.saved_tensors
        return (None, for_logits * gradient.to(for_logits.dtype), *[None] * ctx.n_others)


def risk(
    logits: Tensor, labels: Tensor, advantage: Tensor, temperature: float = 1.0, count: Tensor | None = None
) -> Tensor:
    """Each hypothesis' log probability at the temperature at which it was drawn, times its advantage in errors.

    logits [R, n, V]; labels [R, n], IGNORE where there is no loss; advantage [R]: errors above what was expected. The
    gradient is that of the expected errors (REINFORCE, Williams 1992); the value itself says nothing.
    """

    def weighed(logits: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        q, label = F.log_softmax(logits.float() / temperature, dim=-1), labels.clamp(min=0)[:, None]
        weight = weight * (labels != IGNORE)
        gradient = (-q.exp()).scatter_add(-1, label, torch.ones_like(q[:, :1]))
        return (q.gather(-1, label)[:, 0] * weight).sum(), gradient * (weight / temperature)[:, None]

    weight = advantage[:, None].expand(labels.shape)
    total = _ByRows.apply(weighed, logits.flatten(0, 1), labels.flatten(), weight.flatten())
    return total / _number(labels != IGNORE, count)


def distil_features(student: Tensor, teacher: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Squared error over the teacher's variance; features [B, N, d] (N frames or tokens), mask [B, N] bool.

    mean_d (student - teacher)^2 / var(teacher of this window): 0 when equal, 1 when the student knows only the mean.
    The variance is each window's own, over its kept positions and channels, so that a window weighs the same in any
    batch (FitNets' hint loss, arXiv:1412.6550, section 2.2, made scale-free).
    """
    student, teacher, keep = student.float(), teacher.float(), mask.unsqueeze(-1).float()
    n = (keep.sum((1, 2)) * teacher.shape[-1]).clamp(min=1)  # [B]
    mean = (teacher * keep).sum((1, 2)) / n
    variance = ((teacher - mean[:, None, None]).square() * keep).sum((1, 2)) / n
    error = (student - teacher).square().mean(-1) * mask  # [B, N]
    return (error / (variance[:, None] + 1e-6)).sum() / _number(mask, count)


def gate_target(snr_db: Tensor, centre_db: float = 7.5, width_db: float = 5.0) -> Tensor:
    """The primary's share that a mixture of this SNR asks for: sigmoid((SNR - centre) / width), [B] in [0, 1]."""
    return torch.sigmoid((snr_db.float() - centre_db) / width_db)


def gate_supervision(
    gate: Tensor,
    snr_db: Tensor,
    mask: Tensor,
    centre_db: float = 7.5,
    width_db: float = 5.0,
    count: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of the gate against the SNR's target, mean over layers and positions.

    gate [L, B, n] in [0, 1]; snr_db [B], +inf without noise, -inf for noise alone; mask [B, n] bool.
    Without it the gate collapses onto one branch and the dual decoder is a single one.
    """
    target = gate_target(snr_db, centre_db, width_db)[None, :, None]
    gate = gate.float()
    tiny = 1e-4  # half precision rounds a confident gate to 0 or 1
    entropy = -(target * (gate + tiny).log() + (1 - target) * (1 - gate + tiny).log())
    return (entropy * mask).sum() / (len(gate) * _number(mask, count))


def noise_dominance(clean: Tensor, noise: Tensor, n_frames: int) -> Tensor:
    """The noise's share of the energy per encoder position: clean, noise [B, S] samples -> [B, n_frames] in [0, 1].

    Samples beyond the waveform count as silence; where both are silent the share is 0.
    """
    power = [pad_or_trim(frame_energy(x), n_frames) for x in (clean, noise)]
    return power[1] / (power[0] + power[1] + 1e-8)


def noise_attention(scores: Tensor, dominance: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """KL(noise dominance || the secondary's attention), the attention averaged over heads.

    scores [B, h, n, T] before the softmax; dominance [B, T] in [0, 1], zero outside the audio; mask [B, n] bool.
    Windows without noise ask for nothing and count nothing. A supervised attention as in Garg et al. 2019
    (arXiv:1909.02074, section 4.2), the target here being where the noise is.
    """
    total = dominance.float().sum(-1, keepdim=True)  # [B, 1]
    target = dominance.float() / total.clamp(min=1e-6)
    attention = scores.float().softmax(-1).mean(1)  # [B, n, T]
    entropy = torch.special.entr(target).sum(-1)[:, None]  # [B, 1]
    divergence = -(target[:, None] * (attention + 1e-8).log()).sum(-1) - entropy  # [B, n]
    keep = mask & (total > 1e-3)
    return (divergence * keep).sum() / _number(mask, count)


def noise_mel(predicted: Tensor, target: Tensor, mask: Tensor, count: Tensor | None = None) -> Tensor:
    """Squared error of the noise's log-mel spectrum read from the secondary's memory.

    predicted [B, T, n_mels], one spectrum per encoder position; target [B, n_mels, 2T], the log-mel of the noise
    alone, whose frames are averaged in pairs; mask [B, T] bool.
    """
    frames = target.float().unflatten(-1, (-1, 2)).mean(-1).mT  # [B, T, n_mels]
    error = (predicted.float() - frames).square().mean(-1)
    return (error * mask).sum() / _number(mask, count)


def frame_mask(lengths: Tensor, n_frames: int) -> Tensor:
    """Encoder positions that hear audio: lengths [B] samples -> [B, n_frames] bool; at least one is kept."""
    frames = (lengths + N_SAMPLES_PER_TOKEN - 1).div(N_SAMPLES_PER_TOKEN, rounding_mode="floor").clamp(min=1)
    return torch.arange(n_frames, device=lengths.device)[None] < frames[:, None]


def _number(mask: Tensor, count: Tensor | None) -> Tensor:
    return (mask.sum() if count is None else count).clamp(min=1)
