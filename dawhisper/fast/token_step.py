"""The token step through the Triton kernels of kernels.py: shapes, buffers and launches.

Shapes: R = B * G rows of tokens (G rows share a window's audio), d width, h heads of width e, T audio positions, H = h
or, where both branches' heads are stacked, 2h; g is the width of the gate's hidden layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn

from dawhisper.model import DecoderBlock, merge

from . import kernels

MIN_TILE = 16  # rows and columns of the smallest matrix product
SPLITS_FOR = 4  # programs for each multiprocessor, from which on the audio of one head is not cut


class Int8Memory(NamedTuple):
    """A `CrossMemory` whose keys and values are int8: half the bytes that a token step reads.

    Each channel of a head has a scale of its own in each window, so that a loud one takes nothing from the others.
    """

    key: Tensor  # [B, H, T, e]
    value: Tensor
    scales: Tensor  # [B, H, 2, e] float32: of keys, of values
    secondary: None
    noise: tuple[Tensor, Tensor] | None  # [1, h, k, e]

    def read(self, query: Tensor) -> Tensor:
        """Attention of [B, H, n, e] over the audio."""
        batch, n_head, n, _ = query.shape
        rows = merge(query).flatten(0, 1)  # [B n, H e]
        read = cross_attend(rows, self.key, self.value, self.scales, n_head)[0]
        return read.view(batch, n, n_head, -1).transpose(1, 2)


class StepWeights:
    """Copies of a decoder block's weights, those of one input side by side as one product.

    self_qkv: query, key and value of the self-attention, [3d, d] and [3d].
    cross_q: the queries of all cross-attentions, [d, d] and [d]; in a dual model [2d + g, d] with the gate's g rows.
    cross_out: their outputs, [1, d, d] and [1, d]; in a dual model [2, d + g, d] and [2, d + g].
    The gate's hidden layer is linear in y, p and s, and so in y and in what the branches read.
    """

    def __init__(self, block: DecoderBlock):
        self.block = block
        out = block.cross_attn.out.weight
        d, branches = len(out), 1 if block.gate is None else 2
        g = 0 if block.gate is None else block.gate[0].out_features
        self.self_qkv = out.new_zeros(3 * d, d), out.new_zeros(3 * d)
        self.cross_q = out.new_zeros(branches * d + g, d), out.new_zeros(branches * d + g)
        self.cross_out = out.new_zeros(branches, d + g, d), out.new_zeros(branches, d + g)
        self.refresh()

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for pair in (self.self_qkv, self.cross_q, self.cross_out) for x in pair)

    def refresh(self) -> None:
        """Take the weights as they are by now."""
        block, d = self.block, self.cross_out[0].shape[2]
        attn = block.attn
        side_by_side(self.self_qkv, attn.query, attn.key, attn.value)
        crosses = [block.cross_attn] if block.secondary_attn is None else [block.cross_attn, block.secondary_attn]
        side_by_side(self.cross_q, *(cross.query for cross in crosses))
        for weight, bias, cross in zip(*self.cross_out, crosses):
            side_by_side((weight, bias), cross.out)
        if block.gate is not None:
            weights, biases = self.cross_out
            hidden = block.gate[0]
            of_y, *of_outs = hidden.weight.split(d, dim=1)
            self.cross_q[0][2 * d :].copy_(of_y)
            self.cross_q[1][2 * d :].copy_(hidden.bias)
            of_branches = torch.stack(of_outs)  # [2, g, d]
            weights[:, d:] = of_branches @ weights[:, :d]
            biases[:, d:] = (of_branches @ biases[:, :d, None])[..., 0]


def side_by_side(place: tuple[Tensor, Tensor], *linears: nn.Linear) -> None:
    """Copy the weights and biases of linear layers that read the same input into one weight and one bias, in place."""
    weight, bias = place
    start = 0
    for linear in linears:
        end = start + len(linear.weight)
        weight[start:end].copy_(linear.weight)
        if linear.bias is not None:
            bias[start:end].copy_(linear.bias)
        start = end


def block_step(
    block: DecoderBlock, weights: StepWeights, memory: Any, states: Tensor, position: Tensor, span: int, x: Tensor
) -> Tensor:
    """What `DecoderBlock.forward` computes, for one new token in each row: x [R, d] -> [R, d].

    states [2, R, h, n_ctx, e]: the self-attention's keys and values, read up to `position` [1], below `span`.
    """
    read = self_attend(linear(norm(x, block.attn_ln), *weights.self_qkv), states, position, span)
    x = linear(read, block.attn.out.weight, block.attn.out.bias, residual=x)
    q = linear(norm(x, block.cross_attn_ln), *weights.cross_q)
    scales = getattr(memory, "scales", None)
    noise = None if memory.noise is None else (*memory.noise, block.noise_scale)
    read = cross_attend(q, memory.key, memory.value, scales, block.n_head, noise)
    if block.gate is None:
        x = linear(read, *weights.cross_out, residual=x)[0]
        y = norm(x, block.mlp_ln)
    else:
        x, y = fuse(x, q[:, 2 * x.shape[1] :], linear(read, *weights.cross_out), block.gate[2], block.mlp_ln)
    first: Any = block.mlp[0]
    last: Any = block.mlp[2]
    return linear(linear(y, first.weight, first.bias, gelu=True), last.weight, last.bias, residual=x)


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """Layer norm of the rows of x [R, d]."""
    rows, d = x.shape
    y = torch.empty_like(x)
    block = triton.next_power_of_2(d)
    kernels.norm[(rows,)](x, layer.weight, layer.bias, y, layer.eps, D=d, BLOCK=block, **overlapping(x.device))
    return y


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gelu: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [R, K] times weight [N, K] transposed -> [R, N]; several apart: [Z, R, K] and [Z, N, K] -> [Z, R, N].

    gelu: the result goes through it; residual, of the result's shape, is added to it.
    """
    *several, rows, k = x.shape
    n = weight.shape[-2]
    y = torch.empty(*several, rows, n, device=x.device, dtype=dtype or x.dtype)
    block_m = min(64, max(MIN_TILE, triton.next_power_of_2(rows)))
    block_k, parts = 128 if k >= 2048 and block_m <= 32 else 64, 4 if n <= 4096 else 2
    stage = (block_m + MIN_TILE) * block_k * parts * x.element_size()  # bytes that are loaded ahead, several times
    grid = (triton.cdiv(n, MIN_TILE), triton.cdiv(rows, block_m), *(several or [1]))
    kernels.linear[grid](
        x, weight, bias, residual, y, rows, n, x.stride(0) if several else 0, x.stride(-2),
        K=k, BIAS=bias is not None, GELU=gelu, RESIDUAL=residual is not None,
        BLOCK_M=block_m, BLOCK_N=MIN_TILE, BLOCK_K=block_k, PARTS=parts,
        num_warps=parts, num_stages=max(1, min(4, shared_memory(x.device) // stage)), **overlapping(x.device),
    )  # fmt: skip
    return y


def self_attend(qkv: Tensor, states: Tensor, position: Tensor, span: int) -> Tensor:
    """Store the new keys and values and attend to all so far: qkv [R, 3d] -> [R, d]."""
    _, rows, n_head, n_ctx, e = states.shape
    y = torch.empty(rows, n_head * e, device=qkv.device, dtype=qkv.dtype)
    kernels.self_attend[(rows, n_head)](
        qkv, states[0], states[1], position, y, e**-0.5, n_head, n_ctx,
        E=e, SPAN=min(span, n_ctx), BLOCK=64, **overlapping(y.device),
    )  # fmt: skip
    return y


def cross_attend(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    scales: Tensor | None,
    n_head: int,
    noise: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention over the audio by all heads of both branches: q [R, H e or more] -> [H / h, R, h e].

    key, value [B, H, T, e]; scales: those of int8, see `Int8Memory`; n_head: h. noise: keys and values [1, h, k, e] of
    the noise embeddings and their scale [h], which the secondary's heads read beside.
    """
    batch, heads, n_position, e = key.shape
    rows = len(q)
    group = rows // batch
    tiles, block = (1, 32) if group == 1 else (triton.cdiv(group, MIN_TILE), 64 if scales is None else 128)
    wanted = SPLITS_FOR * processors(q.device) // (batch * heads * tiles)
    per_split = triton.cdiv(triton.cdiv(n_position, max(1, wanted)), block) * block
    splits = triton.cdiv(n_position, per_split)
    part = torch.empty(batch * heads * splits * group, e, device=q.device)
    level = torch.empty(len(part), device=q.device)
    audio = (q, key, value, scales, part, level, e**-0.5, q.stride(0), heads, n_position)
    how = {"E": e, "INT8": scales is not None, "PER_SPLIT": per_split, "BLOCK": block, **overlapping(q.device)}
    if group == 1:
        kernels.cross_attend[(batch * heads, splits)](*audio, **how)
    else:
        kernels.cross_attend_rows[(batch * heads, splits, tiles)](*audio, group, **how, BLOCK_G=MIN_TILE)
    y = torch.empty(heads // n_head, rows, n_head * e, device=q.device, dtype=q.dtype)
    noise_key, noise_value, noise_scale = noise or (None, None, None)
    n_noise = 0 if noise_key is None else noise_key.shape[2]
    kernels.join[(rows, heads)](
        q, part, level, noise_key, noise_value, noise_scale, y, e**-0.5, q.stride(0), heads, rows, group, n_noise,
        HEADS=n_head, E=e, SPLITS=splits, NOISE=n_noise > 0, BLOCK=triton.next_power_of_2(max(splits, n_noise)),
        num_warps=1, **overlapping(q.device),
    )  # fmt: skip
    return y


def fuse(x: Tensor, hidden: Tensor, outs: Tensor, last: nn.Linear, layer: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """x + a p + (1 - a) s, where a is the gate, and the layer norm of it.

    x [R, d]; hidden [R, g], the gate's hidden layer as far as y makes it; outs [2, R, d + g]: p and s, and their parts
    of the hidden layer; last: the gate's last layer.
    """
    rows, d = x.shape
    g = hidden.shape[1]
    y, normed = torch.empty_like(x), torch.empty_like(x)
    kernels.fuse[(rows,)](
        x, hidden, outs, last.weight, last.bias, layer.weight, layer.bias, y, normed, rows, hidden.stride(0), layer.eps,
        D=d, GATE=g, BLOCK_D=triton.next_power_of_2(d), BLOCK_GATE=triton.next_power_of_2(g),
        **overlapping(x.device),
    )  # fmt: skip
    return y, normed


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the likeliest tokens of each row, and its log probability: logits [R, V] float32 -> [R] and [R]."""
    rows, n_vocab = logits.shape
    token = torch.empty(rows, dtype=torch.long, device=logits.device)
    logprob = torch.empty(rows, device=logits.device)
    kernels.most_likely[(rows,)](logits, token, logprob, logits.stride(0), V=n_vocab, BLOCK=4096, num_warps=16)
    return token, logprob


def quantize_memory(x: Tensor, y: Tensor, scales: Tensor) -> None:
    """Keys or values [B, h, T, e] to int8 `y` and the scales [B, h, e] of their channels, float32."""
    batch, n_head, n_position, e = x.shape
    kernels.quantize[(batch, n_head)](
        x, y, scales, *x.stride()[:3], y.stride(0), *scales.stride()[:2], T=n_position, E=e, BLOCK=128
    )


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor that one program may take, less what sums need."""
    if device.type != "cuda":
        return 1 << 17
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin - (1 << 14)


@cache
def overlapping(device: torch.device) -> dict[str, bool]:
    """A kernel's options for a launch during the end of the one before (programmatic dependent launch, from Hopper)."""
    early = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": early, "launch_pdl": early}
