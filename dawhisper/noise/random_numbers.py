"""Random numbers that are the same on every device.

Short draws come from an explicit CPU `torch.Generator`; long signals are made on the device by an integer hash of seeds
drawn from it. So the CPU and the GPU give the same audio (within 1e-4), and a step can be repeated from its number.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dawhisper.distributed import onto


def step_generator(seed: int, rank: int = 0, step: int = 0, stream: int = 0) -> torch.Generator:
    """The CPU generator of one step on one rank; `stream` tells uses within a step apart."""
    state = np.random.SeedSequence([seed & (2**63 - 1), rank, step, stream]).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(state[0]))


def seeds(count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    return onto(device, torch.randint(-(2**62), 2**62, (count,), generator=generator))


def splitmix64(seeds: Tensor, n: int) -> Tensor:
    """splitmix64 (Steele et al., 2014) of seed + counter, in wrapping int64. seeds [B] -> [B, n]"""
    z = seeds[:, None] + torch.arange(1, n + 1, device=seeds.device) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)  # torch shifts int64 with its sign


def uniform(seeds: Tensor, n: int) -> Tensor:
    """Uniform in [0, 1). seeds [B] -> float32 [B, n]"""
    return _shift(splitmix64(seeds, n), 40).float() * 2**-24


def gaussian(seeds: Tensor, n: int) -> Tensor:
    """Standard normal (Box-Muller). seeds [B] -> float32 [B, n]"""
    bits = splitmix64(seeds, -(-n // 2))
    radius = (-2 * ((_shift(bits, 40).float() + 0.5) * 2**-24).log()).sqrt()
    angle = (bits & (2**24 - 1)).float() * (2 * math.pi * 2**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)[:, :n]


def between(bounds: tuple[float, float], count: int, generator: torch.Generator) -> Tensor:
    """Uniform between the bounds, on the CPU -> float32 [count]"""
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(count, generator=generator)
