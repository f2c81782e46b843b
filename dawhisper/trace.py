"""What a forward pass records of its cross-attentions: outputs, gates, scores."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .model import CrossMemory, Fused


@dataclass
class Trace:
    """What a forward pass records of its cross-attentions, by layer, when it is given one.

    `output` is the fused cross-attention output [R, n, d], `gate` the primary's share a [R, n] (dual models), and with
    `attention` set, `primary` and `secondary` are the scores before the softmax [R, h, n, T].
    `layers` limits the recording to the chosen decoder layers.
    """

    layers: Collection[int] | None = None
    attention: bool = False
    output: dict[int, Tensor] = field(default_factory=dict)
    gate: dict[int, Tensor] = field(default_factory=dict)
    primary: dict[int, Tensor] = field(default_factory=dict)
    secondary: dict[int, Tensor] = field(default_factory=dict)

    def record(self, layer: int, fused: Fused, memory: CrossMemory, rows: Sequence[int]) -> None:
        """What a layer's cross-attentions gave; rows: [R, n]."""
        if self.layers is not None and layer not in self.layers:
            return
        self.output[layer] = fused.output.view(*rows, -1)
        if fused.gate is not None:
            self.gate[layer] = fused.gate.view(*rows)
        if fused.query is not None:
            scores = fused.query @ memory.stacked().key.to(fused.query.dtype).mT / math.sqrt(fused.query.shape[-1])
            branches = scores.unflatten(2, (-1, rows[1])).transpose(1, 2).flatten(0, 1)  # [R, h or 2h, n, T]
            n_head = branches.shape[1] if fused.gate is None else branches.shape[1] // 2
            self.primary[layer] = branches[:, :n_head]
            if fused.gate is not None:
                self.secondary[layer] = branches[:, n_head:]
