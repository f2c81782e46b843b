"""The token step on tensors that stay in place, so that a CUDA graph can replay it without Python in between.

A step reads its token, its position and all keys and values from the same addresses every time. The self-attention
reads the cache up to one of a few spans, with what is not written yet masked out; each span is a graph of its own.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from dawhisper.errors import one_line
from dawhisper.kv_cache import KVCache
from dawhisper.model import AudioFeatures, CrossMemory, TextDecoder

if TYPE_CHECKING:
    from .token_step import StepWeights

SPANS = (64, 128, 256, 448)  # positions read by the self-attention
MOST_STEPS = 8  # first tokens that are quicker as steps than as one pass
Result = TypeVar("Result")
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
        self.fused = wants_kernels(features)
        super().__init__(decoder, features)
        self.group = group
        self.rows_states = self.states.repeat_interleave(group, dim=2)  # [layers, 2, R, h, n_ctx, e]
        self.states = self.rows_states[:, :, ::group]
        self.token = torch.zeros(self.rows * group, 1, dtype=torch.long, device=self.states.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.states.device)
        self.columns = torch.arange(self.states.shape[-2], device=self.states.device)
        self.weights: list[StepWeights] = []
        if self.fused:
            from .token_step import StepWeights

            self.weights = [StepWeights(block) for block in decoder.blocks]  # type: ignore[arg-type]
        self.graphs: dict[int, Callable[[], Tensor]] = {}  # by span
        self.features = AudioFeatures(*(x.clone() for x in features))  # where `refilled` reads them
        self.refilled: Callable[[], None] | None = None
        self.pool = torch.cuda.graph_pool_handle() if self.token.is_cuda else None  # memory that they share

    def remember(self, decoder: TextDecoder, features: AudioFeatures) -> list[CrossMemory]:
        rooms = []
        for memory in decoder.memories(features):
            rooms.append(room_for(memory, keeps_int8(decoder) and self.fused))
            fill(rooms[-1], memory)
        return rooms

    @property
    def nbytes(self) -> int:
        audio = (x for memory in self.memories for x in (memory.key, memory.value))
        return self.rows_states.nbytes + sum(x.nbytes for x in audio) + sum(x.nbytes for x in self.weights)

    def refill(self, decoder: TextDecoder, features: AudioFeatures) -> None:
        """Start again with other windows, and with the weights as they are by now."""
        for kept, new in zip(self.features, features):
            kept.copy_(new)
        if not self.token.is_cuda:
            self._refill(decoder)
        elif self.refilled is None:  # the cache was filled before, which set up what can't be captured
            self._refill(decoder)
            self.refilled = captured(lambda: self._refill(decoder), self.pool)
        else:
            self.refilled()
        self.length = 0
        self.states = self.rows_states[:, :, :: self.group]

    def _refill(self, decoder: TextDecoder) -> None:
        for weights in self.weights:
            weights.refresh()
        for room, memory in zip(self.memories, decoder.memories(self.features)):
            fill(room, memory)

    def repeat(self, group: int) -> None:
        if group != self.group:
            raise ValueError(f"this cache has {self.group} rows a window, not {group}")
        rows = self.rows_states[..., : self.length, :].unflatten(2, (-1, group))
        rows[:, :, :, 1:] = rows[:, :, :, :1]
        self.states = self.rows_states

    def first_logits(self, decoder: TextDecoder, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        """As KVCache's. A few tokens are run as steps, which have graphs."""
        if not self.fused or tokens.shape[1] > MOST_STEPS:
            return super().first_logits(decoder, tokens, positions)
        rows = tokens.repeat_interleave(self.group, dim=0)
        each = [self.next_logits(decoder, token)[:: self.group].clone() for token in rows.split(1, dim=1)]
        return torch.stack([each[position] for position in positions], dim=1)

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
        x = decoder.token_embedding(self.token) + F.embedding(self.position, decoder.positional_embedding)
        if self.fused:
            return self._fused_step(decoder, span, x[:, 0])
        mask = (self.columns[:span] <= self.position)[None]
        for block, memory, (keys, values) in zip(decoder.blocks, self.memories, self.rows_states):
            slot: Any = LayerSlot(keys[:, :, :span], values[:, :, :span], self.position, mask)
            x, _ = block(x, memory, slot, 0, False, None)  # the slot is the layer's own
        return decoder.logits(x)[:, 0]

    def _fused_step(self, decoder: TextDecoder, span: int, x: Tensor) -> Tensor:
        from .token_step import block_step, linear, norm

        for block, weights, memory, states in zip(decoder.blocks, self.weights, self.memories, self.rows_states):
            x = block_step(block, weights, memory, states, self.position, span, x)  # type: ignore[arg-type]
        return linear(norm(x, decoder.ln), decoder.token_embedding.weight, dtype=torch.float32)

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


def captured(step: Callable[[], Result], pool: Any = None) -> Callable[[], Result]:
    """`step` as a CUDA graph: it works on tensors that stay in place, and gives the same result each time.

    Capturing runs nothing; `step` must have run before. A graph holds addresses alone: the caller keeps alive what
    `step` reads, weights included. Graphs of one pool overwrite each other's results.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # others may use the GPU meanwhile
        result = step()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


def room_for(memory: CrossMemory, int8: bool) -> CrossMemory:
    """Empty buffers for keys and values of these shapes, the heads of both branches stacked."""
    windows, n_head, n_position, e = memory.key.shape
    heads = n_head if memory.secondary is None else 2 * n_head
    kind = torch.int8 if int8 else memory.key.dtype
    key, value = (memory.key.new_empty(windows, heads, n_position, e, dtype=kind) for _ in range(2))
    noise = None if memory.noise is None else (memory.noise[0].contiguous(), memory.noise[1].contiguous())
    if not int8:
        return CrossMemory(key, value, None, noise)
    from .token_step import Int8Memory

    scales = memory.key.new_empty(windows, heads, 2, e, dtype=torch.float32)
    return Int8Memory(key, value, scales, None, noise)  # type: ignore[return-value]


def fill(room: CrossMemory, memory: CrossMemory) -> None:
    """Copy keys and values into the buffers of `room_for`, in int8 where these are."""
    branches = [(memory.key, memory.value), *([] if memory.secondary is None else [memory.secondary])]
    for branch, pair in enumerate(branches):
        for which, x in enumerate(pair):
            heads = slice(branch * x.shape[1], (branch + 1) * x.shape[1])
            place = (room.key, room.value)[which][:, heads]
            if place.dtype == torch.int8:
                from .token_step import quantize_memory

                quantize_memory(x, place, room.scales[:, heads, which])  # type: ignore[attr-defined]
            else:
                place.copy_(x)
    for kept, new in zip(room.noise or (), memory.noise or ()):
        kept.copy_(new)


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
    key = (features.primary.shape, features.primary.dtype, group, keeps_int8(decoder), weights)
    found = kept.pop(key, None)
    with torch.cuda.device_of(features.primary):  # Triton launches on the current one
        if found is None:
            with torch.inference_mode(False), torch.no_grad():  # so that any later caller may write to it
                found = StaticKVCache(decoder, features, group)
        else:
            found.refill(decoder, features)
        yield found
    kept[key] = found
    while len(kept) > 1 and sum(one.nbytes for one in kept.values()) > most_bytes(features.primary.device):
        kept.popitem(last=False)


def keeps_int8(decoder: TextDecoder) -> bool:
    """Whether `decoder.int8_memory` was set: the audio's keys and values are kept in int8 for the kernels of a step."""
    return getattr(decoder, "int8_memory", False)


def most_bytes(device: torch.device) -> int:
    """What a decoder may keep: an eighth of a GPU's memory, beside the cache used last."""
    return torch.cuda.get_device_properties(device).total_memory // 8 if device.type == "cuda" else 1 << 30


def wants_graphs(features: AudioFeatures) -> bool:
    """On a GPU, unless autocast is on, which keeps casts of the weights that a graph must not hold."""
    return features.primary.is_cuda and not torch.is_autocast_enabled()


def wants_kernels(features: AudioFeatures) -> bool:
    """Whether token steps run as the kernels of kernels.py: on a GPU in half precision, where Triton works."""
    return features.primary.dtype.itemsize == 2 and triton_works(features.primary.device, features.primary.dtype)


@cache
def triton_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Triton builds its kernels on this machine, with a C compiler; without, steps run as PyTorch's own kernels."""
    if device.type != "cuda" or find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from .token_step import linear

        with torch.cuda.device(device):
            for rows in (16, 64):  # with the most shared memory that it takes
                linear(*torch.ones(2, rows, 2048, device=device, dtype=dtype))
            torch.cuda.synchronize()
    except Exception as error:  # of Triton, the compiler or the driver: whatever it is, there is another way
        way_out = "torch 2.8 or newer has them" if isinstance(error, ImportError) else "is a C compiler there?"
        warnings.warn(f"decoding without Triton kernels, which is slower ({one_line(error)}); {way_out}", stacklevel=2)
        return False
    return True
