"""The token step on tensors that stay in place, so that a CUDA graph can replay it without Python in between.

A step reads its token, its position and all keys and values from the same addresses every time. The self-attention
reads the cache up to one of a few spans, with what is not written yet masked out; each span is a graph of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .model import AudioFeatures, DecoderBlock, KVCache, TextDecoder

SPANS = (64, 128, 256, 448)  # positions read by the self-attention
_kept: WeakKeyDictionary[TextDecoder, OrderedDict[Any, StaticKVCache]] = WeakKeyDictionary()


class LayerSlot(NamedTuple):
    """A layer's self-attention cache within a step: `KVCache.write` where the position is on the device."""

    keys: Tensor  # [R, h, span, e]
    values: Tensor
    position: Tensor  # [1]
    mask: Tensor  # [1, span], True up to the position

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.keys.index_copy_(2, self.position, key)
        self.values.index_copy_(2, self.position, value)
        return self.keys, self.values, self.mask


class StaticKVCache(KVCache):
    """A cache that serves windows of one shape, one after the other, from the same memory.

    Tokens given at first are run one row a window, without a graph; `repeat` then makes the rows of a window equal.
    """

    def __init__(self, decoder: TextDecoder, features: AudioFeatures, group: int):
        super().__init__(decoder, features)
        self.group = group
        self.rows_states = self.states.repeat_interleave(group, dim=2)  # [layers, 2, R, h, n_ctx, e]
        self.states = self.rows_states[:, :, ::group]
        self.token = torch.zeros(self.rows * group, 1, dtype=torch.long, device=self.states.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.states.device)
        self.columns = torch.arange(self.states.shape[-2], device=self.states.device)
        self.weights = [block.joint_weights() for block in decoder.blocks]  # type: ignore[operator]
        self.graphs: dict[int, Callable[[], Tensor]] = {}  # by span
        self.pool = torch.cuda.graph_pool_handle() if self.token.is_cuda else None  # memory that they share

    @property
    def nbytes(self) -> int:
        audio = (x for memory in self.memories for x in (memory.key, memory.value))
        weights = (x for block in self.weights for pair in block for x in pair)
        return sum(x.nbytes for x in (self.rows_states, *audio, *weights))

    def refill(self, decoder: TextDecoder, features: AudioFeatures) -> None:
        """Start again with other windows, and with the weights as they are by now."""
        for block, mine in zip(decoder.blocks, self.weights):
            for pair, new_pair in zip(mine, block.joint_weights()):  # type: ignore[operator]
                for kept, new_weight in zip(pair, new_pair):
                    kept.copy_(new_weight)
        for old, new in zip(self.memories, (memory.stacked() for memory in decoder.memories(features))):
            old.key.copy_(new.key)
            old.value.copy_(new.value)
            if old.noise is not None and new.noise is not None:
                for kept, noise in zip(old.noise, new.noise):
                    kept.copy_(noise)
        self.length = 0
        self.states = self.rows_states[:, :, :: self.group]

    def repeat(self, group: int) -> None:
        if group != self.group:
            raise ValueError(f"this cache has {self.group} rows a window, not {group}")
        rows = self.rows_states[..., : self.length, :].unflatten(2, (-1, group))
        rows[:, :, :, 1:] = rows[:, :, :, :1]
        self.states = self.rows_states

    def next_logits(self, decoder: TextDecoder, tokens: Tensor) -> Tensor:
        """As KVCache's; the logits stay valid until the next call."""
        span = next((s for s in SPANS if s > self.length), len(self.columns))
        self.token.copy_(tokens)
        self.position.fill_(self.length)
        self.length += 1
        if not tokens.is_cuda:
            return self._step(decoder, span)
        if span not in self.graphs:
            self.graphs[span] = self._captured(decoder, span)
        return self.graphs[span]()

    def _step(self, decoder: TextDecoder, span: int) -> Tensor:
        x = decoder.token_embedding(self.token) + decoder.positional_embedding[self.position]
        mask = (self.columns[:span] <= self.position)[None]
        forward: Any = _compiled_block() if decoder.compile_step else DecoderBlock.forward
        layers = zip(decoder.blocks, self.memories, self.rows_states, self.weights)
        for block, memory, (keys, values), weights in layers:
            slot = LayerSlot(keys[:, :, :span], values[:, :, :span], self.position, mask)
            # the slot is the layer's own, and its number always 0, so that one compiled block serves all
            x = forward(block, x, memory, slot, 0, None, weights)
        return decoder.logits(x)[:, 0]

    def _captured(self, decoder: TextDecoder, span: int) -> Callable[[], Tensor]:
        """A graph of this step; running it repeatedly writes the same keys and values again."""
        with torch.cuda.device(self.token.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what a first run sets up can't be captured
                for _ in range(2):
                    self._step(decoder, span)
            torch.cuda.current_stream().wait_stream(side)
            return captured(lambda: self._step(decoder, span), self.pool)


def captured(step: Callable[[], Tensor], pool: Any = None) -> Callable[[], Tensor]:
    """`step` as a CUDA graph: it works on tensors that stay in place, and gives the same one each time.

    Capturing runs nothing; `step` must have run before. A graph holds addresses alone: the caller keeps alive what
    `step` reads, weights included. Graphs of one pool overwrite each other's results.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # others may use the GPU meanwhile
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@cache
def _compiled_block() -> Any:
    return torch.compile(DecoderBlock.forward)


@contextmanager
def open_cache(decoder: TextDecoder, features: AudioFeatures, group: int, max_length: int) -> Iterator[KVCache]:
    """A cache for these windows and `group` rows each: on a GPU one with graphs, which is kept for later windows.

    While it is in use no other thread finds it. The ones used longest ago are given up for the memory of newer ones.
    """
    if not wants_graphs(features):
        yield KVCache(decoder, features, max_length)
        return
    kept = _kept.setdefault(decoder, OrderedDict())
    # graphs hold addresses: other weights need other graphs
    weights = tuple((p.data_ptr(), p.dtype) for p in decoder.parameters())
    key = (features.primary.shape, features.primary.dtype, group, decoder.compile_step, weights)
    found = kept.pop(key, None)
    if found is None:
        with torch.inference_mode(False), torch.no_grad():  # so that any later caller may write to it
            found = StaticKVCache(decoder, features, group)
    else:
        found.refill(decoder, features)
    yield found
    kept[key] = found
    while len(kept) > 1 and sum(one.nbytes for one in kept.values()) > most_bytes(features.primary.device):
        kept.popitem(last=False)


def most_bytes(device: torch.device) -> int:
    """What a decoder may keep: an eighth of a GPU's memory, beside the cache used last."""
    return torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else 1 << 30


def wants_graphs(features: AudioFeatures) -> bool:
    """On a GPU, unless autocast is on, which keeps casts of the weights that a graph must not hold."""
    return features.primary.is_cuda and not torch.is_autocast_enabled()
