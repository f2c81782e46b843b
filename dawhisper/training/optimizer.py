"""Optimisation: parameter groups, the schedule of the learning rate, an average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dawhisper.model import Whisper, is_second_branch

from .recipe import OptimOptions

FROM_A_CONSTANT = ("gate", "mixture", "noise_scale")


def parameter_groups(student: nn.Module, options: OptimOptions) -> list[dict[str, Any]]:
    """AdamW's groups "old", "encoder", "new" and "gate", each with and without weight decay; without frozen weights.

    Old are Whisper's own weights, its encoder apart where it has a rate of its own; new is what it does not have: the
    second branch, noise embeddings, training heads.
    The gate, the layer mixture and the noise scales start at a constant and not at a copy: they have far to go and get
    a rate of their own.
    Biases, norms, scales and every kind of embedding are not decayed: pulling them to zero regularises nothing.
    """
    rates = {"old": options.lr, "encoder": options.lr_encoder, "new": options.lr_new, "gate": options.lr_gate}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = _kind(name, options)
        decays = parameter.ndim >= 2 and "embed" not in name
        key = kind if decays else f"{kind}_no_decay"
        group = groups.setdefault(
            key,
            {
                "name": key,
                "params": [],
                "peak_lr": rates[kind],
                "weight_decay": options.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _kind(name: str, options: OptimOptions) -> str:
    if any(part in FROM_A_CONSTANT for part in name.split(".")):
        return "gate"
    if is_second_branch(name) or name.startswith("noise_head"):
        return "new"
    return "encoder" if options.lr_encoder is not None and name.startswith("model.encoder.") else "old"


def make_optimizer(student: nn.Module, options: OptimOptions) -> torch.optim.AdamW:
    """AdamW in one fused kernel per group. The rate is set before each step by `set_rate`."""
    groups = parameter_groups(student, options)
    return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)


def rate_factor(step: int, steps: int, warmup: int, final: float) -> float:
    """The share of the peak rate at a step (from 0): linear warm-up, then half a cosine down to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def optimizer_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, bad: Tensor) -> None:
    """One step, skipped on the device itself where `bad` (bool, 0-dim) is set, so that the host never has to wait.

    The fused optimisers leave weights and moments alone when `found_inf` is 1, the protocol by which GradScaler talks
    to them; with fp16 the scaler does that itself.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]


class Average:
    """Exponential moving average of the weights; its model is the one to evaluate and to ship.

    torch.optim.swa_utils.AveragedModel does not do the same: its first update is a copy, and get_ema_multi_avg_fn has
    one decay for all steps. To begin it later, with a decay of our own, takes more code than this.
    """

    def __init__(self, model: Whisper, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Whisper, step: int) -> None:
        """Move toward `model`; a young average forgets its start faster."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), _values(model.parameters()), 1 - decay)


def _values(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter.detach() for parameter in parameters]
