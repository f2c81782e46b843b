"""Training passes replayed as CUDA graphs, so that the GPU does not wait for Python to launch its kernels.

A step of a small model is thousands of short kernels, which Python takes longer to launch than the GPU to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dawhisper.fast.cache import captured

from .inputs import Inputs

TOKEN_MULTIPLE = 32  # tokens are padded to it: each shape is a graph
MOST_GRAPHS = 64  # rarer shapes run as they do without

# forward and backward pass of a micro-batch: inputs, counts [5] -> the loss and its parts, 0-dim and detached
Passes = Callable[[Inputs, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Replay:
    """`passes`, replayed as one graph for each shape of a micro-batch. On a CPU the same, without graphs.

    A graph reads and writes the same memory each time: what goes in is copied there, gradients are added to the
    `.grad` that there are (set them to zero in place), and what comes out is copied, since all graphs work in one
    pool of memory. A shape's first use runs as ever, which sets up what can't be captured; its second is captured.
    """

    def __init__(self, passes: Passes):
        self.passes = passes
        self.seen: set[Any] = set()
        self.graphs: dict[Any, Passes] = {}
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def __call__(self, inputs: Inputs, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        shape = tuple(None if x is None else x.shape for x in inputs)
        if shape not in self.graphs:
            if shape not in self.seen or len(self.graphs) == MOST_GRAPHS:
                self.seen.add(shape)
                return self.passes(inputs, counts)
            self.graphs[shape] = self._recorded(inputs, counts)
        return self.graphs[shape](inputs, counts)

    def _recorded(self, inputs: Inputs, counts: Tensor) -> Passes:
        """What inputs of this shape go through."""
        places = Inputs(*(None if x is None else x.clone() for x in inputs))  # type: ignore[arg-type]
        counts_place = counts.clone()
        names: list[str] = []

        def step() -> Tensor:
            loss, report = self.passes(places, counts_place)
            names[:] = report
            return torch.stack([loss, *report.values()])

        run = captured(step, self.pool) if counts.is_cuda else step

        def replay(inputs: Inputs, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            for place, x in zip((*places, counts_place), (*inputs, counts)):
                if place is not None and x is not None:
                    place.copy_(x)
            loss, *parts = run().clone().unbind()
            return loss, dict(zip(names, parts))

        return replay
