"""Whisper with a second cross-attention for noise. This file stands alone: it needs only torch.

Shapes: B windows of audio, R = B * group rows of tokens (group = beams or samples of one window), n tokens,
T audio positions (1500 for 30 s), d model width, h heads, e = d / h head width, V vocabulary.
Parameter names are openai-whisper's; the second branch adds names of its own (`is_second_branch`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SECOND_BRANCH = ("mixture", "noise_embed", "noise_scale", "gate")  # and what is called secondary_...


@dataclass(frozen=True)
class ModelDimensions:
    """The sizes of a Whisper model, as stored in OpenAI's checkpoints."""

    n_mels: int
    n_audio_ctx: int
    n_audio_state: int
    n_audio_head: int
    n_audio_layer: int
    n_vocab: int
    n_text_ctx: int
    n_text_state: int
    n_text_head: int
    n_text_layer: int


@dataclass(frozen=True)
class DualOptions:
    """The second branch of the decoder.

    memory_layers: the secondary's memory has its own copies of the encoder's last so many layers, which can learn to
    hear through noise while the primary's stay as they are; -1: of all; 0: both branches share the whole encoder.
    layer_mixture: the secondary reads a learned mixture of all encoder layers; off: the last one's output alone.
    n_noise_embed: learned noise embeddings that the secondary reads beside the audio; 0 switches them off.
    gate_hidden: width of the gate's hidden layer; gate_init: the gate's value before training, in (0, 1).
    init: "copy" starts the secondary as the primary's copy, which computes exactly what Whisper does; "random".
    """

    memory_layers: int = 0
    layer_mixture: bool = True
    n_noise_embed: int = 8
    gate_hidden: int = 64
    gate_init: float = 0.8
    init: str = "copy"

    def __post_init__(self) -> None:
        if self.init not in ("copy", "random"):
            raise ValueError(f"DualOptions.init is 'copy' or 'random', not {self.init!r}")
        if not 0 < self.gate_init < 1:
            raise ValueError(f"DualOptions.gate_init lies between 0 and 1, not {self.gate_init}")
        if self.memory_layers < -1:
            raise ValueError(f"DualOptions.memory_layers is a number, or -1 for all, not {self.memory_layers}")

    @property
    def own_memory(self) -> bool:
        """Whether the secondary reads something else than the primary."""
        return self.layer_mixture or self.memory_layers != 0


class AudioFeatures(NamedTuple):
    """What the decoder attends to: the encoder output for the primary, a memory of its own for the secondary branch."""

    primary: Tensor  # [B, T, d]
    secondary: Tensor  # [B, T, d]; the same tensor as `primary` without DualOptions.own_memory


class Fused(NamedTuple):
    """What a layer's cross-attentions give; the rows of a window stand side by side."""

    output: Tensor  # [B, n, d]
    gate: Tensor | None  # [B, n, 1] the primary's share, with two branches
    query: Tensor | None  # [B, h or 2h, n, e] where it is asked for


class CrossMemory(NamedTuple):
    """Keys and values of one layer's cross-attentions: each branch's apart or, in a cache, with heads stacked."""

    key: Tensor  # [B, h, T, e]; stacked [B, 2h, T, e]
    value: Tensor
    secondary: tuple[Tensor, Tensor] | None  # keys and values [B, h, T, e]; None when stacked, or with one branch
    noise: tuple[Tensor, Tensor] | None  # keys and values of the noise embeddings, [1, h, k, e]

    def stacked(self, dtype: torch.dtype | None = None) -> CrossMemory:
        """A copy that one attention call can read for both branches, for many token steps over the same audio."""
        branches = [(self.key, self.value)] if self.secondary is None else [(self.key, self.value), self.secondary]
        key, value = (torch.cat([x.to(dtype or x.dtype) for x in both], dim=1) for both in zip(*branches))
        return CrossMemory(key, value, None, self.noise)

    def read(self, query: Tensor) -> Tensor:
        """Attention over the audio; query and result [B, h, n, e], or of both branches where they are stacked."""
        return attend(query, self.key, self.value)


class Recorder(Protocol):
    """What is given the cross-attentions of a forward pass, layer by layer (trace.py)."""

    attention: bool  # whether it wants queries

    def record(self, layer: int, fused: Fused, memory: CrossMemory, rows: Sequence[int]) -> None: ...


class Cache(Protocol):
    """What the decoder asks of a cache: keys and values of the tokens before, and of the audio (kv_cache.py)."""

    length: int
    memories: Sequence[CrossMemory]

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]: ...


def sinusoids(length: int, channels: int, max_timescale: float = 10_000.0) -> Tensor:
    """Sinusoidal positions [length, channels] (Vaswani et al. 2017, section 3.5), sines then cosines as in Whisper."""
    scale = torch.exp(-math.log(max_timescale) / (channels // 2 - 1) * torch.arange(channels // 2))
    angle = torch.arange(length)[:, None] * scale[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class MultiHeadAttention(nn.Module):
    """The projections of one attention; the attention itself is `scaled_dot_product_attention`."""

    def __init__(self, n_state: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.query = nn.Linear(n_state, n_state)
        self.key = nn.Linear(n_state, n_state, bias=False)
        self.value = nn.Linear(n_state, n_state)
        self.out = nn.Linear(n_state, n_state)

    def split(self, x: Tensor) -> Tensor:
        """[B, n, d] -> [B, h, n, e]"""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, h, T, e] of what a cross-attention reads, x [B, T, d]."""
        return self.split(self.key(x)), self.split(self.value(x))

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values [B, h, n, e] of a self-attention's input x [B, n, d]."""
        return self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))


def merge(x: Tensor) -> Tensor:
    """[B, h, n, e] -> [B, n, d]"""
    return x.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in the type that the keys are kept in; the result is of the query's."""
    return F.scaled_dot_product_attention(query.to(key.dtype), key, value).to(query.dtype)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer norm in x's own type, statistics in float32: autocast's is float32, which each reader would cast again."""
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = (None if w is None else w.to(x.dtype) for w in (weight, bias))
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


def mlp(n_state: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_state, 4 * n_state), nn.GELU(), nn.Linear(4 * n_state, n_state))


class EncoderBlock(nn.Module):
    def __init__(self, n_state: int, n_head: int):
        super().__init__()
        self.attn = MultiHeadAttention(n_state, n_head)
        self.attn_ln = LayerNorm(n_state)
        self.mlp = mlp(n_state)
        self.mlp_ln = LayerNorm(n_state)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.query_key_value(self.attn_ln(x))
        x = x + self.attn.out(merge(F.scaled_dot_product_attention(q, k, v)))
        return x + self.mlp(self.mlp_ln(x))


class AudioEncoder(nn.Module):
    """Log-mel spectrogram -> features. Any even number of frames up to 2 * n_audio_ctx is encoded."""

    positional_embedding: Tensor

    def __init__(self, dims: ModelDimensions):
        super().__init__()
        d, self.n_head, self.n_mels = dims.n_audio_state, dims.n_audio_head, dims.n_mels
        self.conv1 = nn.Conv1d(dims.n_mels, d, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(d, d, kernel_size=3, stride=2, padding=1)
        self.register_buffer("positional_embedding", sinusoids(dims.n_audio_ctx, d))
        self.blocks = nn.ModuleList(EncoderBlock(d, dims.n_audio_head) for _ in range(dims.n_audio_layer))
        self.ln_post = LayerNorm(d)
        self.secondary_blocks = nn.ModuleList()  # these three: see add_second_branch
        self.secondary_ln_post: LayerNorm | None = None
        self.mixture: nn.Parameter | None = None
        self.gradient_checkpointing = False

    def add_second_branch(self, dual: DualOptions) -> None:
        d, n_layer = self.ln_post.weight.numel(), len(self.blocks)
        if dual.memory_layers > n_layer:
            raise ValueError(f"DualOptions.memory_layers is {dual.memory_layers}; the encoder has {n_layer} layers")
        if dual.memory_layers:
            self.secondary_blocks.extend([EncoderBlock(d, self.n_head) for _ in range(dual.memory_layers)])
            self.secondary_ln_post = LayerNorm(d)
            if dual.init == "copy":
                for mine, block in zip(self.secondary_blocks, self.blocks[n_layer - dual.memory_layers :]):
                    mine.load_state_dict(block.state_dict())
                self.secondary_ln_post.load_state_dict(self.ln_post.state_dict())
        if dual.layer_mixture:
            self.mixture = nn.Parameter(F.one_hot(torch.tensor(n_layer - 1), n_layer).float())  # the last alone

    @staticmethod
    def mix(x: Tensor, share: Tensor, mixed: Tensor | None) -> Tensor:
        """Add a layer's output x [B, T, d] to the mixture so far."""
        weighed = share * layer_norm(x)  # layers differ in scale
        return weighed if mixed is None else mixed + weighed

    @property
    def hears_twice(self) -> bool:
        """Whether the secondary may be given a spectrogram of its own."""
        return len(self.secondary_blocks) == len(self.blocks)

    def convolved(self, mel: Tensor) -> Tensor:
        """mel [B, n_mels, 2T] -> what the layers hear, [B, T, d]"""
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x)).transpose(1, 2).contiguous()  # else every layer after it works on strides
        if x.shape[1] > self.positional_embedding.shape[0]:
            raise ValueError(f"{mel.shape[-1]} frames do not fit the encoder's {2 * len(self.positional_embedding)}")
        return x + self.positional_embedding[: x.shape[1]].to(x.dtype)  # layers stay in half precision under autocast

    def forward(self, mel: Tensor, layers: list[Tensor] | None = None) -> AudioFeatures:
        """mel [B, n_mels, 2T] -> features [B, T, d] of both branches; `layers` gets each output (of own ones).

        Of a mel [B, 2 n_mels, 2T] the secondary's layers hear the second half instead, if it has all of its own.
        """
        first, *second = mel.split(self.n_mels, dim=1)
        if second and not self.hears_twice:
            raise ValueError("a second spectrogram needs a secondary with its own copies of all encoder layers")
        x = self.convolved(first)
        own, mixed = x, None  # what the secondary's own layers hear, and its mixture of the others
        for layer, block in enumerate(self.blocks):
            if layer == len(self.blocks) - len(self.secondary_blocks):
                own = self.convolved(second[0]) if second else x
            x = maybe_checkpoint(self, block, x)
            if layers is not None and not self.secondary_blocks:
                layers.append(x)
            if self.mixture is not None and layer < len(self.blocks) - 1:
                mixed = self.mix(x, self.mixture[layer], mixed)
        last = x = self.ln_post(x)
        if self.secondary_ln_post is not None:
            for block in self.secondary_blocks:
                own = maybe_checkpoint(self, block, own)
                if layers is not None:
                    layers.append(own)
            last = self.secondary_ln_post(own)
        if self.mixture is not None:
            last = self.mixture[-1] * last if mixed is None else mixed + self.mixture[-1] * last
        return AudioFeatures(x, last)


class DecoderBlock(nn.Module):
    """Self-attention, then two cross-attentions fused by a gate, then the MLP.

    y = ln(x);  p = primary(y, A);  s = secondary(y, S);  a = sigmoid(gate([y, p, s]));  x = x + a p + (1 - a) s
    """

    def __init__(self, n_state: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.attn = MultiHeadAttention(n_state, n_head)
        self.attn_ln = LayerNorm(n_state)
        self.cross_attn = MultiHeadAttention(n_state, n_head)
        self.cross_attn_ln = LayerNorm(n_state)
        self.mlp = mlp(n_state)
        self.mlp_ln = LayerNorm(n_state)
        self.secondary_attn: MultiHeadAttention | None = None  # these three: see add_second_branch
        self.gate: Any = None
        self.noise_scale: Any = None

    def add_second_branch(self, dual: DualOptions) -> None:
        self.secondary_attn = MultiHeadAttention(d := self.attn_ln.weight.numel(), self.n_head)
        if dual.init == "copy":
            self.secondary_attn.load_state_dict(self.cross_attn.state_dict())
        last = nn.Linear(dual.gate_hidden, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(dual.gate_init / (1 - dual.gate_init)))
        self.gate = nn.Sequential(nn.Linear(3 * d, dual.gate_hidden), nn.GELU(), last)
        if dual.n_noise_embed:
            self.noise_scale = nn.Parameter(torch.zeros(self.n_head))

    def memory(self, features: AudioFeatures, noise_embed: Tensor | None) -> CrossMemory:
        """The keys and values that the cross-attentions read, computed once for a window."""
        key, value = self.cross_attn.key_value(features.primary)
        if self.secondary_attn is None:
            return CrossMemory(key, value, None, None)
        noise = None if noise_embed is None else self.secondary_attn.key_value(noise_embed[None])
        return CrossMemory(key, value, self.secondary_attn.key_value(features.secondary), noise)

    def forward(
        self, x: Tensor, memory: CrossMemory, cache: Cache | None, layer: int, query: bool, held: Tensor | None
    ) -> tuple[Tensor, Fused]:
        """x [R, n, d] -> [R, n, d], and what the cross-attentions gave, with their query if it is asked for.

        held [B, 1, 1]: a window's gate is held at this value; where it is not a number, the gate decides.
        """
        x = x + self.self_attention(self.attn_ln(x), cache, layer)
        # the rows of one window share its memory: they stand side by side as queries, nothing is copied
        y = self.cross_attn_ln(x).view(memory.key.shape[0], -1, x.shape[-1])
        fused = self.cross_attention(y, memory, query, held)
        x = x + fused.output.view_as(x)
        return x + self.mlp(self.mlp_ln(x)), fused

    def self_attention(self, y: Tensor, cache: Cache | None, layer: int) -> Tensor:
        q, k, v = self.attn.query_key_value(y)
        k, v, mask = (k, v, None) if cache is None else cache.write(layer, k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and y.shape[1] > 1)
        return self.attn.out(merge(out))

    def queries(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, the heads of both branches side by side, [B, h or 2h, n, e]; and what the gate reads of y."""
        each = [attn.split(attn.query(y)) for attn in (self.cross_attn, self.secondary_attn) if attn is not None]
        return torch.cat(each, dim=1) if len(each) == 2 else each[0], y

    def gated(self, y: Tensor, p: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the branches' `out` gave -> p, s and the gate a [B, n, 1]."""
        return p, s, self.gate(torch.cat([y, p, s], dim=-1)).sigmoid()

    def cross_attention(self, y: Tensor, memory: CrossMemory, query: bool = False, held: Tensor | None = None) -> Fused:
        primary, secondary, h, (q, y) = self.cross_attn, self.secondary_attn, self.n_head, self.queries(y)
        if secondary is None:
            return Fused(primary.out(merge(memory.read(q))), None, q if query else None)
        if memory.secondary is None:  # both branches in one call
            read, read2 = memory.read(q).chunk(2, dim=1)
        else:
            read, read2 = attend(q[:, :h], memory.key, memory.value), attend(q[:, h:], *memory.secondary)
        if memory.noise is not None:
            noise = attend(q[:, h:], *(x.expand(len(q), -1, -1, -1) for x in memory.noise))
            read2 = torch.addcmul(read2, self.noise_scale[:, None, None], noise)
        p, s, gate = self.gated(y, primary.out(merge(read)), secondary.out(merge(read2)))
        share = gate if held is None else torch.where(held.isnan(), gate, held.to(gate.dtype))
        return Fused(torch.lerp(s, p, share), gate, q if query else None)  # exactly p where s equals p


class TokenEmbedding(nn.Embedding):
    """The tokens' embeddings, whose weights are those of the output layer too."""

    def logits(self, x: Tensor) -> Tensor:
        """x [..., d] -> [..., V]"""
        weight, rows = self.weight.to(x.dtype), x.shape[:-1].numel()
        if x.is_cuda and rows >= 512:  # the kernels for many rows want sizes in eights; 51,865 is odd
            return (x @ F.pad(weight, (0, 0, 0, -len(weight) % 8)).T)[..., : len(weight)]
        if x.device.type != "cpu" or x.dtype != torch.float32 or rows > 16:
            return x @ weight.T
        # in blocks of 128 tokens: 4.2 ms for a row of `base`, as one product 9.8 (a thread of an AMD EPYC, torch 2.11)
        blocks, columns = weight[: len(weight) // 128 * 128].unflatten(0, (-1, 128)), x.flatten(0, -2).T
        first = torch.bmm(blocks, columns.expand(len(blocks), -1, -1)).flatten(0, 1)
        return torch.cat([first, weight[len(first) :] @ columns]).T.unflatten(0, x.shape[:-1])


class TextDecoder(nn.Module):
    def __init__(self, dims: ModelDimensions):
        super().__init__()
        d = dims.n_text_state
        self.token_embedding = TokenEmbedding(dims.n_vocab, d)
        self.positional_embedding = nn.Parameter(nn.init.normal_(torch.empty(dims.n_text_ctx, d), std=0.01))
        self.blocks = nn.ModuleList(DecoderBlock(d, dims.n_text_head) for _ in range(dims.n_text_layer))
        self.ln = LayerNorm(d)
        self.noise_embed: nn.Parameter | None = None
        self.gradient_checkpointing = False

    def memories(self, features: AudioFeatures) -> Iterable[CrossMemory]:
        """Each layer's keys and values of the audio, one after the other."""
        return (block.memory(features, self.noise_embed) for block in self.blocks)  # type: ignore[operator]

    def remember(self, features: AudioFeatures) -> list[CrossMemory]:
        """All layers' keys and values of the audio, for many token steps."""
        return [memory.stacked() for memory in self.memories(features)]

    def forward(
        self,
        tokens: Tensor,
        features: AudioFeatures | None = None,
        cache: Cache | None = None,
        trace: Recorder | None = None,
        positions: Sequence[int] | None = None,
        dtype: torch.dtype | None = torch.float32,
        held: Tensor | None = None,
    ) -> Tensor:
        """tokens [R, n] -> logits [R, n, V] of type `dtype`; None leaves them as they are computed.

        With a cache the tokens follow those already in it, and the audio is the cache's; without one, `features`
        gives the audio. `positions` limits the logits to some of the n tokens, in the order given. held: see the block.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > len(self.positional_embedding):
            raise ValueError(f"{end} tokens do not fit the decoder's {len(self.positional_embedding)} positions")
        x = self.token_embedding(tokens) + self.positional_embedding[start:end]
        if cache is None and features is None:
            raise ValueError("the decoder needs the audio: give features or a cache")
        memories = self.memories(features) if cache is None else iter(cache.memories)  # type: ignore[arg-type]
        for layer, (block, memory) in enumerate(zip(self.blocks, memories)):
            query = trace is not None and trace.attention
            x, fused = maybe_checkpoint(self, block, x, memory, cache, layer, query, held)
            if trace is not None:
                trace.record(layer, fused, memory, tokens.shape)
        if cache is not None:
            cache.length = end
        return self.logits(x if positions is None else x[:, list(positions)], dtype)

    def logits(self, x: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """The last block's output [..., d] -> logits [..., V]."""
        logits = self.token_embedding.logits(self.ln(x))
        return logits if dtype is None else logits.to(dtype)


def maybe_checkpoint(module: TextDecoder | AudioEncoder, block: Callable[..., Any], *args: Any) -> Any:
    """Run a block; with gradient checkpointing on, recompute it in the backward pass instead of keeping it."""
    if module.gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
    return block(*args)


class Whisper(nn.Module):
    """OpenAI's Whisper, with a second branch in its decoder where `dual` is given.

    variable_audio_ctx: trained to encode only as much as there is audio, instead of 30 s always.
    knows_silence: trained on noise without speech, so that its no-speech probability can be believed by itself.
    """

    alignment_heads: Tensor  # [n_text_layer, n_text_head] booleans: where word times are read from

    def __init__(self, dims: ModelDimensions, dual: DualOptions | None = None, variable_audio_ctx: bool = False):
        super().__init__()
        self.dims = dims
        self.dual: DualOptions | None = None
        self.variable_audio_ctx, self.knows_silence = variable_audio_ctx, False
        self.encoder = AudioEncoder(dims)
        self.decoder = TextDecoder(dims)
        # unless a model names its own, all heads of the upper half, as in Whisper
        heads = torch.zeros(dims.n_text_layer, dims.n_text_head, dtype=torch.bool)
        heads[dims.n_text_layer // 2 :] = True
        self.register_buffer("alignment_heads", heads, persistent=False)
        if dual is not None:
            self.add_second_branch(dual)

    def add_second_branch(self, dual: DualOptions) -> None:
        """Give a single-branch decoder its second branch; with init="copy" the model still computes the same."""
        if self.dual is not None:
            raise ValueError("the model has its second branch already")
        if dual.memory_layers == -1:
            dual = replace(dual, memory_layers=self.dims.n_audio_layer)
        self.encoder.add_second_branch(dual)
        self.dual = dual
        if dual.n_noise_embed:
            self.decoder.noise_embed = nn.Parameter(torch.randn(dual.n_noise_embed, self.dims.n_text_state))
        for block in self.decoder.blocks:
            block.add_second_branch(dual)  # type: ignore[operator]
        self.to(self.device, self.dtype)

    def encode(self, mel: Tensor) -> AudioFeatures:
        """mel [B, n_mels, 2T] -> features of both branches, [B, T, d] each."""
        if mel.device.type != "cpu" or len(mel) == 1:
            return self.encoder(mel)
        # one after the other, so that a window's activations stay near: 16 at once take 1.2 times as long
        each = [self.encoder(window) for window in mel.split(1)]
        primary, shared = torch.cat([features.primary for features in each]), each[0].secondary is each[0].primary
        return AudioFeatures(primary, primary if shared else torch.cat([features.secondary for features in each]))

    def embed_audio(self, mel: Tensor) -> Tensor:
        """mel [B, n_mels, 2T] -> the encoder output [B, T, d], as openai-whisper's."""
        return self.encoder(mel).primary

    def logits(self, tokens: Tensor, features: AudioFeatures) -> Tensor:
        """tokens [B, n] -> logits [B, n, V]"""
        return self.decoder(tokens, features)

    def forward(self, mel: Tensor, tokens: Tensor, trace: Recorder | None = None) -> Tensor:
        """mel [B, n_mels, 2T], tokens [B, n] -> logits [B, n, V]; `trace` records the cross-attentions."""
        return self.decoder(tokens, self.encoder(mel), trace=trace)

    @property
    def device(self) -> torch.device:
        return self.decoder.positional_embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.positional_embedding.dtype

    @property
    def is_multilingual(self) -> bool:
        return self.dims.n_vocab >= 51865

    @property
    def num_languages(self) -> int:
        return self.dims.n_vocab - 51765 - int(self.is_multilingual)


def is_second_branch(name: str) -> bool:
    """Whether a parameter of this name exists only in a dual model."""
    return any(part in SECOND_BRANCH or part.startswith("secondary_") for part in name.split("."))
